"""W2: from an event handed in to the first line of its task, one at a time, beside the limit loop's
own.
"""

from benchmarks import limit, load, ours
from benchmarks.measure import Figure
from eventflow import flow, task

FIGURES = (
    Figure(
        key="p50",
        what="accepted → first line of the task, p50",
        unit="ms",
        floor=1.8,
        goal=1.3,
        lower_is_better=True,
    ),
    Figure(
        key="p99",
        what="accepted → first line of the task, p99",
        unit="ms",
        floor=2.0,
        goal=1.5,
        lower_is_better=True,
    ),
)


async def eventflow(quick: bool) -> dict[str, float]:
    probe = load.Probe()

    @task
    async def first_line(amount: int) -> dict[str, int]:
        return await probe.score({"amount": amount})

    @flow
    async def probed(amount: int) -> dict[str, int]:
        return await first_line(amount)

    async with ours.opened(probed) as app:
        found = await probe.measure(app.accept, load.bodies(samples(quick)), app.count)
    return {"p50": found.p50 * 1e3, "p99": found.p99 * 1e3}


async def bare(quick: bool) -> dict[str, float]:
    found = await limit.latency(samples(quick))
    return {"p50": found.p50 * 1e3, "p99": found.p99 * 1e3}


def samples(quick: bool) -> int:
    return 200 if quick else 1_000


SIDES = {"eventflow": eventflow, "limit": bare}
