"""`where=` follows EventBridge's pattern grammar, names the condition that failed, and rejects bad
grammar at registration.
"""

import time
from datetime import UTC, datetime

import pytest

from eventflow.core.errors import UsageError
from eventflow.events.event import Event
from eventflow.routing.filters import compile_filter, condition_of

# The sample event of EventBridge's documentation of its pattern language.
DETAIL = {
    "c-count": 5,
    "d-count": 3,
    "x-limit": 301.8,
    "source-ip": "10.0.0.33",
    "instance-id": "i-000000aaaaaa00000",
    "state": "running",
}
SAMPLE = {
    "resources": ["arn:aws:ec2:us-east-1:123456789012:instance/i-000000aaaaaa00000"],
    "region": "us-east-1",
    "detail": DETAIL,
}


def event(data=None, **attributes):
    return Event(
        **({"id": "1", "source": "/s", "type": "order.created", "data": data} | attributes)
    )


def matches(pattern, data):
    compiled = compile_filter(pattern)
    assert compiled is not None
    return compiled.mismatch(event(data)) is None


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        # Documented examples that match the sample event.
        ({"detail": {"state": ["initializing", "running"]}}, True),
        ({"resources": ["arn:aws:ec2:us-east-1:123456789012:instance/i-000000aaaaaa00000"]}, True),
        ({"region": [{"prefix": "us-"}]}, True),
        ({"detail": {"instance-id": [{"suffix": "00000"}]}}, True),
        ({"detail": {"state": [{"equals-ignore-case": "RUNNING"}]}}, True),
        ({"detail": {"instance-id": [{"wildcard": "i-*aaaaaa*"}]}}, True),
        ({"detail": {"state": [{"anything-but": "initializing"}]}}, True),
        ({"detail": {"x-limit": [{"anything-but": 123}]}}, True),
        ({"detail": {"state": [{"anything-but": ["stopped", "overloaded"]}]}}, True),
        ({"detail": {"x-limit": [{"anything-but": [100, 200, 300]}]}}, True),
        ({"detail": {"state": [{"anything-but": {"prefix": "init"}}]}}, True),
        ({"detail": {"state": [{"anything-but": {"suffix": "ing"}}]}}, False),
        ({"detail": {"state": [{"anything-but": {"suffix": ["zing", "xing"]}}]}}, True),
        ({"detail": {"state": [{"anything-but": {"equals-ignore-case": "Running"}}]}}, False),
        ({"detail": {"state": [{"anything-but": {"wildcard": "run*"}}]}}, False),
        ({"detail": {"c-count": [{"numeric": [">", 0, "<=", 5]}]}}, True),
        ({"detail": {"d-count": [{"numeric": ["<", 10]}]}}, True),
        ({"detail": {"x-limit": [{"numeric": ["=", 3.018e2]}]}}, True),
        ({"detail": {"c-count": [{"exists": True}]}}, True),
        ({"detail": {"c-count": [{"exists": False}]}}, False),
        ({"detail": {"e-count": [{"exists": False}]}}, True),
        ({"detail": {"c-count": [6, {"numeric": ["<", 6]}]}}, True),
        ({"$or": [{"region": ["eu-west-1"]}, {"detail": {"state": ["running"]}}]}, True),
        ({"$or": [{"region": ["eu-west-1"]}, {"detail": {"state": ["stopped"]}}]}, False),
        (
            {
                "region": ["eu-west-1"],
                "$or": [{"region": ["us-east-1"]}, {"detail": {"state": ["running"]}}],
            },
            False,
        ),
        (
            {
                "detail": {
                    "$or": [
                        {"c-count": [{"numeric": [">", 9]}]},
                        {"d-count": [{"numeric": ["<", 9]}]},
                    ]
                }
            },
            True,
        ),
        # And the neighbours of each that do not.
        ({"detail": {"state": ["stopped"]}}, False),
        ({"region": [{"prefix": "eu-"}]}, False),
        ({"detail": {"c-count": [{"prefix": "5"}]}}, False),
        ({"detail": {"c-count": [{"numeric": [">", 5]}]}}, False),
        ({"detail": {"state": [{"numeric": [">", 0]}]}}, False),
        ({"detail": {"state": [{"anything-but": "running"}]}}, False),
        ({"detail": {"gone": [{"anything-but": "running"}]}}, False),
        ({"detail": {"state": {"deeper": ["running"]}}}, False),
        ({"nowhere": {"deeper": [{"exists": False}]}}, True),
    ],
)
def test_documented_patterns(pattern, wanted):
    """The grammar's documented examples give the documented answers."""
    assert matches(pattern, SAMPLE) is wanted


