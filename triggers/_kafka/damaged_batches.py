"""Decodes a batch record by record, when aiokafka cannot decode one of them.

aiokafka decodes a batch from its first record on, so one record that it cannot decode also hides
the records behind it. Here each record is found by its own length. `Fetcher` (fetching.py) calls
`decode_singly` for a batch whose fetch failed, and for no other.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateUsage=false

import struct
from typing import Any, NamedTuple, cast

from aiokafka.errors import CorruptRecordException
from aiokafka.record.default_records import _DefaultRecordBatchPy as DefaultBatch
from aiokafka.record.util import decode_varint
from aiokafka.structs import ConsumerRecord

from eventflow.core.errors import value_or_none
from triggers._kafka.client import KafkaRecord, TopicPartition

_LENGTH = struct.Struct(">qi")
"""Base offset, and the length of the rest of the batch."""

_MAGIC_AT = 16
"""Of the format's version; below 2 a batch is one message, which aiokafka decodes alone."""


class Unreadable(NamedTuple):
    """The offsets that cannot be decoded: from `first` up to, not including, `end`."""

    first: int
    end: int


def decode_singly(
    tp: TopicPartition, found: bytes, offset: int, *, aborted: bool
) -> tuple[list[KafkaRecord], int, Unreadable]:
    """The records from `offset` up to the first one that cannot be decoded, the next offset, and
    what to skip if there is no record: one record, or its whole batch.

    `found`: whole batches, the last of which may be cut off. Only the batch with `offset` is
    decoded, or the first one behind it: a compacted topic does not have each offset. `aborted`:
    transactions in them were aborted.
    """
    for start, end in _batches(found):
        batch: Any = cast(Any, DefaultBatch)(found[start:end])
        if batch.next_offset <= offset:
            continue
        whole = Unreadable(offset, batch.next_offset)
        is_ours = batch.validate_crc() and not batch.is_control_batch
        if not is_ours or (batch.is_transactional and aborted):
            return [], offset, whole
        records, after = value_or_none(_decode, tp, batch, offset) or ([], whole)
        if isinstance(after, Unreadable):
            return records, after.first, after
        return records, after, whole
    return [], offset, Unreadable(offset, offset + 1)


def _batches(found: bytes) -> list[tuple[int, int]]:
    """Start and end of each whole batch."""
    places: list[tuple[int, int]] = []
    start = 0
    while start + DefaultBatch.HEADER_STRUCT.size <= len(found):
        _, length = _LENGTH.unpack_from(found, start)
        end = start + _LENGTH.size + length
        is_whole = start + DefaultBatch.HEADER_STRUCT.size <= end <= len(found)
        if not is_whole or found[start + _MAGIC_AT] < 2:
            break
        places.append((start, end))
        start = end
    return places


def _decode(
    tp: TopicPartition, batch: Any, offset: int
) -> tuple[list[KafkaRecord], int | Unreadable]:
    """The records, and the offset behind the batch, or the record that cannot be decoded. Raises
    UnsupportedCodecError, and whatever damaged bytes raise when they are decompressed.
    """
    records: list[KafkaRecord] = []
    iter(batch)  # decompresses
    for _ in range(batch._num_records):
        at = offset
        try:
            length, body = decode_varint(batch._buffer, batch._pos)
            if (at := _offset_at(batch, body)) >= offset:
                records.append(_record(tp, batch._read_msg()))
                offset = records[-1].offset + 1
            batch._pos = body + length
        except (ValueError, IndexError, CorruptRecordException):  # this record: the caller decides
            is_here = offset <= at < batch.next_offset
            return records, Unreadable(offset, (at if is_here else offset) + 1)
    return records, batch.next_offset


def _offset_at(batch: Any, position: int) -> int:
    """The offset of the record whose fields begin at `position`: behind attributes and time."""
    _, position = decode_varint(batch._buffer, position)
    _, position = decode_varint(batch._buffer, position)
    delta, _ = decode_varint(batch._buffer, position)
    return batch.base_offset + delta


def _record(tp: TopicPartition, found: Any) -> KafkaRecord:
    return cast(
        KafkaRecord,
        ConsumerRecord(
            tp.topic,
            tp.partition,
            found.offset,
            found.timestamp,
            found.timestamp_type,
            found.key,
            found.value,
            found.checksum,
            -1 if found.key is None else len(found.key),
            -1 if found.value is None else len(found.value),
            tuple(found.headers),
        ),
    )
