"""Time. This is the only file that reads it; all other code gets a `Clock`.

Instants are integers: microseconds since 1970-01-01 UTC (`_us` in names, `_at` in stored columns).
Durations are `float` seconds, or `timedelta` where a user writes one. `SystemClock` reads the
machine's clock; `eventflow.testing.VirtualClock` advances only when a test moves it.
"""

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, Protocol

SECOND = 1_000_000
"""Microseconds per second."""

Duration = float | int | timedelta


def seconds(duration: Duration) -> float:
    """A duration as seconds."""
    return duration.total_seconds() if isinstance(duration, timedelta) else float(duration)


def microseconds(duration: Duration) -> int:
    """A duration as whole microseconds, rounded up, so that nothing fires early."""
    us = seconds(duration) * SECOND
    whole = int(us)
    return whole if whole >= us else whole + 1


def in_seconds(us: int) -> float:
    """Microseconds as seconds; an int if they are whole."""
    return us / SECOND if us % SECOND else us // SECOND


def duration_text(seconds: float | None) -> str | None:
    """`310 ms`, `12.4 s`, `3 m 12 s`, `2 h 5 m`, `2 d 4 h`; None for None."""
    if seconds is None:
        return None
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms" if seconds >= 0.001 else "<1 ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} m {whole % 60} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60} m"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def to_datetime(us: int) -> datetime:
    """An instant as an aware UTC datetime."""
    return datetime.fromtimestamp(us // SECOND, UTC).replace(microsecond=us % SECOND)


def to_us(moment: datetime) -> int:
    """An aware datetime as an instant. Raises ValueError for a naive one."""
    if moment.tzinfo is None:
        raise ValueError(
            f"expected an aware datetime, got the naive {moment.isoformat()}; add tzinfo=UTC"
        )
    delta = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (delta.days * 86_400 + delta.seconds) * SECOND + delta.microseconds


class Timer(Protocol):
    """A pending call; `cancel` is idempotent and may come after the call."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """A source of instants and of timers."""

    def now(self) -> int:
        """Wall clock, microseconds since the epoch. May step back or forward."""
        ...

    def monotonic(self) -> float:
        """Seconds that never step back; only differences are meaningful."""
        ...

    def timer(
        self, loop: asyncio.AbstractEventLoop, due_us: int, call: Callable[[], None]
    ) -> Timer:
        """Call `call` on `loop` once `now() >= due_us`: never before, at once if that is past."""
        ...


class Moment(NamedTuple):
    """One instant on both clocks. A wait that is computed from it lasts as long as computed, even
    if the wall clock is set before the timer is.
    """

    wall: int
    """Microseconds since the epoch."""
    monotonic: float

    def time_left(self, now: "Moment", due_us: int) -> int:
        """Microseconds from `now` until `timer_at` calls for this due time; negative when it is
        past.
        """
        return due_us - self.wall - int((now.monotonic - self.monotonic) * SECOND)


def read_moment(clock: Clock, *, not_before: int = 0) -> Moment:
    """This instant. `not_before`: the wall time to use while the wall clock is behind it.

    A clock without a method `monotonic_timer` has one time only, like `VirtualClock`.
    """
    wall = clock.now()  # read first, so that a wait may be slightly too long, never too short
    has_both = getattr(clock, "monotonic_timer", None) is not None
    return Moment(max(wall, not_before), clock.monotonic() if has_both else wall / SECOND)


def timer_at(
    clock: Clock,
    loop: asyncio.AbstractEventLoop,
    due_us: int,
    since: Moment,
    call: Callable[[], None],
) -> Timer:
    """Call `call` on `loop` once `due_us - since.wall` microseconds have passed since `since`,
    whatever happens to the wall clock.

    For due times that were computed in this process.
    """
    monotonic_timer = getattr(clock, "monotonic_timer", None)
    if monotonic_timer is None:
        return clock.timer(loop, due_us, call)
    return monotonic_timer(loop, since.monotonic + (due_us - since.wall) / SECOND, call)


def timer_after(
    clock: Clock, loop: asyncio.AbstractEventLoop, duration_us: int, call: Callable[[], None]
) -> Timer:
    """Call `call` on `loop` once `duration_us` has passed, whatever happens to the wall clock."""
    since = read_moment(clock)
    return timer_at(clock, loop, since.wall + duration_us, since, call)


async def sleep_until(clock: Clock, due_us: int) -> None:
    """Wait until the wall clock reads `due_us`. A clock that is set back lengthens the wait."""
    over = asyncio.Event()
    timer = clock.timer(asyncio.get_running_loop(), due_us, over.set)
    try:
        await over.wait()
    finally:
        timer.cancel()


async def sleep_for(clock: Clock, duration: Duration, wake: asyncio.Event | None = None) -> None:
    """Wait for `duration`, or until `wake` is set; sets `wake` when it ends.

    The timer is one of `clock`, so a `VirtualClock` controls it. If that stands still, a timer of
    the event loop ends the wait one second after `duration`.
    """
    wake = wake or asyncio.Event()
    loop = asyncio.get_running_loop()
    timer = timer_after(clock, loop, microseconds(duration), wake.set)
    backstop = loop.call_later(seconds(duration) + 1, wake.set)
    try:
        await wake.wait()
    finally:
        timer.cancel()
        backstop.cancel()


class SystemClock:
    """The machine's clock.

    A timer waits in steps of at most `STEP_SECONDS` and reads the wall clock after each, so that a
    suspended machine or a stepped clock delays it by at most one step and never fires it early.
    """

    STEP_SECONDS = 30.0

    def now(self) -> int:
        return time.time_ns() // 1000

    monotonic = staticmethod(time.monotonic)  # no frame of Python: each task body asks it thrice

    def timer(
        self, loop: asyncio.AbstractEventLoop, due_us: int, call: Callable[[], None]
    ) -> Timer:
        return _SteppedTimer(self, loop, due_us, call)

    def monotonic_timer(
        self, loop: asyncio.AbstractEventLoop, due: float, call: Callable[[], None]
    ) -> Timer:
        """Call `call` on `loop` once `monotonic() >= due`. For `timer_at`."""
        return _MonotonicTimer(self, loop, due, call)


class _SteppedTimer:
    __slots__ = ("_call", "_clock", "_due_us", "_handle", "_loop")

    def __init__(
        self,
        clock: SystemClock,
        loop: asyncio.AbstractEventLoop,
        due_us: int,
        call: Callable[[], None],
    ) -> None:
        self._clock: SystemClock = clock
        self._loop: asyncio.AbstractEventLoop = loop
        self._due_us: int = due_us
        self._call: Callable[[], None] = call
        self._handle: asyncio.Handle = loop.call_soon(self._step)

    def _step(self) -> None:
        left = (self._due_us - self._clock.now()) / SECOND
        if left <= 0:
            self._call()
        else:
            self._handle = self._loop.call_later(min(left, self._clock.STEP_SECONDS), self._step)

    def cancel(self) -> None:
        self._handle.cancel()


class _MonotonicTimer:
    __slots__ = ("_call", "_clock", "_due", "_handle", "_loop")

    def __init__(
        self,
        clock: SystemClock,
        loop: asyncio.AbstractEventLoop,
        due: float,
        call: Callable[[], None],
    ) -> None:
        self._clock: SystemClock = clock
        self._loop: asyncio.AbstractEventLoop = loop
        self._due: float = due
        self._call: Callable[[], None] = call
        self._handle: asyncio.Handle = loop.call_soon(self._step)

    def _step(self) -> None:
        left = self._due - self._clock.monotonic()
        if left <= 0:
            self._call()
        else:  # also after an event loop that rounds the delay has called too early
            self._handle = self._loop.call_later(min(left, self._clock.STEP_SECONDS), self._step)

    def cancel(self) -> None:
        self._handle.cancel()
