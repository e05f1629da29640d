"""Members that come, go and die; a full ledger; brokers that are away (faults 17 and 18): nothing
twice, nothing lost.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from aiokafka.errors import RebalanceInProgressError

from eventflow.core.errors import StoreFull
from tests.brokers import Broker, OwnBroker, noida, tansu
from tests.conftest import eventually, stays
from tests.triggers.kafka_topic import Topic, make_topic, offsets_of
from triggers._kafka import session

STRANGER = """
import asyncio, sys
from aiokafka import AIOKafkaConsumer

async def main(server, group, topic):
    options = {
        "session_timeout_ms": 1000,
        "heartbeat_interval_ms": 200,
        "rebalance_timeout_ms": 1000,
    }
    async with AIOKafkaConsumer(
        topic,
        bootstrap_servers=server,
        group_id=group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        **options,
    ) as consumer:
        print("joined", len(consumer.assignment()), flush=True)
        while True:
            await consumer.getmany(timeout_ms=100)

asyncio.run(main(*sys.argv[1:]))
"""


BLOCKED_SECONDS = 3
"""Less than the session of `QUICK`."""

OUTAGE_SECONDS = 4.0

FROZEN_SECONDS = 8.0
"""More than the session of `QUICK`."""

MEMBERS = {"session_timeout_ms": 2_000, "heartbeat_interval_ms": 200, "rebalance_timeout_ms": 2_000}
"""Tansu lets members join together for half of the rebalance timeout; a dead one is evicted after
its session.
"""


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnBroker]:
    with noida(tmp_path_factory.mktemp("broker")) as running:
        yield running


@pytest.fixture(scope="module")
def other() -> Iterator[Broker]:
    with tansu() as running:
        yield running


def run(
    broker: Broker, work: Callable[[Topic], Awaitable[None]], partitions: int = 1, **options: Any
) -> None:
    async def go() -> None:
        await work(await make_topic(broker, partitions, **options))

    asyncio.run(go())


def once_each(topic: Topic, count: int) -> None:
    """Every offset is recorded exactly once, in the order of its partition."""
    found: dict[str, list[int]] = {}
    for item in topic.ledger.recorded.values():
        partition, offset, _ = item.id.split(":")
        found.setdefault(partition, []).append(int(offset))
    assert sum(map(len, found.values())) == count
    for offsets in found.values():
        assert offsets == list(range(len(offsets)))


# ------------------------------------------------------------------ members


def waits_for_a_join(topic: Topic) -> bool:
    """Whether the broker has the member's request to join and has not answered it."""
    client: Any = topic.trigger._sessions[0].consumer
    return any(
        type(request).__name__.startswith("JoinGroup")
        for connection in client._client._conns.values()
        for _, request, _ in connection._requests
    )


def test_two_members_share_the_partitions(other: Broker):
    """Two listeners of one group have each partition once; when one leaves, the other reads on
    exactly behind it.
    """

    async def work(topic: Topic) -> None:
        async with AsyncExitStack() as first:
            await first.enter_async_context(topic.read())
            async with topic.read():
                parts = [
                    {gauge.labels["partition"] for gauge in each.gauges()}
                    for each in topic.triggers
                ]
                await eventually(
                    lambda: [len(each.gauges()) for each in topic.triggers] == [4, 4],
                    "each has two partitions",
                )
                for partition in range(4):
                    await topic.send(0, 1, 2, partition=partition)
                await topic.has(12)
                await first.aclose()
                for partition in range(4):
                    await topic.send(3, 4, partition=partition)
                await topic.has(20)
                await topic.committed(5, 5, 5, 5)
        assert len(parts) == 2
        once_each(topic, 20)
        assert len(topic.ledger.offered) == 20

    run(other, work, partitions=4, **MEMBERS)


