"""Every event has a verdict per subscription, and every delivery is counted once."""

import inspect
import re
from typing import Any

import msgspec
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventflow.core.clock import SystemClock
from eventflow.core.errors import BindingError, NotStorable, UsageError
from eventflow.events.event import Event, Undecodable
from eventflow.routing.plans import content_digest, identity
from eventflow.routing.router import MAX_PLANS, Router
from eventflow.routing.subscriptions import EMITTED, subscribe
from eventflow.runs.run import Ids, State
from eventflow.sdk.flow import flow


class Order(msgspec.Struct):
    id: int
    total: float = 0.0


@flow(priority=3)
async def handle(order: Order) -> None: ...


@flow
async def audit(event: Event) -> None: ...


@flow
async def count(n: int, label: str = "x") -> None: ...


def event(data: Any = None, **attributes: Any) -> Event:
    return Event(
        **({"id": "e1", "source": "/shop", "type": "order.created", "data": data} | attributes)
    )


def router(*subscriptions: Any) -> Router:
    return Router(subscriptions, Ids(), SystemClock())


def verdicts(arrival: Any) -> list[tuple[str, str]]:
    return [(name, outcome) for name, outcome, _ in orjson.loads(arrival.verdicts)]


def reasons(arrival: Any) -> list[Any]:
    return [reason for _, _, reason in orjson.loads(arrival.verdicts)]


ORDER = {"id": 7, "total": 9.5}


def test_a_match_is_a_run():
    """A matching event starts one run per subscription, due now, with the event's body and the
    flow's priority.
    """
    arrival = router(subscribe("orders", handle), subscribe("orders", audit)).route(
        "orders", event(ORDER)
    )
    first, second = arrival.runs
    assert (first.flow, first.subscription, first.priority, first.state) == (
        "handle",
        "orders/handle",
        3,
        State.PENDING,
    )
    assert (second.flow, second.priority) == ("audit", 0)
    assert first.event == arrival.id
    assert first.due_at == first.created_at == arrival.received_at
    assert first.params is None
    assert first.payload is arrival.body
    assert Event.from_json(arrival.body) == event(ORDER)
    assert orjson.loads(arrival.verdicts) == [
        ["orders/handle", "run", first.id],
        ["orders/audit", "run", second.id],
    ]
    assert arrival.counts == {"pending": 2}
    assert len({arrival.id, first.id, second.id}) == 3


def test_a_run_has_the_arguments_that_its_recorded_event_gives():
    """`given` is what the flow gets of the recorded event; None where that is yet to be bound."""
    made = router(
        subscribe("orders", handle),
        subscribe("orders", audit),
        subscribe("orders", count, params=lambda found: {"n": found.data["id"]}),
    )
    assert [run.given for run in made.route("orders", event(ORDER)).runs] == [
        {"order": Order(7, 9.5)},
        None,
        {"n": 7},
    ]


def test_types_from_outside_do_not_fill_the_memory():
    """Any number of event types leaves a bounded number of plans, and each event is matched."""
    made = router(subscribe("orders", audit, types=["order.*"]))
    for number in range(MAX_PLANS + 10):
        assert made.route("orders", event(type=f"order.{number}")).counts == {"pending": 1}
    assert len(made.plans) <= MAX_PLANS
    assert made.route("orders", event(type="other")).counts == {"suppressed": 1}


def test_p3_each_subscription_has_its_verdict():
    """Run, filtered and invalid are listed in order, each with its reason; only the trigger's
    subscriptions have one.
    """
    arrival = router(
        subscribe("orders", audit),
        subscribe("orders", handle, where={"total": [{"numeric": [">", 10]}]}),
        subscribe("orders", count),
        subscribe("orders", audit, where=lambda found: found.data["nope"], name="broken"),
        subscribe("other", audit),
    ).route("orders", event(ORDER))
    assert verdicts(arrival) == [
        ("orders/audit", "run"),
        ("orders/handle", "filtered"),
        ("orders/count", "invalid"),
        ("broken", "invalid"),
    ]
    assert reasons(arrival)[1:3] == [
        "total.numeric[> 10] (found 9.5)",
        "flow 'count' cannot bind parameter 'n': missing; the data has id, total",
    ]
    assert re.fullmatch(
        r"KeyError: 'nope' \(in .*<lambda>, .*test_router.py:\d+\)", reasons(arrival)[3]
    )
    assert arrival.counts == {"pending": 1, "suppressed": 1, "dead": 2}
    assert arrival.dead_letters == [
        ("orders/count", reasons(arrival)[2]),
        ("broken", reasons(arrival)[3]),
    ]


