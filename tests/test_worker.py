"""The way through: what waits in the ledger gets its turn."""

import pytest

from eventflow import App, Event, flow
from eventflow.testing import MemoryTrigger, running
from tests.conftest import eventually

pytestmark = pytest.mark.anyio


async def test_runs_that_end_at_once_make_room_below_their_cap() -> None:
    """A run that settles while a claim is under way frees its place for the next one: none waits for another event."""

    @flow(concurrency=1)
    async def quick() -> None: ...

    app, trigger = App("capped"), MemoryTrigger("src")
    app.on(trigger, quick)

    async def done() -> bool:
        return (await app.store.counts())["completed"] == 30

    async with running(app):
        await trigger.send(*(Event(id=f"e{n}", source="/s", type="t") for n in range(30)))
        await eventually(done, "all thirty have run")
