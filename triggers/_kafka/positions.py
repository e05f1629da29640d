"""Where each assigned partition is read from, and what is wrong when that is not where it was left.

`Session` calls `Positions.resolve` after each assignment. The ledger's cursor decides: it is
written in the transaction that records the events. A larger group offset takes precedence (an
operator moved it, or another ledger works for the group), unless this ledger committed it: then the
ledger has lost its last records, and they are read again. A position that the broker no longer has,
or whose record is another one now, is a gap, which is never skipped silently (partitions.py).
"""

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import cast

from eventflow.core.clock import to_us
from eventflow.events.event import Intake, Json
from triggers._kafka.client import Consumer, GroupOffset, TopicPartition, group_offsets
from triggers._kafka.options import KafkaOptions

LOG_EVENTS = {
    "kafka.group_offset_behind": (
        "The group offset was set back. Reading continues at the cursor, so that no record is read "
        "twice; `eventflow replay` passes recorded events to the flows again."
    ),
    "kafka.group_offset_ahead": (
        "The group offset is ahead of the cursor (it was moved); reading continues from the "
        "group offset."
    ),
    "kafka.group_offset_beyond_end": (
        "The group offset was set beyond the end of the partition, where no record is. Reading "
        "continues at the cursor."
    ),
    "kafka.rewound": "The ledger lost its newest rows: records are read again from its cursor.",
}

START_APPLIED_KEY = "/began"
"""Cursor key: `start=` was applied. A partition found later is read from its beginning. No topic
name has a slash.
"""

LEDGER_KEY = "/ledger"
"""Cursor key: the name of this ledger, the metadata of every offset it commits."""


@dataclass(slots=True)
class PartitionPosition:
    """How far a partition is recorded."""

    offset: int  # the next one to read
    last_offset: int = -1  # of the last record; -1 without one
    last_timestamp: int = -1  # of the last record, milliseconds

    def to_cursor(self) -> Json:
        return [self.offset, self.last_offset, self.last_timestamp]

    @classmethod
    def from_cursor(cls, cursor: Json) -> "PartitionPosition | None":
        return cls(*cast("list[int]", cursor)) if isinstance(cursor, list) else None


@dataclass(frozen=True, slots=True)
class OffsetBounds:
    """A position, and the offsets that the broker has: from `begin` up to, not including, `end`."""

    position: PartitionPosition
    begin: int
    end: int

    @property
    def is_gap(self) -> bool:
        return not self.begin <= self.position.offset <= self.end

    @property
    def gap_reason(self) -> str:
        """One line for the log and the dead letter."""
        offset = self.position.offset
        if offset < self.begin:
            return (
                f"{self.begin - offset} records, offsets {offset} to {self.begin - 1}, are gone: "
                f"the broker's log begins at {self.begin}"
            )
        if offset > self.end:
            return (
                f"offset {offset} was next, and the log ends at {self.end}: "
                "the topic was recreated, or lost its end"
            )
        return (
            f"offset {self.position.last_offset} holds another record than the one that was read "
            "there: the topic was recreated"
        )


def partition_name(tp: TopicPartition) -> str:
    return f"{tp.topic}/{tp.partition}"


