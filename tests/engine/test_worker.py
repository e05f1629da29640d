"""The worker: runs that wait in the ledger get their turn."""

import asyncio
import threading
from typing import Any

import pytest

from eventflow import App, Event, flow
from eventflow.store.writer import ConnectionJob
from eventflow.testing import MemoryTrigger, running
from tests.conftest import eventually, stays

pytestmark = pytest.mark.anyio


async def test_runs_that_end_at_once_free_their_flows_cap() -> None:
    """A run that settles while a claim is under way frees its place for the next one: none waits
    for another event.
    """

    @flow(concurrency=1)
    async def quick() -> None: ...

    app, trigger = App("capped"), MemoryTrigger("src")
    app.on(trigger, quick)

    async def done() -> bool:
        return (await app.store.counts())["completed"] == 30

    async with running(app):
        await trigger.send(*(Event(id=f"e{n}", source="/s", type="t") for n in range(30)))
        await eventually(done, "all thirty have run")


async def test_a_run_whose_outcome_is_being_committed_holds_no_slot() -> None:
    """A slow commit must not keep the next run waiting, but on a disk that hangs only as many again
    may begin.
    """
    disk, loop, begun = threading.Event(), asyncio.get_running_loop(), list[str]()
    stall: Any = ConnectionJob(lambda _: disk.wait(10))

    @flow
    async def quick(event: Event) -> None:
        if not begun:  # from here on the writer is busy, and what this run comes to waits behind
            app.store.post(stall, lambda _: None, loop)
        begun.append(event.id)

    app, trigger = App("slow disk", concurrency=1), MemoryTrigger("src")
    app.on(trigger, quick)

    async def both() -> bool:
        return len(begun) == 2

    async def done() -> bool:
        return (await app.store.counts())["completed"] == 5

    async with running(app):
        await trigger.send(*(Event(id=f"e{n}", source="/s", type="t") for n in range(5)))
        await eventually(both, "the second has begun, while nothing of the first is durable")
        await stays(lambda: len(begun) == 2, "a third run does not begin", during=0.2)
        assert (await app.store.counts())["completed"] == 0
        disk.set()
        await eventually(done, "all are settled")
