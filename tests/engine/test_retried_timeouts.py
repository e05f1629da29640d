"""Blocks with a timeout in a run that is executed again: they have their whole time again."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import anyio
import pytest

from eventflow import App, flow, sleep, task, timeout
from eventflow.testing import VirtualClock, running
from tests.conftest import eventually
from tests.engine.test_flow_retries import WAIT, Bodies, awaits, in_state, state_of

pytestmark = pytest.mark.anyio


def _limits() -> dict[str, Callable[[Coroutine[Any, Any, str]], Coroutine[Any, Any, str]]]:
    """Ways to limit a call to 10 s, by name."""

    async def with_timeout(call: Coroutine[Any, Any, str]) -> str:
        async with timeout(10):
            return await call

    async def with_asyncio(call: Coroutine[Any, Any, str]) -> str:
        async with asyncio.timeout(10):
            return await call

    async def with_anyio(call: Coroutine[Any, Any, str]) -> str:
        with anyio.fail_after(10):
            return await call

    async def with_wait(call: Coroutine[Any, Any, str]) -> str:
        done, _ = await asyncio.wait({asyncio.ensure_future(call)}, timeout=10)
        if not done:
            raise TimeoutError
        return await done.pop()

    return {
        "timeout": with_timeout,
        "asyncio.timeout": with_asyncio,
        "anyio": with_anyio,
        "wait": with_wait,
    }


@pytest.mark.parametrize(
    ("ends_by", "again"),
    [
        ("its error", "retries="),
        ("its timeout", "retries="),
        ("its error", "by hand"),
        ("its timeout", "by hand"),
        ("its error", "now"),
        ("its timeout", "now"),
        ("its error", "from a call"),  # a call that a timeout ends leaves no record
    ],
)
@pytest.mark.parametrize("limit", _limits())
async def test_a_block_has_its_whole_time_again(limit: str, ends_by: str, again: str) -> None:
    """A block with a timeout whose call failed, or took too long, has its whole time in the next
    attempt, however much later that begins; it ends neither at once nor late.
    """
    seen = Bodies()

    @task
    async def fetch() -> str:
        if seen.fail("fetch", 0) == 1 and ends_by == "its error":
            raise OSError("no")
        await asyncio.Event().wait()
        return ""

    @flow(retries=[] if again in ("by hand", "from a call") else [3600])
    async def job() -> str:
        await _limits()[limit](fetch())
        return ""

    app, clock = App("blocks"), VirtualClock()
    app.add(job)
    async with running(app, clock=clock), asyncio.timeout(20):
        number = (await app.start(job)).number
        await eventually(lambda: seen.calls, "the call is made")
        if ends_by == "its timeout":
            await clock.advance(10)
        if again in ("by hand", "from a call"):
            await in_state(app, number, "failed")
            await clock.advance(3600)
            if again == "by hand":
                await app.store.retry(number)
            else:
                number = (await app.store.retry_from(number, "fetch", number + 1)).id
        else:
            await awaits(app, number, "attempt 1 of 2")
            if again == "now":
                await clock.advance(60)
                await app.store.retry(number)
            else:
                await clock.advance(3600)
        await eventually(lambda: len(seen.calls) == 2, "the call is made again")
        await clock.advance(9)
        assert await state_of(app, number) == "running"
        await clock.advance(1)
        await in_state(app, number, "failed")
        assert (await app.store.run(number))["error"].startswith(b'{"type":"builtins:TimeoutError"')
        assert await app.store.check() == []


async def test_a_timeout_that_the_flow_went_on_after_is_kept() -> None:
    """A block's timeout after which the flow received a value is kept, like that value: the next
    attempt neither waits for it nor makes the block's call again.
    """
    seen = Bodies()

    @task
    async def long() -> None:
        seen.fail("long", 0)
        await asyncio.Event().wait()

    @task
    async def note() -> None:
        seen.fail("note", 0)

    @task
    async def work() -> str:
        return f"work {seen.fail('work', 1)}"

    @flow(retries=[WAIT])
    async def job() -> str:
        try:
            async with timeout(10):
                await long()
        except TimeoutError:
            await note()
        return await work()

    app, clock = App("kept"), VirtualClock()
    app.add(job)
    async with running(app, clock=clock), asyncio.timeout(20):
        run = await app.start(job)
        await eventually(lambda: seen.calls, "the call is made")
        await clock.advance(10)
        await awaits(app, run.number)
        await clock.advance(WAIT)
        assert await run.result() == "work 2"
        assert seen.calls == ["long", "note", "work", "work"]


async def test_a_restart_leaves_a_block_the_time_that_is_left(tmp_path: Path) -> None:
    """The timeout of a block counts from the start of the attempt, also after a restart in it."""
    seen = Bodies()

    @task
    async def fetch() -> None:
        seen.fail("fetch", 1)
        await asyncio.Event().wait()

    @flow(retries=[WAIT])
    async def job() -> None:
        async with timeout(10):
            await fetch()

    clock = VirtualClock()
    number = 0
    for life in range(2):
        app = App("blocks")
        app.add(job)
        async with running(app, clock=clock, store=tmp_path / "b.db"), asyncio.timeout(20):
            if life == 0:
                number = (await app.start(job)).number
                await awaits(app, number)
                await clock.advance(WAIT)
            await eventually(lambda n=life: len(seen.calls) == 2 + n, "the call is made again")
            await clock.advance(5)
            if life == 0:
                assert await state_of(app, number) == "running"
            else:
                await in_state(app, number, "failed")


async def test_a_block_counts_from_an_attempt_that_begins_late(tmp_path: Path) -> None:
    """An attempt that begins long after its due time, because no process ran or no slot was free,
    also has the whole time of its blocks; a restart during it changes nothing.
    """
    seen = Bodies()

    @task
    async def fetch() -> str:
        seen.fail("fetch", 1)
        await asyncio.Event().wait()
        return ""

    @flow(retries=[WAIT])
    async def job() -> None:
        async with timeout(10):
            await fetch()

    clock = VirtualClock()
    number = 0
    for life in range(3):
        app = App("late")
        app.add(job)
        async with running(app, clock=clock, store=tmp_path / "late.db"), asyncio.timeout(20):
            if life == 0:
                number = (await app.start(job)).number
                await awaits(app, number, "attempt 1 of 2")
            else:
                await eventually(lambda n=life: len(seen.calls) == n + 1, "the call is made")
                await clock.advance(4)
                assert await state_of(app, number) == "running"
            if life == 2:
                await clock.advance(2)
                await in_state(app, number, "failed")
        await clock.advance(86_400 if life == 0 else 0)


@pytest.mark.parametrize("ended_by", ["a cancel", "its error"])
async def test_a_sleep_within_a_block_keeps_its_place(ended_by: str) -> None:
    """A sleep that had not ended starts again with the block around it: a sleep that is longer than
    the block's timeout does not end first, however much later the next attempt begins.
    """
    seen = Bodies()

    @task
    async def work() -> None:
        seen.fail("work", 1 if ended_by == "its error" else 0)

    async def limited() -> str:
        try:
            async with timeout(10):
                await sleep(100)
        except TimeoutError:
            return "timeout"
        return "slept through its timeout"

    @flow
    async def job() -> str:
        found, _ = await asyncio.gather(limited(), work())
        return found

    app, clock = App("sleeps"), VirtualClock()
    app.add(job)
    async with running(app, clock=clock), asyncio.timeout(20):
        run = await app.start(job)
        await eventually(lambda: seen.calls, "the call is made")
        if ended_by == "a cancel":
            await run.cancel()
        await in_state(app, run.number, "cancelled" if ended_by == "a cancel" else "failed")
        await clock.advance(3600)
        await app.store.retry(run.number)
        await clock.advance(10)
        assert await run.result() == "timeout"


async def test_a_block_ends_although_the_clock_was_set_back(tmp_path: Path) -> None:
    """After a start under a clock that was a year ahead, blocks of a run that is executed again
    have their time, and not a year more.
    """
    seen = Bodies()

    @task
    async def fetch() -> None:
        seen.fail("fetch", 1)
        await asyncio.Event().wait()

    @flow(retries=[WAIT])
    async def job() -> None:
        async with timeout(10):
            await fetch()

    @flow
    async def other() -> None:
        pass

    for life in range(2):
        clock = VirtualClock()
        app = App("year")
        app.add(job, other)
        async with running(app, clock=clock, store=tmp_path / "y.db"), asyncio.timeout(20):
            if life == 0:
                await clock.advance(365 * 86_400)
                await (await app.start(other)).result()
                continue
            number = (await app.start(job)).number
            await awaits(app, number)
            await clock.advance(WAIT)
            await eventually(lambda: len(seen.calls) == 2, "the call is made again")
            await clock.advance(10)
            await in_state(app, number, "failed")
