"""What `==` ignores is kept, too, or refused: a value never comes back as a slightly other one."""

import dataclasses
import datetime as dt
import math
import struct
from collections import OrderedDict, defaultdict
from decimal import Decimal
from functools import cached_property
from typing import Any, NamedTuple
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import msgspec
import pydantic
import pytest

from eventflow import flow
from eventflow.core.errors import NotStorable
from eventflow.routing.binding import Binder
from eventflow.serialization.codecs import ResultCodec, to_readable
from eventflow.serialization.tagged_json import deep_equal, reads_back

BERLIN = ZoneInfo("Europe/Berlin")
TWICE = dt.datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN)
"""An hour that the clocks show twice."""
NAIVE = dt.datetime(2026, 1, 1)  # noqa: DTZ001 (its absent zone is what is tested)
LOCAL = dt.datetime.now().astimezone()
NAMED = dt.timezone(dt.timedelta(hours=1), "CET")


def nan(bits: str) -> float:
    return struct.unpack(">d", bytes.fromhex(bits))[0]


def name_of(value: Any) -> str:
    return getattr(value, "__name__", type(value).__name__)


class Text(str):
    pass


class Number(int):
    pass


class Pair(NamedTuple):
    left: Any
    right: Any = 0


@dataclasses.dataclass
class Data:
    at: Any
    note: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass
class Derived:
    n: int
    square: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.square = self.n**2

    @cached_property
    def cube(self) -> int:
        return self.n**3


class Struct(msgspec.Struct):
    at: dt.datetime
    name: str = ""
    extra: Any = None


class Measured(msgspec.Struct):
    loss: float


class Line(pydantic.BaseModel):
    sku: str
    n: int = 1


class Model(pydantic.BaseModel):
    name: str
    ident: UUID = pydantic.Field(default_factory=uuid4)
    lines: list[Line] = []
    at: dt.datetime | None = None
    tags: set[str] = set()
    _seen: Any = pydantic.PrivateAttr(default=None)


def seen(model: Model, what: Any) -> Model:
    model._seen = what
    return model


def with_attribute(value: Any, name: str, attribute: Any) -> Any:
    setattr(value, name, attribute)
    return value


KEPT = [
    (TWICE, dt.datetime),
    (TWICE.replace(fold=1), dt.datetime),
    (TWICE.replace(fold=1), None),
    ([TWICE, {"at": TWICE.replace(tzinfo=None, fold=1)}], None),
    (dt.datetime(2026, 1, 1, tzinfo=NAMED), None),
    (dt.datetime(2026, 1, 1, tzinfo=dt.timezone(dt.timedelta(seconds=-3661))), None),
    (dt.datetime(2026, 1, 1, tzinfo=ZoneInfo("UTC")), dt.datetime),
    (LOCAL, dt.datetime),
    (dt.time(2, 30, tzinfo=BERLIN, fold=1), None),
    (dt.time(2, 30, fold=1), dt.time),
    (dt.time(2, 30, tzinfo=dt.UTC), dt.time),
    ({dt.date(2026, 1, 1): TWICE}, None),
    (-0.0, float),
    ([-0.0, 0.0], list[float]),
    (nan("7ff8000000000000"), float),
    (nan("fff8000000000000"), float),
    (nan("7ff8000000abcdef"), None),
    (Decimal("1.10"), Decimal),
    (Decimal("-0E+3"), None),
    (Decimal("sNaN12"), None),
    (Data(TWICE, "note"), Data),
    (Data({1: "a", True and 2: "b"}, "note"), Data),
    (Derived(3), Derived),
    (Struct(TWICE, "x"), Struct),
    (Struct(NAIVE.replace(fold=1)), Struct),
    ({"b": 1, "a": {"d": 1, "c": 2}}, dict),
    (Model(name="a"), Model),
    (Model(name="a", lines=[Line(sku="x"), Line(sku="y", n=1)]), Model),
    ([Model(name="a"), Model(name="b", tags={"x", "y"})], list[Model]),
    ({"m": Model(name="a")}, dict[str, Model]),
    (seen(Model(name="a"), {"k": (1, TWICE)}), Model),
    (Model(name="a", at=TWICE), Model),
    (Model(name="a", at=dt.datetime(2026, 1, 1, tzinfo=dt.UTC)), Model),
    (Model.model_validate_json('{"name": "a", "at": "2026-01-01T00:00:00Z"}'), Model),
    (Pair(1, (2, 3)), Pair),
]


