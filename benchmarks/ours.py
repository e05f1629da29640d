"""eventflow under the load: an App with one flow of one task, a trigger that is called instead of
calling, INFO logs to a file.

The eventflow side of every measure stands on this room, and only on what a user has too.
"""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from benchmarks import load
from eventflow import App, Event, Intake, flow, task
from eventflow.logs.capture import configure
from eventflow.server.server import tune_interpreter


class Memory:
    """A trigger whose events come from the measure itself."""

    name = "bench"

    def __init__(self) -> None:
        self.opened: asyncio.Future[Intake] = asyncio.get_running_loop().create_future()

    async def listen(self, intake: Intake) -> None:
        self.opened.set_result(intake)
        await asyncio.get_running_loop().create_future()


class Ours:
    """An open App, and the way into it."""

    def __init__(self, app: App, intake: Intake) -> None:
        self.app = app
        self.intake = intake

    async def accept(self, *bodies: bytes) -> None:
        """What a trigger does: makes events of bytes, hands them in, returns when they are
        durable.
        """
        await self.intake.accept(*map(Event.from_json, bodies))

    async def count(self) -> int:
        """Runs settled durably, by the sum of P9."""
        counts = await self.app.store.counts()
        return counts["completed"] + counts["failed"]


@task
async def score(amount: int) -> dict[str, int]:
    return {"total": amount * 2}


@asynccontextmanager
async def opened(flow: Any, *, store: Path | None = None, **options: Any) -> AsyncIterator[Ours]:
    """The App, open, in a folder of its own unless `store` says where."""
    with (
        tempfile.TemporaryDirectory() as folder,
        (Path(folder) / "bench.log").open("ab", buffering=1 << 20) as stream,
    ):
        logs = configure(stream=stream, pretty=False, capture=False)
        # as `eventflow serve` does; the limit loop, in the same process, has it too
        tune_interpreter()
        trigger = Memory()
        app = App("bench", store=f"sqlite:///{store or Path(folder) / 'bench.db'}", **options)
        app.on(trigger, flow)
        try:
            async with app:
                yield Ours(app, await trigger.opened)
        finally:
            logs.close()


@flow
async def one_task(amount: int) -> dict[str, int]:
    return await score(amount)


async def throughput(
    mode: str, events: int, measured: Any = one_task, store: Path | None = None
) -> float:
    """Runs/s of `measured`, from the first event handed in to the last run settled."""
    async with opened(measured, store=store) as ours:
        before = await ours.count()

        async def finished() -> int:
            return await ours.count() - before

        return await load.throughput(
            ours.accept, load.bodies(events, f"bench-{before}"), finished, mode
        )