@pytest.mark.parametrize(
    ("pattern", "data", "wanted"),
    [
        # `exists` tests leaves: an array of values is one, an object or an empty array is not.
        ({"c": [{"exists": False}]}, {"c": {"c1": 100}}, True),
        ({"c": [{"exists": True}]}, {"c": {"c1": 100}}, False),
        ({"c": [{"exists": True}]}, {"c": [1]}, True),
        ({"c": [{"exists": True}]}, {"c": []}, False),
        ({"c": [{"exists": True}]}, {"c": None}, True),
        ({"c": [{"exists": False}, "x"]}, {"c": "x"}, True),
        # null and "" are values, and not each other.
        ({"a": [None]}, {"a": None}, True),
        ({"a": [None]}, {"a": ""}, False),
        ({"a": [None]}, {}, False),
        ({"a": [""]}, {"a": ""}, True),
        ({"a": [""]}, {"a": None}, False),
        # Numbers are numbers, booleans are not.
        ({"a": [1]}, {"a": 1.0}, True),
        ({"a": [1]}, {"a": True}, False),
        ({"a": [True]}, {"a": 1}, False),
        ({"a": [True]}, {"a": True}, True),
        ({"a": ["1"]}, {"a": 1}, False),
        ({"a": [{"numeric": [">", 0]}]}, {"a": True}, False),
        ({"a": [{"anything-but": [1]}]}, {"a": True}, True),
        # Arrays match by any element, objects in arrays as wholes.
        ({"a": ["x", "y"]}, {"a": ["z", "y"]}, True),
        ({"a": ["x"]}, {"a": [["x"]]}, True),
        ({"a": [{"numeric": [">", 5]}]}, {"a": [1, 9]}, True),
        (
            {"items": {"sku": ["x"], "qty": [2]}},
            {"items": [{"sku": "x", "qty": 1}, {"sku": "x", "qty": 2}]},
            True,
        ),
        (
            {"items": {"sku": ["x"], "qty": [2]}},
            {"items": [{"sku": "x", "qty": 1}, {"sku": "y", "qty": 2}]},
            False,
        ),
        ({"items": {"sku": [{"exists": False}]}}, {"items": []}, True),
        # A scalar is short for a list of one.
        ({"a": "x"}, {"a": "x"}, True),
        ({"a": 5, "b": None}, {"a": 5, "b": None}, True),
        # prefix and suffix may ignore case.
        ({"a": [{"prefix": {"equals-ignore-case": "EventB"}}]}, {"a": "EVENTBRIDGE"}, True),
        ({"a": [{"suffix": {"equals-ignore-case": "BRIDGE"}}]}, {"a": "Eventbridge"}, True),
        # Globs.
        ({"a": [{"wildcard": "*"}]}, {"a": ""}, True),
        ({"a": [{"wildcard": "a*a"}]}, {"a": "a"}, False),
        ({"a": [{"wildcard": "a*b*c"}]}, {"a": "aXbXbXc"}, True),
        ({"a": [{"wildcard": "a*b*c"}]}, {"a": "acb"}, False),
        ({"a": [{"wildcard": "*.pn?"}]}, {"a": "x.png"}, False),
        ({"a": [{"wildcard": r"a\*b"}]}, {"a": "a*b"}, True),
        ({"a": [{"wildcard": r"a\*b"}]}, {"a": "axb"}, False),
        ({"a": [{"wildcard": r"a\\*"}]}, {"a": "a\\b"}, True),
        # A field may be called like an operator.
        ({"file": {"prefix": ["x"]}}, {"file": {"prefix": "x"}}, True),
        # Data that is no object has no fields.
        ({"a": ["x"]}, None, False),
        ({"a": ["x"]}, "x", False),
        ({"a": ["x"]}, [{"a": "x"}], True),
    ],
)
def test_the_grammar_at_its_edges(pattern, data, wanted):
    """Leaves, null, numbers, arrays, globs and short forms behave as the grammar documents."""
    assert matches(pattern, data) is wanted


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ({"@type": ["order.created"]}, True),
        ({"@type": [{"prefix": "order."}], "@source": "/shop"}, True),
        ({"@type": [{"prefix": "invoice."}]}, False),
        ({"@subject": [{"suffix": "/7"}]}, True),
        ({"@id": ["e1"]}, True),
        ({"@time": [{"prefix": "2026-01-02T03:04:05Z"}]}, True),
        ({"@region": ["eu"]}, True),
        ({"@shard": [{"numeric": [">=", 3]}]}, True),
        ({"@missing": [{"exists": False}]}, True),
        ({"@dataschema": [{"exists": True}]}, False),
        (
            {
                "$or": [
                    {"@type": ["x"]},
                    {"@type": ["order.created"], "total": [{"numeric": [">", 5]}]},
                ]
            },
            True,
        ),
        (
            {
                "$or": [
                    {"@type": ["x"]},
                    {"@type": ["order.created"], "total": [{"numeric": ["<", 5]}]},
                ]
            },
            False,
        ),
        ({"meta": {"@type": ["Order"]}}, True),
    ],
)
def test_attributes_have_an_at_sign(pattern, wanted):
    """`@type`, `@subject`, `@source`, `@id`, `@time` and extensions are conditions like fields; in
    nested objects `@` is data.
    """
    found = event(
        {"total": 9, "meta": {"@type": "Order"}},
        id="e1",
        source="/shop",
        subject="orders/7",
        time=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        extensions={"region": "eu", "shard": 3},
    )
    compiled = compile_filter(pattern)
    assert compiled is not None
    assert (compiled.mismatch(found) is None) is wanted


