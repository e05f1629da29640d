"""What getmany may raise, and whom it concerns: one partition, which then stops alone, or the whole consumer.

session.py asks; nothing here waits. An error that is not listed is the consumer's: it is made anew.
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

UNREADABLE = (CorruptRecordException, UnsupportedCodecError)
"""A batch that cannot be read. Neither says which partition it is."""

TOO_LARGE = RecordTooLargeError
"""An old broker does not send a record that is larger than `max_partition_fetch_bytes`; aiokafka has passed over it already."""

MISPLACED = (OffsetOutOfRangeError, NoOffsetForPartitionError)
"""The broker has no such offset."""


@dataclass(frozen=True, slots=True)
class Stopped:
    """Why nothing is read from a partition, and when (on the monotonic clock) it is tried again."""

    why: str
    until: float


@dataclass(frozen=True, slots=True)
class Missing:
    """Offsets from `first` up to `after` that are passed over, and why."""

    first: int
    after: int
    why: str


def misplaced(error: KafkaError) -> Collection[TopicPartition]:
    """The partitions that an error of MISPLACED is about: it carries a mapping by partition, or a partition."""
    about: Any = error.args[0] if error.args else ()
    return (
        [about]
        if isinstance(about, TopicPartition)
        else cast("dict[TopicPartition, int]", dict(about))
    )


def too_large(error: KafkaError) -> tuple[TopicPartition, int]:
    """The partition and offset that an error of TOO_LARGE is about."""
    _, tp, offset, *_ = cast("tuple[str, TopicPartition, int, int]", error.args)
    return tp, offset


def unreadable(error: KafkaError, offset: int) -> str:
    """What to do about a record that cannot be had."""
    if isinstance(error, TOO_LARGE):
        return f"offset {offset} cannot be read: it is larger than max_partition_fetch_bytes={error.args[3]}"
    found = f"offset {offset} cannot be read: {type(error).__name__}: {error}"
    if isinstance(error, UnsupportedCodecError):
        return f"{found}; run: pip install 'eventflow-reactor[kafka]'"
    return f"{found}; skip_corrupt=True leaves such records to the dead letters and goes on"
