"""Results, errors and fingerprints: the journal returns what the task returned, or an error says
why not.
"""

import dataclasses
import datetime as dt
import enum
import itertools
import math
import threading
import typing
from decimal import Decimal
from numbers import Real
from typing import Any

import msgspec
import orjson
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventflow.core.errors import (
    NotStorable,
    ResultTooLarge,
    StoreCorrupt,
    UsageError,
)
from eventflow.serialization import codecs
from eventflow.serialization.codecs import (
    ResultCodec,
    digest,
    fingerprint,
    fingerprint_diff,
    to_readable,
)
from eventflow.serialization.tagged_json import deep_equal


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Metrics:
    loss: float
    steps: int = 0
    extra: Any = None


@dataclasses.dataclass(eq=False)
class Unequal:
    x: int


class Line(msgspec.Struct):
    sku: str
    price: Decimal


class Order(msgspec.Struct):
    id: int
    lines: list[Line] = []
    at: dt.datetime | None = None


class Special(Order):
    pass


class Customer(pydantic.BaseModel):
    name: str
    born: dt.date
    score: float = 1.0


class Basket(pydantic.BaseModel, extra="allow"):
    items: dict[str, Customer | int] = {}
    more: "list[Basket | int]" = []


class Holder(msgspec.Struct):
    baskets: list[Basket]


class Unsettled(pydantic.BaseModel):
    """Has state that is not in its JSON."""

    x: int = 1
    _seen: list[int] = pydantic.PrivateAttr(default_factory=lambda: [next(NUMBERS)])


NUMBERS = itertools.count()
MORE: typing.Any = {"seen": True}


class Row(typing.TypedDict):
    a: int


NOW = dt.datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=dt.UTC)


def round_trip(value, annotation=None, codec=None):
    made = ResultCodec(annotation, "job", codec)
    codec_name, data = made.encode(value)
    return codec_name, made.decode(codec_name, data)


@pytest.mark.parametrize(
    ("value", "annotation", "codec"),
    [
        (None, None, "json"),
        ({"a": [1, "x", None]}, dict, "json"),
        (3, int, "json"),
        (b"\x00\xff", bytes, "bytes"),
        (b"raw", None, "bytes"),
        (math.nan, float, "tagged"),
        ({"loss": math.inf}, dict[str, float], "tagged"),
        ((1, 2), None, "tagged"),
        (2**100, int, "tagged"),
        ({1: "one"}, dict[int, str], "tagged"),
        ((1, "a"), tuple[int, str], "typed"),
        ({1, 2}, set[int], "typed"),
        (NOW, dt.datetime, "typed"),
        (Decimal("1.10"), Decimal, "typed"),
        (Colour.RED, Colour, "typed"),
        ({"a": 1}, Row, "typed"),
        (Order(1, [Line("x", Decimal("9.99"))], NOW), Order, "typed"),
        ([Order(1), Order(2)], list[Order], "typed"),
        (None, Order | None, "json"),
        (Metrics(0.5), Metrics, "typed"),
        (Metrics(math.nan), Metrics, "typed-tagged"),
        (Metrics(0.5, extra=NOW), Metrics, "typed-tagged"),
        (Unequal(1), Unequal, "typed"),
        (Customer(name="A", born=dt.date(2000, 1, 1), score=2.0), Customer, "typed"),
        (Customer(name="A", born=dt.date(2000, 1, 1)), Customer, "typed-unset"),
        ([Customer(name="A", born=dt.date(2000, 1, 1))], list[Customer], "typed-unset"),
        (Basket(items={"a": Customer(name="A", born=dt.date(2000, 1, 1))}), Basket, "typed-unset"),
        (Holder([Basket(), Basket(items={}, more=[1])]), Holder, "typed-unset"),
        (Basket(items={"a": 1}, more=[Basket()], **MORE), Basket, "typed-unset"),
        (Unsettled(), Unsettled, "typed-models"),
        (Customer(name="A", born=dt.date(2000, 1, 1), score=math.nan), Customer, "typed-models"),
        (Metrics(1.0), Metrics | Unequal, "typed:Metrics"),
        (Unequal(2), Metrics | Unequal, "typed:Unequal"),
        # The annotation does not hold: the value counts.
        ({"loss": 1.0}, Metrics, "json"),
        ([1, 2], tuple[int, int], "json"),
        (NOW, list[int], "tagged"),
        ("text", int, "json"),
        ({"a": "not an int"}, Row, "json"),
    ],
)
def test_p4_a_result_comes_back_as_it_was_given(value, annotation, codec):
    """Each value under each annotation decodes to an equal one of the same type, whether or not the
    annotation holds.
    """
    codec_name, decoded = round_trip(value, annotation)
    assert codec_name == codec
    assert deep_equal(decoded, value)


