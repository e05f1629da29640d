"""The limit loop: the bare durable work of one-task runs, written by hand, in the fastest honest
way found. No features.

Per event: decode; COMMIT the event under its unique key with its run (a partial index holds the
live ones); run one coroutine as an asyncio task; COMMIT its result to the journal; COMMIT the
finished run. Whatever is ready goes into one commit (WAL, `synchronous=FULL`), and a run's begin
and end each write one JSON line to a log file. `w1.py` and `w2.py` divide by it.

Found by measuring (2 cores, medians of five, runs/s for 100 at a time and one at a time): multi-row
VALUES on the loop's own thread 38,000 and 31,000; json_each 36,000 and 30,000; executemany 33,000
and 26,000; VALUES in a writer thread 40,000 and 31,000, but an idle event then waits for two thread
switches more. So: VALUES, on the loop's thread.

    python -m benchmarks.limit [batch | single | latency] [--events N] [--loop uvloop | asyncio]
"""

import argparse
import asyncio
import sqlite3
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import orjson

from benchmarks import load

SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
CREATE TABLE events (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, body BLOB NOT NULL);
CREATE TABLE runs (id INTEGER PRIMARY KEY, event INTEGER NOT NULL, state INTEGER NOT NULL);
CREATE INDEX live ON runs (id) WHERE state < 2;
CREATE TABLE journal (
  run INTEGER, call_key TEXT, value BLOB NOT NULL, PRIMARY KEY (run, call_key)
) WITHOUT ROWID;
"""
ROWS = 100
"""Rows in one INSERT: one prepared statement serves every full chunk."""


class Limit:
    """Accepts bodies, runs `task` on each one's data, forgets what is finished."""

    def __init__(self, folder: Path, task: Callable[[Any], Any]) -> None:
        self.loop = asyncio.get_running_loop()
        self.db = sqlite3.connect(folder / "limit.db", isolation_level=None)
        self.db.executescript(SCHEMA)
        self.log = (folder / "limit.log").open("ab", buffering=1 << 20)
        self.task = task
        self.finished = 0
        self.last_id = 0
        self.ticking = False
        self.running: set[asyncio.Task[None]] = set()
        self.fresh: list[tuple[int, str, bytes, Any]] = []
        self.waiters: list[asyncio.Future[None]] = []
        self.results: list[tuple[int, str, bytes]] = []
        self.ends: list[tuple[int]] = []

    def accept(self, *bodies: bytes) -> asyncio.Future[None]:
        """Done when the events and their runs are durable."""
        for body in bodies:
            event = orjson.loads(body)
            self.last_id += 1
            self.fresh.append(
                (self.last_id, f"{event['source']} {event['id']}", body, event["data"])
            )
        waiter = self.loop.create_future()
        self.waiters.append(waiter)
        self.wake()
        return waiter

    def wake(self) -> None:
        if not self.ticking:
            self.ticking = True
            self.loop.call_soon(self.tick)

    def tick(self) -> None:
        """One commit of all that is ready, then what follows from it."""
        fresh, waiters, results, ends = self.fresh, self.waiters, self.results, self.ends
        self.fresh = []
        self.waiters = []
        self.results = []
        self.ends = []
        self.ticking = False
        self.db.execute("BEGIN IMMEDIATE")
        self.insert("INSERT INTO events VALUES ", "(?,?,?)", [row[:3] for row in fresh])
        self.insert("INSERT INTO runs VALUES ", "(?,?,0)", [(row[0], row[0]) for row in fresh])
        self.insert("INSERT INTO journal VALUES ", "(?,?,?)", results)
        self.insert("UPDATE runs SET state = 2 WHERE id IN (", "?", ends, ")")
        self.db.execute("COMMIT")
        for waiter in waiters:
            waiter.set_result(None)
        for ident, _, _, data in fresh:
            task = self.loop.create_task(self.run(ident, data))
            self.running.add(task)
            task.add_done_callback(self.running.discard)
        self.ends += [row[:1] for row in results]
        self.finished += len(ends)
        self.write_log("run.claimed", fresh)
        self.write_log("run.completed", ends)
        if self.ends:
            self.wake()

    def insert(self, head: str, row: str, rows: Sequence[tuple[Any, ...]], tail: str = "") -> None:
        for start in range(0, len(rows), ROWS):
            part = rows[start : start + ROWS]
            self.db.execute(
                head + ",".join([row] * len(part)) + tail, list(chain.from_iterable(part))
            )

    async def run(self, ident: int, data: Any) -> None:
        value = orjson.dumps(await self.task(data))
        # After the wait, because a tick may replace the list during it.
        self.results.append((ident, "score", value))
        self.wake()

    def write_log(self, event: str, rows: Sequence[tuple[Any, ...]]) -> None:
        lines = [
            orjson.dumps(
                {"event": event, "run": row[0], "level": "info", "at": time.time_ns() // 1000},
                option=_LINE,
            )
            for row in rows
        ]
        self.log.write(b"".join(lines))

    async def count(self) -> int:
        return self.finished

    def close(self) -> None:
        self.db.close()
        self.log.close()


_LINE = orjson.OPT_APPEND_NEWLINE


async def throughput(mode: str, events: int, task: Callable[[Any], Any] = load.score) -> float:
    """Runs/s of `task`, from the first event handed in to the last run finished."""
    with tempfile.TemporaryDirectory() as folder:
        limit = Limit(Path(folder), task)
        try:
            return await load.throughput(limit.accept, load.bodies(events), limit.count, mode)
        finally:
            limit.close()


async def latency(events: int) -> load.Latency:
    """From an event handed in to the first line of its task, one event at a time."""
    with tempfile.TemporaryDirectory() as folder:
        probe = load.Probe()
        limit = Limit(Path(folder), probe.score)
        try:
            return await probe.measure(limit.accept, load.bodies(events), limit.count)
        finally:
            limit.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.limit")
    parser.add_argument("mode", nargs="?", choices=("batch", "single", "latency"), default="batch")
    parser.add_argument("--events", type=int)
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    args = parser.parse_args()
    if args.mode == "latency":
        found = load.run(latency(args.events or 1000), args.loop)
        print(f"latency: p50 {found.p50 * 1e3:.3f} ms, p99 {found.p99 * 1e3:.3f} ms ({args.loop})")
    else:
        rate = load.run(throughput(args.mode, args.events or 30_000), args.loop)
        print(f"{args.mode}: {rate:,.0f} runs/s ({args.loop})")


if __name__ == "__main__":
    main()