def test_p9_an_event_without_subscription_is_one_suppressed_delivery():
    """An event without a subscription is recorded with no verdict and counted as suppressed."""
    arrival = router().route("orders", event(ORDER))
    assert (arrival.verdicts, arrival.counts, list(arrival.runs)) == (b"[]", {"suppressed": 1}, [])


def test_p9_undecodable_bytes_are_one_dead_letter():
    """Bytes that are no event are recorded unchanged, with the reason and the headers."""
    item = Undecodable(
        id="x", source="/shop", body=b"\xff\x00", error="not JSON", headers={"content-type": "a/b"}
    )
    arrival = router(subscribe("orders", audit)).route("orders", item)
    assert (arrival.body, arrival.counts, arrival.dead_letters) == (
        b"\xff\x00",
        {"dead": 1},
        (("", "not JSON"),),
    )
    assert orjson.loads(arrival.verdicts) == [["", "dead", "not JSON"]]
    assert orjson.loads(arrival.headers or b"") == {"content-type": "a/b"}
    assert not arrival.runs


def test_data_that_is_no_json_is_a_dead_letter():
    """An event whose data has no JSON form is not lost: its attributes are recorded with the
    reason, and its data as Python shows it.
    """
    arrival = router(subscribe("orders", audit)).route("orders", event({"x": object()}))
    assert arrival.counts == {"dead": 1}
    assert "not JSON serializable: object" in arrival.dead_letters[0][1]
    assert arrival.event_id == "e1" and arrival.body.startswith(b"{'x': <object object at")


def test_the_items_of_a_call_arrive_together():
    """The items of one call have one time of arrival, and ids in their order, which no run shares;
    an item that is no event, or cannot be recorded, does not affect the others.
    """
    items = [
        event(ORDER, id="1"),
        Undecodable(id="2", source="/shop", body=b"{", error="unexpected end"),
        event({"x": object()}, id="3"),
        event(ORDER, id=4),
        event(ORDER, id="5"),
    ]
    arrivals = router(subscribe("orders", handle), subscribe("orders", audit)).route_all(
        "orders", items
    )
    ids = [ident for each in arrivals for ident in (each.id, *(run.id for run in each.runs))]
    assert ids == sorted(set(ids)) and len(ids) == 5 + 2 * 2
    assert len({each.received_at for each in arrivals}) == 1
    assert [each.counts for each in arrivals] == [
        {"pending": 2},
        *[{"dead": 1}] * 3,
        {"pending": 2},
    ]
    assert "id and source: expected a str each" in arrivals[3].dead_letters[0][1]


def test_runs_of_a_paused_trigger_are_paused():
    """While a trigger is paused its runs are recorded in PAUSED, count as pending, and filters
    still apply.
    """
    (arrival,) = router(
        subscribe("orders", audit), subscribe("orders", handle, where={"total": [0]})
    ).route_all("orders", [event(ORDER)], True)
    assert verdicts(arrival) == [("orders/audit", "paused"), ("orders/handle", "filtered")]
    assert [run.state for run in arrival.runs] == [State.PAUSED]
    assert arrival.counts == {"pending": 1, "suppressed": 1}


@given(st.text(), st.text(), st.text(), st.text(), st.text(), st.text())
def test_p2_identity_is_trigger_source_and_id(a, b, c, d, e, f):
    """Two events have the same key if, and only if, trigger, source and id are the same."""
    clean = [text.encode(errors="replace").decode() for text in (a, b, c, d, e, f)]
    left, right = clean[:3], clean[3:]
    assert (identity(*left) == identity(*right)) == (left == right)
    assert identity(*left) == identity(*left)


def test_p2_the_content_digest_distinguishes_duplicate_and_conflict():
    """Another time stamp, or another order of keys, is the same content; another type or other data
    is not.
    """
    base = event(ORDER)
    stamped = msgspec.structs.replace(base, time=None, subject="s")
    assert content_digest(base) == content_digest(stamped)
    one, other = event({"a": {"b": 1, "c": 2}, "d": 3}), event({"d": 3, "a": {"c": 2, "b": 1}})
    assert content_digest(one) == content_digest(other)
    assert (
        len(
            {
                content_digest(one)
                for one in (base, event({"id": 8}), event(ORDER, type="x"), event(b"raw"))
            }
        )
        == 4
    )
    arrival = router().route("orders", base)
    assert (arrival.key, arrival.digest) == (
        identity("orders", "/shop", "e1"),
        content_digest(base),
    )
    assert (len(arrival.key), len(arrival.digest)) == (16, 8)


