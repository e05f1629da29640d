"""One bad item robs and stops no other: whatever a partition, a batch or a record holds, the
records beside it are recorded once each, over restarts too.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest

from tests.brokers import Broker, noida, tansu
from tests.conftest import eventually
from tests.triggers.kafka_topic import Topic, make_topic
from triggers._kafka import fetching

GOOD_PARTITIONS = 7
"""Beside the bad one: the client drains some of them before it finds the damage."""

BAD_NAME = b"\xc3\x28"
"""A header name that is not UTF-8; Kafka does not check names, and clients for C send any bytes."""


@pytest.fixture(scope="module", params=["tansu", "noida"])
def broker(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Broker]:
    with tansu() if request.param == "tansu" else noida(tmp_path_factory.mktemp("b")) as running:
        yield running


async def missing_codec(topic: Topic) -> None:
    """`bad 0`, compressed with a codec that the test takes away."""
    await topic.send("bad 0", partition=0, compression_type="snappy")


async def header_name(topic: Topic) -> None:
    """`bad 0` alone in its batch, with a header that is not UTF-8."""
    await topic.broker.send_batch(topic.name, ("bad 0", BAD_NAME))


async def header_name_with_neighbours(topic: Topic) -> None:
    """`bad 0` first in a batch, before a record that is whole."""
    await topic.broker.send_batch(
        topic.name, ("bad 0", BAD_NAME), ("good", b"name"), ("good too", b"name")
    )


async def compressed_garbage(topic: Topic) -> None:
    """`bad 0`, whose compressed bytes are none, under a checksum that holds."""
    await topic.broker.send_batch(topic.name, ("bad 0", b"name"), garbage=True)


KINDS: dict[str, tuple[Callable[[Topic], Awaitable[None]], int]] = {
    "codec": (missing_codec, 0),
    "header name": (header_name, 0),
    "compressed garbage": (compressed_garbage, 0),
    "header name in a batch": (header_name_with_neighbours, 2),
}
"""How partition 0 becomes bad at its offset 1, and how many good records lie behind it in its
batch.
"""


async def fill(topic: Topic, bad: Callable[[Topic], Awaitable[None]]) -> None:
    await topic.send("before", partition=0)
    await bad(topic)
    await topic.send("after", partition=0)
    for partition in range(1, GOOD_PARTITIONS + 1):
        await topic.send(*range(3), partition=partition)


def once_each(topic: Topic, partitions: range, count: int) -> None:
    """Every offset of these partitions is recorded exactly once, in order."""
    found: dict[int, list[int]] = {partition: [] for partition in partitions}
    for item in topic.events:
        partition, offset, _ = item.id.split(":")
        if int(partition) in found:
            found[int(partition)].append(int(offset))
    assert all(offsets == list(range(count)) for offsets in found.values()), found


async def stopped_at_the_bad_record(topic: Topic, others: int) -> None:
    """Waits until partition 0 is stopped and named; the others are recorded and committed."""
    await eventually(
        lambda: (
            f"{topic.name}/0 is stopped: offset 1 cannot be read" in (topic.trigger.condition or "")
        ),
        "the partition is stopped, and named",
    )
    await topic.has(1 + GOOD_PARTITIONS * others)
    await topic.committed(1, *[others] * GOOD_PARTITIONS)
    assert topic.cursor(0) == 1
    once_each(topic, range(1, GOOD_PARTITIONS + 1), others)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_partition_robs_no_other(broker: Broker, kind: str, monkeypatch: pytest.MonkeyPatch):
    """A record that cannot be read stops its own partition, which is named; every record of the
    other partitions is recorded once, and cursor and group claim no more than what is recorded,
    also after a restart and for what comes later.
    """

    async def work() -> None:
        topic = await make_topic(broker, GOOD_PARTITIONS + 1, rebalance_timeout_ms=1_000)
        await fill(topic, KINDS[kind][0])
        monkeypatch.setattr("aiokafka.codec.cramjam", None)
        async with topic.read():
            await stopped_at_the_bad_record(topic, 3)
        async with topic.read():
            await stopped_at_the_bad_record(topic, 3)
            for partition in range(1, GOOD_PARTITIONS + 1):
                await topic.send(3, 4, partition=partition)
            await stopped_at_the_bad_record(topic, 5)
        assert not topic.dead_letters

    asyncio.run(work())


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_record_that_is_skipped_robs_no_other(
    broker: Broker, kind: str, monkeypatch: pytest.MonkeyPatch
):
    """With skip_corrupt=True the unreadable record is the only dead letter: the records in front of
    it and behind it, in its batch and in its partition, are recorded once each.
    """
    bad, behind = KINDS[kind]

    async def work() -> None:
        topic = await make_topic(broker, GOOD_PARTITIONS + 1, rebalance_timeout_ms=1_000)
        await fill(topic, bad)
        monkeypatch.setattr("aiokafka.codec.cramjam", None)
        for _ in range(2):
            async with topic.read(skip_corrupt=True):
                await topic.has(3 + behind + GOOD_PARTITIONS * 3)
                await topic.committed(3 + behind, *[3] * GOOD_PARTITIONS)
        (dead_letter,) = topic.dead_letters
        assert dead_letter.headers["kafka-offset"] == "1"
        once_each(topic, range(1, GOOD_PARTITIONS + 1), 3)
        first = [event.data for event in topic.events if event.id.startswith("0:")]
        assert first == ["before", *["good", "good too"][:behind], "after"]

    asyncio.run(work())


def test_a_partition_is_read_on_once_its_record_can_be_read(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
):
    """A stopped partition is tried again: when the codec is there, its records follow, in order."""
    monkeypatch.setattr(fetching, "PARTITION_RETRY_SECONDS", 0.5)

    async def work() -> None:
        topic = await make_topic(broker, GOOD_PARTITIONS + 1, rebalance_timeout_ms=1_000)
        await fill(topic, missing_codec)
        with monkeypatch.context() as without:
            without.setattr("aiokafka.codec.cramjam", None)
            async with topic.read():
                await stopped_at_the_bad_record(topic, 3)
                without.undo()
                await topic.has(3 + GOOD_PARTITIONS * 3)
        once_each(topic, range(1), 3)

    asyncio.run(work())


COMPACTED = {
    "header name behind a gap": ([0, 400, 900], BAD_NAME, False),
    "header name first, behind a gap": ([400, 401, 900], BAD_NAME, False),
    "codec of a batch with gaps": ([0, 400, 900], b"name", True),
}
"""Offsets of the three records in a batch; the header name of the one at 400; whether the batch is
compressed.
"""


@pytest.mark.parametrize("kind", COMPACTED)
def test_offsets_that_a_compaction_took_are_no_dead_letters(
    broker: Broker, kind: str, monkeypatch: pytest.MonkeyPatch
):
    """In a topic whose offsets have gaps, what cannot be read is one dead letter for all offsets up
    to it, or to the end of its batch; what lies before and behind is recorded once.
    """
    offsets, name, snappy = COMPACTED[kind]

    async def work() -> None:
        topic = await make_topic(broker, rebalance_timeout_ms=1_000)
        await topic.send("before")
        records = [(f"at {each}", name if each == 400 else b"name") for each in offsets]
        await broker.send_batch(topic.name, *records, offsets=offsets, snappy=snappy)
        (last,) = await topic.send("after")
        if last != offsets[-1] + 2:
            pytest.skip(f"this broker numbers records itself: the last one has offset {last}")
        monkeypatch.setattr("aiokafka.codec.cramjam", None)
        good = [] if snappy else [f"at {each}" for each in offsets if each != 400]
        for _ in range(2):
            async with topic.read(skip_corrupt=True):
                await topic.committed(last + 1)
        assert topic.data == ["before", *good, "after"]
        (letter,) = topic.dead_letters
        assert letter.headers["kafka-offset"] == ("2" if offsets[0] == 0 and not snappy else "1")
        assert letter.headers["kafka-next"] == str(last if snappy else 1 + 400 + 1)

    asyncio.run(work())