def count_rebalance_answers(consumer: Any) -> list[int]:
    """Counts the heartbeats that the broker answers with "a rebalance is in progress": it knows the
    second member, and waits for this one to give up its partitions.
    """
    found = [0]
    client = consumer._client
    send = client.send

    async def observed(node: Any, request: Any, **options: Any) -> Any:
        answer = await send(node, request, **options)
        is_heartbeat = type(request).__name__.startswith("Heartbeat")
        found[0] += is_heartbeat and answer.error_code == RebalanceInProgressError.errno
        return answer

    client.send = observed
    return found


def test_k18_a_rebalance_in_mid_batch(other: Broker):
    """K18: the current batch when partitions are revoked is recorded and committed before another
    member has them.
    """

    async def work(topic: Topic) -> None:
        async with topic.read():
            topic.ledger.block()
            await topic.send(*range(5), partition=0)
            await topic.send(*range(5), partition=1)
            await eventually(lambda: topic.ledger.offered, "a batch is offered")
            consumer: Any = topic.trigger._sessions[0].consumer
            heartbeats = count_rebalance_answers(consumer)
            before = len(topic.logged("kafka.assigned"))
            async with topic.read(joined=False):
                await eventually(
                    lambda: heartbeats[0] >= 5 or len(topic.logged("kafka.assigned")) > before,
                    "the broker has said often that it waits for this member",
                )
                assert heartbeats[0] >= 5, "the partitions were given up before the batch was over"
                assert len(topic.logged("kafka.assigned")) == before
                assert not topic.ledger.recorded
                topic.ledger.unblock()
                await topic.committed(5, 5)
                await topic.has(10)
                await eventually(
                    lambda: len(topic.logged("kafka.assigned")) == 3, "both have a partition"
                )
                await topic.send(5, partition=0)
                await topic.send(5, partition=1)
                await topic.has(12)
        once_each(topic, 12)
        assert len(topic.ledger.offered) == 12

    run(other, work, partitions=2, **MEMBERS)


def test_k19_a_batch_that_outlives_its_assignment(other: Broker, monkeypatch: pytest.MonkeyPatch):
    """K19: a batch that takes longer than a revocation may wait moves nothing of the next
    assignment; nothing runs twice.
    """
    monkeypatch.setattr(session, "REVOKE_TIMEOUT_SECONDS", 0.3)

    async def work(topic: Topic) -> None:
        async with topic.read():
            topic.ledger.block()
            await topic.send(*range(5), partition=0)
            await eventually(lambda: topic.ledger.offered, "a batch is offered")
            async with topic.read():
                await eventually(
                    lambda: len(topic.ledger.offered) >= 5, "the other member may read it too"
                )
                topic.ledger.unblock()
                await topic.has(5)
                await topic.send(5, partition=0)
                await topic.has(6)
                await topic.committed(6, 0)
        once_each(topic, 6)

    run(other, work, partitions=2, **MEMBERS)


def test_k16_a_member_that_is_killed(other: Broker):
    """K16: when a member of the group dies, its partitions come over within its session timeout and
    10 s; nothing is lost.
    """

    async def work(topic: Topic) -> None:
        command = [sys.executable, "-c", STRANGER, other.server, topic.group, topic.name]
        stranger = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert stranger.stdout is not None
        try:
            assert await asyncio.to_thread(stranger.stdout.readline) == "joined 4\n"
            async with topic.read(within=60):
                before = len(topic.logged("kafka.assigned"))
                for partition in range(4):
                    await topic.send(*range(3), partition=partition)
                stranger.kill()
                killed = time.monotonic()
                await eventually(
                    lambda: len(topic.logged("kafka.assigned")) > before,
                    "all partitions come over",
                    within=60,
                )
                assert time.monotonic() - killed < 11
                await topic.has(12)
        finally:
            stranger.kill()
            stranger.wait()
            stranger.stdout.close()
        once_each(topic, 12)

    run(other, work, partitions=4, **MEMBERS)


