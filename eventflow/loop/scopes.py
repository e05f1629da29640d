"""What a flow-made task is called, and the calls it makes: a scope per task, an ordinal or a key per call.

A task is named by its coroutine's qualname and a digest of its plain arguments. lineage.py asks. Two processes must come to the
same name for the same task, whatever their hash seeds, Python version or the order in which a set was walked; so only arguments
count, and of those only what has one JSON form.
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
    """The calls one flow-made task has made so far: what makes the next claim's ordinal."""

    __slots__ = ("counts", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        self.counts: dict[str, int] = {}

    def claim(self, name: str, key: str | None = None) -> str:
        """The identity of the next call of `name` from here: by ordinal, or by `key`, which must not repeat."""
        if key is None:
            ordinal = self.counts.get(name, 0)
            self.counts[name] = ordinal + 1
            return f"{self.path}{name}#{ordinal}"
        label = f"{name}[{key}]"
        if label in self.counts:
            raise UsageError(
                f"{label} was already called from this part of the flow; a key names one call, make it unique"
            )
        self.counts[label] = 1
        return self.path + label

    def child(self, label: str) -> str:
        """The path of a new scope below this one: equal labels are told apart by creation order."""
        ordinal = self.counts.get(label, 0)
        self.counts[label] = ordinal + 1
        return f"{self.path}{label}.{ordinal}/" if ordinal else f"{self.path}{label}/"


def label(coro: Any, *, deep: bool = False) -> str:
    """The name of a coroutine about to become a task. `deep`: what its closure holds counts too, as far as it is plain.

    A journaled call's own coroutine carries its claim (`call.claim`), which is a better name than any digest.
    """
    frame = getattr(coro, "cr_frame", None)
    if frame is None:
        return _safe(getattr(coro, "__qualname__", type(coro).__qualname__))
    code: CodeType = coro.cr_code
    values = frame.f_locals
    call = values.get("call")
    if call is not None and (claim := getattr(call, "claim", None)) is not None:
        return _safe(f"={claim}")
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
    """A slash would look like a scope."""
    return name.replace("<locals>.", "").replace("/", "|")


def _digest(arguments: dict[str, Any]) -> str:
    try:
        plain = orjson.dumps(arguments, _plainer, _NON_STR)
    except TypeError:  # some of them have no JSON form: the others tell
        plain = b"".join(_plain(name, value) for name, value in arguments.items())
    return blake2b(plain, digest_size=4).hexdigest()


def _plain(name: str, value: Any) -> bytes:
    try:
        return orjson.dumps((name, value), _plainer, _NON_STR)
    except TypeError:
        return b""


def _plainer(value: Any) -> Any:
    """orjson's hook: records that msgspec knows. A set has no order that two processes share."""
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
    """Whether the task under creation is one of `as_completed`'s, which walks a set. For the loop's `create_task`."""
    frame = sys._getframe(2)  # pyright: ignore[reportPrivateUsage]
    for _ in range(4):
        if frame is None:
            return False
        if frame.f_code in _UNORDERED:
            return True
        frame = frame.f_back
    return False
