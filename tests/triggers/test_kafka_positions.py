"""Where reading starts and resumes: start=, the group's offset, and offsets that the broker no
longer has (fault 19).
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from eventflow.events.event import Gauge
from tests.brokers import Broker, OwnBroker, noida, now_ms, tansu
from tests.conftest import eventually
from tests.triggers.kafka_topic import Topic, make_topic, offsets_of
from triggers._kafka import probe


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnBroker]:
    with noida(tmp_path_factory.mktemp("broker")) as running:
        yield running


@pytest.fixture(scope="module")
def silent() -> Iterator[OwnBroker]:
    """A broker that never says that an offset is out of range."""
    with tansu() as running:
        yield running


@pytest.fixture(params=["noida", "tansu"])
def either(request: pytest.FixtureRequest) -> OwnBroker:
    """Each of the brokers."""
    return request.getfixturevalue("broker" if request.param == "noida" else "silent")


def run(
    broker: Broker, work: Callable[[Topic], Awaitable[None]], partitions: int = 1, **options: Any
) -> None:
    async def go() -> None:
        await work(await make_topic(broker, partitions, **options))

    asyncio.run(go())


def gaps(topic: Topic) -> list[tuple[str, str]]:
    """First missing offset and next offset read, of each gap's dead letter."""
    return [
        (each.headers["kafka-offset"], each.headers["kafka-next"])
        for each in topic.dead_letters
        if each.type == "io.eventflow.kafka.gap"
    ]


# ------------------------------------------------------------------ the first start


def test_start_latest(broker: Broker):
    """start="latest" reads what is written after the first start, even while nothing runs; it is
    applied once.
    """

    async def work(topic: Topic) -> None:
        await topic.send("old")
        async with topic.read():
            pass
        await topic.send("new")
        async with topic.read():
            await topic.has(1)
        assert topic.data == ["new"]

    run(broker, work, start="latest")


def test_k30_start_at_a_time(broker: Broker):
    """K30: a datetime begins at the first record of that time or later; past the end it waits for
    new ones.
    """
    at = now_ms()

    async def work(topic: Topic) -> None:
        for n in range(4):
            await topic.send(n, at=at - 40_000 + n * 10_000)
        between = datetime.fromtimestamp((at - 25_000) / 1000, UTC)
        async with topic.read(start=between):
            await topic.has(2)
        assert topic.data == [2, 3]

    async def later(topic: Topic) -> None:
        await topic.send("old")
        async with topic.read(start=datetime.now(UTC) + timedelta(hours=1)):
            await topic.send("new")
            await topic.has(1)
        assert topic.data == ["new"]

    run(broker, work)
    run(broker, later)


def test_an_existing_group_resumes_at_its_offset(broker: Broker):
    """A ledger that knows nothing begins at the group's offset, as any other consumer of the group
    would.
    """

    async def work(topic: Topic) -> None:
        await topic.send(0, 1, 2)
        await broker.commit(topic.group, topic.name, 2)
        async with topic.read():
            await topic.has(1)
        assert topic.data == [2]

    run(broker, work)
    run(broker, work, start="latest")


def test_a_group_moved_ahead(broker: Broker):
    """Where an operator moved the group ahead of the cursor, the group counts."""

    async def work(topic: Topic) -> None:
        await topic.send(0, 1)
        async with topic.read():
            await topic.has(2)
            await topic.committed(2)
        await topic.send(2, 3, 4)
        await broker.commit(topic.group, topic.name, 4)
        async with topic.read():
            await topic.has(3)
        assert topic.data == [0, 1, 4] and len(topic.logged("kafka.group_offset_ahead")) == 1

    run(broker, work)


def test_a_group_set_beyond_the_end_is_no_gap(broker: Broker):
    """A group set to an offset that the log does not have yet tells of no missing record: the
    cursor counts, and a warning says so.
    """

    async def work(topic: Topic) -> None:
        await topic.send(0, 1)
        async with topic.read():
            await topic.has(2)
            await topic.committed(2)
        await broker.commit(topic.group, topic.name, 100)
        await topic.send(2)
        async with topic.read():
            await topic.has(3)
            await topic.committed(3)
        assert topic.data == [0, 1, 2] and not gaps(topic) and len(topic.ledger.offered) == 3
        (line,) = topic.logged("kafka.group_offset_beyond_end")
        assert (line["ledger"], line["group"], line["end"]) == (2, 100, 3)

    run(broker, work)


