"""The limits of a worker by themselves: slots of a flow, and the gate of crash suspects."""

import asyncio
from collections import Counter

import pytest

from eventflow import App, flow, sleep, task
from eventflow.core.errors import RunCancelled
from eventflow.engine.limits import MAX_SUSPECTS, CrashSuspectGate, FlowSlots
from eventflow.testing import VirtualClock, running
from tests.conftest import eventually

pytestmark = pytest.mark.anyio


def test_a_run_that_works_again_goes_before_new_ones() -> None:
    """While a run waits to get a slot again, no slot is free for a claim; the claim under way
    keeps its own until it has ended.
    """
    slots = FlowSlots(Counter({"f": 1}))
    returned: list[str] = []
    slots.begin_claim({"f": 1})
    assert not slots.take("f", 2, lambda: returned.append("first"))
    assert slots.free("f", 2) == 0
    assert returned == []
    slots.end_claim(lambda _: 2)  # nothing was claimed
    assert returned == ["first"] and slots.taken["f"] == 2
    assert not slots.take("f", 2, lambda: returned.append("second"))
    slots.release("f", 2)
    assert returned == ["first", "second"] and slots.free("f", 2) == 0


async def test_a_run_that_is_cancelled_while_it_waits_for_its_slot_harms_no_other() -> None:
    """With `concurrency=1`, the slot that a cancelled run no longer needs goes to the next run, and
    callers that wait for the result of the run that released it get it.
    """
    go = asyncio.Event()
    began: list[str] = []

    @task
    async def hold(name: str) -> str:
        began.append(name)
        await go.wait()
        return name

    @flow(concurrency=1)
    async def one(name: str) -> str:
        if name == "first":
            await sleep(1)
        return await hold(name)

    app, clock = App("slots"), VirtualClock()
    app.add(one)
    async with running(app, clock=clock), asyncio.timeout(20):
        first = await app.start(one, name="first")
        second = await app.start(one, name="second")
        await eventually(lambda: began == ["second"], "the second run has the slot")
        await clock.advance(1)  # the first run waits for a slot
        third = await app.start(one, name="third")
        await first.cancel("enough")
        with pytest.raises(RunCancelled, match="enough"):
            await first.result()
        go.set()
        assert [await run.result() for run in (second, third)] == ["second", "third"]
        assert await app.store.check() == []


async def test_an_exclusive_body_waits_for_its_time_and_others_do_not() -> None:
    """`exclusive` opens at `exclusive_from`; ordinary suspects pass meanwhile."""
    loop = asyncio.get_running_loop()
    gate = CrashSuspectGate(exclusive_from=loop.time() + 0.3)
    opened: list[float] = []

    async def alone() -> None:
        async with gate.exclusive():
            opened.append(loop.time())

    waiting = asyncio.create_task(alone())
    async with asyncio.timeout(0.2), gate:
        assert not opened
    await waiting
    assert opened[0] >= gate.exclusive_from


async def test_two_exclusive_bodies_do_not_wait_for_each_other() -> None:
    """Two that come while all slots are taken both get their turn, one after the other, alone."""
    gate = CrashSuspectGate()
    at_work: list[str] = []
    order: list[str] = []

    async def alone(name: str) -> None:
        async with gate.exclusive():
            assert at_work == []
            at_work.append(name)
            await asyncio.sleep(0)
            at_work.remove(name)
            order.append(name)

    for _ in range(MAX_SUSPECTS):
        await gate.acquire()
    both = [asyncio.create_task(alone(name)) for name in ("first", "second")]
    for _ in range(MAX_SUSPECTS):
        await asyncio.sleep(0)
        gate.release()
    async with asyncio.timeout(5):
        await asyncio.gather(*both)
    assert order == ["first", "second"]
