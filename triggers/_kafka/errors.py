"""The errors of `getmany`, and what each one concerns: one partition, or the whole consumer.

`Fetcher` (fetching.py) asks; nothing here waits. After an error that is not listed here the
consumer is replaced.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

from triggers._kafka.client import (
    CorruptRecordException,
    KafkaError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
    RecordTooLargeError,
    TopicPartition,
    UnsupportedCodecError,
)

UNREADABLE_ERRORS = (CorruptRecordException, UnsupportedCodecError)
"""A batch that cannot be read. Neither error names the partition."""

TOO_LARGE_ERROR = RecordTooLargeError
"""An old broker does not send a record larger than `max_partition_fetch_bytes`; aiokafka has
already skipped it.
"""

OFFSET_ERRORS = (OffsetOutOfRangeError, NoOffsetForPartitionError)
"""The broker does not have the offset."""


@dataclass(frozen=True, slots=True)
class PartitionStop:
    """Why a partition is not read. `retry_at` is monotonic."""

    reason: str
    retry_at: float


@dataclass(frozen=True, slots=True)
class MissingOffsets:
    """Offsets that are skipped: from `first` up to, not including, `end`."""

    first: int
    end: int
    reason: str


def partitions_without_offset(error: KafkaError) -> Collection[TopicPartition]:
    """The partitions that an OFFSET_ERRORS error names: it carries a mapping by partition, or one
    partition.
    """
    named: Any = error.args[0] if error.args else ()
    return (
        [named]
        if isinstance(named, TopicPartition)
        else cast("dict[TopicPartition, int]", dict(named))
    )


def oversized_record(error: KafkaError) -> tuple[TopicPartition, int]:
    """The partition and offset that a TOO_LARGE_ERROR names."""
    _, tp, offset, *_ = cast("tuple[str, TopicPartition, int, int]", error.args)
    return tp, offset


def unreadable_reason(error: KafkaError, offset: int) -> str:
    """The error for people, with what to do about it."""
    if isinstance(error, TOO_LARGE_ERROR):
        limit = f"max_partition_fetch_bytes={error.args[3]}"
        return f"offset {offset} cannot be read: it is larger than {limit}"
    found = f"offset {offset} cannot be read: {type(error).__name__}: {error}"
    if isinstance(error, UnsupportedCodecError):
        return f"{found}; run: pip install 'eventflow-reactor[kafka]'"
    return f"{found}; skip_corrupt=True makes such records dead letters"
