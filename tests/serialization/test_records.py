"""Enum members, named tuples, dataclasses, numpy scalars come back as they were or are refused."""

import dataclasses
import enum
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from eventflow import App, UsageError, flow, task
from eventflow.core.errors import NotStorable
from eventflow.serialization.codecs import ResultCodec, to_readable
from eventflow.testing import result_of, running


class Colour(enum.Enum):
    RED = 1


class Access(enum.Flag):
    READ = 1
    WRITE = 2


class Level(enum.IntEnum):
    HIGH = 3


class Name(enum.StrEnum):
    FIRST = "first"


class Point(NamedTuple):
    x: int
    tag: Any = None


Pair = namedtuple("Pair", "a b")


@dataclasses.dataclass
class Score:
    value: Any
    note: str | None = None
    doubled: Any = dataclasses.field(init=False, default=None)

    def __post_init__(self) -> None:
        self.doubled = (self.value, self.value)


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    value: Any


@dataclasses.dataclass
class Forgets:
    value: dataclasses.InitVar[int]
    kept: int = 0

    def __post_init__(self, value: int) -> None:
        self.kept = value


VALUES: list[Any] = [
    Colour.RED,
    Access.READ | Access.WRITE,
    Level.HIGH,
    Name.FIRST,
    Point(1, Colour.RED),
    Pair(1, (2, {3})),
    Score(1.5),
    Score(Point(1), note="x"),
    Frozen([Frozen({"a": Level.HIGH})]),
    {Colour.RED: [Point(2)]},
    np.float64(0.1),
    np.float32(0.1),
    np.int8(-3),
    np.uint64(2**64 - 1),
    np.bool_(True),
    np.complex128(1 + 2j),
    np.datetime64("2026-01-02T03:04:05", "ns"),
    np.timedelta64(3, "h"),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize("annotation", [Any, list, dict[str, Any]], ids=str)
def test_p4_values_of_classes_come_back_as_they_were(value: Any, annotation: Any) -> None:
    """Without an annotation that helps, the value decodes to an equal one of the same class."""
    codec = ResultCodec(annotation, "job")
    decoded = codec.decode(*codec.encode([value]))
    assert decoded == [value]
    assert type(decoded[0]) is type(value)
    to_readable(*codec.encode([value]))


def test_numpy_nan_comes_back_as_nan() -> None:
    """A numpy NaN decodes to a NaN of the same type, bit for bit."""
    codec = ResultCodec(Any, "job")
    decoded = codec.decode(*codec.encode(np.float32("nan")))
    assert type(decoded) is np.float32
    assert np.isnan(decoded)


def _hidden() -> Score:
    score = Score(1)
    vars(score)["hidden"] = 5
    return score


def _local() -> Any:
    @dataclasses.dataclass
    class Local:
        value: int = 1

    return Local()


REFUSED: list[tuple[Any, str]] = [
    (_hidden(), "Score"),
    (_local(), "Local"),
    (Forgets(3), "Forgets"),
    (np.longdouble(1), "longdouble"),
    (np.arange(3), "ndarray"),
    (Score(object()), r"result\.value is a object"),
    (Point(1, object()), r"result\.tag is a object"),
]


@pytest.mark.parametrize(("value", "message"), REFUSED, ids=lambda each: str(each)[:30])
def test_what_would_come_back_different_is_refused_with_the_ways_out(
    value: Any, message: str
) -> None:
    """Hidden attributes, classes that cannot be found again, platform types: NotStorable names the
    part and what to do.
    """
    with pytest.raises(NotStorable, match=message) as caught:
        ResultCodec(Any, "job").encode(value)
    for way in ('codec="pickle"', "bytes", "path"):
        assert way in str(caught.value)


@pytest.mark.parametrize(
    "value", ["Colour.RED", "Point(1)", "Score(2)", "np.float64(0.5)"], ids=str
)
def test_values_of_classes_survive_into_another_process(value: str, tmp_path: Path) -> None:
    """What one process stored, where the module ran as `__main__`, another one reads by its import
    name; one without the class says what to import.
    """
    module = tmp_path / "shop.py"
    module.write_text(
        "import enum, dataclasses, typing, sys\n"
        "import numpy as np\n"
        "from eventflow.serialization.codecs import ResultCodec\n"
        "class Colour(enum.Enum):\n    RED = 1\n"
        "class Point(typing.NamedTuple):\n    x: int\n"
        "@dataclasses.dataclass\nclass Score:\n    value: int\n"
        f"value = {value}\n"
        "codec = ResultCodec(typing.Any, 'job')\n"
        "if __name__ == '__main__':\n"
        "    print(codec.encode(value)[1].decode())\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path.cwd()}"}

    def run(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    stored = run(str(module))
    read = "import sys, shop; value = shop.codec.decode('tagged', sys.argv[1].encode()); "
    check = "assert value == shop.value and type(value) is type(shop.value); print('equal')"
    assert run("-c", read + check, stored) == "equal"
    if "np" not in value:
        with pytest.raises(UsageError, match=r"shop:.* is not imported here"):
            ResultCodec(Any, "job").decode("tagged", stored.encode())


class Connection:
    """No class that can be stored."""


NEVER_STORABLE: list[Any] = [np.ndarray, Connection, list[Connection], Connection | None]


class Base:
    """A plain class, one of whose subclasses can be stored."""


@dataclasses.dataclass
class Derived(Base):
    value: int = 0


@pytest.mark.parametrize(
    "annotation", [np.ndarray, Connection, list[Connection], Connection | None]
)
@pytest.mark.parametrize("decorate", [task, flow], ids=["task", "flow"])
def test_an_annotation_that_cannot_be_stored_is_refused_at_decoration(
    annotation: Any, decorate: Any
) -> None:
    """A return annotation without a storable value is a UsageError with the line and the ways out,
    before anything runs.
    """

    async def make() -> None: ...

    make.__annotations__["return"] = annotation
    with pytest.raises(UsageError, match="lossless") as caught:
        decorate(make)
    assert Path(__file__).name in str(caught.value)
    for way in ("bytes", "path"):
        assert way in str(caught.value)


@pytest.mark.parametrize(
    "annotation",
    [
        Any,
        None,
        object,
        Base,
        Connection | dict[str, int],
        Score,
        Colour,
        Point,
        np.float32,
        "Later",
    ],
)
def test_an_annotation_that_may_be_stored_is_accepted(annotation: Any) -> None:
    """Only what is certain is refused at decoration; `codec="pickle"` accepts all."""

    async def make() -> None: ...

    make.__annotations__["return"] = annotation
    task(make)
    make.__annotations__["return"] = Connection
    task(codec="pickle")(make)


@task
async def measure() -> Any:
    return {"score": Score(np.float32(0.5)), "colour": Colour.RED, "at": Point(1)}


@flow
async def measures() -> Any:
    return await measure()


@pytest.mark.anyio
async def test_a_flow_gets_and_returns_values_of_classes() -> None:
    """A task's and a flow's value reach flow and program as objects of their classes."""
    async with running(App("records")) as app:
        assert await result_of(app, measures) == {
            "score": Score(np.float32(0.5)),
            "colour": Colour.RED,
            "at": Point(1),
        }
