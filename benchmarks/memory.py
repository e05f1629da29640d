"""Memory: resident size of an open App, idle; with 100,000 pending runs; and what one suspended run
adds.
"""

import asyncio
import gc
from pathlib import Path

from benchmarks import load, ours
from benchmarks.measure import Figure, alone
from eventflow import flow, sleep, task

FIGURES = (
    Figure(
        key="idle",
        what="resident, idle",
        unit="MB",
        floor=80,
        goal=55,
        combine=alone,
        lower_is_better=True,
    ),
    Figure(
        key="pending",
        what="resident, 100,000 pending",
        unit="MB",
        floor=250,
        goal=120,
        combine=alone,
        lower_is_better=True,
    ),
    Figure(
        key="suspended",
        what="per suspended run (0, to within 1 kB)",
        unit="kB",
        floor=1,
        goal=1,
        combine=alone,
        lower_is_better=True,
    ),
)


async def eventflow(quick: bool) -> dict[str, float]:
    idle, pending = await while_pending(10_000 if quick else 100_000)
    return {
        "idle": idle,
        "pending": pending,
        "suspended": await per_suspended(500 if quick else 5_000),
    }


def resident() -> float:
    """Megabytes of this process."""
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) / 1024


async def while_pending(events: int) -> tuple[float, float]:
    """Resident megabytes of an idle App, and of one whose only slot is taken while `events`
    wait.
    """

    @task
    async def endless() -> None:
        await asyncio.sleep(3600)

    @flow
    async def blocked(amount: int) -> None:
        await endless()

    async with ours.opened(blocked, concurrency=1) as opened:
        await asyncio.sleep(0.5)
        idle = resident()
        for start in range(0, events, 100):
            await opened.accept(*load.bodies(100, f"bench-{start}"))
        pending = resident()
        await opened.app.close(grace=0.1)
    return idle, pending


async def per_suspended(runs: int) -> float:
    """Kilobytes that each of `runs` sleeping runs adds, once as many have slept before (the process
    is warm).
    """

    @flow
    async def sleeping(amount: int) -> None:
        await sleep(3600)

    async with ours.opened(sleeping) as opened:

        async def suspended() -> int:
            """Runs started that have left memory; a list of them would be measured with them."""
            return (await opened.app.store.counts())["runs"] - opened.app.runtime.worker.load[
                "in_memory"
            ]

        sizes: list[float] = []
        for turn in range(1, 4):
            for start in range(0, runs, 100):
                await opened.accept(*load.bodies(100, f"bench-{turn}-{start}"))
            await load.settle(suspended, turn * runs, 0.2)
            sizes.append(resident())
    return (sizes[2] - sizes[1]) * 1024 / runs


SIDES = {"eventflow": eventflow}
