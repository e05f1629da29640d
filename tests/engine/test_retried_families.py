"""Child runs of a run that is executed again by the `retries=` of its flow."""

import asyncio
from pathlib import Path

import pytest

from eventflow import App, flow, task
from eventflow.testing import VirtualClock, running
from tests.conftest import eventually
from tests.engine.test_flow_retries import WAIT, Bodies, awaits, child_of, in_state

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("ends", ["at once", "in the wait", "in the next attempt"])
async def test_a_retry_executes_what_a_child_had_cancelled_again(ends: str) -> None:
    """A flow with retries calls a flow without retries, whose TaskGroup cancels a sibling of the
    child that failed: the retry executes that sibling again too, whenever its clean-up ends.
    """
    seen = Bodies()
    cleaned = asyncio.Event()
    if ends == "at once":
        cleaned.set()

    @task
    async def work() -> str:
        await eventually(lambda: "long" in seen.calls, "the brother works")
        return f"work {seen.fail('work', 1)}"

    @task
    async def long() -> str:
        if seen.fail("long", 0) == 1:
            await asyncio.Event().wait()
        return "long"

    @task
    async def clean() -> None:
        seen.fail("clean", 0)
        await cleaned.wait()

    @flow
    async def quick() -> str:
        return await work()

    @flow(grace=3600)
    async def brother() -> str:
        try:
            return await long()
        except asyncio.CancelledError:
            await clean()
            raise

    @flow
    async def middle() -> list[str]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(brother()), group.create_task(quick())]
        return [each.result() for each in tasks]

    @flow(retries=[WAIT])
    async def top() -> list[str]:
        return await middle()

    app, clock = App("three generations"), VirtualClock()
    app.add(top)
    async with running(app, clock=clock), asyncio.timeout(20):
        run = await app.start(top)
        await awaits(app, run.number)
        parent = await child_of(app, run.number, "middle")
        number = await child_of(app, parent, "brother")
        if ends == "in the wait":
            await eventually(lambda: "clean" in seen.calls, "the brother cleans up")
            cleaned.set()
        if ends != "in the next attempt":
            await awaits(app, number, "retried with its parent")
        await clock.advance(WAIT)
        if ends == "in the next attempt":
            await in_state(app, parent, "running")
            cleaned.set()
        assert await run.result() == ["long", "work 2"]
        assert seen.calls == ["long", "work", "clean", "long", "work"] or seen.calls == [
            "long", "work", "clean", "work", "long",
        ]  # fmt: skip
        assert len(await app.store.runs()) == 4
        assert await app.store.check() == []


async def test_a_child_that_fails_in_a_drain_has_failed(tmp_path: Path) -> None:
    """An attempt that a restart interrupts is continued: a child that fails after its parent has
    left memory is not executed once more, and its error ends that attempt.
    """
    seen = Bodies()
    parents: list[tuple[App, int]] = []

    @task
    async def work() -> None:
        if seen.calls.count("work") == 1:
            await in_state(*parents[0], "pending")
        seen.fail("work", 9)

    @flow
    async def child() -> None:
        await work()

    @flow(retries=[WAIT])
    async def parent() -> None:
        await child()

    clock = VirtualClock()
    for life in range(2):
        app = App("drain")
        app.add(parent)
        async with running(app, clock=clock, store=tmp_path / "d.db"), asyncio.timeout(20):
            if life == 0:
                number = (await app.start(parent)).number
                parents.append((app, number))
                await awaits(app, number)
                await clock.advance(WAIT)
                await in_state(app, await child_of(app, number, "child"), "running")
                await in_state(app, number, "running")
            else:
                await in_state(app, parents[0][1], "failed")
                assert seen.calls == ["work", "work"]
                assert await app.store.check() == []
