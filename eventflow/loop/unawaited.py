"""Tells a flow's host of coroutines that flow code made and never awaited.

Python reports such a coroutine as a RuntimeWarning without a line when it is freed. While a worker
runs, `UnawaitedWatcher` takes the place of the function that prints it: what is freed in a step of
a flow goes to the flow's host, everything else to the previous function. The steps of a flow run
with origin tracking (`ORIGIN_DEPTH`), so that the line of the call is known.
"""

import warnings
from asyncio import events
from collections.abc import Callable
from types import CodeType
from typing import Any, cast

from eventflow.core.declarations import format_location, is_own_file

ORIGIN_DEPTH = 2
"""Frames of the caller that a coroutine remembers: one of eventflow (`Task.__call__`), then the
user's. Each costs a tenth of a microsecond per coroutine.
"""

_HOOK = "_warn_unawaited_coroutine"


class UnawaitedWatcher:
    """The function that CPython calls with a coroutine that was freed without being awaited."""

    def __init__(self, previous: Callable[[Any], None], loop_type: type[Any]) -> None:
        self._previous = previous
        self._loop_type = loop_type
        self.users: int = 1

    def __call__(self, coro: Any) -> None:
        loop = events._get_running_loop()
        frame = getattr(coro, "cr_frame", None)
        # A task call may also be freed with the frames of a run that left memory.
        host: Any = None if frame is None else frame.f_locals.get("self")
        if hasattr(host, "on_unawaited"):
            host.on_unawaited(coro)
        elif type(loop) is self._loop_type:
            cast(Any, loop).host.on_unawaited(coro)
        else:
            self._warn(coro)

    def _warn(self, coro: Any) -> None:
        """What Python does, with the line that drops the coroutine instead of one of ours."""
        if self._previous.__module__ != warnings.__name__:
            self._previous(coro)
            return
        text = f"coroutine {coro.__qualname__!r} was never awaited"
        warnings.warn(text, RuntimeWarning, stacklevel=3, source=coro)

    def remove(self) -> None:
        """Once for each `watch_unawaited`; the last one puts the previous function back."""
        self.users -= 1
        if not self.users and getattr(warnings, _HOOK, None) is self:
            setattr(warnings, _HOOK, self._previous)


def watch_unawaited(loop_type: type[Any]) -> UnawaitedWatcher:
    """Installs the watcher, or joins the one that another worker of this process installed."""
    previous: Any = getattr(warnings, _HOOK)
    if isinstance(previous, UnawaitedWatcher):
        previous.users += 1
        return previous
    watcher = UnawaitedWatcher(previous, loop_type)
    setattr(warnings, _HOOK, watcher)
    return watcher


def origin(coro: Any) -> str | None:
    """`file:line` of the user's code that made a coroutine; None if it is not known."""
    for file, line, _ in getattr(coro, "cr_origin", None) or ():
        if not is_own_file(file):
            return format_location(file, line)
    return None


def called_name(coro: Any) -> str:
    """What the user called: the name of the task, the flow, or the coroutine function."""
    frame = getattr(coro, "cr_frame", None)
    call = None if frame is None else frame.f_locals.get("call")
    for attribute in ("task", "flow"):
        if (target := getattr(call, attribute, None)) is not None:
            return f"{attribute} {target.name!r}"
    owner = None if frame is None else frame.f_locals.get("self")
    if (map_name := getattr(owner, "map_name", None)) is not None:
        return f"{map_name}.map()"
    if coro.__qualname__.startswith("task "):  # called in another task's body
        return f"task {coro.__qualname__[5:]!r}"
    code: CodeType = coro.cr_code
    return f"{code.co_qualname}()"
