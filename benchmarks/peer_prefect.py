"""Prefect's side of `python -m benchmarks peers`; runs in the peers' environment, without
eventflow.

As its documentation recommends for one machine: async flows of `@task` functions that are called in
the process, the API served by the ephemeral server that Prefect starts (a separate process) on its
default SQLite database, and `persist_result=True`, so that a repeated run takes recorded results of
its tasks from the cache. Per run of one task Prefect writes the flow run and its states through its
API, the task run's states as events in the background, and both results to files. This is less than
what the other sides promise: SQLite runs with `synchronous=NORMAL` (Prefect sets it), so that a
power failure may lose the last commits; the files are not synced; after a crash no run resumes
automatically.
"""

import argparse
import asyncio
import json
import os
import tempfile
import time
from importlib import import_module
from importlib.metadata import version
from typing import Any

from benchmarks import load

CALLERS = 2
"""Concurrent flow runs; with 1, 4, 8 and 16 the throughput was lower."""


class Peer:
    """Runs flows of one task, and counts the runs that have ended. Nothing is durable before a flow
    begins, so a call returns when its run has ended.
    """

    def __init__(self, prefect: Any) -> None:
        self.finished = 0
        self.probe = load.Probe()
        durable = {"persist_result": True}

        @prefect.task(**durable)
        async def score(amount: int) -> dict[str, int]:
            return {"total": amount * 2}

        @prefect.task(**durable)
        async def first_line(amount: int) -> dict[str, int]:
            return await self.probe.score({"amount": amount})

        @prefect.flow(**durable)
        async def one_task(amount: int) -> dict[str, int]:
            return await score(amount)

        @prefect.flow(**durable)
        async def probed(amount: int) -> dict[str, int]:
            return await first_line(amount)

        @prefect.flow(**durable)
        async def sequential(count: int) -> int:
            for number in range(count):
                await score(number)
            return count

        @prefect.flow(**durable)
        async def gathered(count: int) -> int:
            return len(await asyncio.gather(*(score(number) for number in range(count))))

        self.one_task = one_task
        self.probed = probed
        self.sequential = sequential
        self.gathered = gathered

    async def run(self, body: bytes) -> None:
        await self.one_task(load.decode(body)["data"]["amount"])
        self.finished += 1

    async def run_probed(self, body: bytes) -> None:
        await self.probed(load.decode(body)["data"]["amount"])

    async def count(self) -> int:
        return self.finished

    async def count_probed(self) -> int:
        return len(self.probe.waits)


async def timed(flow: Any, count: int) -> float:
    """Microseconds per task of one run."""
    began = time.perf_counter()
    await flow(count)
    return (time.perf_counter() - began) / count * 1e6


async def sample(quick: bool) -> dict[str, float]:
    runs, latencies, tasks = (4, 4, 10) if quick else (30, 40, 100)
    peer = Peer(import_module("prefect"))
    await peer.run(load.bodies(1)[0])  # starts the server, and makes its database
    peer.finished = 0
    rate = await load.drive(peer.run, load.bodies(runs), peer.count, 1, CALLERS)
    found = await peer.probe.measure(peer.run_probed, load.bodies(latencies), peer.count_probed)
    return {
        "runs": rate,
        "p50": found.p50 * 1e3,
        "p99": found.p99 * 1e3,
        "sequential": await timed(peer.sequential, tasks),
        "gathered": await timed(peer.gathered, tasks),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.peer_prefect")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        del os.environ[name]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ.update(PREFECT_HOME=folder, DO_NOT_TRACK="1")
        # the default of 20 s is not enough to make the database on a machine that is busy
        os.environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "120"
        found = asyncio.run(sample(options.quick))
    name = f"Prefect {version('prefect')}, ephemeral server on SQLite"
    print(json.dumps({"version": name, "values": found}), flush=True)


if __name__ == "__main__":
    main()
