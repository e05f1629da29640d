"""The errors of `getmany`, and what each one concerns: one partition, or the whole consumer.

`Fetcher` (fetching.py) asks; nothing here waits. An error of the brokers that is not listed here
ends the consumer, and another one is made. Any other exception was raised while the client decoded
the records of one partition, which it does not name.
"""

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from typing import Any, cast

from triggers._kafka.client import (
    ConsumerStoppedError,
    CorruptRecordException,
    KafkaError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
    RecordTooLargeError,
    TopicAuthorizationFailedError,
    TopicPartition,
    UnsupportedCodecError,
)

UNREADABLE_ERRORS = (CorruptRecordException, UnsupportedCodecError, TopicAuthorizationFailedError)
"""A batch, or a topic, that cannot be read. None of these errors names the partition."""

TOO_LARGE_ERROR = RecordTooLargeError
"""An old broker does not send a record larger than `max_partition_fetch_bytes`; aiokafka has
already skipped it.
"""

OFFSET_ERRORS = (OffsetOutOfRangeError, NoOffsetForPartitionError)
"""The broker does not have the offset."""


class CheckReason(Enum):
    """Why the position of a partition is to be checked."""

    CHANGED = "changed"  # its last recorded offset holds another record
    REFUSED = "refused"  # the broker refused to read there
    SHRUNK = "shrunk"  # the log ends before it: its leader may be new


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


def ends_consumer(error: Exception) -> bool:
    """Whether an error of `getmany` concerns the whole consumer, and not one partition."""
    if isinstance(error, (*UNREADABLE_ERRORS, TOO_LARGE_ERROR, *OFFSET_ERRORS)):
        return False
    return isinstance(error, ConsumerStoppedError) or (
        isinstance(error, KafkaError) and type(error) is not KafkaError
    )  # aiokafka raises a bare KafkaError for a control batch without records


def unreadable_reason(error: Exception, offset: int) -> str:
    """The error for people, with what to do about it."""
    if isinstance(error, TOO_LARGE_ERROR):
        limit = f"max_partition_fetch_bytes={error.args[3]}"
        return f"offset {offset} cannot be read: it is larger than {limit}"
    found = f"offset {offset} cannot be read: {type(error).__name__}: {error}"
    if isinstance(error, TopicAuthorizationFailedError):
        return f"{found}; grant the group's user Read and Describe on this topic"
    if isinstance(error, UnsupportedCodecError):
        return f"{found}; run: pip install 'eventflow-reactor[kafka]'"
    return f"{found}; skip_corrupt=True makes such records dead letters"
