"""`VirtualClock`: time for tests. It stands still until it is moved; between two steps the apps
that run on it come to rest.

Everything of eventflow that waits arms a timer of its clock, so a day passes in the time the work
in it takes.
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
    """A clock (clock.Clock) that stands still until a test moves it.

        clock = VirtualClock()
        async with running(app, clock=clock):
            await reminders.send(data={"after": "1 day"})
            await clock.advance(24 * 3600)              # every retry, sleep and timeout due by then has fired, in order

    `advance` and `jump` let each app that runs with this clock come to rest before and after every
    firing. They wait for task bodies that are busy for real (HTTP, a thread) only `patience` real
    seconds, so that a timeout can be tested; `drain` waits for them. `asyncio.sleep` is real time
    in a task body, this clock's in a flow.
    """

    def __init__(self, start: datetime = START, *, busy_timeout: float = 0.1) -> None:
        self._busy_timeout = busy_timeout
        self._now = self._started = to_us(start)
        self._lock = threading.Lock()
        self._timers: list[tuple[int, int, _VirtualTimer]] = []
        self._order = count()
        self._apps: list[App] = []

    def now(self) -> int:
        return self._now

    def monotonic(self) -> float:
        """Seconds since the start; stands still too."""
        return (self._now - self._started) / SECOND

    def timer(
        self, loop: asyncio.AbstractEventLoop, due_us: int, call: Callable[[], None]
    ) -> Timer:
        """Any thread may ask; `call` runs on `loop`."""
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
        """When the next timer fires; None when none is armed."""
        due = self._next()
        return None if due is None else to_datetime(due)

    async def advance(self, duration: Duration) -> None:
        """Moves time on by `duration`, through every due time on the way."""
        await self._wait_idle()
        target = self._now + microseconds(duration)
        while (due := self._next()) is not None and due <= target:
            await self._move(due)
        await self._move(target)

    async def jump(self) -> bool:
        """Moves time on to the next due time; False when no timer is armed."""
        await self._wait_idle()
        due = self._next()
        if due is not None:
            await self._move(due)
        return due is not None

    def attach(self, app: App) -> None:
        """From now on `advance` and `jump` let this app come to rest. `running` and `drain` see to
        it by themselves.
        """
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
        await asyncio.sleep(0)  # what fired on this loop is called
        self._apps = [app for app in self._apps if app.is_open and app.clock is self]
        for app in self._apps:
            await wait_until_idle(app, self._busy_timeout)


class _VirtualTimer:
    """One armed call. `cancel` holds also between the firing and the loop's turn."""

    __slots__ = ("_call", "_loop", "cancelled")

    def __init__(self, loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
        self._loop, self._call, self.cancelled = loop, call, False

    def cancel(self) -> None:
        self.cancelled = True

    def fire(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        if not self.cancelled:
            self._call()
