"""Tells a flow's host of coroutines that flow code made and never awaited.

Python reports such a coroutine as a RuntimeWarning without a line when it is freed. While a worker
runs, `UnawaitedWatcher` takes the place of the function that prints it: what is freed in a step of
a flow goes to the flow's host, everything else to the previous function. The line is that of the
call, which tasks and flows remember (`call_site`), or the one that the flow executes when the
coroutine is freed: usually the same, since most forgotten coroutines are not kept.
"""

import inspect
import sys
import warnings
from asyncio import events
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, cast

from eventflow.core.declarations import format_location, is_own_file

CallSite = tuple[CodeType, int]
"""Code, and the offset in it of the instruction that makes a call."""

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


def call_site() -> CallSite:
    """Where the caller of the caller is. The line is looked up only if somebody asks."""
    frame = sys._getframe(2)  # pyright: ignore[reportPrivateUsage]
    return frame.f_code, frame.f_lasti


def origin(coro: Any) -> str | None:
    """`file:line` of the user's code that made a coroutine, which is being freed; None if it is not
    known.
    """
    if (place := made_at(coro)) is not None:
        return place
    running: FrameType | None = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while running is not None:
        code = running.f_code
        if code.co_flags & inspect.CO_COROUTINE and not is_own_file(code.co_filename):
            return format_location(code.co_filename, running.f_lineno)
        running = running.f_back
    return None


def made_at(coro: Any) -> str | None:
    """`file:line` of the call that made a coroutine; None if the call did not remember it."""
    frame = getattr(coro, "cr_frame", None)
    call = None if frame is None else frame.f_locals.get("call")
    site: CallSite | None = getattr(call, "site", None)
    if site is not None:
        code, offset = site
        for start, end, line in code.co_lines():
            if start <= offset < end and line is not None:
                return format_location(code.co_filename, line)
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