class Positions:
    """Resolves positions with one consumer.

    `ledger`: the name of this ledger. `unrecorded_keys`: cursor entries for the next recorded
    batch.
    """

    def __init__(
        self, options: KafkaOptions, intake: Intake, consumer: Consumer, rng: random.Random
    ) -> None:
        self._options: KafkaOptions = options
        self._intake: Intake = intake
        self._consumer: Consumer = consumer
        self._rng: random.Random = rng
        self.ledger: str = ""
        self.unrecorded_keys: dict[str, Json] = {}

    async def resolve(self, tps: Collection[TopicPartition]) -> dict[TopicPartition, OffsetBounds]:
        """The position of each partition, with the broker's bounds. Raises StoreFull when `start=`
        cannot be recorded now.
        """
        cursor = await self._intake.cursor()
        if START_APPLIED_KEY not in cursor and self._options.start != "earliest":
            cursor = await self._apply_start()
        if LEDGER_KEY in cursor:
            self.ledger = str(cursor[LEDGER_KEY])
            self.unrecorded_keys = {}
        elif not self.unrecorded_keys:
            self.ledger = f"{self._rng.getrandbits(64):016x}"
            self.unrecorded_keys = {
                START_APPLIED_KEY: str(self._options.start),
                LEDGER_KEY: self.ledger,
            }
        group = await group_offsets(self._consumer, tps)
        begin = await self.beginning_offsets(tps)
        end = await self.end_offsets(tps)
        found: dict[TopicPartition, OffsetBounds] = {}
        for tp in tps:
            position = PartitionPosition.from_cursor(cursor.get(partition_name(tp)))
            if self._is_beyond_end(tp, position, group.get(tp), end[tp]):
                group.pop(tp)
            position = self._choose(tp, position, group.get(tp))
            found[tp] = OffsetBounds(position or PartitionPosition(begin[tp]), begin[tp], end[tp])
        return found

    async def bounds(self, tp: TopicPartition) -> tuple[int, int]:
        return (await self.beginning_offsets([tp]))[tp], (await self.end_offsets([tp]))[tp]

    async def end_offsets(self, tps: Collection[TopicPartition]) -> dict[TopicPartition, int]:
        """The next offsets to be written; with `read_committed` the ends of what may be read."""
        return await self._consumer.end_offsets(tps)

    async def beginning_offsets(self, tps: Collection[TopicPartition]) -> dict[TopicPartition, int]:
        return await self._consumer.beginning_offsets(tps)

    def _is_beyond_end(
        self,
        tp: TopicPartition,
        position: PartitionPosition | None,
        group: GroupOffset | None,
        end: int,
    ) -> bool:
        """Whether the group was set to an offset that the log has not, and the cursor is within it:
        nothing is known to be missing then.
        """
        if position is None or group is None or not position.offset <= end < group.offset:
            return False
        if group.metadata == self.ledger:
            return False
        self._intake.log.warning(
            "kafka.group_offset_beyond_end",
            partition=partition_name(tp),
            ledger=position.offset,
            group=group.offset,
            end=end,
        )
        return True

    def _choose(
        self, tp: TopicPartition, position: PartitionPosition | None, group: GroupOffset | None
    ) -> PartitionPosition | None:
        if position is not None and group is not None and group.offset < position.offset:
            if group.metadata != self.ledger:  # its own commits may lag, after a crash
                self._warn_set_back(tp, position.offset, group.offset)
            return position
        if group is None or (position is not None and group.offset == position.offset):
            return position
        if position is not None and group.metadata == self.ledger:
            self._intake.log.warning(
                "kafka.rewound",
                partition=partition_name(tp),
                ledger=position.offset,
                group=group.offset,
            )
            return position
        if position is not None:
            self._intake.log.info(
                "kafka.group_offset_ahead",
                partition=partition_name(tp),
                ledger=position.offset,
                group=group.offset,
            )
        return PartitionPosition(group.offset)

    def _warn_set_back(self, tp: TopicPartition, ledger: int, group: int) -> None:
        self._intake.log.warning(
            "kafka.group_offset_behind",
            partition=partition_name(tp),
            ledger=ledger,
            group=group,
            do="to run records again: eventflow replay EVENT, or eventflow replay --since TIME",
        )

    # ------------------------------------------------------------------ the first start

    async def _apply_start(self) -> Mapping[str, Json]:
        """Applies `start=` to all partitions, once, before anything is read: records written from
        now on are read.
        """
        tps = self._all_partitions()
        group = await group_offsets(self._consumer, tps)
        offsets = await self._start_offsets([tp for tp in tps if tp not in group])
        notes = {
            partition_name(tp): PartitionPosition(offset).to_cursor()
            for tp, offset in offsets.items()
        }
        if (
            START_APPLIED_KEY not in await self._intake.cursor()
        ):  # another listener of this trigger may have done it meanwhile
            await self._intake.accept(cursor={**notes, START_APPLIED_KEY: str(self._options.start)})
        return await self._intake.cursor()

    def _all_partitions(self) -> list[TopicPartition]:
        return [
            TopicPartition(topic, number)
            for topic in self._consumer.subscription()
            for number in self._consumer.partitions_for_topic(topic) or ()
        ]

    async def _start_offsets(self, tps: list[TopicPartition]) -> dict[TopicPartition, int]:
        start = self._options.start
        if not tps:
            return {}
        end = await self.end_offsets(tps)
        if not isinstance(start, datetime):
            return end
        wanted = to_us(start) // 1000
        found = await self._consumer.offsets_for_times(dict.fromkeys(tps, wanted))
        # A broker may answer with a record older than requested, or with offset 0 for none: neither
        # counts.
        return {
            tp: at.offset if (at := found[tp]) is not None and at.timestamp >= wanted else end[tp]
            for tp in tps
        }
