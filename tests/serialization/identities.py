"""Prints, as JSON, what two processes compare of each value; stores results and reads them.

`python -m tests.serialization.identities [encode NAME | decode NAME FILE]`; test_hash_seeds.py runs
it under several hash seeds.
"""

import dataclasses
import datetime as dt
import enum
import json
import sys
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import msgspec
import pydantic

from eventflow import flow, task
from eventflow.core.canonical import may_hold_sets
from eventflow.engine.awaitables import ChildCall
from eventflow.events.event import Event
from eventflow.loop.scopes import task_label
from eventflow.routing.plans import content_digest
from eventflow.routing.subscriptions import compile_key
from eventflow.serialization.codecs import ResultCodec, fingerprint
from eventflow.serialization.tagged_json import deep_equal

WORDS = [f"word-{n}" for n in range(12)]
TWICE = dt.datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin"))
"""The second one of an hour that the clocks show twice."""


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"
    GREEN = "green"


class Point(msgspec.Struct, frozen=True):
    x: str
    tags: frozenset[str] = frozenset()


class Inner(pydantic.BaseModel, frozen=True):
    names: frozenset[str]


class Model(pydantic.BaseModel):
    tags: set[str]
    inner: list[Inner] = []
    by_name: dict[str, set[int | str]] = {}
    renamed: set[str] = pydantic.Field(default_factory=set, alias="other-name")

    @pydantic.computed_field
    @property
    def upper(self) -> set[str]:
        return {tag.upper() for tag in self.tags}


class Private(pydantic.BaseModel):
    """With a field that is not set, and an attribute that `==` of its fields does not see."""

    name: str
    tags: set[str] = set()
    at: dt.datetime | None = None
    _seen: set[str] = pydantic.PrivateAttr(default_factory=set)


@dataclasses.dataclass
class Uncompared:
    at: dt.datetime
    notes: set[str] = dataclasses.field(default_factory=set, compare=False)


class Root(pydantic.RootModel[dict[str, set[str]]]):
    pass


class Struct(msgspec.Struct, rename="camel", tag="struct", omit_defaults=True):
    all_tags: set[str]
    inner: list[Inner] = []
    points: frozenset[Point] = frozenset()
    anything: Any = None


class Array(msgspec.Struct, array_like=True, tag="array"):
    first: int
    tags: frozenset[str]


class Wrong(msgspec.Struct):
    """A value that its annotation does not allow, which Python lets pass."""

    names: list[str]


@dataclasses.dataclass
class Data:
    tags: set[str]
    models: list[Model] = dataclasses.field(default_factory=list)
    deeper: dict[str, Any] = dataclasses.field(default_factory=dict)


class Named(NamedTuple):
    tags: frozenset[str]
    n: int


def values() -> dict[str, Any]:
    """One of each kind of value with a set in it, and dicts that a set has ordered."""
    words = set(WORDS)
    model = Model(
        tags=words,
        inner=[Inner(names=frozenset(words)), Inner(names=frozenset("ab"))],
        by_name={"mixed": {1, 2, "a", "b", "c"}},
        **{"other-name": {"x", "y", "z"}},
    )
    return {
        "set": words,
        "mixed": {1, "a", None, 2.5, "b"},
        "nested": {frozenset({"a", "b"}), frozenset({"c", "d"}), frozenset({"a", "c", "e"})},
        "tuples": {("a", 1), ("b", None), ("c", "x")},
        "enums": frozenset(Colour),
        "big": {2**70, 2**80, 5, -(2**90)},
        "decimals": {Decimal("1.0"), Decimal("2.5"), Decimal("-3")},
        "dates": {dt.date(2026, 1, day) for day in range(1, 9)},
        "bytes": {b"a", b"b", b"c" * 100},
        "paths": {PurePosixPath("a"), PurePosixPath("b"), PurePosixPath("c")},
        "dict": dict.fromkeys(words, 1),
        "dict of dicts": {"a": {name: {"deep": {name}} for name in words}},
        "model": model,
        "root": Root(dict.fromkeys(words, words)),
        "models": [model, model],
        "struct": Struct(words, list(model.inner), frozenset(map(Point, words)), {"a": words}),
        "points": {Point(name, frozenset(words)) for name in words},
        "array": Array(1, frozenset(words)),
        "wrong": Wrong(words),  # type: ignore[arg-type]
        "data": Data(words, [model], {"a": [words, {"b": model}]}),
        "named": Named(frozenset(words), 1),
        "long": Struct({f"{name}-{n}" for name in words for n in range(50)}),
        "in a list": [{"a": [words]}],
        "at": {"at": dt.datetime(2026, 1, 1, tzinfo=dt.UTC), "of": Struct(words)},
    }


