"""Where each partition is read on, and what is told when that is not where it was left.

session.py asks `Positions.find` for the partitions it was assigned. The ledger's cursor is the truth: it was written in the
transaction that recorded the events. The group's offset counts where it is larger (an operator moved it, or another store
works for the group), unless this very ledger committed it: then the ledger has lost its end, and the records are read again.
A position that the broker no longer has, or whose record is another one now, is a `Gap`: never passed over in silence.
"""

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import cast

from eventflow.core.clock import to_us
from eventflow.events.event import Intake, Json
from triggers._kafka.client import Committed, Consumer, TopicPartition, committed
from triggers._kafka.options import Options

BEGAN = "/began"
"""The cursor's note that `start=` was applied; a partition found later is read from its beginning. No topic has a slash."""

LEDGER = "/ledger"
"""The cursor's name for this ledger, which goes along with every offset it commits."""


@dataclass(slots=True)
class Place:
    """How far a partition is recorded: `offset` is the next to read; `last` and `stamp` are the last record's offset and
    timestamp, -1 without one."""

    offset: int
    last: int = -1
    stamp: int = -1

    def cursor(self) -> Json:
        return [self.offset, self.last, self.stamp]

    @classmethod
    def of(cls, cursor: Json) -> "Place | None":
        return cls(*cast("list[int]", cursor)) if isinstance(cursor, list) else None


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a partition is to be read on, and what the broker has: offsets from `begin` up to, not with, `end`."""

    place: Place
    begin: int
    end: int

    @property
    def is_gap(self) -> bool:
        return not self.begin <= self.place.offset <= self.end

    @property
    def why(self) -> str:
        """What is wrong with it, in a line for the log and the dead letter."""
        place = self.place
        if place.offset < self.begin:
            lost = self.begin - place.offset
            return f"{lost} records, offsets {place.offset} to {self.begin - 1}, are gone: the broker's log begins at {self.begin}"
        if place.offset > self.end:
            return f"offset {place.offset} was next, and the log ends at {self.end}: the topic was made anew, or lost its end"
        return f"offset {place.last} holds another record than the one that was read there: the topic was made anew"


def key(tp: TopicPartition) -> str:
    return f"{tp.topic}/{tp.partition}"


class Positions:
    """Finds positions with one consumer. `ledger` is its name; `notes` are to be recorded with the next cursors."""

    def __init__(
        self, options: Options, intake: Intake, consumer: Consumer, draw: random.Random
    ) -> None:
        self._options, self._intake, self._consumer, self._draw = options, intake, consumer, draw
        self.ledger = ""
        self.notes: dict[str, Json] = {}

    async def find(self, tps: Collection[TopicPartition]) -> dict[TopicPartition, Standing]:
        """Where each partition stands."""
        cursor = await self._intake.cursor()
        if BEGAN not in cursor and self._options.start != "earliest":
            cursor = await self._begin()
        if LEDGER in cursor:
            self.ledger, self.notes = str(cursor[LEDGER]), {}
        elif not self.notes:
            self.ledger = f"{self._draw.getrandbits(64):016x}"
            self.notes = {BEGAN: str(self._options.start), LEDGER: self.ledger}
        group = await committed(self._consumer, tps)
        begin, end = await self._begins(tps), await self.ends(tps)
        found: dict[TopicPartition, Standing] = {}
        for tp in tps:
            place = self._larger(tp, Place.of(cursor.get(key(tp))), group.get(tp))
            found[tp] = Standing(place or Place(begin[tp]), begin[tp], end[tp])
        return found

    async def bounds(self, tp: TopicPartition) -> tuple[int, int]:
        return (await self._begins([tp]))[tp], (await self.ends([tp]))[tp]

    async def ends(self, tps: Collection[TopicPartition]) -> dict[TopicPartition, int]:
        """The next offsets to be written; with `read_committed` the ends of what may be read."""
        return await self._consumer.end_offsets(tps)

    async def _begins(self, tps: Collection[TopicPartition]) -> dict[TopicPartition, int]:
        return await self._consumer.beginning_offsets(tps)

    def _larger(
        self, tp: TopicPartition, place: Place | None, group: Committed | None
    ) -> Place | None:
        if group is None or (place is not None and group.offset <= place.offset):
            return place
        if place is not None and group.metadata == self.ledger:
            self._intake.log.warning(
                "kafka.rewound", partition=key(tp), ledger=place.offset, group=group.offset
            )
            return place
        if place is not None:
            self._intake.log.info(
                "kafka.moved_on", partition=key(tp), ledger=place.offset, group=group.offset
            )
        return Place(group.offset)

    # ------------------------------------------------------------------ the first start

    async def _begin(self) -> Mapping[str, Json]:
        """Applies `start=` to every partition there is, once, before anything is read: what is written from now on is read."""
        tps = self._all_partitions()
        group = await committed(self._consumer, tps)
        offsets = await self._starts([tp for tp in tps if tp not in group])
        notes = {key(tp): Place(offset).cursor() for tp, offset in offsets.items()}
        if (
            BEGAN not in await self._intake.cursor()
        ):  # a second listener of this trigger may have been quicker
            await self._intake.accept(cursor={**notes, BEGAN: str(self._options.start)})
        return await self._intake.cursor()

    def _all_partitions(self) -> list[TopicPartition]:
        known, topics = self._consumer.partitions_for_topic, self._consumer.subscription()
        return [TopicPartition(topic, number) for topic in topics for number in known(topic) or ()]

    async def _starts(self, tps: list[TopicPartition]) -> dict[TopicPartition, int]:
        start = self._options.start
        if not tps:
            return {}
        end = await self.ends(tps)
        if not isinstance(start, datetime):
            return end
        wanted = to_us(start) // 1000
        found = await self._consumer.offsets_for_times(dict.fromkeys(tps, wanted))
        # A broker may answer with a record that is older than asked for, or with none as offset 0; neither counts.
        return {
            tp: at.offset if (at := found[tp]) is not None and at.timestamp >= wanted else end[tp]
            for tp in tps
        }
