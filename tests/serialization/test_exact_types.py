"""Where `==` is taken for deep equality, the deep comparison says the same."""

import dataclasses
import datetime as dt
import enum
import math
from collections import OrderedDict
from collections.abc import Callable
from decimal import Decimal
from functools import cached_property
from typing import Any, Literal
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eventflow.core.canonical import dump_model
from eventflow.core.errors import NotStorable
from eventflow.serialization.codecs import ResultCodec
from eventflow.serialization.exact_types import exact_check
from eventflow.serialization.tagged_json import reads_back


class Text(str):
    pass


class Number(int):
    pass


class Name(enum.StrEnum):
    RED = "red"


class Level(enum.IntEnum):
    ONE = 1


NAMED_UTC = dt.timezone(dt.timedelta(0), "X")
BERLIN = ZoneInfo("Europe/Berlin")
NEAR: list[Any] = [
        None, True, False, 0, 1, -1, 2**53 + 1, 2**63, 2**70, 0.0, -0.0, 1.0, 0.5, math.nan,
        math.inf,
        "", "red", "1", "AQ==", "2026-01-01", Text("red"), Number(1), Name.RED, Level.ONE,
        b"", b"\x01", Decimal("1"), Decimal("1.0"), Decimal("-0"), Decimal("sNaN"),
        dt.date(2026, 1, 1), dt.timedelta(1), UUID(int=1),
        dt.datetime(2026, 1, 1), dt.datetime(2026, 1, 1, fold=1),  # noqa: DTZ001
        dt.datetime(2026, 1, 1, tzinfo=dt.UTC), dt.datetime(2026, 1, 1, tzinfo=NAMED_UTC),
        dt.datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN, fold=1),
        dt.datetime(2026, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=1))),
        dt.time(1), dt.time(1, fold=1), dt.time(1, tzinfo=dt.UTC),
]  # fmt: skip
"""Pairs of them are `==`, or have one JSON, without being the same."""
LEAVES = st.sampled_from(NEAR)

SIMPLE: list[Any] = [
    int, str, bool, float, bytes, None, Decimal, UUID, Name, Level, Any, int | float, str | None,
    dt.date, dt.datetime, dt.time, dt.timedelta, Literal["red", 1], Decimal | None,
]  # fmt: skip


def struct_of(kinds: list[Any], omit: bool) -> Any:
    fields = [(f"f{n}", kind) for n, kind in enumerate(kinds)]
    return msgspec.defstruct("Made", fields, omit_defaults=omit)


def dataclass_of(kinds: list[Any], omit: bool) -> Any:
    return dataclasses.make_dataclass("Made", [(f"f{n}", kind) for n, kind in enumerate(kinds)])


ANNOTATIONS: st.SearchStrategy[Any] = st.recursive(
    st.sampled_from(SIMPLE),
    lambda inner: st.one_of(
        inner.map(lambda kind: list[kind]),
        inner.map(lambda kind: tuple[kind, ...]),
        inner.map(lambda kind: dict[str, kind]),
        inner.map(lambda kind: kind if kind in (Any, None) else kind | None),
        st.tuples(inner, inner).map(lambda kinds: tuple[kinds]),
        st.sampled_from([set[int], set[str], set[float], frozenset[str], dict[int, str]]),
        st.builds(
            lambda make, kinds, omit: make(kinds, omit),
            st.sampled_from([struct_of, dataclass_of]),
            st.lists(inner, min_size=1, max_size=3),
            st.booleans(),
        ),
    ),
    max_leaves=6,
)

SAMPLES: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(-(2**64), 2**65),
    float: st.floats() | st.sampled_from([0.0, -0.0, 1.0, 3]),
    Decimal: st.decimals(),
    dt.datetime: st.datetimes(timezones=st.sampled_from([None, dt.UTC, NAMED_UTC, BERLIN])),
    Any: st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=2), max_leaves=4),
}


def values_of(annotation: Any) -> st.SearchStrategy[Any]:
    """Values that fit the annotation, and some that do so only nearly."""
    origin = getattr(annotation, "__origin__", None)
    arguments: Any = getattr(annotation, "__args__", ())
    if annotation in SAMPLES:
        return SAMPLES[annotation] | LEAVES
    if origin in (list, set, frozenset) or (origin is tuple and arguments[1:] == (...,)):
        items = st.lists(values_of(arguments[0]).filter(is_hashable_in(origin)), max_size=3)
        return items.map(origin) | items
    if origin is tuple:
        return st.tuples(*map(values_of, arguments))
    if origin is dict:
        keys = values_of(arguments[0]).filter(is_hashable_in(set))
        made = st.dictionaries(keys, values_of(arguments[1]), max_size=3)
        return made | made.map(OrderedDict)
    names = getattr(annotation, "__struct_fields__", None) or getattr(
        annotation, "__dataclass_fields__", None
    )
    if names:
        hints = annotation.__annotations__
        return st.tuples(*(values_of(hints[name]) for name in names)).map(
            lambda fields: annotation(*fields)
        )
    if arguments:
        return st.one_of(*(values_of(each) for each in arguments if isinstance(each, type)), LEAVES)
    kind = annotation if isinstance(annotation, type) else type(None)
    return st.sampled_from([each for each in NEAR if isinstance(each, kind)]) | LEAVES


