"""Errors as records: what a task or flow raised, as bytes, and the error that the flow receives.

The engine records an error and gives the flow the rebuilt one, live and in a replay, so that
`except` takes the same branch in every process. A process may know fewer classes than another: a
module that only a task's body imports is not there after a restart. So `encode_error` decides which
classes every process can make, records the chain of these, and `decode_error` makes the nearest
one. No class is ever imported by name (S12), and names survive that a module is `__main__` here and
`shop` there.
"""

import dis
import inspect
import linecache
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, cast

import msgspec
import orjson

from eventflow.core.declarations import format_location
from eventflow.core.errors import NotStorable, TaskFailed, error_text, value_or_none
from eventflow.core.secrets import KNOWN_SECRETS
from eventflow.serialization.tagged_json import from_tagged, to_tagged, type_name

MAX_TRACEBACK = 16 * 1024
"""Characters of the traceback of an error that are stored, from its end, where the error is."""

MAX_DETAIL = 64 * 1024
"""Bytes of JSON of an error's arguments, and of each attribute, that are stored; characters of its
message.
"""

MAX_GROUP_DEPTH = 20
"""Levels of groups of errors in groups that are stored; below, a group has a message only."""

TARGET_PREFIX = "eventflow_target_"
"""Prefix of the module name of a file whose own name another module has (cli/target.py)."""

_OWN_FILES = str(Path(__file__).parent.parent) + os.sep
_REMOTE = "recorded traceback:\n"
_UNSET = object()


def encode_error(
    error: BaseException, is_imported_everywhere: Callable[[str], bool] | None = None
) -> bytes:
    """JSON `{"type": "module:Qual.Name", "message", "args", "attributes", "bases", "traceback"}`,
    and `"exceptions"` of a group.

    `bases`: the class and its bases, as far as every process can make them, the nearest first.
    Secrets that the process knows are masked in what it says: the flow, too, gets them masked.
    `is_imported_everywhere` tells of a module name whether every process that runs the flow has
    imported it; by default it has. `args` is null, and an attribute is left out, if it has no
    lossless JSON form or is over MAX_DETAIL. Of an error whose parts raise when they are read, type
    and message are recorded: this function does not raise.
    """
    is_imported = is_imported_everywhere or _anywhere
    data = value_or_none(_encode, error, is_imported)
    return data if data is not None else orjson.dumps(_describe_briefly(error, is_imported))


def decode_error(data: bytes) -> BaseException:
    """The recorded error, with the recorded traceback as its note.

    It has the recorded class if that can be rebuilt with the same text, from its arguments or from
    its state. Otherwise it is an instance of TaskFailed and of the nearest recorded bases, with the
    text, arguments and attributes of the original. Without any such base it is
    TaskFailed(type, message).
    """
    return _rebuild(orjson.loads(data))


def _encode(error: BaseException, is_imported_everywhere: Callable[[str], bool]) -> bytes:
    return orjson.dumps(_describe(error, MAX_TRACEBACK, is_imported_everywhere))


def _anywhere(_module: str) -> bool:
    return True


# --------------------------------------------------------------------------- recording


