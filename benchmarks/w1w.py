"""W1w: W1 with a task that waits once, for one turn of the event loop or for a millisecond; the
limit loop has the same tasks.
"""

import asyncio
from typing import Any

from benchmarks import limit, load, ours
from benchmarks.measure import Figure
from eventflow import flow, task

FIGURES = (
    Figure(key="turn", what="runs/s, the task awaits sleep(0)", unit="/s", floor=0.20, goal=0.30),
    Figure(
        key="sleep", what="runs/s, the task awaits sleep(0.001)", unit="/s", floor=0.20, goal=0.30
    ),
)
WAITS = {"turn": 0.0, "sleep": 0.001}
"""Seconds, by figure."""


def waiting_flow(seconds: float) -> Any:
    """A flow whose task waits once."""

    @task
    async def score_later(amount: int) -> dict[str, int]:
        await asyncio.sleep(seconds)
        return {"total": amount * 2}

    @flow
    async def one_waiting_task(amount: int) -> dict[str, int]:
        return await score_later(amount)

    return one_waiting_task


async def eventflow(quick: bool) -> dict[str, float]:
    events = 3_000 if quick else 15_000
    return {
        key: await ours.throughput("batch", events, waiting_flow(seconds))
        for key, seconds in WAITS.items()
    }


async def bare(quick: bool) -> dict[str, float]:
    events = 10_000 if quick else 30_000

    def waiting(seconds: float) -> Any:
        async def score_later(data: Any) -> dict[str, int]:
            await asyncio.sleep(seconds)
            return await load.score(data)

        return score_later

    return {
        key: await limit.throughput("batch", events, waiting(seconds))
        for key, seconds in WAITS.items()
    }


SIDES = {"eventflow": eventflow, "limit": bare}
