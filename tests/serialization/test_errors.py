"""Errors: the flow receives the class that it can catch, in every process the same."""

import datetime as dt
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import orjson
import pydantic
import pytest

from eventflow.core.errors import (
    BindingError,
    NotStorable,
    OutsideFlowError,
    TaskFailed,
    TaskTimedOut,
    UsageError,
)
from eventflow.core.retry import Permanent
from eventflow.core.secrets import KnownSecrets
from eventflow.sdk.checks import CheckFailed
from eventflow.serialization.codecs import ResultCodec
from eventflow.serialization.errors import (
    MAX_DETAIL,
    MAX_TRACEBACK,
    decode_error,
    encode_error,
    imported_by,
)

ROOT = Path(__file__).parents[2]


class Plain(Exception):
    pass


class Silent(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Outer:
    class Inner(ValueError):
        pass


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def without_traceback(fields: dict[str, Any]) -> dict[str, Any]:
    left = {name: value for name, value in fields.items() if name != "traceback"}
    if "exceptions" in left:
        left["exceptions"] = [without_traceback(member) for member in left["exceptions"]]
    return left


@pytest.mark.parametrize(
    "error",
    [
        ValueError("bad", 3),
        KeyError("a"),
        Plain("x", [1, {"a": None}]),
        Outer.Inner("nested"),
        BindingError("f", "x", "missing"),
        TaskTimedOut("job", 2.5),
        FileNotFoundError(2, "No such file", "/nope"),
        OSError(18, "cross-device", "/a", None, "/b"),
        ZeroDivisionError(),
        ExceptionGroup("several", [ValueError(1), ExceptionGroup("inner", [KeyError("k")])]),
    ],
    ids=repr,
)
def test_p4_an_error_is_rebuilt_from_its_class(error):
    """An error whose class is imported comes back with its type, text and arguments, and encodes to
    the same record again.
    """
    data = encode_error(raised(error))
    rebuilt = decode_error(data)
    assert type(rebuilt) is type(error)
    assert str(rebuilt) == str(error)
    assert without_traceback(orjson.loads(encode_error(raised(rebuilt)))) == without_traceback(
        orjson.loads(data)
    )


class Coded(Exception):
    """Its constructor has other parameters than `args`."""

    def __init__(self, code: int, *, detail: str) -> None:
        super().__init__(code)
        self.detail = detail


class Api(Exception):
    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(f"{status}: {body['reason']}")
        self.status = status
        self.body = body


class Slotted(Exception):
    __slots__ = ("place",)

    def __init__(self, place: tuple[int, int]) -> None:
        self.place = place

    def __str__(self) -> str:
        return f"at {self.place}"


class Optional(Exception):
    """Without its second argument it is made, too, but is another error."""

    def __init__(self, text: str, retry_at: dt.datetime | None = None) -> None:
        super().__init__(text)
        self.retry_at = retry_at


class Holder(Exception):
    """Part of its state has no lossless form."""

    def __init__(self, text: str, response: object) -> None:
        super().__init__(text, response)
        self.text = text
        self.response = response

    def __str__(self) -> str:
        return f"{self.text} of {type(self.response).__name__}"


class Lookup(KeyError):
    def __init__(self, item: object) -> None:
        super().__init__(item)


class Group(ExceptionGroup[Exception]):
    pass


class Filled(pydantic.BaseModel):
    n: int
    when: dt.date


def made(call: Callable[..., Any], *args: Any, **kwargs: Any) -> BaseException:
    """What the call raises."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        return error
    raise AssertionError("raises nothing")


AT = dt.datetime(2026, 1, 2, tzinfo=dt.UTC)


@pytest.mark.parametrize(
    ("error", "caught_as", "state"),
    [
        (Coded(7, detail="lost"), Coded, {"detail": "lost"}),
        (Api(404, {"reason": "gone"}), Api, {"status": 404, "body": {"reason": "gone"}}),
        (Slotted((1, 2)), Slotted, {"place": (1, 2)}),
        (Optional("later", AT), Optional, {"retry_at": AT}),
        (Plain((1, 2)), Plain, {"args": ((1, 2),)}),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), ValueError, {"object": b"\xff"}),
        (made(json.loads, "{x"), json.JSONDecodeError, {"doc": "{x", "pos": 1}),
        (made(orjson.loads, "{x"), ValueError, {"doc": "{x", "lineno": 1}),
        (made(int, "x"), ValueError, {}),
        (made(open, "/nope/x"), FileNotFoundError, {"errno": 2, "filename": "/nope/x"}),
        (made(Filled, n="x"), pydantic.ValidationError, {}),
        (made(msgspec.json.decode, b'"x"', type=int), msgspec.ValidationError, {}),
        (made(__import__, "no.such"), ImportError, {"name": "no"}),
        (made(getattr, 1, "x"), AttributeError, {"name": "x"}),
        (Group("several", [ValueError(1), KeyError("k")]), Group, {"message": "several"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_p4_an_error_keeps_its_class_text_and_state(error, caught_as, state):
    """Whatever parameters the constructor has, the flow receives an error of the same class with
    the same text and attributes, and it encodes to the same record again.
    """
    data = encode_error(raised(error))
    rebuilt = decode_error(data)
    assert type(rebuilt) is type(error)
    assert isinstance(rebuilt, caught_as)
    assert str(rebuilt) == str(error)
    assert {name: getattr(rebuilt, name) for name in state} == state
    assert without_traceback(orjson.loads(encode_error(raised(rebuilt)))) == without_traceback(
        orjson.loads(data)
    )


def test_an_error_of_requests_is_caught_as_its_class_and_as_oserror():
    """`requests.ConnectionError`, whose arguments and request have no JSON form, is one."""
    requests = pytest.importorskip("requests")
    error = made(requests.get, "http://127.0.0.1:1/", timeout=1)
    rebuilt = decode_error(encode_error(raised(error)))
    assert type(rebuilt) is type(error) and isinstance(rebuilt, OSError)
    assert str(rebuilt) == str(error) and vars(rebuilt)["response"] is None


class Other:
    pass


@pytest.mark.parametrize(
    ("error", "bases"),
    [
        (Holder("part", Other()), (Holder,)),
        (Lookup(Other()), (Lookup, KeyError, LookupError)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_that_cannot_be_rebuilt_is_caught_by_its_class(error, bases):
    """Where neither arguments nor state make the same text, the flow receives an instance of the
    class that is a TaskFailed, too, with the text of the original.
    """
    data = encode_error(raised(error))
    rebuilt = decode_error(data)
    assert isinstance(rebuilt, (TaskFailed, *bases)) and all(
        isinstance(rebuilt, each) for each in (TaskFailed, *bases)
    )
    assert str(rebuilt) == str(error)
    assert (
        cast(TaskFailed, rebuilt).error_type
        == f"{type(error).__module__}:{type(error).__qualname__}"
    )
    assert without_traceback(orjson.loads(encode_error(rebuilt))) == without_traceback(
        orjson.loads(data)
    )


def test_only_exceptions_are_rebuilt():
    """A KeyboardInterrupt that a body raised is a TaskFailed of its type and text, and stays
    one.
    """
    data = encode_error(raised(KeyboardInterrupt("stop")))
    rebuilt = decode_error(data)
    assert type(rebuilt) is TaskFailed
    assert (rebuilt.error_type, rebuilt.message) == ("builtins:KeyboardInterrupt", "stop")
    assert without_traceback(orjson.loads(encode_error(rebuilt))) == without_traceback(
        orjson.loads(data)
    )


# --------------------------------------------------------------------------- other processes


BODY = """
import json

class Refused(OSError):
    def __init__(self, code, detail):
        super().__init__(code, detail)
        self.detail = detail

class Both(json.JSONDecodeError, LookupError):
    pass

class Grouped(ExceptionGroup):
    pass

class Own(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")
        self.one = one
"""

ELSEWHERE = """
import json, sys
from eventflow.core.errors import TaskFailed
from eventflow.serialization.errors import decode_error
if "import" in sys.argv: import only_the_body
for line in sys.stdin:
    error = decode_error(line.encode())
    names = [kind.__qualname__ for kind in type(error).__mro__]
    state = {name: getattr(error, name, None) for name in ("errno", "detail", "doc", "one")}
    print(json.dumps([str(error), type(error).__name__, names, state]))
"""


def decoded_elsewhere(folder: Path, records: list[bytes], *args: str) -> list[Any]:
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *args],
        input=b"\n".join(records) + b"\n",
        env={**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"},
        cwd=folder,
        capture_output=True,
        timeout=60,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_p4_what_only_a_body_imports_is_the_nearest_class_in_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An error of a module that only a task's body imports is, here and in a process without that
    module, an instance of each base that both have, with its text and attributes.
    """
    (tmp_path / "only_the_body.py").write_text(BODY)
    monkeypatch.syspath_prepend(tmp_path)
    before = frozenset(sys.modules)
    body: Any = importlib.import_module("only_the_body")
    errors = [
        (body.Refused(2, "no"), OSError, {"errno": 2, "detail": "no"}),
        (body.Both("bad", "{", 0), (ValueError, LookupError), {"doc": "{"}),
        (body.Grouped("some", [body.Own(1, 2), KeyError("k")]), ExceptionGroup, {}),
        (body.Own(1, 2), Exception, {"one": 1}),
    ]
    records = [encode_error(raised(error), before.__contains__) for error, _, _ in errors]
    elsewhere = decoded_elsewhere(tmp_path, records)
    assert decoded_elsewhere(tmp_path, records, "import") == elsewhere
    for (error, bases, state), record, other in zip(errors, records, elsewhere, strict=True):
        here = decode_error(record)
        assert isinstance(here, bases) and isinstance(here, TaskFailed)
        assert not isinstance(here, type(error))
        assert other[0] == str(here) and other[1] == type(here).__name__
        assert other[2] == [kind.__qualname__ for kind in type(here).__mro__]
        if type(here) is not TaskFailed:
            text = error.message if isinstance(error, BaseExceptionGroup) else str(error)
            assert str(here) == text
            for name, value in state.items():
                assert getattr(here, name) == value == other[3][name]
        assert len(getattr(here, "exceptions", ())) == len(getattr(error, "exceptions", ()))
    (inner, _) = decode_error(records[2]).exceptions  # type: ignore[attr-defined]
    assert type(inner) is TaskFailed and inner.message == "1 and 2"
    # A flow that imports the module itself has it in every process.
    assert type(decode_error(encode_error(raised(body.Refused(2, "no"))))) is body.Refused


def flow_that_imports() -> None:
    import only_the_body  # pyright: ignore[reportMissingImports]
    from package.inner import part  # pyright: ignore[reportMissingImports]

    def later() -> None:
        import xml.sax

        print(xml.sax, only_the_body, part)

    later()


def test_what_a_flow_imports_in_its_body_is_known():
    """Imports in a flow's body, also in functions inside of it, count as the flow's own."""
    assert imported_by(flow_that_imports) == {
        "only_the_body", "package.inner", "package.inner.part", "xml.sax",
    }  # fmt: skip


MAIN = """
import sys
from eventflow.serialization.errors import decode_error, encode_error
class Oops(ValueError):
    class Inner(KeyError):
        pass
if __name__ in ("__main__", "eventflow_target_shop", "shop", "pkg.shop"):
    for line in sys.stdin:
        error = decode_error(line.encode())
        print(type(error) in (Oops, Oops.Inner), flush=True)
    for error in (Oops("x"), Oops.Inner("y")):
        print(encode_error(error).decode(), flush=True)
"""
LOADERS = {
    "script": ["{folder}/pkg/shop.py"],
    "module": ["-m", "pkg.shop"],
    "file target": [
        "-c", "from eventflow.cli.target import load_module; load_module('pkg/shop.py')",
    ],
    "module target": [
        "-c", "from eventflow.cli.target import load_module; load_module('pkg.shop:app')",
    ],
    "taken name": [
        "-c",
        "import sys, types; sys.modules['shop'] = types.ModuleType('shop');"
        "from eventflow.cli.target import load_module; load_module('pkg/shop.py')",
    ],
}  # fmt: skip


@pytest.mark.parametrize("recorded_by", LOADERS)
def test_an_error_keeps_its_class_by_whatever_name_its_module_was_loaded(
    tmp_path: Path, recorded_by: str
):
    """An error of a file that was `__main__` here, a file target there, and a module elsewhere is
    rebuilt with its class in each of them.
    """
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text("")
    (tmp_path / "pkg" / "shop.py").write_text(MAIN)

    def run(loader: str, lines: list[str]) -> list[str]:
        done = subprocess.run(
            [sys.executable, *(part.format(folder=tmp_path) for part in LOADERS[loader])],
            input="".join(f"{line}\n" for line in lines),
            env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    records = run(recorded_by, [])
    assert len(records) == 2
    for loader in LOADERS:
        assert run(loader, records)[:2] == ["True", "True"], loader


def test_a_record_of_an_earlier_version_gives_what_it_gave():
    """A record without bases is rebuilt from its arguments, or is a TaskFailed, as it was when the
    flow received it first.
    """
    old = {"traceback": "", "message": "7", "type": f"{__name__}:Coded", "args": [7]}
    assert type(decode_error(orjson.dumps(old))) is TaskFailed
    old = old | {"type": f"{__name__}:Plain"}
    assert type(decode_error(orjson.dumps(old))) is Plain
    assert type(decode_error(orjson.dumps(old | {"args": None}))) is TaskFailed


def test_an_error_without_a_text_is_recorded():
    """A `__str__` that raises costs the text, not the record."""
    data = encode_error(raised(Silent()))
    assert orjson.loads(data)["message"] == "<Silent.__str__ raised RuntimeError>"
    assert type(decode_error(data)) is Silent


@pytest.mark.parametrize(
    ("name", "args", "kind"),
    [
        ("eventflow.retry:Permanent", ["no"], Permanent),
        ("eventflow.errors:UsageError", ["no"], UsageError),
        ("eventflow.errors:LineageLost", ["t", "a thread"], OutsideFlowError),
        ("eventflow.checks:CheckFailed", [[]], CheckFailed),
    ],
)
def test_an_error_recorded_before_its_module_moved_is_rebuilt(name, args, kind):
    """Class names that an earlier version recorded refer to the classes of today."""
    message = str(kind(*args))
    data = orjson.dumps({"type": name, "message": message, "args": args, "traceback": ""})
    assert type(decode_error(data)) is kind


def test_s12_no_module_is_imported_to_rebuild_an_error():
    """An error of a module that is not imported is a TaskFailed, and the module stays
    unimported.
    """
    fields = {"type": "this:Zen", "message": "m", "args": ["m"], "traceback": ""}
    assert "this" not in sys.modules
    assert isinstance(decode_error(orjson.dumps(fields)), TaskFailed)
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    "name",
    ["os:system", "builtins:eval", "builtins:SystemExit", "builtins:dict", "os:path.join", "x"],
)
def test_s12_only_exception_classes_are_called(name):
    """A record that names a function, or a class that is no Exception, calls nothing."""
    fields = {"type": name, "message": "m", "args": ["true"], "traceback": ""}
    assert isinstance(decode_error(orjson.dumps(fields)), TaskFailed)


def test_a_record_keeps_where_it_happened():
    """The rebuilt error carries the recorded traceback as its note, causes included, and keeps it
    when recorded again.
    """

    def inner() -> None:
        raise KeyError("deep")

    try:
        try:
            inner()
        except KeyError as error:
            raise ValueError("outer") from error
    except ValueError as error:
        rebuilt = decode_error(encode_error(error))
    (note,) = rebuilt.__notes__
    assert "in test_a_record_keeps_where_it_happened.<locals>.inner" in note
    assert "direct cause" in note
    assert 'raise KeyError("deep")' in note
    assert 'raise KeyError("deep")' in orjson.loads(encode_error(raised(rebuilt)))["traceback"]


def test_the_traceback_is_the_users():
    """Frames of eventflow's own files are left out, and the text is capped at its end."""
    try:
        ResultCodec(None, "job").encode(object())
    except NotStorable as error:
        traceback = orjson.loads(encode_error(error))["traceback"]
    assert "test_errors.py" in traceback
    assert "eventflow/serialization/codecs.py" not in traceback
    long = orjson.loads(encode_error(raised(ValueError("x" * 100_000))))["traceback"]
    assert len(long) == MAX_TRACEBACK


def test_a_cycle_of_causes_ends():
    """An error that is its own cause, a lone surrogate in a message, and a deep recursion are all
    recorded.
    """
    first, second = ValueError("a \ud800"), ValueError("b")
    first.__cause__ = second
    second.__cause__ = first

    def recurse(depth: int) -> None:
        if depth == 0:
            raise first
        recurse(depth - 1)

    try:
        recurse(500)
    except ValueError as error:
        fields = orjson.loads(encode_error(error))
    assert fields["message"] == "a \\ud800"
    assert "  ...\n" in fields["traceback"]


def nested_groups(depth: int) -> Exception:
    error: Exception = ValueError("innermost")
    for level in range(depth):
        error = ExceptionGroup(f"level {level}", list[Exception]([error]))
    return error


def with_state(**state: Any) -> Exception:
    error = ValueError("said")
    vars(error).update(state)
    return error


class NoModule(Exception):
    """An error whose class says nonsense about itself."""

    __module__ = cast(Any, None)


class HidesState(ValueError):
    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        sys.exit(3)


class ExitsInReduce(Exception):
    def __reduce__(self) -> Any:
        sys.exit(3)


def holds_itself() -> Exception:
    error = ValueError()
    error.args = (error,)
    return error


HOSTILE: dict[str, Callable[[], BaseException]] = {
    "groups in groups": lambda: nested_groups(2_000),
    "notes that are no list": lambda: with_state(__notes__=5),
    "notes that raise": lambda: with_state(__notes__=[Silent()]),
    "a class without a module": lambda: NoModule("said"),
    "a state that exits": lambda: HidesState("said"),
    "a reduce that exits": lambda: ExitsInReduce("said"),
    "arguments that hold the error": holds_itself,
    "a lock": lambda: ValueError("said", os.environ, sys.stdin),
    "an exit in a group": lambda: BaseExceptionGroup("said", [SystemExit(3), GeneratorExit()]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_every_error_has_a_record(name: str):
    """Recording and rebuilding never raise, whatever the parts of an error do when they are
    read; the record names type and text.
    """
    error = HOSTILE[name]()
    data = encode_error(raised(error))
    fields = orjson.loads(data)
    assert fields["type"].endswith(f":{type(error).__name__}")
    assert fields["message"] in str(decode_error(data))


@pytest.mark.parametrize("where", ["message", "argument", "attribute", "note", "cause", "group"])
def test_a_record_of_a_huge_text_is_bounded(where: str):
    """A text of 20 MB costs neither 20 MB in the ledger nor seconds of the loop: it is cut, and
    says how long it was. The class stays.
    """
    huge = "x" * 20_000_000
    error: BaseException = {
        "message": lambda: ValueError(huge),
        "argument": lambda: OSError(5, huge),
        "attribute": lambda: with_state(body=huge),
        "note": lambda: with_state(__notes__=[huge]),
        "cause": lambda: ValueError("said"),
        "group": lambda: ExceptionGroup("all", [ValueError(huge), ValueError(huge)]),
    }[where]()
    if where == "cause":
        error.__cause__ = ValueError(huge)
    data = encode_error(raised(error))
    assert len(data) < 4 * MAX_DETAIL
    rebuilt = decode_error(data)
    assert isinstance(rebuilt, type(error))
    if where == "message":
        assert str(rebuilt).endswith("… (20000000 characters)")


@pytest.mark.parametrize("at", range(-60, 20, 7))
def test_a_secret_that_a_cut_divides_is_in_no_excerpt(at: int):
    """Neither the whole of a secret nor its beginning stays where a text is cut."""
    secrets, secret = KnownSecrets(), "s3cret-of-thirty-two-characters!"
    secrets.register(secret)
    text = "." * (1_000 + at) + secret + "." * 5_000
    cut = secrets.excerpt(text, 1_000)
    assert "s3c" not in cut
    assert cut.endswith(f"… ({len(text)} characters)") and len(cut) < 1_100
    assert secrets.excerpt(secret * 3, 1_000) == "***" * 3