def test_a_group_set_back_is_reported(either: OwnBroker):
    """A group set back while nothing runs does not make its records run twice: the cursor counts,
    and a warning says so and names `eventflow replay`.
    """

    async def work(topic: Topic) -> None:
        await topic.send(0, 1)
        async with topic.read():
            await topic.has(2)
            await topic.committed(2)
        await set_back(topic, 0)
        async with topic.read():
            await topic.committed(2)
        (line,) = topic.logged("kafka.group_offset_behind")
        assert (line["ledger"], line["group"]) == (2, 0) and "eventflow replay" in line["do"]
        assert line["log_level"] == "warning" and len(topic.ledger.offered) == 2

    run(either, work, rebalance_timeout_ms=1_000)


def test_a_group_that_only_lags_is_not_warned_about(broker: Broker):
    """After a kill between record and commit the group is behind the cursor; nobody set it back,
    which the committed metadata shows.
    """

    async def work(topic: Topic) -> None:
        await topic.send(0, 1)
        async with topic.read():
            await topic.has(2)
            await topic.committed(2)
        topic.ledger.cursors[f"{topic.name}/0"] = [3, 2, 0]
        async with topic.read():
            pass
        assert not topic.logged("kafka.group_offset_behind")

    run(broker, work)


async def set_back(topic: Topic, offset: int) -> None:
    """Commits an offset as a member of the group: some brokers take it from nobody else."""
    async with AIOKafkaConsumer(
        topic.name,
        bootstrap_servers=topic.broker.server,
        group_id=topic.group,
        enable_auto_commit=False,
        session_timeout_ms=6_000,
        rebalance_timeout_ms=1_000,
    ) as member:
        await member.commit({TopicPartition(topic.name, 0): offset})


def test_a_ledger_that_lost_its_end_reads_it_again(broker: Broker):
    """A ledger put back from a backup is behind the offsets that it had committed itself: it reads
    on at its own cursor.
    """

    async def work(topic: Topic) -> None:
        await topic.send(0, 1)
        async with topic.read():
            await topic.has(2)
        backup = dict(topic.ledger.cursors)
        await topic.send(2, 3)
        async with topic.read():
            await topic.has(4)
            await topic.committed(4)
        topic.ledger.cursors = backup
        for item in topic.events[2:]:
            del topic.ledger.recorded[(item.source, item.id)]
        async with topic.read():
            await topic.has(4)
        assert topic.data == [0, 1, 2, 3] and len(topic.logged("kafka.rewound")) == 1

    run(broker, work)


# ------------------------------------------------------------------ gaps


def test_k15_records_that_expired(broker: Broker):
    """K15: a cursor below the log's start resumes there; an error in the log and a dead letter name
    the lost offsets.
    """

    async def work(topic: Topic) -> None:
        await topic.send(0, 1)
        async with topic.read():
            await topic.has(2)
            await topic.committed(2)
        await topic.send(2, 3, 4, 5)
        await broker.delete_records(topic.name, before=5)
        async with topic.read():
            await topic.has(4)
            await topic.committed(6)
        assert topic.data == [0, 1, 5] and gaps(topic) == [("2", "5")]
        assert "3 records, offsets 2 to 4" in topic.logged("kafka.offsets_missing")[0]["reason"]
        async with topic.read():
            await topic.send(6)
            await topic.has(5)
        assert gaps(topic) == [("2", "5")]

    run(broker, work)


def test_records_that_expire_under_a_reader(broker: Broker):
    """Records deleted ahead of a reader that is held up are a gap too, found when the fetch
    fails.
    """

    async def work(topic: Topic) -> None:
        await topic.send(0)
        async with topic.read(max_poll_records=1):
            await topic.has(1)
            topic.ledger.block()
            await topic.send(1)
            await eventually(lambda: len(topic.ledger.offered) == 2, "record 1 is offered")
            await topic.send(*range(2, 8))
            await broker.delete_records(topic.name, before=6)
            topic.ledger.unblock()
            await eventually(lambda: 7 in topic.data, "the last is recorded")
        missing = set(range(8)) - set(topic.data)
        assert missing <= set(range(2, 6)) and {0, 1, 6, 7} <= set(topic.data)
        assert [(int(first), int(after)) for first, after in gaps(topic)] == (
            [(min(missing), 6)] if missing else []
        )

    run(broker, work)