@pytest.mark.parametrize(
    ("key", "ordering_key"),
    [
        (None, None),
        ("id", "7"),
        ("customer.name", "Ada"),
        ("customer", '{"name":"Ada"}'),
        ("customer.missing.deeper", None),
        ("@subject", "s/1"),
        ("@shard", "3"),
        ("@missing", None),
        ("record", "pk"),
        (lambda found: f"k{found.data['id']}", "k7"),
    ],
)
def test_key_computes_the_ordering_key(key, ordering_key):
    """`key=` takes the ordering key from a path into the data, an attribute, the record's key or a
    callable; without a value, there is none.
    """
    found = event(
        ORDER | {"customer": {"name": "Ada"}},
        subject="s/1",
        extensions={"partitionkey": "pk", "shard": 3},
    )
    (run,) = router(subscribe("orders", audit, key=key)).route("orders", found).runs
    assert run.ordering_key == ordering_key


def test_record_falls_back_to_the_subject():
    """`key="record"` is the subject where the source has no partition key."""
    (run,) = (
        router(subscribe("orders", audit, key="record")).route("orders", event(subject="s")).runs
    )
    assert run.ordering_key == "s"


def test_a_key_that_fails_is_invalid():
    """A key callable that raises, or returns something else than text, makes a dead letter and no
    unordered run.
    """
    arrival = router(
        subscribe("orders", audit, key=lambda found: found.data["x"]),
        subscribe("orders", audit, key=lambda found: 5, name="five"),  # pyright: ignore[reportArgumentType]
    ).route("orders", event({}))
    assert verdicts(arrival) == [("orders/audit", "invalid"), ("five", "invalid")]
    raised, returned = reasons(arrival)
    assert raised.startswith("KeyError: 'x' (in test_a_key_that_fails_is_invalid.")
    assert returned == "TypeError: key= returned int, expected a str or None"


def test_params_override_the_binding():
    """`params=` makes the arguments; they are stored with the run, and checked against the
    signature on arrival.
    """
    (run,) = (
        router(subscribe("o", count, params=lambda found: {"n": found.data["id"]}))
        .route("o", event(ORDER))
        .runs
    )
    assert run.params == b'{"n":7}'
    arrival = router(
        subscribe("o", count, params=lambda found: {"n": "seven"}, name="type"),
        subscribe("o", count, params=lambda found: {"n": 1, "m": 2}, name="unknown"),
        subscribe("o", count, params=lambda found: {}, name="missing"),
        subscribe("o", count, params=lambda found: {"n": 1, "label": object()}, name="json"),
    ).route("o", event(ORDER))
    assert {outcome for _, outcome in verdicts(arrival)} == {"invalid"}
    assert len(arrival.dead_letters) == arrival.counts["dead"] == 4
    assert "Expected `int`, got `str`" in reasons(arrival)[0]


def test_types_select_the_accepted_event_types():
    """An event of another type is no delivery to a subscription with `types`, and has no verdict
    from it.
    """
    made = router(
        subscribe(EMITTED, audit, types=("order.created",)),
        subscribe(EMITTED, audit, types=("order.*",), name="glob"),
        subscribe(EMITTED, audit, types=("invoice.paid",), name="other"),
    )
    assert verdicts(made.route_emitted(event(ORDER))) == [("events/audit", "run"), ("glob", "run")]
    assert made.route_emitted(event(ORDER, type="nobody")).counts == {"suppressed": 1}


def test_an_emitted_event_has_its_depth():
    """Runs of emitted events carry the depth; beyond 20 hops the event is a dead letter with that
    reason.
    """
    made = router(subscribe(EMITTED, audit))
    (run,) = made.route_emitted(event(ORDER), 20).runs
    assert run.depth == 20
    (run,) = made.route_emitted(event(ORDER, extensions={"eventflowdepth": 4})).runs
    assert run.depth == 4
    buried = made.route_emitted(event(ORDER), 21)
    assert (list(buried.runs), buried.counts) == ([], {"dead": 1})
    assert "emitted at depth 21" in buried.dead_letters[0][1]