def _describe(
    error: BaseException,
    max_length: int,
    is_imported_everywhere: Callable[[str], bool],
    depth: int = 0,
) -> dict[str, Any]:
    kind = _error_class(type(error))
    message = _kept_message(error)
    traceback = KNOWN_SECRETS.remove_from(_render(error, message))
    traceback = _utf8(traceback[-max_length:])
    recorded = vars(error).get("_recorded") if isinstance(error, TaskFailed) else None
    if recorded is not None:  # replaces another error: record that one again
        return recorded | {"traceback": traceback}
    members: tuple[BaseException, ...] = (
        getattr(error, "exceptions", ()) if kind.is_group and depth < MAX_GROUP_DEPTH else ()
    )
    fields = {
        "type": kind.name,
        "message": message,
        "args": None if members else _detail(_arguments(error, kind)),
        "attributes": _attributes(error, kind),
        "bases": [name for name, module in kind.bases if is_imported_everywhere(module)],
        "traceback": traceback,
    }
    if members:
        share = max(512, max_length // len(members))
        fields["exceptions"] = [
            _describe(member, share, is_imported_everywhere, depth + 1) for member in members
        ]
    if type(error).__module__ == "__main__":
        fields["module"] = "__main__"
    return fields


def _describe_briefly(
    error: BaseException, is_imported_everywhere: Callable[[str], bool]
) -> dict[str, Any]:
    """The description of an error whose parts cannot be read."""
    kind = type(error)
    name = value_or_none(_class_name, kind)
    message = value_or_none(_kept_message, error)
    known = value_or_none(_bases_by_name, kind)
    return {
        "type": name or f"unknown:{kind.__name__}",
        "message": message or "",
        "args": None,
        "attributes": {},
        "bases": [base for base, module in known or () if is_imported_everywhere(module)],
        "traceback": "",
    }


class _ErrorClass(msgspec.Struct, frozen=True):
    """What the description of every error of a class says."""

    name: str
    is_group: bool
    is_validation_error: bool
    bases: tuple[tuple[str, str], ...]
    fields: tuple[str, ...]


@lru_cache(maxsize=1024)
def _error_class(kind: type[BaseException]) -> _ErrorClass:
    return _ErrorClass(
        name=_class_name(kind),
        is_group=issubclass(kind, BaseExceptionGroup),
        is_validation_error=_is_validation_error(kind),
        bases=_bases_by_name(kind),
        fields=_data_descriptors(kind),
    )


@lru_cache(maxsize=1024)
def _bases_by_name(kind: type[BaseException]) -> tuple[tuple[str, str], ...]:
    """The class and its bases that can be found by their names, each with its module here."""
    return tuple(
        (name, base.__module__)
        for base in kind.__mro__
        if issubclass(base, Exception)
        and (base is not Exception or kind is Exception)
        and _find_error_class(name := _class_name(base), base.__module__) is base
    )


def _message(error: BaseException) -> str:
    is_group = isinstance(error, BaseExceptionGroup)
    return error_text(cast(Any, error).message if is_group else error)


def _kept_message(error: BaseException) -> str:
    return _utf8(KNOWN_SECRETS.excerpt(_message(error), MAX_DETAIL))


def _arguments(error: BaseException, kind: _ErrorClass) -> list[Any]:
    """What the class makes an equal error from, if its constructor is an ordinary one."""
    args = list(error.args)
    if isinstance(error, OSError) and len(args) == 2 and error.filename is not None:
        args += (
            [error.filename] if error.filename2 is None else [error.filename, None, error.filename2]
        )
    if kind.is_validation_error:
        reduced = value_or_none(error.__reduce__)
        return args if reduced is None else [*cast(Any, reduced)[1]]
    return args


def _detail(value: Any) -> Any:
    """The tagged JSON data of a value, secrets masked; None if it has none or is too large."""
    for part in cast(list[Any], value) if isinstance(value, list) else (value,):
        if isinstance(part, (str, bytes)) and len(part) > MAX_DETAIL:
            return None  # before a text is searched for secrets, which may take seconds
    try:
        form = to_tagged(value, "")
        masked = KNOWN_SECRETS.remove_from_data(form)
        if masked is not form and masked != form and value_or_none(from_tagged, masked) is None:
            return None  # it was in a value that is not text
        return masked if len(orjson.dumps(masked)) <= MAX_DETAIL else None
    except (NotStorable, TypeError, RecursionError):
        return None


def _attributes(error: BaseException, kind: _ErrorClass) -> dict[str, Any]:
    """The state of the error besides its arguments: its `__dict__`, slots, and fields such as
    `errno`.
    """
    values = {
        _utf8(name): value for name, value in vars(error).items() if not name.startswith("__")
    }
    for name in kind.fields:
        try:
            value = getattr(error, name, _UNSET)
        except BaseException:  # user code: what cannot be read is left out
            continue
        if value is not _UNSET:
            values[name] = value
    forms: dict[str, Any] = {}
    for name, value in values.items():
        if value is None:
            forms[name] = None
        elif (form := _detail(value)) is not None:
            forms[name] = form
    return forms


@lru_cache(maxsize=1024)
def _data_descriptors(kind: type[BaseException]) -> tuple[str, ...]:
    """The fields that C code or `__slots__` keep outside of `__dict__`. Not `obj` of an
    AttributeError, which is no part of the error, nor the members of a group.
    """
    return tuple(
        name
        for base in kind.__mro__
        if base is not BaseException and base is not object
        for name, member in vars(base).items()
        if (inspect.ismemberdescriptor(member) or inspect.isgetsetdescriptor(member))
        and not name.startswith("__")
        and name not in ("obj", "exceptions", "message")
    )


def _utf8(text: str) -> str:
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


def _render(error: BaseException, message: str) -> str:
    """The traceback of an error with this message as Python prints it, without the frames of
    eventflow's own files and without carets: parsing each line for carets makes a failing task ten
    times as expensive as a succeeding one.
    """
    parts: list[str] = []
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen and len(seen) < 20:
        seen.add(id(link))
        frames = _render_frames(link)
        text = message if link is error else _kept_message(link)
        parts.append(f"{frames}{type_name(link)}: {text}{_render_notes(link)}\n")
        if link.__cause__ is not None:
            parts.append(
                "\nThe above exception was the direct cause of the following exception:\n\n"
            )
            link = link.__cause__
        elif link.__context__ is not None and not link.__suppress_context__:
            parts.append(
                "\nDuring handling of the above exception, another exception occurred:\n\n"
            )
            link = link.__context__
        else:
            link = None
    return "".join(reversed(parts))


def _render_notes(error: BaseException) -> str:
    notes: Any = getattr(error, "__notes__", None)
    if not isinstance(notes, list):
        return ""
    return "".join(
        f"\n{KNOWN_SECRETS.excerpt(str(note), MAX_DETAIL)}" for note in cast(list[Any], notes)
    )


def _render_frames(error: BaseException) -> str:
    lines: list[str] = []
    step = error.__traceback__
    while step is not None:
        code = step.tb_frame.f_code
        if not code.co_filename.startswith(_OWN_FILES):
            lines.append(
                f'  File "{code.co_filename}", line {step.tb_lineno}, in {code.co_qualname}\n'
            )
            if source := linecache.getline(
                code.co_filename, step.tb_lineno, step.tb_frame.f_globals
            ).strip():
                lines.append(f"    {source}\n")
        step = step.tb_next
    if len(lines) > 120:  # infinite recursion: both ends suffice
        lines[60:-60] = ["  ...\n"]
    return "Traceback (most recent call last):\n" + "".join(lines) if lines else ""


_INSTALLED = r"[/\\]site-packages[/\\]|[/\\]lib[/\\]python\d"
_FRAME = r'(?m)^  File "(.+)", line (\d+), in '


def error_summary(fields: Mapping[str, Any]) -> str:
    """`ValueError: message` of a recorded error, for one line of the log."""
    return f"{fields.get('type')}: {fields.get('message')}".removeprefix("builtins:")


def raised_at(fields: Mapping[str, Any]) -> str | None:
    """`file:line` of the recorded error: the innermost line of the user's own code, else of any."""
    frames: list[tuple[str, str]] = re.findall(_FRAME, fields.get("traceback") or "")
    own = [each for each in frames if not re.search(_INSTALLED, each[0])]
    for file, line in reversed(own or frames):
        return format_location(file, int(line))
    return None


# --------------------------------------------------------------------------- rebuilding


def _rebuild(fields: dict[str, Any]) -> BaseException:
    error = _make(fields)
    if fields["traceback"]:
        error.add_note(_REMOTE + fields["traceback"].rstrip())
    return error


def _make(fields: dict[str, Any]) -> BaseException:
    name: str = fields["type"]
    if "bases" not in fields:
        return _make_as_before(fields)
    found: list[type[Exception]] = []
    for each in cast(list[str], fields["bases"]):
        kind = _find_error_class(each, fields.get("module") if each == name else None)
        if kind is not None:
            found.append(kind)
            if each == name and (error := _instance(kind, fields)) is not None:
                return error
    while found:
        nearest = tuple(
            kind
            for kind in found
            if not any(other is not kind and issubclass(other, kind) for other in found)
        )
        error = value_or_none(_replacement, nearest, fields)
        if error is not None:
            return error
        found = found[1:]
    return _plain_replacement(fields)


def _make_as_before(fields: dict[str, Any]) -> BaseException:
    """The error that version 0.1.0, which recorded no bases, gave the flow."""
    kind = _find_error_class(fields["type"])
    args = _recorded_args(fields)
    if kind is not None and args is not None:
        error = value_or_none(kind, *args)
        if error is not None and _has_text(error, kind, fields):
            return error
    return _plain_replacement(fields)


def _plain_replacement(fields: dict[str, Any]) -> TaskFailed:
    error = TaskFailed(fields["type"], fields["message"])
    vars(error)["_recorded"] = _without_traceback(fields)
    return error


def _without_traceback(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "traceback"}


def _instance(kind: type[Exception], fields: dict[str, Any]) -> Exception | None:
    """The error of this class with the recorded text, or None if neither its arguments nor its
    state make it.
    """
    args = _recorded_args(fields)
    if args is not None:
        make = cast(Any, kind).from_exception_data if _is_validation_error(kind) else kind
        error = value_or_none(make, *args)
        if error is not None and _has_text(error, kind, fields):
            _set_state(error, fields)
            if _has_text(error, kind, fields):
                return error
    error = value_or_none(_make_without_init, kind, fields)
    return error if error is not None and _has_text(error, kind, fields) else None


def _recorded_args(fields: dict[str, Any]) -> list[Any] | None:
    if "exceptions" in fields:
        return [fields["message"], [_rebuild(member) for member in fields["exceptions"]]]
    args = fields["args"]
    return args if args is None or "bases" not in fields else from_tagged(args)


def _has_text(error: BaseException, kind: type[Exception], fields: dict[str, Any]) -> bool:
    return type(error) is kind and _utf8(_message(error)) == fields["message"]


def _make_without_init(kind: type[Exception], fields: dict[str, Any]) -> Exception:
    """An error whose constructor is not called, as `copy` and `pickle` make objects.

    Raises what the C constructor of its base raises.
    """
    base = next(each for each in kind.__mro__ if each.__module__ == "builtins")
    args = _recorded_args(fields)
    if "exceptions" in fields:
        error: Exception = cast(Any, base).__new__(kind, *cast(list[Any], args))
    else:
        error = cast(Any, base).__new__(kind)
        error.args = (fields["message"],) if args is None else tuple(args)
    _set_state(error, fields)
    return error


def _set_state(error: Exception, fields: dict[str, Any]) -> None:
    outside = _data_descriptors(type(error))
    for name, form in fields.get("attributes", {}).items():
        value = from_tagged(form)
        if name not in outside:
            vars(error)[name] = value
        elif value is not None:  # None is their default, and OSError would print it
            value_or_none(setattr, error, name, value)


def _replacement(bases: tuple[type[Exception], ...], fields: dict[str, Any]) -> Exception:
    """A TaskFailed that is an instance of `bases`, too, with the text of the original."""
    error = cast(TaskFailed, _make_without_init(_replacement_class(fields["type"], bases), fields))
    state = vars(error)
    state["error_type"] = fields["type"]
    state["message"] = fields["message"]
    state["_recorded"] = _without_traceback(fields)
    return error


@lru_cache(maxsize=256)
def _replacement_class(name: str, bases: tuple[type[Exception], ...]) -> type[Exception]:
    module, _, path = name.partition(":")
    namespace = {"__str__": _recorded_text, "__module__": module, "__qualname__": path}
    return type(path.rpartition(".")[2], (TaskFailed, *bases), namespace)


def _recorded_text(error: Exception) -> str:
    return vars(error)["_recorded"]["message"]


def _is_validation_error(kind: type[BaseException]) -> bool:
    """Whether it is pydantic's, which has no constructor."""
    return kind.__name__ == "ValidationError" and hasattr(kind, "from_exception_data")


# --------------------------------------------------------------------------- names of classes

_MOVED_MODULES = {
    "eventflow.checks": "eventflow.sdk.checks",
    "eventflow.errors": "eventflow.core.errors",
    "eventflow.retry": "eventflow.core.retry",
}
_RENAMED_CLASSES = {"LineageLost": "OutsideFlowError"}
"""New names of classes that a ledger of an earlier version recorded."""


def _class_name(kind: type[BaseException]) -> str:
    """`module:Qual.Name`, the module by the name that it has when it is imported."""
    module = sys.modules.get(kind.__module__)
    return f"{_import_name(kind.__module__, module)}:{kind.__qualname__}"


def _import_name(name: str, module: ModuleType | None) -> str:
    """`shop` for the file shop.py, also where it is `__main__` or a target with a prefix."""
    if name != "__main__":
        return name.removeprefix(TARGET_PREFIX)
    spec = getattr(module, "__spec__", None)
    if spec is not None:  # python -m package.module
        return spec.name
    path = getattr(module, "__file__", None)
    return name if path is None else Path(path).stem


def _find_error_class(name: str, literal: str | None = None) -> type[Exception] | None:
    """The class `module:Qual.Name`, if its module is already imported (S12), by whatever name.

    `literal` is the name that the module had in the process that recorded the error.
    """
    module, _, path = name.partition(":")
    if module in _MOVED_MODULES:
        module, path = _MOVED_MODULES[module], _RENAMED_CLASSES.get(path, path)
    for known in _modules_named(module, literal):
        if (kind := _error_class_in(known, path)) is not None:
            return kind
    if module in sys.modules:
        return None
    kinds = {_error_class_in(known, path) for known in _modules_like(module)} - {None}
    return kinds.pop() if len(kinds) == 1 else None


def _error_class_in(module: ModuleType, path: str) -> type[Exception] | None:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) and issubclass(found, Exception) else None


