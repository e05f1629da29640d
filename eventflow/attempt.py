"""One attempt of one task call: run the body on the worker's loop, bounded in time, and say what came of it.

The executor launches an attempt and gets back exactly one of `Value`, `Failure` or nothing (the attempt was abandoned: cancelled
by the flow, by a drain, by a lost lease). What an abandoned body still returns is refused. A body that ignores its cancel is asked
`ASKS` times and then left behind; a thread cannot be stopped at all and keeps its slot until it ends.
"""

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from eventflow.clock import Clock, microseconds
from eventflow.errors import TaskTimedOut
from eventflow.task import Call

ASKS = 3
"""Times a body is asked to stop, `ASK_EVERY` seconds apart, before it is left behind."""
ASK_EVERY = 1.0


class Deadline:
    """Cancels an attempt's asyncio task when its timeout has passed, and again while it does not listen.

    `on_deaf` is called when it was asked in vain: the attempt then counts as timed out and its late result is refused.
    """

    __slots__ = ("_asked", "_clock", "_loop", "_on_deaf", "_task", "_timer", "expired")

    def __init__(self, clock: Clock, timeout: float, on_deaf: Callable[[], None]) -> None:
        self.expired = False
        self._asked = 0
        self._clock, self._on_deaf = clock, on_deaf
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._timer = clock.timer(self._loop, clock.now() + microseconds(timeout), self._expire)

    def _expire(self) -> None:
        self.expired = True
        if self._asked == ASKS:
            self._on_deaf()
            return
        self._asked += 1
        if self._task is not None:
            self._task.cancel()
        self._timer = self._clock.timer(self._loop, self._clock.now() + microseconds(ASK_EVERY), self._expire)

    def cancel(self) -> None:
        self._timer.cancel()

    def absorbed(self) -> None:
        """The cancels were ours and have been turned into a timeout: outer code must not see them."""
        if self._task is not None:
            for _ in range(self._asked):
                self._task.uncancel()


async def run_body(call: Call, clock: Clock, threads: ThreadPoolExecutor, on_deaf: Callable[[], None]) -> Any:
    """The body's return value, or its exception; TaskTimedOut when it outlived its timeout."""
    timeout = call.task.options.timeout
    if timeout is None:
        return await _body(call, threads)
    deadline = Deadline(clock, timeout, on_deaf)
    try:
        return await _body(call, threads)
    except asyncio.CancelledError:
        if not deadline.expired or asyncio.current_task() is not call.handle:
            raise
        deadline.absorbed()
        raise TaskTimedOut(call.task.name, timeout) from None
    finally:
        deadline.cancel()


def _body(call: Call, threads: ThreadPoolExecutor) -> Coroutine[Any, Any, Any] | asyncio.Future[Any]:
    if call.task.is_async:
        return call.task.fn(*call.args, **call.kwargs)
    work = partial(call.task.fn, *call.args, **call.kwargs)
    return asyncio.get_running_loop().run_in_executor(threads, contextvars.copy_context().run, work)
