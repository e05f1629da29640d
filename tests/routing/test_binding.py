"""A flow's arguments are bound from an event by its signature; what cannot be bound is named."""

import dataclasses
import datetime as dt
import enum
import threading
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypedDict, TypeVar
from uuid import UUID

import msgspec
import orjson
import pydantic
import pytest

from eventflow.core.errors import BindingError, NotStorable, UsageError
from eventflow.events.event import Event
from eventflow.routing.binding import Binder
from eventflow.serialization.tagged_json import deep_equal


class Line(msgspec.Struct):
    sku: str
    qty: int = 1


class Order(msgspec.Struct):
    id: int
    lines: list[Line] = []
    at: dt.datetime | None = None


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


class Row(TypedDict):
    a: int


class Customer(pydantic.BaseModel):
    name: str
    age: pydantic.PositiveInt = 1


class Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)
    at: dt.datetime


class Cat(pydantic.BaseModel):
    kind: Literal["cat"]


class Dog(pydantic.BaseModel):
    kind: Literal["dog"]


class Invoice(msgspec.Struct):
    """Has a field with the name of the parameter that takes it."""

    invoice: int
    total: float


class Wrapped(msgspec.Struct):
    x: int
    rest: msgspec.Raw = msgspec.Raw(b"null")


@dataclasses.dataclass
class Decorated:
    x: msgspec.Raw


class Colour(enum.Enum):
    RED = "a"
    ONE = 1


class Level(enum.IntEnum):
    ONE = 1


class Tagged(msgspec.Struct, tag="tagged"):
    x: int


class Other(msgspec.Struct, tag="other"):
    x: int


class Pair(NamedTuple):
    x: float
    y: str = ""


T = TypeVar("T")


class Boxed(msgspec.Struct, Generic[T]):
    x: T


class Unset(msgspec.Struct):
    x: int | msgspec.UnsetType = msgspec.UNSET


DEFAULT = Order(9)


def event(data: Any = None) -> Event:
    return Event(id="1", source="/s", type="t", data=data)


def bind(fn: Any, data: Any) -> dict[str, Any]:
    return Binder(fn, "handle").bind_event(event(data))


async def one_order(order: Order) -> None: ...
async def one_point(point: Point) -> None: ...
async def one_row(row: Row) -> None: ...
async def one_model(customer: Customer) -> None: ...
async def one_dict(payload: dict[str, Any]) -> None: ...
async def one_mapping(payload: Mapping[str, int]) -> None: ...
async def one_list(rows: list[int]) -> None: ...
async def one_bytes(body: bytes) -> None: ...
async def one_int(n: int) -> None: ...
async def one_thing(thing) -> None: ...
async def one_maybe(order: Order | None = None) -> None: ...
async def one_default(order: Order = DEFAULT) -> None: ...
async def one_invoice(invoice: Invoice) -> None: ...
async def order_and_event(order: Order, event: Event) -> None: ...
async def maybe_event(event: Event | None = None) -> None: ...
async def several(id: int, name: str = "x", tags: tuple[str, ...] = ()) -> None: ...
async def rest(id: int, **more: Any) -> None: ...
async def nothing() -> None: ...
async def rich(at: dt.datetime, price: Decimal, ident: UUID, by: dict[int, str]) -> None: ...
async def limited(n: Annotated[int, msgspec.Meta(gt=0)]) -> None: ...
async def pets(pet: Annotated[Cat | Dog, pydantic.Field(discriminator="kind")]) -> None: ...
async def strict(strict: Strict) -> None: ...