def test_gaps_may_stop_a_partition(broker: Broker):
    """on_gap="stop": the partition stops and reports why; the others are read, and nothing is
    skipped.
    """

    async def work(topic: Topic) -> None:
        await topic.send(0)
        async with topic.read():
            await topic.has(1)
        await topic.send(1, 2)
        await broker.delete_records(topic.name, before=2)
        async with topic.read(on_gap="stop"):
            await topic.send("other", partition=1)
            await topic.has(2)
            assert f"{topic.name}/0 is stopped: 1 records, offsets 1 to 1" in (
                topic.trigger.condition or ""
            )
        assert topic.cursor(0) == 1 and topic.data == [0, "other"] and topic.dead_letters == []
        async with topic.read(on_gap="latest"):
            await topic.send(3)
            await topic.has(4)
        assert topic.data == [0, "other", 3] and gaps(topic) == [("1", "3")]

    run(broker, work, partitions=2)


@pytest.mark.parametrize("fresh", [1, 3, 5], ids=lambda n: f"{n} new")
def test_k13_a_recreated_topic(either: OwnBroker, fresh: int):
    """K13: behind a topic's deletion and new creation all its new records are read, be they fewer
    than before or more, and whether or not the broker says that the old offset is out of range.
    """

    async def work(topic: Topic) -> None:
        await topic.send(*(f"old {n}" for n in range(3)))
        async with topic.read():
            await topic.has(3)
            await topic.committed(3)
        await recreate(topic)
        await topic.send(*(f"new {n}" for n in range(fresh)))
        async with topic.read():
            await topic.has(3 + fresh + 1)
            await topic.committed(fresh)
        assert topic.data[3:] == [f"new {n}" for n in range(fresh)]
        assert (
            len(gaps(topic)) == 1
            and "recreated" in topic.logged("kafka.offsets_missing")[0]["reason"]
        )
        async with topic.read():
            await topic.send("last")
            await eventually(lambda: "last" in topic.data, "reading resumes")
        assert len(gaps(topic)) == 1

    run(either, work, rebalance_timeout_ms=1_000)


async def recreate(topic: Topic) -> None:
    """Deletes the topic and makes it anew, in a later millisecond than its last record."""
    await topic.broker.delete(topic.name)
    last = max((int(event.id.split(":")[2]) for event in topic.events), default=0)
    await eventually(lambda: now_ms() > last, "the new records have other timestamps")
    await topic.broker.create(topic.name, topic.partitions)


@pytest.mark.parametrize("fresh", [1, 3], ids=lambda n: f"{n} new")
def test_a_topic_recreated_while_it_is_read(
    either: OwnBroker, fresh: int, monkeypatch: pytest.MonkeyPatch
):
    """A topic recreated while it is read: at the next check its new records are read from the first
    one, be they fewer than before or as many, and what happened is recorded; the other partitions
    are read on.
    """
    monkeypatch.setattr(probe, "PROBE_INTERVAL_SECONDS", 1.0)

    async def work(topic: Topic) -> None:
        other = await either.create(topic.name + "-other")
        await topic.send(*(f"old {n}" for n in range(3)))
        async with topic.read(pattern=f"{topic.name}.*"):
            await topic.has(3)
            await recreate(topic)
            await topic.send(*(f"new {n}" for n in range(fresh)))
            await either.send(other, "other")
            await eventually(
                lambda: {"new 0", f"new {fresh - 1}", "other"} <= set(topic.data),
                "the new records are recorded",
                within=60,
            )
        new = [data for data in topic.data if data.startswith("new")]
        assert sorted(new) == [f"new {n}" for n in range(fresh)]
        assert [first for first, _ in gaps(topic)] == ["3"]

    run(either, work, rebalance_timeout_ms=1_000)


def test_a_deleted_topic(broker: Broker):
    """A topic that is deleted stops nothing else."""

    async def work(topic: Topic) -> None:
        doomed = await broker.create(topic.name + "-doomed")
        await broker.send(doomed, "doomed")
        await topic.send(0)
        async with topic.read(pattern=f"{topic.name}.*"):
            await topic.has(2)
            await broker.delete(doomed)
            await topic.send(1)
            await eventually(lambda: 1 in topic.data, "the other topic is read on", within=60)

    run(broker, work)


