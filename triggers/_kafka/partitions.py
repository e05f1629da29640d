"""The partitions that are assigned: which are read, which are held and why, and what is passed over.

session.py asks and tells. A partition is held while it is *stopped* (it cannot be read for a while), *doubtful* (its offset is
to be looked at), in a *gap* (offsets are gone, and a dead letter that says so is to be recorded first), or while the ledger is
*full*. Nothing is ever passed over in silence.
"""

from typing import Any

from triggers._kafka.batches import Batch, Partition
from triggers._kafka.client import Consumer, TopicPartition
from triggers._kafka.errors import Missing, Stopped
from triggers._kafka.options import Options
from triggers._kafka.positions import Place, Standing, key


class Partitions(dict[TopicPartition, Partition]):
    """The assigned partitions by name. `full`: none is read."""

    def __init__(self, options: Options, consumer: Consumer, log: Any) -> None:
        super().__init__()
        self._options, self._consumer, self._log, self._clock = (
            options,
            consumer,
            log,
            options.clock,
        )
        self.doubtful: dict[TopicPartition, bool] = {}
        self.gaps: dict[TopicPartition, Missing] = {}
        self.full = False

    def take(self, tp: TopicPartition, standing: Standing) -> None:
        """A partition just assigned, and paused: reads it from where it stands, or meets the gap there.

        An end below that place is not taken at its word (a broker may be behind): the fetch tells.
        """
        partition = self[tp] = Partition(tp, standing.place, self._clock.monotonic())
        partition.level.end = standing.end
        if standing.place.offset < standing.begin:
            self.meet_gap(partition, standing)
        else:
            self.read_on(partition, standing.begin)

    def forget(self) -> None:
        """They are somebody else's now."""
        self.clear()
        self.doubtful.clear()
        self.gaps.clear()

    def settle(self, batch: Batch) -> None:
        """Remembers what is recorded; only from here on may it be committed."""
        for tp, place in batch.places.items():
            if (partition := self.get(tp)) is not None:
                if place.offset > partition.place.offset and partition.stopped is None:
                    partition.complaint = ""
                partition.place, partition.moved_at = place, self._clock.monotonic()
                if tp in batch.passed:
                    self.read_on(partition)

    # ------------------------------------------------------------------ holding and going on

    def is_held(self, tp: TopicPartition) -> bool:
        return self.full or self[tp].stopped is not None or tp in self.doubtful or tp in self.gaps

    def hold_all(self) -> None:
        self._consumer.pause(*self._consumer.assignment())

    def go_on(self) -> None:
        """Reads again what was held by a ledger that was full, or for a time that is over."""
        now, was_full = self._clock.monotonic(), self.full
        self.full = False
        for partition in self.values():
            over = partition.stopped is not None and partition.stopped.until <= now
            if over:
                partition.stopped = None
            if over or was_full:
                self._resume(partition)

    def read_on(self, partition: Partition, begin: int = 0) -> None:
        """Reads from its place, and the last record before it once more: it must still be the same one."""
        place = partition.place
        partition.overlap = place.last if place.last >= begin else -1
        self._consumer.seek(
            partition.tp, place.offset if partition.overlap < 0 else partition.overlap
        )
        self._resume(partition)

    def _resume(self, partition: Partition) -> None:
        if not self.is_held(partition.tp) and partition.tp in self._consumer.assignment():
            self._consumer.resume(partition.tp)

    def stop(
        self, tp: TopicPartition, why: str, seconds: float, offset: int, *, passing: bool = False
    ) -> None:
        """Reads no more from a partition for a while, and then from `offset`; the others go on. `passing`: it mends itself."""
        partition = self[tp]
        if partition.complaint != why:  # said once, however often it is tried again
            partition.complaint = why
            if passing:
                self._log.warning("kafka.partition_stopped", partition=key(tp), reason=why)
            else:
                self._log.error("kafka.partition_stopped", partition=key(tp), reason=why)
        partition.stopped = Stopped(why, self._clock.monotonic() + seconds)
        self._consumer.pause(tp)
        self._consumer.seek(tp, offset)

    def skip(self, tp: TopicPartition, offset: int, why: str) -> None:
        """Passes over one record."""
        self._consumer.pause(tp)
        self.gaps[tp] = Missing(offset, offset + 1, why)

    # ------------------------------------------------------------------ gaps

    def doubt(self, tp: TopicPartition, *, changed: bool = False) -> None:
        """Something is wrong with where a partition is read; nothing is read until it was looked at."""
        if tp in self and tp in self._consumer.assignment():
            self._consumer.pause(tp)
            self.doubtful[tp] = changed

    def meet_gap(self, partition: Partition, found: Standing) -> None:
        """A line in the log; then a dead letter, or a partition that stands still."""
        tp, on_gap = partition.tp, self._options.on_gap
        if on_gap == "stop":
            self.stop(tp, f"{found.why}; on_gap= says to stop", float("inf"), found.begin)
            return
        self._log.error("kafka.gap_met", partition=key(tp), reason=found.why, reading_from=on_gap)
        after = found.begin if on_gap == "earliest" else found.end
        self.gaps[tp] = Missing(found.place.offset, after, found.why)

    def pass_gaps(self, epoch: int) -> Batch:
        """Dead letters for the offsets passed over; the partitions are read on once they are recorded."""
        batch, gaps = Batch(epoch), self.gaps
        self.gaps = {}
        for tp, missing in gaps.items():
            partition = self[tp]
            partition.overlap = -1
            batch.items.append(
                self._options.reader.gap(tp.topic, tp.partition, missing, partition.place.stamp)
            )
            batch.places[tp] = Place(missing.after)
            batch.passed.add(tp)
        return batch

    # ------------------------------------------------------------------ with nothing to read

    async def catch_up(self, epoch: int, now: int) -> Batch | None:
        """Notes what is level, and moves cursors past offsets that hold no records (the markers of transactions)."""
        batch = Batch(epoch)
        for tp, partition in self.items():
            if self.is_held(tp) or tp not in self._consumer.assignment():
                continue
            position = await self._consumer.position(tp)
            if position > partition.place.offset:
                batch.places[tp] = Place(position, partition.place.last, partition.place.stamp)
            partition.level.look(self._consumer, tp)
            if 0 <= partition.level.end <= position:
                partition.level.at = now
        return batch if batch.places else None
