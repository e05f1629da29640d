"""Decodes the records of one fetch into a batch of events, dead letters and new positions.

`Session` calls `decode_batch`, in a thread when the user's decoder may block; nothing here touches
the consumer. Records of a partition keep their order. See records.py (one record).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from eventflow.events.event import Event, Undecodable
from triggers._kafka.client import KafkaRecord, TopicPartition
from triggers._kafka.errors import PartitionStop
from triggers._kafka.lag import Lag
from triggers._kafka.positions import PartitionPosition
from triggers._kafka.records import RecordReader, RetryLater


@dataclass(slots=True)
class AssignedPartition:
    """The state of one assigned partition.

    `fetch_offset`: behind what a fetch has returned; the client's own position may be ahead of it
    after a fetch that failed. `shrunk_at`: the log ends before the position, and since then the
    record before it is awaited.

    `recheck_offset`: the last record recorded before this assignment is fetched once more, to check
    that it is still the same one; -1 when there is nothing to check.
    """

    tp: TopicPartition
    position: PartitionPosition  # recorded in the ledger
    progressed_at: float  # monotonic: of the last new record
    fetch_offset: int = 0  # the next one to fetch
    shrunk_at: float | None = None  # monotonic
    recheck_offset: int = -1
    group_offset: int = -1  # as committed by this session
    stopped: PartitionStop | None = None
    logged_reason: str = ""  # of the last `kafka.partition_stopped`
    lag: Lag = field(default_factory=Lag)


@dataclass(slots=True)
class DecodedBatch:
    """What one transaction is to record.

    `positions`: of the partitions once it is recorded. `past_gap`: partitions to resume behind a
    gap. `changed`: partitions whose last recorded offset now holds another record. `retry_later`:
    partitions whose decoder asked for time, at the offset in `positions`.
    """

    epoch: int
    items: list[Event | Undecodable] = field(default_factory=list[Event | Undecodable])
    positions: dict[TopicPartition, PartitionPosition] = field(
        default_factory=dict[TopicPartition, PartitionPosition]
    )
    past_gap: set[TopicPartition] = field(default_factory=set[TopicPartition])
    changed: list[TopicPartition] = field(default_factory=list[TopicPartition])
    retry_later: dict[TopicPartition, RetryLater] = field(
        default_factory=dict[TopicPartition, RetryLater]
    )


def decode_batch(
    reader: RecordReader,
    fetched: Iterable[tuple[AssignedPartition, Sequence[KafkaRecord]]],
    fetch_positions: Mapping[TopicPartition, int],
    epoch: int,
) -> DecodedBatch:
    """Decodes the records.

    `fetch_positions`: the consumer's next offsets, which may be past offsets that hold no records
    for a consumer.
    """
    batch = DecodedBatch(epoch)
    for partition, records in fetched:
        tp = partition.tp
        first = records[0]
        partition.shrunk_at = None
        if first.offset == partition.recheck_offset:
            recorded = partition.position
            is_known = first.offset == recorded.last_offset
            if is_known and first.timestamp != recorded.last_timestamp:
                batch.changed.append(tp)
                continue
            records = records[1:]
        partition.recheck_offset = -1
        position = max(fetch_positions[tp], partition.position.offset)
        if records or position > partition.position.offset:  # else only the last one, once more
            _decode_partition(reader, partition, records, position, batch)
    return batch


def _decode_partition(
    reader: RecordReader,
    partition: AssignedPartition,
    records: Sequence[KafkaRecord],
    position: int,
    batch: DecodedBatch,
) -> None:
    read = reader.read
    items = batch.items
    last = None
    try:
        for record in records:
            item = read(record)
            if item is not None:
                items.append(item)
            last = record
    except RetryLater as later:  # the records before this one are recorded
        batch.retry_later[partition.tp] = later
        position = partition.position.offset if last is None else last.offset + 1
    recorded = partition.position
    batch.positions[partition.tp] = PartitionPosition(
        position,
        recorded.last_offset if last is None else last.offset,
        recorded.last_timestamp if last is None else last.timestamp,
    )