@pytest.mark.parametrize(("value", "annotation"), KEPT, ids=name_of)
def test_p4_what_equality_ignores_is_kept(value: Any, annotation: Any):
    """Zones, folds, signs, bits, exponents, uncompared, private and unset fields come back as they
    were, and the result is readable without its class.
    """
    codec = ResultCodec(annotation, "job")
    form, data = codec.encode(value)
    back = codec.decode(form, data)
    assert deep_equal(back, value) and type(back) is type(value)
    to_readable(form, data)
    if isinstance(value, dt.datetime):
        assert (back.tzname(), back.fold, back.isoformat()) == (
            value.tzname(), value.fold, value.isoformat(),
        )  # fmt: skip
    if isinstance(value, float):
        assert struct.pack(">d", back) == struct.pack(">d", value)
    if isinstance(value, Model):
        assert back.model_fields_set == value.model_fields_set
        assert back.model_dump() == value.model_dump() and back._seen == value._seen


class Zone(dt.tzinfo):
    """A zone without a name that another process could look up."""

    def utcoffset(self, when: dt.datetime | None) -> dt.timedelta | None:
        return None if when is None else dt.timedelta(hours=1)

    def dst(self, when: dt.datetime | None) -> None:
        return None


REFUSED = [
    (dt.datetime(2026, 1, 1, tzinfo=Zone()), dt.datetime),
    (Data(dt.datetime(2026, 1, 1, tzinfo=Zone())), Data),
    (Struct(NAIVE, Text("x")), Struct),
    (Struct(NAIVE, extra=Number(3)), Struct),
    (Struct(NAIVE, extra=OrderedDict(a=1)), Struct),
    (Data(defaultdict(list, a=[1])), Data),
    (with_attribute(Data(1), "more", 2), Data),
    (with_attribute(Derived(3), "square", 10), Derived),
    (seen(Model(name="a"), object()), Model),
    ({Text("key"): 1}, dict),
]  # fmt: skip


def test_an_int_under_float_is_a_float():
    """What an annotation says of a number is believed: an int in a field of floats is one."""
    codec = ResultCodec(list[Measured], "job")
    assert codec.decode(*codec.encode([Measured(3)])) == [Measured(3.0)]


@pytest.mark.parametrize(("value", "annotation"), REFUSED, ids=name_of)
def test_what_cannot_be_kept_whole_is_refused(value: Any, annotation: Any):
    """A value that would come back without part of its state raises NotStorable."""
    with pytest.raises(NotStorable):
        ResultCodec(annotation, "job").encode(value)


def binder(annotation: Any) -> Binder:
    async def handle(value: annotation) -> None:  # type: ignore[valid-type]
        pass

    return flow(handle).binder


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (TWICE, dt.datetime),
        (NAIVE.replace(fold=1), dt.datetime),
        (Data(1, "note"), Data),
        (Data(Text("x")), Data),
        (Struct(TWICE), Struct),
        (Struct(dt.datetime(2026, 1, 1, tzinfo=dt.UTC), extra=-0.0), Struct),
        (seen(Model(name="a"), 1), Model),
        (Model(name="a", tags={"x", "y", "z"}), Model),
        ({2**70, 2**80}, set[int]),
        (math.nan, float),
    ],
    ids=name_of,
)
def test_a_parameter_is_bound_whole_or_refused(value: Any, annotation: Any):
    """The argument of a child flow, or of `app.start`, arrives whole, or raises NotStorable. Only
    which fields of a model are set is not kept: all of them are.
    """
    made = binder(annotation)
    try:
        params = made.unpack((value,), {})
    except NotStorable:
        return
    bound = made.bind_params(msgspec.json.decode(params))["value"]
    assert reads_back(bound, value, same_unset=False)