def test_an_outside_event_has_no_depth():
    """A depth sent from outside is ignored."""
    (run,) = (
        router(subscribe("o", audit))
        .route("o", event(ORDER, extensions={"eventflowdepth": "19"}))
        .runs
    )
    assert run.depth == 0


@pytest.mark.parametrize("data", [float("nan"), (1, 2), {"x": object()}, 2**70])
def test_emitted_data_must_be_json(data):
    """Emitting data that JSON cannot represent exactly raises in the flow."""
    with pytest.raises(NotStorable):
        router().route_emitted(event(data))


def test_a_flow_can_be_started_without_a_subscription():
    """One delivery to one flow, with given parameters or from the event; a binding error raises to
    the caller.
    """
    made = router()
    arrival = made.route_to_flow(count, event(), params=b'{"n":5}', trigger="api", ordering_key="l")
    (run,) = arrival.runs
    assert (run.flow, run.params, run.ordering_key, run.event) == (
        "count",
        b'{"n":5}',
        "l",
        arrival.id,
    )
    assert (arrival.trigger, arrival.counts) == ("api", {"pending": 1})
    assert made.route_to_flow(handle, event(ORDER)).runs[0].params is None
    with pytest.raises(BindingError):
        made.route_to_flow(count, event(), params=b'{"n":"x"}')
    with pytest.raises(BindingError):
        made.route_to_flow(handle, event({"id": "x"}))


def test_a_replay_is_for_the_recorded_event():
    """A replayed event keeps its ledger id in its runs, and may be for one flow or subscription
    only, of any trigger.
    """
    made = router(
        subscribe("orders", audit),
        subscribe("orders", handle),
        subscribe("other", count, name="later"),
    )
    arrival = made.route("orders", event(ORDER), ledger_id=42, only="handle")
    assert (arrival.id, [run.event for run in arrival.runs]) == (42, [42])
    assert verdicts(arrival) == [("orders/handle", "run")]
    assert verdicts(made.route("orders", event({"n": 1}), only="later")) == [("later", "run")]


def test_subscription_names_are_unique():
    """A second subscription of the same flow to the same trigger is #2, a third #3."""
    names: list[str] = []
    for _ in range(3):
        names.append(subscribe("orders", audit, used_names=names).name)
    assert names == ["orders/audit", "orders/audit#2", "orders/audit#3"]


def test_priority_is_the_flows_unless_given():
    """A subscription may set the priority of its runs, zero included."""
    assert [subscribe("o", handle, priority=given).priority for given in (None, 0, 9)] == [3, 0, 9]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"on_failure": "stop"}, "on_failure="),
        ({"key": "a..b"}, "key="),
        ({"where": {"a": [{"regex": "x"}]}}, "where: a"),
        ({"types": ("a**",)}, "single stars"),
    ],
)
def test_an_invalid_subscription_is_rejected_at_once(given, message):
    """An invalid option of a subscription raises UsageError when it is made."""
    with pytest.raises(UsageError, match=message):
        subscribe("orders", audit, **given)


@flow
async def unfillable(*orders: Order) -> None: ...


def test_a_signature_is_checked_when_the_app_starts():
    """A flow that no event can fill is found by the Router, not by the first event."""
    with pytest.raises(UsageError, match="unfillable"):
        router(subscribe("orders", unfillable))


FIELDS = st.dictionaries(
    st.sampled_from(["id", "total", "n", "order"]), st.integers() | st.text(max_size=3) | st.none()
)


@given(FIELDS, st.booleans())
def test_p9_the_counts_are_those_of_the_verdicts(data, paused):
    """For any event, each subscription has one verdict, and the counts add up to their number."""
    made = router(
        subscribe("o", handle),
        subscribe("o", count, where={"n": [{"exists": True}]}),
        subscribe("o", audit, where=lambda found: found.data["id"] > 0, key="order"),
    )
    clean = {
        name: value.encode(errors="replace").decode() if isinstance(value, str) else value
        for name, value in data.items()
    }
    (arrival,) = made.route_all("o", [event(clean)], paused)
    if arrival.runs or arrival.verdicts.count(b'["",') == 0:
        assert len(orjson.loads(arrival.verdicts)) == sum(arrival.counts.values()) == 3
    assert len(arrival.runs) == arrival.counts.get("pending", 0)
    assert len(arrival.dead_letters) == arrival.counts.get("dead", 0)


def test_routing_never_waits():
    """Nothing in routing is a coroutine: the way in does not wait for it."""
    assert not any(inspect.iscoroutinefunction(member) for _, member in inspect.getmembers(Router))
