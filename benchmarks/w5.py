"""W5: runs per second of a flow whose task fails twice and then succeeds, without delay, compared
with the limit loop's runs, whose task succeeds at once.
"""

from benchmarks import limit, ours
from benchmarks.measure import Figure
from eventflow import Retry, current_task, flow, task

FIGURES = (
    Figure(key="retried", what="runs/s, each task failing twice", unit="/s", floor=0.08, goal=0.20),
)


@task(retries=Retry(attempts=3, delay=0))
async def third_time(amount: int) -> dict[str, int]:
    if current_task().attempt < 3:
        raise ConnectionError("not yet")
    return {"total": amount * 2}


@flow
async def retried(amount: int) -> dict[str, int]:
    return await third_time(amount)


async def eventflow(quick: bool) -> dict[str, float]:
    return {"retried": await ours.throughput("batch", events(quick), retried)}


async def bare(quick: bool) -> dict[str, float]:
    return {"retried": await limit.throughput("batch", 10_000 if quick else 30_000)}


def events(quick: bool) -> int:
    return 2_000 if quick else 10_000


SIDES = {"eventflow": eventflow, "limit": bare}
