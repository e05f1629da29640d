"""Deterministic names: a scope per flow-made task, a call key per call.

`FlowLoop` names each task by its coroutine's qualname and a digest of its plain arguments. Two
processes must derive the same name for the same task, whatever their hash seeds, their Python
version, or the order in which a set was iterated. So only arguments count, and of those only the
ones with a canonical JSON form. Names are stored with journals: a changed name makes old journals
diverge.
"""

import asyncio
import sys
from hashlib import blake2b
from types import CodeType
from typing import Any

import msgspec
import orjson

from eventflow.core.errors import UsageError

_NON_STR = orjson.OPT_NON_STR_KEYS


class Scope:
    """Counts the calls of one flow-made task, by name."""

    __slots__ = ("counts", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        self.counts: dict[str, int] = {}

    def call_key(self, name: str, key: str | None = None) -> str:
        """The journal's key of the next call of `name`: with an ordinal, or with `key`, which must
        not repeat.

        Raises UsageError when it does.
        """
        if key is None:
            ordinal = self.counts.get(name, 0)
            self.counts[name] = ordinal + 1
            return f"{self.path}{name}#{ordinal}"
        keyed = f"{name}[{key}]"
        if keyed in self.counts:
            raise UsageError(
                f"{keyed} was already called from this part of the flow; a key names one call, "
                "make it unique"
            )
        self.counts[keyed] = 1
        return self.path + keyed

    def child_path(self, label: str) -> str:
        """The path of a new scope below this one. Equal labels get an ordinal, in
        creation order.
        """
        ordinal = self.counts.get(label, 0)
        self.counts[label] = ordinal + 1
        return f"{self.path}{label}.{ordinal}/" if ordinal else f"{self.path}{label}/"


def task_label(coro: Any, *, deep: bool = False) -> str:
    """The name of a coroutine that becomes a task. With `deep` the plain values of its closure
    count too.

    A journaled call's coroutine (`CallPerformer.perform`) is named by its call key instead of a
    digest.
    """
    frame = getattr(coro, "cr_frame", None)
    if frame is None:
        return _safe(getattr(coro, "__qualname__", type(coro).__qualname__))
    code: CodeType = coro.cr_code
    values = frame.f_locals
    call = values.get("call")
    if call is not None and (call_key := getattr(call, "call_key", None)) is not None:
        return _safe(f"={call_key}")
    count = (
        code.co_argcount
        + code.co_kwonlyargcount
        + bool(code.co_flags & 4)
        + bool(code.co_flags & 8)
    )
    names = code.co_varnames[:count]
    if deep:
        names += code.co_freevars
    name = _safe(coro.__qualname__)
    return (
        f"{name}:{_digest({name: values[name] for name in names if name in values})}"
        if names
        else name
    )


def _safe(name: str) -> str:
    """Replaces slashes, which separate scopes."""
    return name.replace("<locals>.", "").replace("/", "|")


def _digest(arguments: dict[str, Any]) -> str:
    try:
        plain = orjson.dumps(arguments, _plainer, _NON_STR)
    except TypeError:  # some arguments have no JSON form: digest the others
        plain = b"".join(_plain(name, value) for name, value in arguments.items())
    return blake2b(plain, digest_size=4).hexdigest()


def _plain(name: str, value: Any) -> bytes:
    try:
        return orjson.dumps((name, value), _plainer, _NON_STR)
    except TypeError:
        return b""


def _plainer(value: Any) -> Any:
    """orjson's `default`: encodes structs and bytes. Sets are refused: their order differs by
    process.
    """
    if isinstance(value, msgspec.Struct):
        return msgspec.structs.asdict(value)
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError


_UNORDERED: frozenset[CodeType] = frozenset(
    function.__code__
    for function in (
        asyncio.as_completed,
        getattr(getattr(asyncio.tasks, "_AsCompletedIterator", None), "__init__", None),
    )
    if function is not None and hasattr(function, "__code__")
)


def from_unordered_iteration() -> bool:
    """Whether `as_completed`, which iterates a set, is creating a task. Called by
    `FlowLoop.create_task` only.
    """
    frame = sys._getframe(2)  # pyright: ignore[reportPrivateUsage]
    for _ in range(4):
        if frame is None:
            return False
        if frame.f_code in _UNORDERED:
            return True
        frame = frame.f_back
    return False
