"""What is used of aiokafka, with types, which it does not ship: the one file that imports it.

The other rooms see a `Consumer`. Without the extra, importing this says which `pip install` mends it.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false

import asyncio
import inspect
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

from eventflow.core.errors import MissingExtra
from triggers._kafka.shutdown import ends, hang_up, with_whole_bootstrap

try:
    from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
    from aiokafka.codec import has_lz4, has_snappy, has_zstd
    from aiokafka.errors import (
        CorruptRecordException,
        KafkaError,
        NoOffsetForPartitionError,
        OffsetOutOfRangeError,
        RecordTooLargeError,
        UnsupportedCodecError,
    )
except ImportError as error:
    raise MissingExtra("triggers.Kafka", "aiokafka", "kafka") from error

__all__ = [
    "CODECS",
    "Committed",
    "Consumer",
    "ConsumerRebalanceListener",
    "CorruptRecordException",
    "KafkaError",
    "NoOffsetForPartitionError",
    "OffsetOutOfRangeError",
    "Record",
    "RecordTooLargeError",
    "TopicPartition",
    "UnsupportedCodecError",
    "close",
    "committed",
    "make_consumer",
    "option_names",
]

CODECS: Mapping[str, Callable[[], bool]] = {"snappy": has_snappy, "lz4": has_lz4, "zstd": has_zstd}
"""Whether records compressed with these can be read here; gzip always can."""


class Record(Protocol):
    """What a ConsumerRecord has. `timestamp` is in milliseconds, below 0 when unknown; a tombstone has no value."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]]


class Committed(NamedTuple):
    """What the group has of a partition: the next offset to read, and what its committer wrote beside it."""

    offset: int
    metadata: str


class Time(Protocol):
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
    ) -> dict[TopicPartition, Time | None]: ...
    async def getmany(
        self, *tps: TopicPartition, timeout_ms: int, max_records: int | None = None
    ) -> dict[TopicPartition, list[Record]]: ...


def make_consumer(options: Mapping[str, Any]) -> Consumer:
    """A consumer, not started, on the running loop. TypeError or ValueError for options that it refuses."""
    consumer: Any = AIOKafkaConsumer(**options)
    with_whole_bootstrap(consumer._client)
    return cast(Consumer, consumer)


async def close(consumer: Consumer, seconds: float) -> None:
    """Leaves the group and closes every connection; raises nothing. May take `seconds`, and a few more when cut short.

    aiokafka's `stop` waits for a join under way, which may take as long as a rebalance, and may let a cancel of its own tasks
    out; then what it did not come to is done here. A heartbeat left behind would keep the partitions of a member that is gone.
    """
    raw = cast(Any, consumer)
    try:
        if await _ends(raw.stop(), seconds):
            return
        if (coordinator := raw._coordinator) is not None and hasattr(
            coordinator, "_stop_heartbeat_task"
        ):
            await _ends(coordinator._stop_heartbeat_task(), 1.0)
            await _ends(coordinator._stop_commit_offsets_refresh_task(), 1.0)
            await _ends(coordinator._maybe_leave_group(), 1.0)
        if raw._fetcher is not None:
            await _ends(raw._fetcher.close(), 1.0)
        await _ends(raw._client.close(), 1.0)
    finally:
        hang_up(raw._client)


async def _ends(work: Coroutine[Any, Any, None], seconds: float) -> bool:
    return await ends(asyncio.ensure_future(work), seconds)


async def committed(
    consumer: Consumer, tps: Collection[TopicPartition]
) -> dict[TopicPartition, Committed]:
    """What the group has. The public `committed()` leaves out the metadata, and asks for one partition at a time."""
    coordinator: Any = cast(Any, consumer)._coordinator
    fetched = await coordinator.fetch_committed_offsets(list(tps))
    return {
        tp: Committed(each.offset, each.metadata)
        for tp, each in fetched.items()
        if each.offset >= 0
    }


def option_names() -> list[str]:
    """The options that this version's consumer knows."""
    parameters = inspect.signature(cast(Any, AIOKafkaConsumer).__init__).parameters
    return [name for name in parameters if name not in ("self", "topics", "loop", "api_version")]