@pytest.mark.parametrize(
    ("pattern", "data", "reason"),
    [
        ({"total": [{"numeric": [">", 0]}]}, {"total": -3}, "total.numeric[> 0] (found -3)"),
        (
            {"total": [{"numeric": [">", 0, "<=", 5]}]},
            {"total": 6},
            "total.numeric[> 0 <= 5] (found 6)",
        ),
        ({"total": [{"numeric": [">", 0]}]}, {}, "total.numeric[> 0] (absent)"),
        (
            {"a.b": [5]},
            {"a": {"b": 5}},
            'a.b = 5 (absent; a field of an object is written {"a": {"b": ...}})',
        ),
        ({"a": {"b": ["x"]}}, {"a": {"b": "y"}}, 'a.b = "x" (found "y")'),
        ({"a": ["x", "y"]}, {"a": 1}, 'a in ["x", "y"] (found 1)'),
        ({"a": [{"prefix": "x"}]}, {"a": "y" * 200}, f'a.prefix["x"] (found "{"y" * 76}...)'),
        ({"a": ["x"], "b": ["y"]}, {"a": "x", "b": "z"}, 'b = "y" (found "z")'),
        (
            {"$or": [{"a": ["x"]}, {"b": ["y"]}]},
            {"a": 1},
            '$or: none of [a = "x" (found 1); b = "y" (absent)]',
        ),
        ({"i": {"s": ["x"]}}, {"i": [{"s": "y"}, {"s": "z"}]}, 'i.s = "x" (found "y")'),
        ({"@type": ["x"]}, {}, '@type = "x" (found "order.created")'),
    ],
)
def test_p3_a_filter_names_the_condition_that_failed(pattern, data, reason):
    """The first condition that does not hold is named with its path, operator and the value
    found.
    """
    compiled = compile_filter(pattern)
    assert compiled is not None
    assert compiled.mismatch(event(data)) == reason


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ({}, None),
        ({"a": []}, "a expected a value or a list with at least one"),
        ({"a": {}}, "a is empty"),
        (
            {"a": [{}]},
            "a expected an object with one of prefix, suffix, anything-but, exists, numeric",
        ),
        ({"a": [{"regex": ".*"}]}, 'one of .*wildcard; found {"regex"'),
        ({"a": [{"prefix": "x", "suffix": "y"}]}, "a expected an object with one of"),
        ({"a": [{"prefix": 5}]}, "a.prefix expected a string, found 5"),
        ({"a": [{"exists": "yes"}]}, 'a expected {"exists": true}'),
        ({"a": [{"numeric": [">"]}]}, "a.numeric expected"),
        ({"a": [{"numeric": ["!=", 5]}]}, "a.numeric expected"),
        ({"a": [{"numeric": [">", "5"]}]}, "a.numeric expected"),
        ({"a": [{"numeric": [">", True]}]}, "a.numeric expected"),
        ({"a": [{"numeric": 5}]}, "a.numeric expected"),
        ({"a": [{"anything-but": []}]}, "a.anything-but expected at least one"),
        (
            {"a": [{"anything-but": {"numeric": [">", 5]}}]},
            "a.anything-but expected values, prefix",
        ),
        ({"a": [{"wildcard": "a**b"}]}, "expected single stars"),
        ({"a": [{"wildcard": "a\\b"}]}, "a backslash stands before"),
        ({"a": [["x"]]}, "a expected a string, number"),
        ({"a": {"b": [{"nope": 1}]}}, "a.b expected an object"),
        ({"@type": {"prefix": "x"}}, '@type expected a list; write \\[{"prefix": "x"}\\]'),
        ({"a": {"prefix": "x"}}, 'a expected a list; write \\[{"prefix": "x"}\\]'),
        ({"a": {"numeric": [">", 0]}}, "a expected a list; write"),
        ({"a": {"exists": True}}, "a expected a list; write"),
        ({"a": {"anything-but": ["x"]}}, "a expected a list; write"),
        ({"$or": [{"a": ["x"]}]}, "\\$or expected a list of two or more"),
        ({"$or": [{"a": ["x"]}, "b"]}, "\\$or expected a list of patterns"),
        ({"a": {"$or": {"b": ["x"]}}}, "a.\\$or expected a list of two or more"),
        ("total > 0", "expected a pattern or a callable"),
    ],
)
def test_s13_bad_grammar_is_rejected_at_registration(pattern, message):
    """A malformed pattern raises UsageError with the path and what is allowed; an empty one matches
    everything.
    """
    if message is None:
        assert matches(pattern, {})
    else:
        with pytest.raises(UsageError, match=message):
            compile_filter(pattern)