def test_static_members_come_back_without_a_rebalance(broker: Broker):
    """group_instance_id= passes through: a member that is back within its session has its
    partitions; others keep theirs.
    """

    async def work(topic: Topic) -> None:
        async with topic.read(group_instance_id="one"):
            async with topic.read(group_instance_id="two"):
                await eventually(
                    lambda: len(topic.logged("kafka.assigned")) == 3, "each has a partition"
                )
            async with topic.read(group_instance_id="two"):
                await topic.send(0, partition=0)
                await topic.send(0, partition=1)
                await topic.has(2)
            assert len(topic.logged("kafka.assigned")) == 4
        once_each(topic, 2)

    run(broker, work, partitions=2)


def test_ending_in_the_middle_of_a_join(other: Broker):
    """A member that ends while its group still gathers does not wait for it, and leaves nothing
    behind that would heartbeat.
    """

    async def work(topic: Topic) -> None:
        before = asyncio.all_tasks()
        async with topic.read(joined=False):
            await eventually(lambda: topic.trigger.condition == "joining the group", "it joins")
            await eventually(lambda: waits_for_a_join(topic), "the broker has its request")
            began = time.monotonic()
        assert time.monotonic() - began < 10
        assert asyncio.all_tasks() == before

    run(other, work, session_timeout_ms=40_000, rebalance_timeout_ms=40_000)


def test_k25_a_loop_that_is_blocked_for_a_while(broker: Broker):
    """K25: code that blocks the loop for less than the session timeout costs no rebalance."""

    async def work(topic: Topic) -> None:
        async with topic.read():
            time.sleep(BLOCKED_SECONDS)
            await topic.send(0)
            await topic.has(1)
            await topic.committed(1)
        assert len(topic.logged("kafka.assigned")) == 1

    run(broker, work)


# ------------------------------------------------------------------ a full ledger


def test_a_full_ledger_pauses_the_partitions_and_never_leaves_the_group(broker: Broker):
    """P8: while the ledger is full, longer than the poll interval, the member stays, reports it,
    and then records all.
    """

    async def work(topic: Topic) -> None:
        async with topic.read(max_poll_interval_ms=4_500):
            topic.ledger.error = StoreFull("10,000 events are pending", 0.5)
            await topic.send(*range(20))
            await eventually(topic.trigger._sessions[0].consumer.paused, "the partition is paused")
            began = time.monotonic()
            assert topic.trigger.condition == "paused: 10,000 events are pending"
            await eventually(
                lambda: time.monotonic() - began > 9, "twice the poll interval has passed"
            )
            assert await broker.committed(topic.group, topic.name) == [0]
            offered = len(topic.ledger.offered)
            topic.ledger.error = None
            await topic.has(20)
            await topic.committed(20)
            assert topic.trigger.condition is None
        assert len(topic.logged("kafka.assigned")) == 1
        assert offered < 1_000
        once_each(topic, 20)

    run(broker, work)


def test_k24_a_rebalance_while_the_ledger_is_full(other: Broker, monkeypatch: pytest.MonkeyPatch):
    """K24: partitions paused for a full ledger are paused after a rebalance too, and resume when
    there is room.
    """
    monkeypatch.setattr(session, "PAUSE_AFTER_SECONDS", 0.2)

    async def work(topic: Topic) -> None:
        async with topic.read():
            topic.ledger.error = StoreFull("full", 30.0)
            await topic.send(*range(5), partition=0)
            await topic.send(*range(5), partition=1)
            consumer = topic.trigger._sessions[0].consumer
            await eventually(lambda: len(consumer.paused()) == 2, "both partitions are paused")
            async with topic.read(joined=False):
                await eventually(
                    lambda: len(consumer.assignment()) == 1, "one is the other member's"
                )
                await eventually(
                    lambda: consumer.paused() == consumer.assignment(),
                    "the one that is left is paused",
                )
                assert not topic.ledger.recorded
                topic.ledger.error = None
                for trigger in topic.triggers:
                    trigger._sessions[0]._retry_at = 0.0
                await topic.has(10)
                await topic.committed(5, 5)
        once_each(topic, 10)

    run(other, work, partitions=2, **MEMBERS)