def _modules_named(name: str, literal: str | None) -> Iterator[ModuleType]:
    """The imported modules that are the module `name`, the likeliest first."""
    imported = sys.modules
    if literal in imported and _import_name(literal, imported[literal]) == name:
        yield imported[literal]
    for alias in (name, TARGET_PREFIX + name, "__main__"):
        module = imported.get(alias)
        if module is not None and name in (alias, _import_name(alias, module)):
            yield module


def _modules_like(name: str) -> Iterator[ModuleType]:
    """The imported modules that may be it: `package.shop` is `shop` where its file was named."""
    for alias, module in [*sys.modules.items()]:
        known = _import_name(alias, module)
        if known.endswith(f".{name}") or name.endswith(f".{known}"):
            yield module


@lru_cache(maxsize=1024)
def imported_by(fn: Callable[..., Any]) -> frozenset[str]:
    """The modules that a function imports in its body, nested functions included.

    A flow does so in every process, before it catches an error of such a module.
    """
    code = getattr(inspect.unwrap(fn), "__code__", None)
    return frozenset() if code is None else _imported_by(code)


def _imported_by(code: CodeType) -> frozenset[str]:
    found: set[str] = set()
    module = ""
    for step in dis.get_instructions(code):
        if step.opname == "IMPORT_NAME":
            module = str(step.argval)
            found.add(module)
        elif step.opname == "IMPORT_FROM":
            found.add(f"{module}.{step.argval}")
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= _imported_by(constant)
    return frozenset(found)
