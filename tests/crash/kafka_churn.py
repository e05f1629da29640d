"""Two members of one group that join and leave all the time, in one process on one store, while
records come in.

    python -m tests.crash.kafka_churn [--seconds 300] [--every 3] [--seed 1]

Each member stays for some seconds, leaves, and joins again, so that partitions wander between the
two. One leaves only while the other is at work: when both are gone at once, the broker (tansu,
which otherwise knows its members well) may wait for a leader that left. At the end everything comes
to rest: each offset is in the ledger once, with one completed run. test_kafka.py runs a short one.
"""

import argparse
import asyncio
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from eventflow import App
from eventflow.events.event import Intake
from tests.brokers import Broker, tansu
from tests.conftest import comes_true, eventually
from tests.crash.kafka_loop import PARTITIONS, Producer, look
from tests.crash.kafka_victim import GROUP, handle
from tests.crash.verdict import verdict
from triggers.kafka import Kafka

OPTIONS: dict[str, Any] = {
    "session_timeout_ms": 2_000,
    "heartbeat_interval_ms": 200,
    "rebalance_timeout_ms": 1_000,
    "max_poll_records": 20,
}


class Pair:
    """A trigger of two members, each of which comes and goes until `calm`; then both stay."""

    name = "kafka"

    def __init__(self, server: str, topic: str, every: float, draw: random.Random) -> None:
        self._members = [
            Kafka(topic, bootstrap_servers=server, group_id=GROUP, name=self.name, **OPTIONS)
            for _ in range(2)
        ]
        self._every = every
        self._draw = draw
        self._leaving = asyncio.Lock()
        self.calm = asyncio.Event()
        self.stays = 0

    async def listen(self, intake: Intake) -> None:
        async with asyncio.TaskGroup() as group:
            for member, other in (self._members, self._members[::-1]):
                group.create_task(self._come_and_go(member, other, intake))

    async def _come_and_go(self, member: Kafka, other: Kafka, intake: Intake) -> None:
        while not self.calm.is_set():
            stay = asyncio.create_task(member.listen(intake))
            try:
                await asyncio.wait([stay], timeout=self._every * self._draw.uniform(0.5, 1.5))
                async with self._leaving:
                    await eventually(
                        lambda: other.condition is None or self.calm.is_set(),
                        "the other is at work",
                        within=60,
                    )
                    await _end(stay)
            finally:
                await _end(stay)
            self.stays += 1
            await asyncio.sleep(self._draw.uniform(0, 0.3))
        await member.listen(intake)


async def _end(stay: asyncio.Task[None]) -> None:
    stay.cancel()
    await asyncio.gather(stay, return_exceptions=True)


async def churn(
    folder: Path, broker: Broker, seconds: float, every: float, seed: int
) -> tuple[list[str], str]:
    """What went wrong, and how much there was to get wrong."""
    draw = random.Random(seed)
    topic = await broker.create(partitions=PARTITIONS)
    source, pair = Producer(broker, topic, draw), Pair(broker.server, topic, every, draw)
    app = App("churn", store=f"sqlite:///{folder}/store.db")
    app.on(pair, handle)
    async with app:
        producer = asyncio.create_task(source.run())
        await asyncio.sleep(seconds)
        pair.calm.set()
        source.over.set()
        await producer

        async def is_at_rest() -> bool:
            counts = await app.store.counts()
            return counts["events"] >= sum(source.sent) and not counts["pending"]

        await comes_true(is_at_rest, within=60, poll=0.1)
    wrong, duplicates = await asyncio.to_thread(look, folder, source.sent)
    summary = (
        f"{pair.stays} stays, {sum(source.sent)} records, each recorded once and run once; "
        f"{duplicates} offered again"
    )
    return wrong, summary


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.crash.kafka_churn")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--every", type=float, default=3)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kafka-churn-"))
    with tansu() as broker:
        wrong, summary = asyncio.run(
            churn(folder, broker, options.seconds, options.every, options.seed)
        )
    print(summary)
    again = f"--seconds {options.seconds:g} --every {options.every:g} --seed {options.seed}"
    return verdict(wrong, folder, f"tests.crash.kafka_churn {again}")


if __name__ == "__main__":
    sys.exit(main())