def test_s14_a_glob_is_linear():
    """The worst glob over the worst text takes time in proportion to both, not to their product of
    powers.
    """
    compiled = compile_filter({"a": [{"wildcard": "a*" * 50 + "b"}]})
    assert compiled is not None
    started = time.perf_counter()
    assert compiled.mismatch(event({"a": "a" * 100_000})) is not None
    assert time.perf_counter() - started < 1


def large(event: Event) -> bool:
    return event.data["total"] > 100


def test_a_callable_decides():
    """A callable gets the event; its name is in the verdict, and what it raises reaches the
    caller.
    """
    compiled = compile_filter(large)
    assert compiled is not None
    assert compiled.mismatch(event({"total": 101})) is None
    assert compiled.mismatch(event({"total": 1})) == "large returned False"
    with pytest.raises(KeyError):
        compiled.mismatch(event({}))


class Later:
    async def __call__(self, event: Event) -> bool:
        return True


async def later(event: Event) -> bool:
    return True


@pytest.mark.parametrize("where", [later, Later()])
def test_an_async_callable_is_rejected(where):
    """`where=` is plain and quick: an async one raises at registration."""
    with pytest.raises(UsageError, match="expected a plain function"):
        compile_filter(where)


def test_a_returned_coroutine_is_not_true():
    """A lambda that returns a coroutine raises instead of matching everything."""
    compiled = compile_filter(lambda found: later(event(found.data)))  # pyright: ignore[reportArgumentType]
    assert compiled is not None
    with pytest.raises(TypeError, match="returned coroutine"):
        compiled.mismatch(event({}))


def test_no_filter_is_none():
    """Without `where=` there is no filter."""
    assert compile_filter(None) is None


@pytest.mark.parametrize(
    ("data", "reason"),
    [({"total": 3}, "total.numeric[> 5] (found 3)"), ({}, "total.numeric[> 5] (absent)")],
)
def test_a_reason_starts_with_its_condition(data: dict[str, int], reason: str):
    """The condition can be extracted from a reason, whatever value was found."""
    compiled = compile_filter({"total": [{"numeric": [">", 5]}]})
    assert compiled is not None
    assert compiled.mismatch(Event(id="1", source="/s", type="t", data=data)) == reason
    assert condition_of(reason) == "total.numeric[> 5]"
    dotted = compile_filter({"a.b": [5]})
    assert dotted is not None
    why = dotted.mismatch(Event(id="1", source="/s", type="t", data=data))
    assert why is not None and condition_of(why) == "a.b = 5"
