"""Kafka: how fast records get into the ledger, beside a bare aiokafka loop that inserts each batch
into SQLite.

Both sides read the same number of small JSON records from a topic of four partitions, of a broker
of their own (tansu), from the first assignment until the last record is durable (WAL,
`synchronous=FULL`, one transaction per batch). On our side each record is an event matched to a
subscription; its run is recorded and held, so that no flow competes for the processor.

    python -m benchmarks.kafka waiting [--records 1000000] [--max-pending 10000]

shows memory while records wait in the topic behind a ledger that is full.
"""

import argparse
import asyncio
import sqlite3
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
from aiokafka import AIOKafkaConsumer

from benchmarks.measure import Figure
from benchmarks.memory import resident
from eventflow import App, flow
from eventflow.logs.capture import configure
from eventflow.server.server import tune_interpreter
from tests.brokers import Broker, tansu
from triggers.kafka import Kafka

FIGURES = (
    Figure(
        key="intake",
        what="records/s from a topic into the ledger ÷ bare loop",
        unit="/s",
        floor=0.22,
        goal=0.40,
    ),
)

PARTITIONS = 4
MEMBER: dict[str, Any] = {"session_timeout_ms": 6_000, "rebalance_timeout_ms": 1_000}


def records(quick: bool) -> int:
    return 20_000 if quick else 100_000


@asynccontextmanager
async def filled(count: int) -> AsyncIterator[tuple[Broker, str]]:
    """A broker of its own, and a topic with `count` records of about 100 bytes."""
    with tansu() as broker:
        topic = await broker.create(partitions=PARTITIONS)
        async with broker.producer(linger_ms=5, max_batch_size=64 << 10) as producer:
            for number in range(count):
                value = orjson.dumps({"order": number, "amount": number % 97, "note": "x" * 60})
                await producer.send(
                    topic, value, key=b"%d" % (number % 1000), partition=number % PARTITIONS
                )
            await producer.flush()
        yield broker, topic


async def bare(quick: bool) -> dict[str, float]:
    """The least there is to do: read, insert, commit."""
    count = records(quick)
    async with filled(count) as (broker, topic):
        with tempfile.TemporaryDirectory() as folder:
            rows = sqlite3.connect(f"{folder}/bare.db", isolation_level=None)
            rows.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;")
            rows.execute(
                "CREATE TABLE records (topic, partition, offset, at, key, value, PRIMARY KEY "
                "(topic, partition, offset))"
            )
            consumer = AIOKafkaConsumer(
                topic,
                bootstrap_servers=broker.server,
                group_id="bare",
                enable_auto_commit=False,
                auto_offset_reset="earliest",
                **MEMBER,
            )
            await consumer.start()
            began, seen = time.perf_counter(), 0
            while seen < count:
                for batch in (await consumer.getmany(timeout_ms=500)).values():
                    rows.execute("BEGIN IMMEDIATE")
                    rows.executemany(
                        "INSERT INTO records VALUES (?,?,?,?,?,?)",
                        [
                            (
                                one.topic,
                                one.partition,
                                one.offset,
                                one.timestamp,
                                one.key,
                                one.value,
                            )
                            for one in batch
                        ],
                    )
                    rows.execute("COMMIT")
                    seen += len(batch)
            took = time.perf_counter() - began
            await consumer.stop()
            rows.close()
    return {"intake": count / took}


@flow
async def take(order: int, amount: int) -> None: ...


@asynccontextmanager
async def reading(broker: Broker, topic: str, **options: Any) -> AsyncIterator[tuple[App, Kafka]]:
    """An App whose trigger is paused: events and runs are recorded, and no run begins."""
    with (
        tempfile.TemporaryDirectory() as folder,
        (Path(folder) / "bench.log").open("ab", buffering=1 << 20) as stream,
    ):
        logs = configure(stream=stream, pretty=False, capture=False)
        tune_interpreter()
        app = App("bench", store=f"sqlite:///{folder}/bench.db", **options)
        trigger = Kafka(
            topic, bootstrap_servers=broker.server, group_id="ours", name="kafka", **MEMBER
        )
        app.on(trigger, take)
        try:
            async with app:
                app.runtime.reactor.pause("kafka", True)
                yield app, trigger
        finally:
            logs.close()


async def eventflow(quick: bool) -> dict[str, float]:
    count = records(quick)
    async with filled(count) as (broker, topic), reading(broker, topic) as (app, trigger):
        while not trigger.gauges():
            await asyncio.sleep(0.001)
        began = time.perf_counter()
        while (await app.store.counts())["events"] < count:
            await asyncio.sleep(0.01)
        return {"intake": count / (time.perf_counter() - began)}


SIDES = {"eventflow": eventflow, "limit": bare}


async def waiting(count: int, max_pending: int, seconds: float = 60.0) -> tuple[float, float, int]:
    """Resident megabytes when the ledger has just become full, and at most in the time after that;
    and the lag then.
    """
    async with (
        filled(count) as (broker, topic),
        reading(broker, topic, max_pending=max_pending) as (app, trigger),
    ):
        while not (trigger.condition or "").startswith("paused"):
            await asyncio.sleep(0.05)
        first = most = resident()
        over = time.perf_counter() + seconds
        while time.perf_counter() < over:
            await asyncio.sleep(0.5)
            most = max(most, resident())
        lag = sum(gauge.value for gauge in trigger.gauges() if gauge.name == "lag_messages")
        counts = await app.store.counts()
        assert counts["pending"] <= max_pending + 1_000, counts
    return first, most, int(lag)


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.kafka")
    parser.add_argument("what", choices=("waiting",))
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--max-pending", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    first, most, lag = asyncio.run(waiting(options.records, options.max_pending, options.seconds))
    print(
        f"{lag:,} records wait; {first:.0f} MB resident when the ledger became full, {most:.0f} MB "
        "at most since"
    )
    return int(most > first * 1.5)


if __name__ == "__main__":
    sys.exit(main())