@pytest.mark.parametrize(
    ("value", "annotation", "message"),
    [
        (
            {"a": [1, 2, 3, {1, threading.Lock()}]},
            None,
            r"job: result\['a'\]\[3\]\{\} is a _thread.lock",
        ),
        (Order(1), None, "result is a .*Order, which has no lossless JSON form"),
        (Metrics(1.0, extra=threading.Lock()), Metrics, r"result\.extra is a _thread.lock"),
        (Special(1), Order, "result is a .*Special"),
        (Customer(name="A", born=dt.date(2000, 1, 1)), None, "result is a .*Customer"),
        (Customer(name="\ud800", born=dt.date(2000, 1, 1)), Customer, "result is a .*Customer"),
        (range(3), None, "result is a range"),
        ("\ud800", str, "lone surrogate"),
    ],
)
def test_what_cannot_come_back_equal_is_refused(value, annotation, message):
    """A value with no lossless form raises NotStorable with path and type; never its repr, never a
    pickle (fault 37).
    """
    with pytest.raises(NotStorable, match=message):
        ResultCodec(annotation, "job").encode(value)


@Real.register
class Float32:
    """What a numpy scalar looks like from outside."""

    def __float__(self) -> float:
        return 0.25

    def __eq__(self, other: object) -> bool:
        return other == 0.25

    __hash__ = None  # type: ignore[assignment]


def test_a_numeric_scalar_under_float_is_that_number():
    """A number of another library is stored as the `float` its annotation says, and refused without
    one.
    """
    assert round_trip(Float32(), float) == ("json", 0.25)
    with pytest.raises(NotStorable):
        round_trip(Float32())


def test_json_above_the_limit_is_refused(monkeypatch):
    """JSON over MAX_JSON is a NotStorable that names its size; bytes have no such limit
    (fault 36).
    """
    monkeypatch.setattr(codecs, "MAX_JSON", 1000)
    with pytest.raises(ResultTooLarge, match="expected at most"):
        ResultCodec(None, "job").encode(["x" * 1000])
    assert ResultCodec(None, "job").encode(b"x" * 2000)[0] == "bytes"


class Local:
    def __init__(self, x):
        self.x = x


def test_pickle_needs_the_codec_the_key_and_a_flow():
    """A pickle is made only with codec="pickle", read only with allow_pickle, and only under the
    key that signed it (S12).
    """
    codec = ResultCodec(None, "job", "pickle")
    codec_name, data = codec.encode(Local(1), key=b"k")
    assert codec_name == "pickle"
    assert codec.decode(codec_name, data, allow_pickle=True, key=b"k").x == 1
    with pytest.raises(UsageError, match="only read where flows run"):
        codec.decode(codec_name, data)
    with pytest.raises(StoreCorrupt, match="signature"):
        codec.decode(codec_name, data, allow_pickle=True, key=b"other")
    with pytest.raises(StoreCorrupt, match="signature"):
        codec.decode(codec_name, data[:-1] + b"!", allow_pickle=True, key=b"k")
    assert to_readable(codec_name, data) == f"<pickle, {len(data)} bytes>"
    with pytest.raises(UsageError, match="codec="):
        ResultCodec(None, "job", "yaml")


def test_a_changed_annotation_raises_usage_error():
    """A recorded result that the new annotation cannot read raises UsageError that names
    the task.
    """
    codec_name, data = ResultCodec(Metrics, "job").encode(Metrics(0.5))
    with pytest.raises(UsageError, match="job: a recorded result does not fit"):
        ResultCodec(Order, "job").decode(codec_name, data)
    with pytest.raises(UsageError, match="job: a result was recorded as 'typed'"):
        ResultCodec(None, "job").decode(codec_name, data)


def test_an_annotation_may_be_resolved_late_or_never():
    """An annotation that nobody can read counts as none."""
    for annotation in ("Missing", threading.Thread, typing.TypeVar("T")):
        assert round_trip({"a": (1, 2)}, annotation)[1] == {"a": (1, 2)}


@pytest.mark.parametrize(
    ("value", "annotation", "readable"),
    [
        ({"a": 1}, None, {"a": 1}),
        ((1, {2}), None, [1, [2]]),
        (Metrics(1.0, 2), Metrics, {"loss": 1.0, "steps": 2, "extra": None}),
        (
            Metrics(1.0, extra=NOW),
            Metrics,
            {"loss": 1.0, "steps": 0, "extra": "2026-01-02T03:04:05.678901Z"},
        ),
        (b"abc", None, "<bytes, 3 bytes>"),
    ],
)
def test_a_result_is_readable_as_json(value, annotation, readable):
    """Any stored result is readable as JSON without the class that made it."""
    assert (
        orjson.loads(orjson.dumps(to_readable(*ResultCodec(annotation, "job").encode(value))))
        == readable
    )


# --------------------------------------------------------------------------- fingerprints


def test_a_call_has_one_fingerprint_however_it_is_written():
    """f(1), f(x=1), another order of keywords and an applied default are the same call."""
    names, defaults = ("x", "y"), {"y": 2, "z": {"b": 1, "a": 2}}
    prints = {
        fingerprint(names, (1,), {}, defaults),
        fingerprint(names, (), {"x": 1}, defaults),
        fingerprint(names, (1, 2), {}, defaults),
        fingerprint(names, (), {"z": {"a": 2, "b": 1}, "y": 2, "x": 1}, defaults),
    }
    assert prints == {b'{"x":1,"y":2,"z":{"a":2,"b":1}}'}
    assert fingerprint(names, (1, 2, 3), {}, {}) == b'{"*":[3],"x":1,"y":2}'
    assert fingerprint((), (), {}, {}) == b"{}"