def private() -> Private:
    model = Private(name="a", at=TWICE)
    model._seen = set(WORDS)
    return model


def child_of(value: Any) -> ChildCall | None:
    """A call of a flow that takes this value; None if no flow can."""

    @flow
    async def child(value: type(value)) -> None:  # type: ignore[valid-type]
        pass

    try:
        return ChildCall(child, "child#0", child.binder.unpack((value,), {}))
    except Exception:  # no JSON form that gives an equal value: refused, in every process
        return None


def label_of(value: Any) -> str:
    async def branch(n: int, value: Any) -> None:
        pass

    coro = branch(1, value)
    try:
        return task_label(coro)
    finally:
        coro.close()


@task
async def work(value: Any, n: int = 1) -> None:
    pass


def identities(value: Any) -> dict[str, Any]:
    """Every text that is compared between processes, of one value."""
    child = child_of(value)
    print_of = fingerprint(("value", "n"), (value, 1), {}, {})
    found: dict[str, Any] = {
        "arguments": print_of and print_of.decode(),
        "child": child and (child.fingerprint or b"").decode(),
        "params": child and json.loads(child.params),
        "label": label_of(value),
        "may hold sets": may_hold_sets(type(value)),
    }
    if isinstance(value, dict):
        try:
            event = Event(id="e", source="/s", type="t", data={"value": value})
            found["event"] = content_digest(event).hex()
            key = compile_key("value")
            found["key"] = key and key(event)
        except TypeError:  # no JSON form
            pass
    return found


@flow
async def takes_anything() -> None:
    pass


@flow
async def takes_model(value: Model, more: dict[str, int]) -> None:
    pass


PICKLED = "pickled"
RESULTS: dict[str, tuple[Any, Any]] = {
    **{
        name: (value, None)
        for name, value in values().items()
        if type(value) in (set, dict) and name not in ("points", "at")  # they need an annotation
    },
    "list of sets": ([{"a", "b"}, frozenset({"c", "d"})], list[set[str] | frozenset[str]]),
    "set of a type": ({"a", "b", "c"}, set[str]),
    "bytes": (b"abc", bytes),
    "struct": (Struct({"a", "b"}, points=frozenset({Point("x"), Point("y")})), Struct),
    "data": (Data({"a", "b"}), Data),
    "model": (values()["model"], Model),
    "root": (Root({"a": {"b", "c", "d"}}), Root),
    "colours": ({Colour.RED, Colour.BLUE}, set[Colour]),
    "nan": ({"x": float("nan")}, dict[str, float]),
    "fold": ({"at": TWICE}, dict[str, dt.datetime]),
    "uncompared": (Uncompared(TWICE, set(WORDS)), Uncompared),
    "private": (private(), Private),
    PICKLED: ({"a": {"b", "c"}}, None),
}
"""Results, each with the annotation that stores it."""


def codec_of(name: str) -> ResultCodec:
    return ResultCodec(RESULTS[name][1], name, "pickle" if name == PICKLED else None)


def main(args: list[str]) -> Any:
    match args:
        case ["encode", name]:
            form, data = codec_of(name).encode(RESULTS[name][0], key=b"k")
            return [form, data.hex()]
        case ["decode", name, path]:
            form, data = json.loads(Path(path).read_text())
            codec = codec_of(name)
            back = codec.decode(form, bytes.fromhex(data), allow_pickle=True, key=b"k")
            again = codec.decode(
                *codec.encode(RESULTS[name][0], key=b"k"), allow_pickle=True, key=b"k"
            )
            return {"equal": same_members(back, again)}
        case _:
            return {name: identities(value) for name, value in values().items()}


def same_members(left: Any, right: Any) -> bool:
    """Deep equality; of a dict that a set has ordered, without its order."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(
            same_members(left[key], right[key]) for key in left
        )
    return deep_equal(left, right)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
