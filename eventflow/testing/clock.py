"""`VirtualClock`: time for tests, which stands still until the test moves it.

Whatever waits in eventflow arms a timer of its clock, so a test that moves the clock by a day takes
only as long as the work of that day. Between two timers, the clock waits until its apps are idle
(idle.py).
"""

import asyncio
import heapq
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import count

from eventflow.app import App
from eventflow.core.clock import SECOND, Duration, Timer, microseconds, to_datetime, to_us
from eventflow.testing.idle import wait_until_idle

START = datetime(2030, 1, 1, tzinfo=UTC)


class VirtualClock:
    """A core.clock.Clock that stands still until a test moves it.

        clock = VirtualClock()
        async with running(app, clock=clock):
            await reminders.send(data={"after": "1 day"})
            await clock.advance(24 * 3600)  # every retry, sleep and timeout until then has fired

    `advance` and `jump` wait until each attached app is idle, before and after every timer. They
    wait for task bodies that take real time (HTTP, a thread) only `busy_timeout` real seconds, so
    that a timeout can be tested; `drain` waits for them. `asyncio.sleep` takes real time in a task
    body and virtual time in a flow.
    """

    def __init__(self, start: datetime = START, *, busy_timeout: float = 0.1) -> None:
        self._busy_timeout = busy_timeout
        self._started = to_us(start)
        self._now = self._started
        self._lock = threading.Lock()
        self._timers: list[tuple[int, int, _VirtualTimer]] = []
        self._order = count()
        self._apps: list[App] = []

    def now(self) -> int:
        return self._now

    def monotonic(self) -> float:
        """Virtual seconds since the start."""
        return (self._now - self._started) / SECOND

    def timer(
        self, loop: asyncio.AbstractEventLoop, due_us: int, call: Callable[[], None]
    ) -> Timer:
        """Arm a timer. Thread-safe; `call` runs on `loop`."""
        timer = _VirtualTimer(loop, call)
        with self._lock:
            late = due_us <= self._now
            if not late:
                heapq.heappush(self._timers, (due_us, next(self._order), timer))
        if late:
            timer.fire()
        return timer

    @property
    def next_due(self) -> datetime | None:
        """The due time of the next timer; None when none is set."""
        due = self._next()
        return None if due is None else to_datetime(due)

    async def advance(self, duration: Duration) -> None:
        """Move time forward by `duration`, firing every timer on the way at its due time."""
        await self._wait_idle()
        target = self._now + microseconds(duration)
        while (due := self._next()) is not None and due <= target:
            await self._move(due)
        await self._move(target)

    async def jump(self) -> bool:
        """Move time forward to the next due time; False when no timer is set."""
        await self._wait_idle()
        due = self._next()
        if due is not None:
            await self._move(due)
        return due is not None

    def attach(self, app: App) -> None:
        """Let `advance` and `jump` wait for this app too. `running` and `drain` attach theirs."""
        if app not in self._apps:
            self._apps.append(app)

    def _next(self) -> int | None:
        with self._lock:
            while self._timers and self._timers[0][2].cancelled:
                heapq.heappop(self._timers)
            return self._timers[0][0] if self._timers else None

    async def _move(self, now: int) -> None:
        with self._lock:
            self._now = max(self._now, now)
            due: list[_VirtualTimer] = []
            while self._timers and self._timers[0][0] <= self._now:
                due.append(heapq.heappop(self._timers)[2])
        for timer in due:
            timer.fire()
        await self._wait_idle()

    async def _wait_idle(self) -> None:
        await asyncio.sleep(0)  # the loop calls what fired on it
        self._apps = [app for app in self._apps if app.is_open and app.clock is self]
        for app in self._apps:
            await wait_until_idle(app, self._busy_timeout)


class _VirtualTimer:
    """A timer that is set. `cancel` still works after the firing, until the loop calls it."""

    __slots__ = ("_call", "_loop", "cancelled")

    def __init__(self, loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
        self._loop = loop
        self._call = call
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    def fire(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        if not self.cancelled:
            self._call()