@pytest.mark.parametrize(
    "value",
    [
        NOW,
        Decimal("1.1"),
        b"abc",
        Colour.RED,
        Order(1, [Line("x", Decimal(1))], NOW),
        Metrics(1.0),
        {1, 2},
        {3: "x"},
        2**80,
        Customer(name="A", born=dt.date(2000, 1, 1)),
        (1, 2),
        {"deep": [Order(1)]},
    ],
    ids=repr,
)
def test_codec_values_are_compared_by_their_json(value):
    """Values of the known types are part of the fingerprint, and another value is another
    fingerprint.
    """
    made = fingerprint(("x",), (value,), {}, {})
    assert made is not None
    assert made == fingerprint(("x",), (value,), {}, {})
    assert fingerprint_diff(made, fingerprint(("x",), ("other",), {}, {})).startswith("x: ")


def test_what_has_no_json_is_never_compared():
    """An argument without a JSON form is "?", equal to anything; with none but such there is no
    fingerprint.
    """
    one = fingerprint(("model", "n"), (threading.Lock(), 1), {}, {})
    two = fingerprint(("model", "n"), (threading.Lock(), 2), {}, {})
    assert one == b'{"model":"?","n":1}'
    assert fingerprint_diff(one, two) == "n: 1 -> 2"
    assert fingerprint_diff(one, fingerprint(("model", "n"), ("text", 1), {}, {})) == ""
    assert fingerprint(("model",), (threading.Lock(),), {}, {}) is None
    assert fingerprint_diff(None, one) == fingerprint_diff(one, None) == ""


def test_a_long_argument_is_its_hash():
    """Over 1 KiB the long fields are hashed, the small ones stay to be read, and a change is still
    found.
    """
    long = fingerprint(("text", "n"), ("x" * 5000, 1), {}, {})
    assert long is not None
    assert len(long) < 120
    assert b'"n":1' in long
    assert "text" in fingerprint_diff(long, fingerprint(("text", "n"), ("x" * 5001, 1), {}, {}))
    assert len(fingerprint(("data",), (b"x" * 10_000_000,), {}, {}) or b"") < 120


def test_a_field_is_the_same_literal_or_hashed():
    """A field that is hashed only because another one grew has not changed."""
    field = {"b": "y" * 200, "a": 1}
    short = fingerprint(("a", "b"), (field, "x"), {}, {})
    grown = fingerprint(("a", "b"), (field, "x" * 2000), {}, {})
    assert fingerprint_diff(short, grown).startswith("b: ")


def test_big_integers_are_different():
    """Integers that are equal as floats are different arguments, and the diff shows both."""
    old, new = fingerprint(("n",), (2**80,), {}, {}), fingerprint(("n",), (2**80 + 1,), {}, {})
    assert fingerprint_diff(old, new).startswith("n: ")


def test_a_diff_lists_added_and_removed_fields():
    """The diff lists changed, added and removed fields with both values, shortened."""
    old = fingerprint(("a", "b"), (1, "y" * 300), {}, {})
    new = fingerprint(("a", "c"), (2, 3), {}, {})
    diff = fingerprint_diff(old, new)
    assert diff.startswith("a: 1 -> 2, b: ")
    assert diff.endswith("c: absent -> 3")
    assert len(diff) < 150


@given(st.lists(st.binary(max_size=4), max_size=4), st.lists(st.binary(max_size=4), max_size=4))
def test_a_digest_depends_on_the_ends_of_its_parts(left, right):
    """Different parts have different digests, also when their concatenation is the same."""
    assert (digest(*left) == digest(*right)) == (left == right)


def test_unset_fields_as_an_earlier_version_stored_them_are_read():
    """A model with unset fields, recorded in the form that earlier versions wrote, comes back with
    the same fields unset.
    """
    data = (
        b'{"value":{"name":"A","born":{"$date":"2000-01-01"},"score":1.0},'
        b'"models":[[["born","name"],null]]}'
    )
    found = ResultCodec(Customer, "job").decode("typed-models", data)
    assert deep_equal(found, Customer(name="A", born=dt.date(2000, 1, 1)))


def test_a_result_with_unset_fields_shows_all_of_them():
    """The readable form has the defaults too, and later defaults in the code do not change it."""
    codec, data = ResultCodec(Customer, "job").encode(Customer(name="A", born=dt.date(2000, 1, 1)))
    assert to_readable(codec, data) == {"name": "A", "born": "2000-01-01", "score": 1.0}

    class Later(pydantic.BaseModel):
        name: str
        born: dt.date
        score: float = 2.0

    found = ResultCodec(Later, "job").decode(codec, data)
    assert found.score == 1.0 and found.model_fields_set == {"name", "born"}
