"""A coroutine that takes its first step before the asyncio task that goes on with it.

`asyncio.Task(coro)` takes the first step in the loop's next turn, and costs that turn also where
the coroutine never waits. Python 3.12 has `eager_start` for this; this module serves 3.11 too.
"""

import asyncio
from collections.abc import Coroutine
from contextvars import Context
from typing import Any


class StartedCoroutine(Coroutine[Any, Any, Any]):
    """Hand it to a task, call `start` in the same turn of the loop, and the task does the rest.

    `start` runs as a step of that task: `asyncio.current_task()` is the task, and a cancel of it
    reaches the coroutine where it waits. The caller sees to the running loop, and must not be in a
    step of another task of the loop.
    """

    __slots__ = ("_coro", "_has_ended", "_waits_for")

    def __init__(self, coro: Coroutine[Any, Any, Any]) -> None:
        self._coro = coro
        self._has_ended = False
        self._waits_for: Any = None

    def start(
        self, task: "asyncio.Task[Any]", loop: asyncio.AbstractEventLoop, context: Context
    ) -> None:
        """Takes the first step in `context`, which is that of the task, too. What the coroutine
        raises is raised here.
        """
        asyncio._enter_task(loop, task)  # pyright: ignore
        try:
            self._waits_for = context.run(self._coro.send, None)
        except StopIteration:
            self._has_ended = True
        except BaseException:
            self._has_ended = True
            raise
        finally:
            asyncio._leave_task(loop, task)  # pyright: ignore

    # ----------------------------------------------------------------- called by the task

    def send(self, value: Any) -> Any:
        if self._has_ended:
            raise StopIteration
        if (waits_for := self._waits_for) is not None:
            self._waits_for = None
            return waits_for
        return self._coro.send(value)

    def throw(self, *error: Any) -> Any:
        if self._has_ended:
            raise StopIteration
        waits_for = self._waits_for
        self._waits_for = None
        # Cancelled before the task could wait: asyncio cancels what a task waits for.
        if isinstance(waits_for, asyncio.Future) and waits_for.cancel():
            return waits_for
        return self._coro.throw(*error)

    def close(self) -> None:
        self._coro.close()

    def __await__(self) -> Any:
        return self._coro.__await__()

    def __getattr__(self, name: str) -> Any:
        """`cr_frame`, `__qualname__` and the like, for those who describe a task."""
        return getattr(self._coro, name)
