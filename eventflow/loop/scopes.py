"""Deterministic names: a scope per flow-made task, a call key per call.

`FlowLoop` names each task by its coroutine's qualname and a digest of its plain arguments. Two
processes must derive the same name for the same task, whatever their hash seeds, their Python
version, or the order in which a set was iterated. So only arguments count, and of those only the
ones with a canonical JSON form (core/canonical.py). Names are stored with journals: a changed name
makes old journals diverge, so a resumed run asks for `earlier` names, too.
"""

import asyncio
import sys
from hashlib import blake2b
from types import CodeType
from typing import Any

import msgspec
import orjson

from eventflow.core.canonical import to_sorted_builtins
from eventflow.core.errors import UsageError
from eventflow.core.large_values import MIN_LARGE_BYTES, LargeValues

_SORTED = orjson.OPT_NON_STR_KEYS | orjson.OPT_SORT_KEYS
_NO_JSON = (TypeError, ValueError, OverflowError, RecursionError)


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


def task_label(
    coro: Any, *, deep: bool = False, earlier: bool = False, large: LargeValues | None = None
) -> str:
    """The name of a coroutine that becomes a task. With `deep` the plain values of its closure
    count too. `earlier`: the name that version 0.1.0 gave, before sets and models counted.
    `large`: hashes of large arguments, which their run keeps.

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
    arguments = {name: values[name] for name in names if name in values}
    if not names:
        return name
    if earlier:
        return f"{name}:{_earlier_digest(arguments)}"
    return f"{name}:{_digest(arguments, large if large is not None else LargeValues())}"


def _safe(name: str) -> str:
    """Replaces slashes, which separate scopes."""
    return name.replace("<locals>.", "").replace("/", "|")


def _digest(arguments: dict[str, Any], large: LargeValues) -> str:
    if not large.has_any(arguments.values()):
        try:
            plain = orjson.dumps(arguments, _canonical, _SORTED)
            if len(plain) < MIN_LARGE_BYTES:
                return blake2b(plain, digest_size=4).hexdigest()
        except _NO_JSON:  # some arguments have no JSON form: digest the others
            pass
    plain = b"".join(_plain(name, value, large) for name, value in arguments.items())
    return blake2b(plain, digest_size=4).hexdigest()


def _plain(name: str, value: Any, large: LargeValues) -> bytes:
    if (known := large.find(value)) is not None:
        return known
    try:
        plain = orjson.dumps((name, value), _canonical, _SORTED)
    except _NO_JSON:
        return b""
    if len(plain) < MIN_LARGE_BYTES:
        return plain
    known = blake2b(orjson.dumps(value, _canonical, _SORTED), digest_size=16).digest()
    large.add(value, known)
    return known


def _canonical(value: Any) -> Any:
    """orjson's `default`: bytes, and what msgspec and pydantic can write."""
    if isinstance(value, bytes):
        return value.hex()
    return to_sorted_builtins(value)


def _earlier_digest(arguments: dict[str, Any]) -> str:
    try:
        plain = orjson.dumps(arguments, _earlier_default, orjson.OPT_NON_STR_KEYS)
    except TypeError:
        plain = b"".join(_earlier_plain(name, value) for name, value in arguments.items())
    return blake2b(plain, digest_size=4).hexdigest()


def _earlier_plain(name: str, value: Any) -> bytes:
    try:
        return orjson.dumps((name, value), _earlier_default, orjson.OPT_NON_STR_KEYS)
    except TypeError:
        return b""


def _earlier_default(value: Any) -> Any:
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