def test_a_broker_that_lost_its_tail(tmp_path: Path):
    """A broker that loses records it had acknowledged gives their offsets to others: those are
    recorded as well.
    """

    async def work(broker: OwnBroker) -> None:
        topic = await make_topic(broker)
        await topic.send(*(f"first {n}" for n in range(5)))
        async with topic.read():
            await topic.has(5)
        await topic.broker.delete(
            topic.name
        )  # what was not flushed is gone, and so the test need not race with the disk
        broker.kill()
        await asyncio.to_thread(broker.start)
        await broker.create(topic.name)
        await topic.send(*(f"second {n}" for n in range(2)))
        async with topic.read():
            await eventually(
                lambda: "second 1" in topic.data, "the new records are recorded", within=60
            )
        assert topic.data == [f"first {n}" for n in range(5)] + ["second 0", "second 1"]

    with noida(tmp_path / "data") as broker:
        asyncio.run(work(broker))


# ------------------------------------------------------------------ partitions and transactions


def test_new_partitions_are_read_from_their_beginning(broker: Broker):
    """Partitions added later are found and read from their first record on, even with
    start="latest".
    """

    async def work(topic: Topic) -> None:
        await topic.send("old")
        async with topic.read():
            await broker.grow(topic.name, 3)
            await topic.send("in the new one", partition=2)
            await topic.has(1, within=60)
            await topic.send("in the old one", partition=0)
            await topic.has(2)
        assert topic.data == ["in the new one", "in the old one"]

    run(broker, work, start="latest")


def test_a_pattern_finds_topics_that_come_later(broker: Broker):
    """pattern= reads every topic whose name matches, those made later too, and no other."""

    async def work(topic: Topic) -> None:
        await topic.send("one")
        async with topic.read(pattern=f"{topic.name}.*", joined=False):
            await topic.has(1)
            other = await broker.create(f"x-{topic.name}")
            second = await broker.create(f"{topic.name}-second")
            await broker.send(other, "not this")
            await broker.send(second, "two")
            await topic.has(2, within=60)
        assert topic.data == ["one", "two"]

    run(broker, work)


def test_k22_transactions(broker: Broker):
    """K22: records of committed transactions are events, those of aborted ones are not; behind the
    markers nothing lags.
    """

    async def work(topic: Topic) -> None:
        async with topic.read():
            for n in range(
                3
            ):  # each with its own producer: noida names old aborted ones again, which hides theirs
                async with broker.producer(transactional_id=f"{topic.name}-{n}") as producer:
                    await producer.begin_transaction()
                    await producer.send_and_wait(topic.name, str(n).encode(), partition=0)
                    await (
                        producer.abort_transaction() if n == 1 else producer.commit_transaction()
                    )
            await topic.has(2)
            await eventually(lambda: topic.totals().get("lag_messages") == 0, "nothing lags")
            end = topic.cursor()
            await topic.committed(end)
        assert topic.data == [0, 2] and end == 6

    run(broker, work)


def test_lag(broker: Broker):
    """Lag counts records that are not recorded, and their age; once they are, both are 0 again."""

    async def work(topic: Topic) -> None:
        await topic.send(0)
        async with topic.read(max_poll_records=10):
            await topic.has(1)
            await eventually(
                lambda: topic.totals() == {"lag_messages": 0, "lag_seconds": 0}, "nothing lags"
            )
            topic.ledger.block()
            await topic.send(*range(1, 6))
            await eventually(lambda: len(topic.ledger.offered) > 1, "more is offered")
            await eventually(
                lambda: topic.totals()["lag_messages"] == 5, "5 records lag", within=60
            )
            first = topic.totals()["lag_seconds"]
            await eventually(lambda: topic.totals()["lag_seconds"] > first, "they grow old")
            assert 0 < first < 60
            gauge = topic.trigger.gauges()[0]
            assert gauge == Gauge("lag_messages", 5, {"topic": topic.name, "partition": "0"})
            topic.ledger.unblock()
            await topic.has(6)
            await eventually(
                lambda: topic.totals() == {"lag_messages": 0, "lag_seconds": 0}, "nothing lags"
            )
        assert offsets_of(topic.events) == list(range(6))

    run(broker, work)