# ------------------------------------------------------------------ brokers that are away


def test_k27_a_broker_that_is_away_at_the_start(tmp_path: Path):
    """K27: without a broker the trigger reports that it is connecting, and why; once one answers it
    reads.
    """

    async def work(broker: OwnBroker) -> None:
        topic = await make_topic(broker)
        await topic.send(0)
        broker.kill()
        async with topic.read(joined=False):
            await eventually(lambda: topic.logged("kafka.disconnected"), "it noticed")
            assert (
                "connecting: " in (topic.trigger.condition or "") and topic.trigger.gauges() == []
            )
            await asyncio.to_thread(broker.start)
            await topic.send(1)
            await eventually(lambda: 1 in topic.data, "it reads", within=60)
            assert topic.trigger.condition is None

    with noida(tmp_path / "data") as broker:
        asyncio.run(work(broker))


def on_disk(folder: Path, topic: str) -> int:
    """The number of records of a topic's first partition in the file that a noida broker writes."""
    try:
        topics = json.loads((folder / "kafka.json").read_text())["topics"]
    except (OSError, ValueError):  # it is being written
        return 0
    (partition,) = (found["partitions"][0][1] for name, found in topics if name == topic)
    return partition["high_watermark"]


def is_connected(topic: Topic) -> bool:
    """Whether the member has a connection to a broker."""
    client: Any = topic.trigger._sessions[0].consumer
    return any(connection.connected() for connection in client._client._conns.values())


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
def test_k28_a_broker_that_restarts(tmp_path: Path, how: int):
    """K28: a broker outage of some seconds loses nothing: reading resumes within 30 s of its
    return.
    """

    async def work(broker: OwnBroker) -> None:
        topic = await make_topic(broker)
        await topic.send(*range(3))
        async with topic.read() as reading:
            await topic.has(3)
            await eventually(
                lambda: on_disk(tmp_path / "data", topic.name) == 3,
                "noida has written the records, which it does once in a while",
            )
            await asyncio.to_thread(broker.stop, how)
            await stays(
                lambda: not reading.done() and topic.data == [0, 1, 2],
                "it waits for its broker",
                during=OUTAGE_SECONDS,
            )
            assert not is_connected(topic)
            await asyncio.to_thread(broker.start)
            back = time.monotonic()
            await topic.send("after")
            await eventually(lambda: "after" in topic.data, "it reads on", within=60)
            assert time.monotonic() - back < 35
        assert topic.data.count("after") == 1 and topic.data[:3] == [0, 1, 2]

    with noida(tmp_path / "data") as broker:
        asyncio.run(work(broker))


def test_a_broker_that_hangs(tmp_path: Path):
    """A broker that stops answering for longer than a session delays, and loses and repeats
    nothing.
    """

    async def work(broker: OwnBroker) -> None:
        topic = await make_topic(broker, request_timeout_ms=2_000)
        assert broker.process is not None
        await topic.send(*range(3))
        async with topic.read() as reading:
            await topic.has(3)
            os.kill(broker.process.pid, signal.SIGSTOP)
            await stays(
                lambda: not reading.done() and len(topic.events) == 3,
                "it waits for its broker",
                during=FROZEN_SECONDS,
            )
            os.kill(broker.process.pid, signal.SIGCONT)
            await topic.send(3)
            await eventually(lambda: 3 in topic.data, "it reads on", within=60)
        assert offsets_of(topic.events) == [0, 1, 2, 3]

    with noida(tmp_path / "data") as broker:
        asyncio.run(work(broker))


def test_ending_while_the_broker_is_away(tmp_path: Path):
    """A drain does not wait for a broker that is away."""

    async def work(broker: OwnBroker) -> None:
        topic = await make_topic(broker)
        await topic.send(0)
        async with topic.read():
            await topic.has(1)
            broker.kill()
            began = time.monotonic()
        assert time.monotonic() - began < 10

    with noida(tmp_path / "data") as broker:
        asyncio.run(work(broker))
