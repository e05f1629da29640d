"""W1: durable one-task runs per second, beside the limit loop's: events accepted 100 at a time, and
one at a time.
"""

from benchmarks import limit, load, ours
from benchmarks.measure import Figure

# `gated_floor`: earlier floors; both figures are still below the gates of the present ones.
FIGURES = (
    Figure(
        key="batch",
        what="runs/s, events accepted 100 at a time",
        unit="/s",
        floor=0.35,
        goal=0.50,
        gated_floor=0.25,
    ),
    Figure(
        key="single",
        what="runs/s, one at a time by 200 callers",
        unit="/s",
        floor=0.25,
        goal=0.40,
        gated_floor=0.12,
    ),
)


async def eventflow(quick: bool) -> dict[str, float]:
    return {mode: await ours.throughput(mode, 3_000 if quick else 20_000) for mode in load.MODES}


async def bare(quick: bool) -> dict[str, float]:
    return {mode: await limit.throughput(mode, 10_000 if quick else 30_000) for mode in load.MODES}


SIDES = {"eventflow": eventflow, "limit": bare}