@pytest.mark.parametrize(
    ("fn", "data", "arguments"),
    [
        # By name.
        (
            one_order,
            {"order": {"id": 7, "lines": [{"sku": "a"}]}},
            {"order": Order(7, [Line("a")])},
        ),
        (
            several,
            {"id": 1, "name": "n", "tags": ["a"], "unasked": 1},
            {"id": 1, "name": "n", "tags": ("a",)},
        ),
        (several, {"id": 1}, {"id": 1}),
        (rest, {"id": 1, "b": 2, "c": 3}, {"id": 1, "b": 2, "c": 3}),
        (one_thing, {"thing": [1]}, {"thing": [1]}),
        (
            rich,
            {
                "at": "2026-01-02T03:04:05Z",
                "price": "1.10",
                "ident": str(UUID(int=7)),
                "by": {"1": "x"},
            },
            {
                "at": dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC),
                "price": Decimal("1.10"),
                "ident": UUID(int=7),
                "by": {1: "x"},
            },
        ),
        (one_model, {"customer": {"name": "A", "age": 3}}, {"customer": Customer(name="A", age=3)}),
        (pets, {"pet": {"kind": "dog"}}, {"pet": Dog(kind="dog")}),
        (
            strict,
            {"strict": {"at": "2026-01-02T03:04:05Z"}},
            {"strict": Strict(at=dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC))},
        ),
        (one_bytes, {"body": "YWJj"}, {"body": b"abc"}),
        # The whole data.
        (one_order, {"id": 7}, {"order": Order(7)}),
        (one_point, {"x": 1, "y": 2}, {"point": Point(1, 2)}),
        (one_row, {"a": 1}, {"row": {"a": 1}}),
        (one_model, {"name": "A"}, {"customer": Customer(name="A")}),
        (one_dict, {"a": 1}, {"payload": {"a": 1}}),
        (one_dict, {"payload": {"a": 1}}, {"payload": {"a": 1}}),
        (one_mapping, {"a": 1}, {"payload": {"a": 1}}),
        (one_list, [1, 2], {"rows": [1, 2]}),
        (one_bytes, b"abc", {"body": b"abc"}),
        (one_thing, "text", {"thing": "text"}),
        (one_thing, {"other": 1}, {"thing": {"other": 1}}),
        (one_int, 5, {"n": 5}),
        (one_maybe, {"id": 7}, {"order": Order(7)}),
        (one_invoice, {"invoice": 17, "total": 2.0}, {"invoice": Invoice(17, 2.0)}),
        (one_invoice, {"invoice": {"invoice": 17, "total": 2.0}}, {"invoice": Invoice(17, 2.0)}),
        # Nothing to fill.
        (one_maybe, None, {}),
        (one_default, {}, {}),
        (nothing, {"a": 1}, {}),
        (nothing, b"any", {}),
        (nothing, None, {}),
    ],
)
def test_an_event_becomes_arguments(fn, data, arguments):
    """Parameters are filled by name, or a single one by the whole data, and validated by their
    annotations.
    """
    assert bind(fn, data) == arguments


def test_an_event_parameter_gets_the_event():
    """A parameter annotated Event gets the event itself and does not count for the whole-data
    rule.
    """
    got = event({"id": 7})
    assert Binder(order_and_event, "f").bind_event(got) == {"order": Order(7), "event": got}
    assert Binder(maybe_event, "f").bind_event(got) == {"event": got}


@pytest.mark.parametrize(
    ("fn", "data", "field", "reason"),
    [
        (one_order, {"order": {"id": "x"}}, "order", "Expected `int`, got `str` - at `$.order.id`"),
        (
            one_order,
            {"id": 1, "lines": [{"sku": "a", "qty": "2"}]},
            "order",
            "at `$.order.lines[0].qty`",
        ),
        (one_order, None, "order", "missing; the data has no fields"),
        (one_order, [1], "order", "Expected `object`, got `array`"),
        (several, {"name": "x"}, "id", "missing; the data has name"),
        (several, {"id": "5"}, "id", "Expected `int`, got `str`"),
        (several, {"id": 1, "tags": [1]}, "tags", "at `$.tags[0]`"),
        (
            several,
            [1],
            "id, name, tags",
            "expected the event's data to be a JSON object, found an array",
        ),
        (several, b"x", "id, name, tags", "found bytes"),
        (one_int, {"m": 1}, "n", "missing; the data has m"),
        (one_int, True, "n", "Expected `int`, got `bool`"),
        (limited, {"n": 0}, "n", "Expected `int` >= 1"),
        (one_model, {"customer": {"name": "A", "age": -3}}, "customer", "greater than 0"),
        (one_model, {"name": 5}, "customer", "valid string"),
        (pets, {"pet": {"kind": "cow"}}, "pet", "'cow' found using 'kind'"),
    ],
)
def test_p9_binding_errors_name_flow_and_field(fn, data, field, reason):
    """A BindingError has the flow, the field and the reason."""
    with pytest.raises(BindingError) as raised:
        bind(fn, data)
    assert (raised.value.flow, raised.value.field) == ("handle", field)
    assert reason in raised.value.reason


@pytest.mark.parametrize(
    ("fn", "data"),
    [
        (several, {"id": 1, "nmae": "x"}),
        (nothing, {"a": 1}),
    ],
)
def test_an_unknown_parameter_is_rejected(fn, data):
    """A misspelt parameter of a direct start is an error; in an event's data it is ignored."""
    with pytest.raises(BindingError, match="no such parameter"):
        Binder(fn, "f").bind_params(data)
    Binder(fn, "f").bind_event(event(data))


