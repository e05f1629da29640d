"""Whether flow code cleans up after a cancel, or has swallowed it and continues.

Clean-up is what runs in an `except` or `finally` block that the cancel has entered, and every
asyncio task that is made there. A broad `except`, or `asyncio.wait_for` before Python 3.12, takes
the cancel and returns to the flow's normal course: that is none. engine/flow_calls.py asks.
"""

import asyncio
import inspect
import sys
from typing import Any, cast

MAX_GROUP_FRAMES = 8
"""Frames between a future that a task group waits for and the group's `__aexit__`, at most."""


class Cleanup:
    """Of one flow, since its cancel was delivered: which of its tasks were made to clean up, and
    which have begun to wait for something else.
    """

    __slots__ = ("_tasks", "_waits_as_before")

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any] | None] = set()
        self._waits_as_before: set[asyncio.Task[Any] | None] = set()

    def is_ongoing(self, task: "asyncio.Task[Any] | None") -> bool:
        """Whether the current step, of this task, cleans up."""
        return handles_cancel() or task in self._tasks

    def note_new(self, task: "asyncio.Task[Any]", maker: "asyncio.Task[Any] | None") -> None:
        if self.is_ongoing(maker):
            self._tasks.add(task)

    def note_wait(self, task: "asyncio.Task[Any] | None") -> None:
        if self.is_ongoing(task) or _ends_a_group():
            self._waits_as_before.discard(task)
        else:
            self._waits_as_before.add(task)

    def take_wait(self, task: "asyncio.Task[Any]") -> bool:
        """Whether the task has begun such a wait since the last time."""
        if task not in self._waits_as_before:
            return False
        self._waits_as_before.discard(task)
        return True


def _ends_a_group() -> bool:
    """Whether the caller waits, in the `__aexit__` of a task group of asyncio or anyio, for tasks
    that the group has cancelled: it raises the cancel when they have ended.
    """
    frame = inspect.currentframe()
    for _ in range(MAX_GROUP_FRAMES):
        frame = frame.f_back if frame is not None else None
        if frame is None:
            return False
        if frame.f_code.co_name == "__aexit__":
            group = frame.f_locals.get("self")
            scope = getattr(group, "cancel_scope", None)
            return getattr(group, "_aborting", False) or getattr(scope, "cancel_called", False)
    return False


def handles_cancel() -> bool:
    """Whether the caller is inside of a block that handles a cancel, or an error raised there."""
    return _stems_from_cancel(sys.exception())


def _stems_from_cancel(error: BaseException | None) -> bool:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            return True
        if isinstance(error, BaseExceptionGroup):
            group = cast("BaseExceptionGroup[BaseException]", error)
            if any(map(_stems_from_cancel, group.exceptions)):
                return True
        error = error.__context__
    return False
