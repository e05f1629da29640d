"""Batches that cannot be read: damaged on the way, or compressed with a codec that is not
installed. One partition stops.
"""

import asyncio
from collections.abc import Iterator

import pytest

from tests.brokers import Broker, noida
from tests.conftest import eventually
from tests.triggers.kafka_proxy import Proxy, behind_a_proxy
from tests.triggers.kafka_topic import Topic, make_topic
from triggers._kafka import fetching
from triggers._kafka.client import RecordTooLargeError, TopicPartition
from triggers._kafka.errors import oversized_record, unreadable_reason

POISON = b"poison-poison"


def damaged(data: bytes) -> bytes:
    """One bit of every POISON."""
    return data.replace(POISON, b"poison-poisom")


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with noida(tmp_path_factory.mktemp("broker")) as running:
        yield running


def test_a_damaged_batch_stops_its_partition_until_it_is_whole(monkeypatch: pytest.MonkeyPatch):
    """A batch whose checksum does not hold stops its partition, behind what came before it; the
    others are read, and it is read again when it arrives whole.
    """
    monkeypatch.setattr(fetching, "PARTITION_RETRY_SECONDS", 3.0)

    async def work(broker: Broker, proxy: Proxy) -> None:
        async with proxy.listening():
            topic = await make_topic(broker, 2, rebalance_timeout_ms=1_000)
            await topic.send("before")
            await topic.send(POISON)
            await topic.send("after")
            proxy.damage = damaged
            async with topic.read(decode="bytes"):
                await topic.send("other", partition=1)
                await topic.has(2)
                await eventually(
                    lambda: topic.logged("kafka.partition_stopped"), "the partition stopped"
                )
                assert f"{topic.name}/0 is stopped: offset 1 cannot be read: CorruptRecord" in (
                    topic.trigger.condition or ""
                )
                assert topic.cursor(0) == 1 and topic.cursor(1) == 1
                proxy.damage = None
                await topic.has(4)
                await topic.committed(3, 1)
                assert topic.trigger.condition is None
            assert [data for data in topic.data if data != b'"other"'] == [
                b'"before"',
                POISON,
                b'"after"',
            ]
            assert len(topic.logged("kafka.partition_stopped")) == 1

    with behind_a_proxy() as (broker, proxy):
        asyncio.run(work(broker, proxy))


def test_a_damaged_batch_may_be_skipped():
    """With skip_corrupt=True a damaged record is a dead letter with its coordinates, and its
    partition is read on.
    """

    async def work(broker: Broker, proxy: Proxy) -> None:
        async with proxy.listening():
            topic = await make_topic(broker, rebalance_timeout_ms=1_000)
            await topic.send("before")
            await topic.send(POISON)
            await topic.send("after")
            proxy.damage = damaged
            async with topic.read(decode="bytes", skip_corrupt=True):
                await topic.has(3)
                await topic.committed(3)
            (dead_letter,) = topic.dead_letters
            assert topic.data == [b'"before"', b'"after"']
            assert (
                dead_letter.headers["kafka-offset"] == "1" and "CorruptRecord" in dead_letter.error
            )

    with behind_a_proxy() as (broker, proxy):
        asyncio.run(work(broker, proxy))


def test_k7_a_codec_that_is_not_installed(broker: Broker, monkeypatch: pytest.MonkeyPatch):
    """K7: without the codecs' package the start warns; a record that needs one stops its partition,
    with what to install.
    """

    async def work() -> Topic:
        topic = await make_topic(broker, 2)
        await topic.send("plain")
        await topic.send("squeezed" * 100, compression_type="zstd")
        await topic.send("behind it")
        monkeypatch.setattr("aiokafka.codec.cramjam", None)
        async with topic.read():
            await topic.send("other", partition=1)
            await topic.has(2)
            await eventually(
                lambda: topic.logged("kafka.partition_stopped"), "the partition stopped"
            )
            assert "pip install 'eventflow-reactor[kafka]'" in (topic.trigger.condition or "")
            await topic.committed(1, 1)
        assert topic.logged("kafka.codecs_missing")[0]["codecs"] == ["snappy", "lz4", "zstd"]
        assert len(topic.logged("kafka.partition_stopped")) == 1 and sorted(topic.data) == [
            "other",
            "plain",
        ]
        monkeypatch.undo()
        async with topic.read():
            await topic.has(4)
        assert topic.data[-2:] == ["squeezed" * 100, "behind it"]
        return topic

    asyncio.run(work())


def test_a_topic_that_may_not_be_read_any_more_stops_no_other(monkeypatch: pytest.MonkeyPatch):
    """The broker takes back the right to read one topic (error 29 in its fetches). That topic's
    partition stops, and says what to grant; the records of the other topic are recorded meanwhile,
    and its own once it may be read again.
    """
    monkeypatch.setattr(fetching, "PARTITION_RETRY_SECONDS", 1.0)

    async def work(broker: Broker, proxy: Proxy) -> None:
        async with proxy.listening():
            name = broker.topic_name()
            topic = await make_topic(broker, rebalance_timeout_ms=1_000, pattern=f"{name}.*")
            denied, other = f"{name}-denied", f"{name}-other"
            for each in (denied, other):
                await broker.create(each)
                await broker.send(each, "before")
            answer = denied.encode() + (1).to_bytes(4) + bytes(4)  # one partition: 0
            allowed = answer + bytes(2 + 4)  # no error; the upper half of the high-water mark
            async with topic.read():
                await topic.has(2)
                proxy.damage = lambda data: data.replace(
                    allowed, answer + (29).to_bytes(2) + bytes(4)
                )
                for n in range(3):
                    await broker.send(other, f"other {n}")
                    await topic.has(3 + n)
                await eventually(
                    lambda: f"{denied}/0 is stopped" in (topic.trigger.condition or ""),
                    "the partition is stopped, and named",
                )
                assert "grant the group's user Read" in (topic.trigger.condition or "")
                proxy.damage = None
                await broker.send(denied, "again")
                await topic.has(6)
            assert len(topic.logged("kafka.assigned")) <= 2  # the same consumer all the time
            assert not topic.logged("kafka.disconnected")

    with behind_a_proxy() as (broker, proxy):
        asyncio.run(work(broker, proxy))


def test_a_record_that_an_old_broker_does_not_send():
    """aiokafka's error names partition and offset, and the reason names the option to change."""
    tp = TopicPartition("orders", 2)
    error = RecordTooLargeError("There are some messages at %s=%s larger than %s", tp, 7, 1024)
    assert oversized_record(error) == (tp, 7)
    assert (
        unreadable_reason(error, 7)
        == "offset 7 cannot be read: it is larger than max_partition_fetch_bytes=1024"
    )