def test_params_may_come_with_an_event():
    """bind_params takes an Event parameter from the given event, or from its JSON among the
    parameters.
    """
    binder, got = Binder(order_and_event, "f"), event({"x": 1})
    assert binder.bind_params({"order": {"id": 1}}, got) == {"order": Order(1), "event": got}
    packed = orjson.loads(binder.unpack((Order(1), got), {}))
    assert binder.bind_params(packed) == {"order": Order(1), "event": got}
    with pytest.raises(BindingError, match="expected an event, found none"):
        binder.bind_params({"order": {"id": 1}})
    assert Binder(maybe_event, "f").bind_params({}) == {}


@pytest.mark.parametrize(
    ("fn", "args", "kwargs", "arguments"),
    [
        (several, (1,), {"tags": ("a", "b")}, {"id": 1, "tags": ("a", "b")}),
        (one_order, (Order(1, [Line("a")]),), {}, {"order": Order(1, [Line("a")])}),
        (one_order, (), {"order": {"id": 1}}, {"order": Order(1)}),
        (one_model, (Customer(name="A"),), {}, {"customer": Customer(name="A")}),
        (one_bytes, (b"\x00\xff",), {}, {"body": b"\x00\xff"}),
        (rest, (1,), {"b": [2], "c": None}, {"id": 1, "b": [2], "c": None}),
        (nothing, (), {}, {}),
        (one_maybe, (None,), {}, {"order": None}),
        (one_dict, ({"payload": 1, "n": None},), {}, {"payload": {"payload": 1, "n": None}}),
        (
            rich,
            (dt.datetime(2026, 1, 2, tzinfo=dt.UTC), Decimal("1.10"), UUID(int=7), {1: "x"}),
            {},
            {
                "at": dt.datetime(2026, 1, 2, tzinfo=dt.UTC),
                "price": Decimal("1.10"),
                "ident": UUID(int=7),
                "by": {1: "x"},
            },
        ),
    ],
)
def test_a_direct_call_goes_through_json(fn, args, kwargs, arguments):
    """unpack and bind_params together restore the arguments of the call."""
    binder = Binder(fn, "f")
    assert binder.bind_params(orjson.loads(binder.unpack(args, kwargs))) == arguments


def test_a_call_packs_the_same_however_it_is_written():
    """The JSON of a call does not depend on the order or the form of its arguments."""
    binder = Binder(several, "f")
    assert binder.unpack((1, "n"), {}) == binder.unpack((), {"name": "n", "id": 1})


@pytest.mark.parametrize(
    ("fn", "value"),
    [
        (one_thing, threading.Lock()),
        (one_thing, (1, 2)),
        (one_thing, dt.datetime(2026, 1, 1, tzinfo=dt.UTC)),
        (one_thing, float("nan")),
        (one_thing, 2**70),
        (one_thing, Order(1)),
        (one_order, Point(1)),
        (one_int, "\ud800"),
    ],
)
def test_an_argument_that_json_would_change_is_rejected(fn, value):
    """An argument that JSON and the annotation cannot represent is NotStorable, named by flow and
    parameter.
    """
    with pytest.raises(NotStorable, match="f: argument"):
        Binder(fn, "f").unpack((value,), {})


def test_a_wrong_call_raises_as_python_does():
    """A missing, surplus or unknown argument of a direct call is a TypeError."""
    for args, kwargs in [((), {}), ((1, 2, 3, 4), {}), ((1,), {"nmae": 2})]:
        with pytest.raises(TypeError):
            Binder(several, "f").unpack(args, kwargs)


async def star(*orders: Order) -> None: ...
async def slash(order: Order, /) -> None: ...
async def unresolved(order: "Nowhere") -> None: ...  # noqa: F821  # pyright: ignore


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (star, r"\*orders"),
        (slash, "positional only"),
        (unresolved, "cannot resolve its annotations: name 'Nowhere'"),
    ],
)
def test_a_signature_no_event_can_fill_is_rejected(fn, message):
    """A signature that cannot be filled by name raises UsageError when the Binder is made."""
    with pytest.raises(UsageError, match=message):
        Binder(fn, "f")


