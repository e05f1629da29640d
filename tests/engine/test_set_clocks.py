"""A wall clock that is set at any moment of a run: no wait ends early, none is held.

A sleep of a run that has left memory is due by the wall clock: tests/server/test_wall_clock.py.
"""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta

import pytest

from eventflow import (
    App,
    Batch,
    Debounce,
    Event,
    Retry,
    flow,
    restart_with,
    sleep,
    task,
)
from eventflow.core.clock import SECOND, SystemClock
from eventflow.testing import MemoryTrigger, running
from tests.conftest import eventually
from triggers import RunState

pytestmark = pytest.mark.anyio

DELAY = 0.25

WAITS = (
    "sleep", "first sleep", "retry", "block", "flow", "running time", "child",
    "second attempt", "restarted",
)  # fmt: skip


class SetClock(SystemClock):
    """A machine whose wall clock is set by `jump` microseconds before its reading number `set_at`
    from the call of `begin`.
    """

    def __init__(self, jump: int = 0, set_at: int = 0) -> None:
        self.readings = 0
        self._jump = jump
        self._set_at = set_at
        self._has_begun = False
        self._lock = threading.Lock()

    def begin(self) -> None:
        self._has_begun = True

    def now(self) -> int:
        with self._lock:
            is_set = self._has_begun and self.readings >= self._set_at
            self.readings += self._has_begun
        return super().now() + self._jump * is_set


async def run_waiting(what: str, clock: SetClock) -> None:
    """One run with a wait of `DELAY`, which neither ends early nor lasts much longer."""
    began: list[float] = []

    @task
    async def note() -> None:
        began.append(time.monotonic())

    @task
    async def rest(seconds: float) -> str:
        await asyncio.sleep(seconds)
        return "rested"

    @task(retries=Retry(attempts=2, delay=DELAY, jitter=False))
    async def fails_once() -> None:
        began.append(time.monotonic())
        if len(began) == 1:
            raise ValueError("the first attempt")

    @flow
    async def naps() -> None:
        await note()
        await sleep(DELAY)
        await note()

    @flow
    async def waits(again: bool = False) -> object:
        match what:
            case "sleep":
                return await naps.fn()
            case "first sleep":
                began.append(time.monotonic())
                await sleep(DELAY)
                return await note()
            case "retry":
                return await fails_once()
            case "child":
                return await naps()
            case "second attempt":
                began.append(time.monotonic())
                if len(began) == 1:
                    raise ValueError("the first attempt")
                await sleep(DELAY)
                return await note()
            case "restarted" if again:
                began.append(time.monotonic())
                await sleep(DELAY)
                return await note()
            case "restarted":
                await restart_with(again=True)
            case "block":
                await note()
                async with asyncio.timeout(30):
                    await rest(DELAY)
                    return await note()
            case _:
                await note()
                await rest(DELAY)
                return await note()

    limited = flow(name="limited", timeout=30)(waits.fn)
    in_memory = flow(name="in_memory", timeout=30, timeout_counts="running")(waits.fn)
    retried = flow(name="retried", retries=Retry(attempts=2, delay=0))(waits.fn)
    each = {"flow": limited, "running time": in_memory, "second attempt": retried}.get(what, waits)
    app = App("clocks")
    app.add(each, naps)
    async with asyncio.timeout(15), running(app, clock=clock):
        clock.begin()
        run = await app.start(each)
        await run.result()
    *_, first, last = began
    assert last - first >= DELAY
    assert last - first < DELAY + 10


async def run_stored(what: str, clock: SetClock) -> None:
    """A wait of `DELAY` in the store, which neither ends early nor lasts much longer."""
    began: list[float] = []

    @flow(retries=Retry(attempts=2, delay=DELAY, jitter=False))
    async def fails_once() -> None:
        began.append(time.monotonic())
        if len(began) == 1:
            raise ValueError("the first attempt")

    @flow
    async def gathers(events: list[Event]) -> None:
        began.append(time.monotonic())

    trigger = MemoryTrigger("things")
    app = App("clocks")
    app.add(fails_once)
    deliver = Debounce(DELAY, max_wait=2 * DELAY) if what == "debounce" else Batch(9, within=DELAY)
    app.on(trigger, gathers, deliver=deliver)
    async with asyncio.timeout(15), running(app, clock=clock):
        clock.begin()
        if what == "retry":
            await (await app.start(fails_once)).result()
        else:
            began.append(time.monotonic())
            await trigger.send(data={})
            await eventually(lambda: len(began) == 2, "the window has closed")
    first, last = began
    assert last - first >= DELAY
    assert last - first < DELAY + 10


JUMPS = [timedelta(hours=-1), timedelta(days=365)]


async def at_each_reading(
    run: Callable[[str, SetClock], Awaitable[None]], what: str, jump: timedelta
) -> None:
    us = round(jump.total_seconds()) * SECOND
    unset = SetClock()
    await run(what, unset)
    assert unset.readings > 3
    found = await asyncio.gather(
        *(run(what, SetClock(us, at)) for at in range(unset.readings)), return_exceptions=True
    )
    wrong = {at: error for at, error in enumerate(found) if error is not None}
    assert not wrong, wrong


@pytest.mark.parametrize("jump", JUMPS)
@pytest.mark.parametrize("what", WAITS)
async def test_a_clock_that_is_set_at_any_reading(what: str, jump: timedelta) -> None:
    """Whichever reading of the wall clock is the first after it was set, a wait in memory lasts as
    long as it was asked to.
    """
    await at_each_reading(run_waiting, what, jump)


@pytest.mark.parametrize("jump", JUMPS)
@pytest.mark.parametrize("what", ["batch", "debounce", "retry"])
async def test_windows_and_retries_under_a_clock_that_is_set(what: str, jump: timedelta) -> None:
    """The window of a subscription and the delay between two attempts of a flow, which the store
    keeps, last as long as they were asked to.
    """
    await at_each_reading(run_stored, what, jump)


async def test_a_late_run_under_a_clock_that_was_set_back() -> None:
    """A run that begins after the clock was set back is reported as late on time."""
    clock = SetClock(-3600 * SECOND)
    late = asyncio.Event()

    @task
    async def rest() -> None:
        await late.wait()

    @flow
    async def slow() -> None:
        await rest()

    @flow
    async def alert(event: Event) -> None:
        late.set()

    app = App("late")
    app.add(slow)
    app.on(RunState(slow, "late", after=1), alert)
    async with asyncio.timeout(15), running(app, clock=clock):
        run = await app.start(slow)
        clock.begin()
        again = await app.start(slow)
        began = time.monotonic()
        await late.wait()
        assert time.monotonic() - began < 10
        await run.result()
        await again.result()