def is_hashable_in(origin: Any) -> Callable[[Any], bool]:
    def is_hashable(value: Any) -> bool:
        try:
            hash(value)
        except TypeError:
            return origin not in (set, frozenset)
        return True

    return is_hashable


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_p4_values_of_exact_types_are_compared_as_deeply_by_equality(data: st.DataObject):
    """For any annotation: if the types of a value are exact, and what is read back is `==` to it,
    the two are deeply equal. Whatever the codec stores by the annotation is deeply equal.
    """
    annotation = data.draw(ANNOTATIONS)
    value = data.draw(values_of(annotation))
    has_exact_types = exact_check(annotation)
    try:
        back = msgspec.json.decode(msgspec.json.encode(value, enc_hook=dump_model), type=annotation)
    except (TypeError, ValueError, OverflowError):
        back = None
    if has_exact_types is not None and has_exact_types((value,)) and back == value:
        assert reads_back(back, value)
    codec = ResultCodec(annotation, "job")
    try:
        encoded = codec.encode(value)
    except NotStorable:
        return
    if encoded[0].startswith("typed"):
        assert reads_back(codec.decode(*encoded), value)


class Line(msgspec.Struct):
    sku: str
    price: Decimal
    n: int = 1
    weight: float | None = None


class Order(msgspec.Struct):
    at: dt.datetime
    lines: list[Line]
    extra: dict[str, Any]
    tags: set[str]
    colour: Name
    parent: "Order | None" = None


@dataclasses.dataclass
class Metrics:
    loss: float
    steps: int
    by_class: dict[str, float]


@dataclasses.dataclass
class Noted:
    n: int
    note: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass
class Lenient:
    n: int

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


@dataclasses.dataclass
class Cached:
    n: int

    @cached_property
    def square(self) -> int:
        return self.n**2


class Changed(msgspec.Struct):
    n: int

    def __post_init__(self) -> None:
        self.n = bool(self.n)


class LenientStruct(msgspec.Struct):
    n: int

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


class Open(msgspec.Struct, dict=True):
    n: int


def order(**changes: Any) -> Order:
    line = Line("a", Decimal("1.10"), weight=0.0)
    made = Order(dt.datetime(2026, 1, 1, tzinfo=dt.UTC), [line], {"a": [1]}, {"x"}, Name.RED)
    return msgspec.structs.replace(made, **changes)


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (order(), Order),
        ([order(parent=order())], list[Order]),
        (Metrics(0.5, 1, {"a": 1.0}), Metrics),
        ((1, "a"), tuple[int, str]),
        (Cached(1), Cached),
    ],
    ids=str,
)
def test_ordinary_values_have_exact_types(value: Any, annotation: Any):
    """The results that programs return need no deep comparison."""
    check = exact_check(annotation)
    assert check is not None and check((value,))


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (order(colour="red"), Order),
        (order(lines=(Line("a", Decimal(1)),)), Order),
        (order(lines=[Line(Name.RED, Decimal(1))]), Order),
        (order(lines=[Line("a", Decimal(1), Level.ONE)]), Order),
        (order(lines=[Line("a", 1)]), Order),  # type: ignore[arg-type]
        (order(at=dt.datetime(2026, 1, 1, tzinfo=NAMED_UTC)), Order),
        (order(extra={Text("a"): 1}), Order),
        (order(extra={"a": (1,)}), Order),
        (order(extra=OrderedDict(a=1)), Order),
        (Metrics(0.5, Level.ONE, {}), Metrics),
    ],
    ids=str,
)
def test_a_value_of_other_types_is_compared_deeply(value: Any, annotation: Any):
    """Enums with the value of a text or number, subclasses, other containers and zones are found,
    even if they are `==` to what the annotation reads.
    """
    check = exact_check(annotation)
    assert check is not None and not check((value,))


@dataclasses.dataclass
class Late:
    n: int
    later: int = dataclasses.field(init=False)


def test_a_field_that_was_never_set_is_compared_deeply():
    """A dataclass without one of its attributes has not the types of its fields."""
    check = exact_check(Late)
    assert check is not None and not check((Late(1),))
    with pytest.raises(NotStorable):
        ResultCodec(Late, "job").encode(Late(1))


def test_hidden_attributes_of_a_dataclass_are_compared_deeply():
    """An attribute that is no field is none that `==` compares."""
    value = Cached(2)
    assert value.square == 4
    check = exact_check(Cached)
    assert check is not None and not check((value,))


@pytest.mark.parametrize(
    "annotation", [Noted, Lenient, Changed, LenientStruct, Open, list[Noted], Line | Metrics]
)
def test_classes_whose_equality_is_their_own_are_compared_deeply(annotation: Any):
    """No class with an `__eq__` or `__post_init__`, uncompared fields, or a dict is taken as
    compared by `==`.
    """
    assert exact_check(annotation) is None