VALUES = [
    1, 1.0, 1.5, -0.0, 1e22, 1e15, 0.1, 1e-7, 2**63, 2**64 - 1, -(2**63), 5e-324, 123456789.123456,
    "1", "a", "2026-01-01T00:00:00Z", "2026-01-01T00:00:00", "2026-01-01", "12:00:00", "PT5S",
    "AAAA", "1.10", str(UUID(int=7)), None, True, [1], [1.0, "a"], [[1, 2]], {}, {"id": 1},
    {"id": 1, "lines": [{"sku": "x"}]}, {"1": 2}, {"1.5": 2}, {"a": 1}, {"x": 1}, {"name": "n"},
    {"x": 1, "rest": {"b": [1.0, 2, "é"]}}, {"x": {"a": 1}}, [{"x": 1, "rest": [1]}], [0.1, "0.10"],
    ["a", 1], {"kind": "dog"}, {"type": "other", "x": 1}, {"x": 0.1}, {"2026-01-01": 1},
    {str(UUID(int=7)): 1},
]  # fmt: skip
TYPES = [
    int, float, str, bool, Decimal, dt.datetime, dt.date, dt.time, dt.timedelta, UUID, bytes, Any,
    list, list[int], set[int], tuple[int, ...], tuple[int, int], dict, dict[str, int],
    dict[int, int], dict[float, int], Order, Point, Row, Customer, Literal["a", 1], int | str,
    float | None, Order | None, Mapping[str, Any],
    msgspec.Raw, list[msgspec.Raw], tuple[msgspec.Raw, ...], dict[str, msgspec.Raw], Wrapped,
    list[Wrapped], Decorated, list[Decimal], dict[str, Decimal], Decimal | None, frozenset[Colour],
    Colour, Level, Cat | Dog, dict[dt.date, int], dict[UUID, int], Tagged | Other, Pair,
    Boxed[Decimal], Unset, dict[Literal[1, 2], int], dt.datetime | str, bytes | None,
]  # fmt: skip


@pytest.mark.parametrize("annotation", TYPES, ids=str)
def test_arguments_from_the_json_of_data_are_those_of_the_recorded_event(annotation):
    """What `bind_arriving` returns equals what a replay binds from the recorded bytes, and it
    rejects what that rejects.
    """

    def fn(order, more=0): ...

    fn.__annotations__["order"] = annotation
    binder = Binder(fn, "f")
    for data in [*VALUES, *({"order": value} for value in VALUES), {"order": 1, "more": "x"}]:
        found = event(data)
        recorded = Event.from_recorded(found.to_json())
        try:
            expected = binder.bind_event(recorded)
        except BindingError as error:
            with pytest.raises(BindingError) as raised:
                binder.bind_arriving(found, found.to_json_parts()[1])
            assert str(raised.value) == str(error)
            continue
        given = binder.bind_arriving(found, found.to_json_parts()[1])
        assert given is None or deep_equal(given, expected)


def test_the_arguments_of_a_run_share_nothing_with_its_event():
    """A flow that changes its arguments changes neither the event nor another run's arguments."""
    found = event({"payload": {"a": [1]}})
    given = Binder(one_dict, "f").bind_arriving(found, found.to_json_parts()[1])
    assert given is not None and given == {"payload": {"a": [1]}}
    given["payload"]["a"].append(2)
    assert found.data == {"payload": {"a": [1]}}


async def one_raw(body: msgspec.Raw) -> None: ...
async def raws(bodies: list[msgspec.Raw]) -> None: ...


def test_raw_json_is_bound_from_an_event_from_parameters_and_from_several_events():
    """A parameter of type `msgspec.Raw` gets the JSON as it is recorded, however its run begins."""
    body = msgspec.Raw(b'{"b":[1.0,2]}')
    assert bind(one_raw, {"body": {"b": [1.0, 2]}}) == {"body": body}
    assert bind(one_raw, [1, 2]) == {"body": msgspec.Raw(b"[1,2]")}
    binder = Binder(one_raw, "f")
    params = binder.unpack((body,), {})
    assert binder.bind_params(orjson.loads(params)) == {"body": body}
    events = [event({"n": 1}), event(2)]
    expected = [msgspec.Raw(b'{"n":1}'), msgspec.Raw(b"2")]
    assert Binder(raws, "f").bind_events(events) == {"bodies": expected}


async def calls(call: Callable[[int], str]) -> None: ...


def test_a_parameter_that_is_a_function_is_filled_by_no_event():
    """The annotation is accepted or refused as any class is, and does not break the decoration."""
    with pytest.raises(BindingError, match="call"):
        bind(calls, {"call": 1})
