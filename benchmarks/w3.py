"""W3: what a task call costs in a run beyond its commit: in sequence, gathered, and with ten times
as many.
"""

import asyncio
import sqlite3
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import limit, ours
from benchmarks.measure import Figure, alone, difference
from eventflow import flow

FIGURES = (
    Figure(
        key="sequential",
        what="per task of 1,000 in sequence, beyond the commit",
        unit="µs",
        floor=180,
        goal=80,
        combine=difference,
        lower_is_better=True,
    ),
    Figure(
        key="gathered",
        what="per task of 1,000 gathered, beyond the commit",
        unit="µs",
        floor=45,
        goal=25,
        combine=difference,
        lower_is_better=True,
    ),
    Figure(
        key="growth",
        what="per task, 10,000 gathered ÷ 1,000",
        unit="×",
        floor=1.3,
        goal=1.1,
        combine=alone,
        lower_is_better=True,
    ),
)
TASKS = 1_000


@flow
async def sequential(count: int) -> int:
    for number in range(count):
        await ours.score(number)
    return count


@flow
async def gathered(count: int) -> int:
    return len(await asyncio.gather(*(ours.score(number) for number in range(count))))


async def eventflow(quick: bool) -> dict[str, float]:
    async with ours.opened(sequential) as opened:
        await timed(opened.app, gathered, 10)
        many = await timed(opened.app, gathered, TASKS)
        return {
            "sequential": await timed(opened.app, sequential, TASKS),
            "gathered": many,
            "growth": await timed(opened.app, gathered, 10 * TASKS) / many,
        }


async def timed(app: Any, measured: Any, count: int) -> float:
    """Microseconds per task of one run."""
    began = time.perf_counter()
    handle = await app.start(measured, count=count)
    await handle.result()
    return (time.perf_counter() - began) / count * 1e6


async def bare(quick: bool) -> dict[str, float]:
    """The commits alone: 1,000 of one journal row, and one of 1,000 rows; microseconds per row."""
    rows = [(1, f"score/{number}", b'{"total":0}') for number in range(2 * TASKS)]
    with tempfile.TemporaryDirectory() as folder:
        db = sqlite3.connect(Path(folder) / "journal.db", isolation_level=None)
        db.executescript(limit.SCHEMA)
        one_by_one = commit_each(db, [[row] for row in rows[:TASKS]])
        together = commit_each(db, [rows[TASKS:]])
        db.close()
    return {"sequential": one_by_one, "gathered": together}


def commit_each(db: sqlite3.Connection, batches: list[list[tuple[int, str, bytes]]]) -> float:
    began = time.perf_counter()
    for batch in batches:
        db.execute("BEGIN IMMEDIATE")
        db.executemany("INSERT INTO journal VALUES (?,?,?)", batch)
        db.execute("COMMIT")
    return (time.perf_counter() - began) / sum(map(len, batches)) * 1e6


SIDES = {"eventflow": eventflow, "limit": bare}
