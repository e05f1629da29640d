"""W6: `kill -9` with 10,000 runs in flight, then a start on the same store: how soon it is ready,
and has claimed them all.

python -m benchmarks.w6 STORE RUNS EVENTS     the process that is killed, and the one after it
(EVENTS = 0)
"""

import asyncio
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import load, ours
from benchmarks.measure import Figure, alone
from eventflow import flow, task

FIGURES = (
    Figure(
        key="ready",
        what="kill -9 with 10,000 runs in flight: ready again",
        unit="s",
        floor=2,
        goal=0.7,
        combine=alone,
        lower_is_better=True,
    ),
    Figure(
        key="claimed",
        what="kill -9 with 10,000 runs in flight: all claimed again",
        unit="s",
        floor=10,
        goal=3,
        combine=alone,
        lower_is_better=True,
    ),
)


async def eventflow(quick: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        return await asyncio.to_thread(
            crash_and_start, Path(folder) / "bench.db", 2_000 if quick else 10_000
        )


def crash_and_start(store: Path, runs: int) -> dict[str, float]:
    spent(store, runs, runs)
    return spent(store, runs, 0)


def spent(store: Path, runs: int, events: int) -> dict[str, float]:
    """Seconds from the start of a process to each line it says; then it is killed."""
    began = time.perf_counter()
    call = [sys.executable, "-m", "benchmarks.w6", str(store), str(runs), str(events)]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        return {
            expect(line_wanted, process.stdout.readline()): time.perf_counter() - began
            for line_wanted in ("ready", "claimed")
        }
    finally:
        process.kill()
        process.wait()


def expect(line_wanted: str, line: str) -> str:
    if line.strip() != line_wanted:
        raise RuntimeError(f"expected {line_wanted!r}, found {line!r}")
    return line_wanted


async def hold(store: Path, runs: int, events: int) -> None:
    """Accepts `events`, says when open and when all `runs` have begun their flow, and then waits to
    be killed.
    """
    begun = 0

    @task
    async def endless(amount: int) -> None:
        await asyncio.sleep(3600)

    @flow
    async def in_flight(amount: int) -> None:
        nonlocal begun
        begun += 1
        await endless(amount)

    async def count() -> int:
        return begun

    async with ours.opened(in_flight, store=store, concurrency=2 * runs) as opened:
        print("ready", flush=True)
        given = load.bodies(events)
        for start in range(0, events, 100):
            await opened.accept(*given[start : start + 100])
        await load.settle(count, runs, 0.01)
        print("claimed", flush=True)
        await asyncio.sleep(3600)


SIDES = {"eventflow": eventflow}

if __name__ == "__main__":
    load.run(hold(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
