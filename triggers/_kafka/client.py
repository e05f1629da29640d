"""The part of aiokafka's consumer that `Kafka` uses, with types.

Only this file, damaged_batches.py and producer.py import aiokafka, which ships no types.

The other files see a `Consumer`. Without the extra, the import raises MissingExtra, which names the
`pip install`.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

import asyncio
import inspect
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

from eventflow.core.errors import MissingExtra
from triggers._kafka.shutdown import (
    close_connections,
    finish_bootstrap_despite_cancel,
    wait_or_cancel,
)

try:
    from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
    from aiokafka.codec import has_lz4, has_snappy, has_zstd
    from aiokafka.errors import (
        ConsumerStoppedError,
        CorruptRecordException,
        KafkaError,
        NoOffsetForPartitionError,
        OffsetOutOfRangeError,
        RecordTooLargeError,
        TopicAuthorizationFailedError,
        UnsupportedCodecError,
        for_code,
    )
    from aiokafka.protocol.fetch import FetchRequest
except ImportError as error:
    raise MissingExtra("triggers.Kafka", "aiokafka", "kafka") from error

__all__ = [
    "CODECS",
    "Consumer",
    "ConsumerRebalanceListener",
    "ConsumerStoppedError",
    "CorruptRecordException",
    "GroupOffset",
    "KafkaError",
    "KafkaRecord",
    "NoOffsetForPartitionError",
    "OffsetOutOfRangeError",
    "RecordTooLargeError",
    "TopicAuthorizationFailedError",
    "TopicPartition",
    "UnsupportedCodecError",
    "close",
    "fetch_bytes",
    "group_offsets",
    "make_consumer",
    "option_names",
]

CODECS: Mapping[str, Callable[[], bool]] = {"snappy": has_snappy, "lz4": has_lz4, "zstd": has_zstd}
"""Whether each codec is installed; gzip always is."""


class KafkaRecord(Protocol):
    """aiokafka's ConsumerRecord. `timestamp`: milliseconds, below 0 when unknown. A tombstone has
    no value.
    """

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]]


class GroupOffset(NamedTuple):
    """A committed offset: the next one to read, and the committer's metadata."""

    offset: int
    metadata: str


class OffsetAndTimestamp(Protocol):
    offset: int
    timestamp: int


class Consumer(Protocol):
    """AIOKafkaConsumer."""

    def subscribe(
        self, topics: Collection[str], pattern: str | None, listener: ConsumerRebalanceListener
    ) -> None: ...
    def subscription(self) -> Collection[str]: ...
    def partitions_for_topic(self, topic: str) -> Collection[int] | None: ...
    def assignment(self) -> frozenset[TopicPartition]: ...
    def pause(self, *tps: TopicPartition) -> None: ...
    def paused(self) -> set[TopicPartition]: ...
    def resume(self, *tps: TopicPartition) -> None: ...
    def seek(self, tp: TopicPartition, offset: int) -> None: ...
    def highwater(self, tp: TopicPartition) -> int | None: ...
    def last_stable_offset(self, tp: TopicPartition) -> int | None: ...
    async def start(self) -> None: ...
    async def position(self, tp: TopicPartition) -> int: ...
    async def commit(self, offsets: Mapping[TopicPartition, tuple[int, str]]) -> None: ...
    async def beginning_offsets(
        self, tps: Collection[TopicPartition]
    ) -> dict[TopicPartition, int]: ...
    async def end_offsets(self, tps: Collection[TopicPartition]) -> dict[TopicPartition, int]: ...
    async def offsets_for_times(
        self, times: dict[TopicPartition, int]
    ) -> dict[TopicPartition, OffsetAndTimestamp | None]: ...
    async def getmany(
        self, *tps: TopicPartition, timeout_ms: int, max_records: int | None = None
    ) -> dict[TopicPartition, list[KafkaRecord]]: ...


def make_consumer(options: Mapping[str, Any]) -> Consumer:
    """A consumer, not started, on the running loop. TypeError or ValueError for options that it
    refuses.
    """
    consumer: Any = AIOKafkaConsumer(**options)
    finish_bootstrap_despite_cancel(consumer._client)
    return cast(Consumer, consumer)


async def close(consumer: Consumer, seconds: float) -> None:
    """Leaves the group and closes all connections; raises nothing. Takes up to `seconds`, and a few
    more after a timeout.

    aiokafka's `stop` waits for a join in progress, which may take as long as a rebalance, and may
    raise the cancel of its own tasks; then this function does the rest. A heartbeat left running
    would keep the partitions of a closed member.
    """
    raw = cast(Any, consumer)
    try:
        if await _finishes(raw.stop(), seconds):
            return
        if (coordinator := raw._coordinator) is not None and hasattr(
            coordinator, "_stop_heartbeat_task"
        ):
            await _finishes(coordinator._stop_heartbeat_task(), 1.0)
            await _finishes(coordinator._stop_commit_offsets_refresh_task(), 1.0)
            await _finishes(coordinator._maybe_leave_group(), 1.0)
        if raw._fetcher is not None:
            await _finishes(raw._fetcher.close(), 1.0)
        await _finishes(raw._client.close(), 1.0)
    finally:
        close_connections(raw._client)


async def _finishes(work: Coroutine[Any, Any, None], seconds: float) -> bool:
    return await wait_or_cancel(asyncio.ensure_future(work), seconds)


async def group_offsets(
    consumer: Consumer, tps: Collection[TopicPartition]
) -> dict[TopicPartition, GroupOffset]:
    """The group's committed offsets. aiokafka's public `committed()` omits the metadata, and asks
    per partition.
    """
    coordinator: Any = cast(Any, consumer)._coordinator
    fetched = await coordinator.fetch_committed_offsets(list(tps))
    return {
        tp: GroupOffset(each.offset, each.metadata)
        for tp, each in fetched.items()
        if each.offset >= 0
    }


async def fetch_bytes(consumer: Consumer, tp: TopicPartition, offset: int) -> tuple[bytes, bool]:
    """The batches from `offset` on as the broker sends them, and whether transactions in them were
    aborted. The consumer's position does not change. Raises KafkaError.
    """
    raw = cast(Any, consumer)
    fetcher = raw._fetcher
    client = raw._client
    wanted = [(tp.topic, [(tp.partition, offset, fetcher._max_partition_fetch_bytes)])]
    request = FetchRequest(
        fetcher._fetch_max_wait_ms, 1, fetcher._fetch_max_bytes, fetcher._isolation_level, wanted
    )
    node = client.cluster.leader_for_partition(tp)
    if node in (None, -1):
        raise KafkaError(f"{tp.topic}/{tp.partition} has no leader now")
    response = await client.send(node, request)
    ((_, ((_, code, _, *details, found),)),) = response.topics
    if code:
        raise for_code(code)(f"{tp.topic}/{tp.partition} at offset {offset}")
    aborted = any(isinstance(each, list) and bool(cast("list[Any]", each)) for each in details)
    return bytes(found or b""), aborted


def option_names() -> list[str]:
    """The options of the installed version's consumer."""
    parameters = inspect.signature(cast(Any, AIOKafkaConsumer).__init__).parameters
    return [name for name in parameters if name not in ("self", "topics", "loop", "api_version")]
