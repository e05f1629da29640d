"""The process that kafka_loop.py kills: an app with one Kafka trigger, which may be told to kill
itself at a seam.

    python -m tests.crash.kafka_victim FOLDER SERVER TOPIC BROKER SEAM COUNT ON_DAMAGE

SEAM is where the COUNT-th time is the end: `fetched` (records are here, nothing is offered),
`offering` (the transaction is under way), `recorded` (durable, not committed), `committing` (the
request is out), `committed`, `assigned`; `never` leaves the killing to others, and `rest` ends by
itself once COUNT events are recorded and every run is done. ON_DAMAGE: `stop` or `skip` (a record
that cannot be read), without the codec of snappy; or `none`.
"""

import asyncio
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import aiokafka.codec

from eventflow import App, flow, task
from tests.conftest import comes_true
from triggers._kafka import committing, fetching, session
from triggers.kafka import Kafka

GROUP = "kill"
SEAMS = ("fetched", "offering", "recorded", "committing", "committed", "assigned")

OPTIONS: dict[str, dict[str, Any]] = {
    "noida": {
        "group_instance_id": "victim",
        "session_timeout_ms": 6_000,
    },  # it never evicts a member that died
    "tansu": {
        "session_timeout_ms": 1_000,
        "heartbeat_interval_ms": 200,
        "rebalance_timeout_ms": 1_000,
    },
}


@task
async def double(n: int) -> int:
    return n * 2


@flow
async def handle(n: int) -> int:
    return await double(n)


class Fuse:
    """Ends this process when its seam was met often enough."""

    def __init__(self, seam: str, left: int) -> None:
        self.seam = seam
        self.left = left

    def met(self, seam: str) -> None:
        if seam == self.seam:
            self.left -= 1
            if self.left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)


def lay(fuse: Fuse) -> None:
    """Puts the fuse into the session: around what it fetches, records, commits and takes up."""
    fetch, commit = fetching.Fetcher.fetch, committing.GroupCommitter.commit
    record, start = (getattr(session.Session, name) for name in ("_record", "_start_partitions"))

    async def _fetch(self: fetching.Fetcher, *args: Any) -> Any:
        fetched = await fetch(self, *args)
        if fetched:
            fuse.met("fetched")
        return fetched

    async def _record(self: session.Session, batch: Any) -> None:
        asyncio.get_running_loop().call_later(0.0005, fuse.met, "offering")
        await record(self, batch)
        fuse.met("recorded")

    async def _commit(self: committing.GroupCommitter) -> None:
        asyncio.get_running_loop().call_later(0.0002, fuse.met, "committing")
        await commit(self)
        fuse.met("committed")

    async def _start_partitions(self: session.Session, assigned: Any) -> None:
        await start(self, assigned)
        fuse.met("assigned")

    for owner, name, wrapped in (
        (fetching.Fetcher, "fetch", _fetch),
        (committing.GroupCommitter, "commit", _commit),
        (session.Session, "_record", _record),
        (session.Session, "_start_partitions", _start_partitions),
    ):
        setattr(owner, name, wrapped)
    committing.COMMIT_INTERVAL_SECONDS = 0.03


async def main(
    folder: Path, server: str, topic: str, broker: str, seam: str, count: int, on_damage: str
) -> None:
    lay(Fuse(seam, count))
    options = {"max_poll_records": 50, "fetch_max_wait_ms": 50, **OPTIONS[broker]}
    if on_damage != "none":
        aiokafka.codec.cramjam = None
        options["skip_corrupt"] = on_damage == "skip"
    app = App("kill", store=f"sqlite:///{folder}/store.db")
    app.on(Kafka(topic, bootstrap_servers=server, group_id=GROUP, name="kafka", **options), handle)
    async with app:

        async def is_at_rest() -> bool:
            counts = await app.store.counts()
            return seam == "rest" and counts["events"] >= count and not counts["pending"]

        await comes_true(is_at_rest, within=math.inf, poll=0.1)  # the end commits to the group


if __name__ == "__main__":
    place, server, topic, broker, seam, count, on_damage = sys.argv[1:]
    asyncio.run(main(Path(place), server, topic, broker, seam, int(count), on_damage))
