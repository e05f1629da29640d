"""W7: W1 with a million finished runs in the store, beside an empty one.

The full store is made once, by running the runs, and kept under .eventflow/; every sample adds to
it.
"""

from pathlib import Path

from benchmarks import ours
from benchmarks.measure import Figure

FIGURES = (
    Figure(
        key="full",
        what="runs/s, 1,000,000 finished runs in the store ÷ empty",
        unit="/s",
        floor=0.88,
        goal=0.95,
    ),
)


async def eventflow(quick: bool) -> dict[str, float]:
    store = Path(".eventflow") / f"bench-{finished(quick)}.db"
    store.parent.mkdir(exist_ok=True)
    await fill(store, finished(quick))
    return {"full": await ours.throughput("batch", events(quick), store=store.absolute())}


async def fill(store: Path, runs: int, step: int = 50_000) -> None:
    """Runs one-task runs until the store holds `runs` of them."""
    while True:
        async with ours.opened(ours.one_task, store=store.absolute()) as opened:
            missing = runs - await opened.count()
        if missing <= 0:
            return
        await ours.throughput("batch", min(step, missing), store=store.absolute())


async def empty(quick: bool) -> dict[str, float]:
    return {"full": await ours.throughput("batch", events(quick))}


def finished(quick: bool) -> int:
    return 50_000 if quick else 1_000_000


def events(quick: bool) -> int:
    return 3_000 if quick else 20_000


SIDES = {"eventflow": eventflow, "limit": empty}
