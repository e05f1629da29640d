"""The assigned partitions of one session: which are read, which are paused, and why.

`Session` and its parts call it. A partition is paused while it is *stopped* (unreadable, tried
again later), *uncertain* (its offset is checked with the broker), has a *gap* (offsets are missing,
and a dead letter about them is recorded first), or while the ledger is *full*. No offset is skipped
without a dead letter.
"""

from typing import Any

from eventflow.core.errors import StoreFull
from triggers._kafka.batches import AssignedPartition, DecodedBatch
from triggers._kafka.client import Consumer, TopicPartition
from triggers._kafka.errors import CheckReason, MissingOffsets, PartitionStop
from triggers._kafka.options import KafkaOptions
from triggers._kafka.positions import OffsetBounds, PartitionPosition, partition_name

LOG_EVENTS = {
    "kafka.offsets_missing": (
        "The broker no longer has offsets of a partition; a dead letter names them, or the "
        "partition stopped."
    ),
    "kafka.partition_stopped": (
        "A partition is not readable; the others continue. It is tried again."
    ),
}


LAGGING_BROKER_SECONDS = 3.0
"""That the record before the position may be missing: after an election, a new leader may not know
the end of the log yet.
"""


class AssignedPartitions(dict[TopicPartition, AssignedPartition]):
    """By topic and partition.

    `epoch` changes with each rebalance: what began in another epoch is dropped. `uncertain`:
    partitions to check, and why. `gaps`: offsets to skip.
    `store_full`: why nothing is read; None while the ledger has room. `decoder_is_slow`: nothing is
    read because the user's decoder does not return.
    """

    def __init__(self, options: KafkaOptions, consumer: Consumer, log: Any) -> None:
        super().__init__()
        self._options: KafkaOptions = options
        self._consumer: Consumer = consumer
        self._log: Any = log
        self.epoch: int = 0
        self.uncertain: dict[TopicPartition, CheckReason] = {}
        self.gaps: dict[TopicPartition, MissingOffsets] = {}
        self.store_full: StoreFull | None = None
        self.decoder_is_slow: bool = False

    def assign(self, tp: TopicPartition, bounds: OffsetBounds) -> None:
        """Adds a partition that was just assigned, and is paused: reads it from its position, or
        handles the gap there.
        """
        partition = AssignedPartition(tp, bounds.position, self._now())
        self[tp] = partition
        partition.lag.end_offset = bounds.end
        self.check(partition, bounds, CheckReason.SHRUNK)

    def check(
        self, partition: AssignedPartition, bounds: OffsetBounds, reason: CheckReason
    ) -> None:
        """Reads a partition from its position, or handles the gap there.

        A log that ends before the position is a gap if the broker refused to read there. Some
        brokers never refuse, and some name an end that is too small: then it is a gap unless the
        record before the position can be read within LAGGING_BROKER_SECONDS.
        """
        ends_before = bounds.position.offset > bounds.end
        if reason is CheckReason.SHRUNK and ends_before and not _is_shrunk(partition, self._now()):
            partition.shrunk_at = partition.shrunk_at or self._now()
            self.seek_and_resume(partition, bounds.begin)
            return
        partition.shrunk_at = None
        if reason is CheckReason.CHANGED or bounds.is_gap:
            self.handle_gap(partition, bounds)
        else:
            self.seek_and_resume(partition, bounds.begin)

    def rewind(self, *tps: TopicPartition) -> None:
        """Seeks partitions (by default all) back to what fetches have returned: a fetch that raises
        may have moved them over records that it dropped.
        """
        assigned = self._consumer.assignment()
        for tp in tps or tuple(self):
            if tp in assigned and tp in self:
                self._consumer.seek(tp, self[tp].fetch_offset)

    def recheck(self, tp: TopicPartition, bounds: OffsetBounds) -> None:
        """Compares a partition at rest with the broker's bounds and with its last record, which is
        fetched once more: its topic may have been deleted and made anew.
        """
        partition = self[tp]
        at_rest = partition.fetch_offset == partition.position.offset
        if self.is_paused(tp) or tp not in self._consumer.assignment():
            return
        if bounds.is_gap:
            self.mark_uncertain(tp, CheckReason.SHRUNK)
        elif at_rest:
            self.seek_and_resume(partition, bounds.begin)

    def _seek(self, partition: AssignedPartition, offset: int) -> None:
        partition.fetch_offset = offset
        self._consumer.seek(partition.tp, offset)

    def revoke_all(self) -> None:
        self.clear()
        self.uncertain.clear()
        self.gaps.clear()

    def mark_recorded(self, batch: DecodedBatch) -> None:
        """Takes over the positions of a recorded batch; only now may they be committed."""
        for tp, position in batch.positions.items():
            if (partition := self.get(tp)) is not None:
                if position.offset > partition.position.offset and partition.stopped is None:
                    partition.logged_reason = ""
                partition.position = position
                partition.progressed_at = self._now()
                if tp in batch.past_gap:
                    self.seek_and_resume(partition)

    def _now(self) -> float:
        return self._options.clock.monotonic()

    # ------------------------------------------------------------------ pausing and resuming

    def is_paused(self, tp: TopicPartition) -> bool:
        return (
            self.store_full is not None
            or self[tp].stopped is not None
            or tp in self.uncertain
            or tp in self.gaps
        )

    def pause_all(self) -> None:
        self._consumer.pause(*self._consumer.assignment())

    def resume_due(self) -> None:
        """Resumes what a full ledger paused, and the stopped partitions whose time has come. A
        partition whose last record was awaited for too long becomes uncertain.
        """
        now = self._now()
        was_full = self.store_full is not None
        self.store_full = None
        for partition in self.values():
            is_due = partition.stopped is not None and partition.stopped.retry_at <= now
            if is_due:
                partition.stopped = None
            if is_due or was_full:
                partition.shrunk_at = partition.shrunk_at and now  # it was not read meanwhile
                self._resume(partition)
            if _is_shrunk(partition, now):
                self.mark_uncertain(partition.tp, CheckReason.SHRUNK)

    def seek_and_resume(self, partition: AssignedPartition, begin: int = 0) -> None:
        """Reads from its position, and once more the last record before it, to check that it is
        still the same one.

        `begin`: the broker's first offset; a last record below it cannot be checked.
        """
        position = partition.position
        last_offset = position.last_offset
        if last_offset < 0 and partition.shrunk_at is not None:
            last_offset = position.offset - 1  # unknown, but it must be there
        partition.recheck_offset = last_offset if last_offset >= begin else -1
        self._seek(
            partition,
            position.offset if partition.recheck_offset < 0 else partition.recheck_offset,
        )
        self._resume(partition)

    def _resume(self, partition: AssignedPartition) -> None:
        if not self.is_paused(partition.tp) and partition.tp in self._consumer.assignment():
            self._consumer.resume(partition.tp)

    def stop(
        self,
        tp: TopicPartition,
        reason: str,
        seconds: float,
        offset: int,
        *,
        temporary: bool = False,
    ) -> None:
        """Stops one partition for that time, then reads it from `offset`. `temporary`: a warning,
        not an error, in the log.
        """
        partition = self[tp]
        if partition.logged_reason != reason:  # one line, however often it is tried
            partition.logged_reason = reason
            log = self._log.warning if temporary else self._log.error
            log("kafka.partition_stopped", partition=partition_name(tp), reason=reason)
        partition.stopped = PartitionStop(reason, self._now() + seconds)
        self._consumer.pause(tp)
        self._seek(partition, offset)

    def skip_records(self, tp: TopicPartition, missing: MissingOffsets) -> None:
        """Skips records that cannot be read, with one dead letter."""
        self._consumer.pause(tp)
        self.gaps[tp] = missing

    # ------------------------------------------------------------------ gaps

    def mark_uncertain(self, tp: TopicPartition, reason: CheckReason) -> None:
        """Pauses a partition until its position is checked."""
        if tp in self and tp in self._consumer.assignment():
            self._consumer.pause(tp)
            self.uncertain[tp] = reason

    def handle_gap(self, partition: AssignedPartition, bounds: OffsetBounds) -> None:
        """Logs an error; then, as `on_gap` says, prepares a dead letter or stops the partition for
        good.
        """
        tp = partition.tp
        on_gap = self._options.on_gap
        reason = bounds.gap_reason
        if on_gap == "stop":
            self.stop(tp, f"{reason}; on_gap= says to stop", float("inf"), bounds.begin)
            return
        name = partition_name(tp)
        self._log.error("kafka.offsets_missing", partition=name, reason=reason, reading_from=on_gap)
        end = bounds.begin if on_gap == "earliest" else bounds.end
        self.gaps[tp] = MissingOffsets(bounds.position.offset, end, reason)

    def skip_gaps(self) -> DecodedBatch:
        """A batch of dead letters about the gaps; once it is recorded, their partitions are read
        behind them.
        """
        batch = DecodedBatch(self.epoch)
        gaps = self.gaps
        self.gaps = {}
        for tp, missing in gaps.items():
            partition = self[tp]
            partition.recheck_offset = -1
            last_timestamp = partition.position.last_timestamp
            batch.items.append(
                self._options.reader.gap_dead_letter(
                    tp.topic, tp.partition, missing, last_timestamp
                )
            )
            batch.positions[tp] = PartitionPosition(missing.end)
            batch.past_gap.add(tp)
        return batch

    # ------------------------------------------------------------------ without records

    async def advance_idle(self) -> DecodedBatch | None:
        """A batch of positions behind offsets without records (transaction markers); None when no
        position moved.

        Called when a fetch returned nothing: partitions whose end is reached are marked as caught
            up.
        """
        batch = DecodedBatch(self.epoch)
        now = self._options.clock.now()
        for tp, partition in self.items():
            if self.is_paused(tp) or tp not in self._consumer.assignment():
                continue
            fetched = partition.fetch_offset = await self._consumer.position(tp)
            recorded = partition.position
            if fetched > recorded.offset:
                batch.positions[tp] = PartitionPosition(
                    fetched, recorded.last_offset, recorded.last_timestamp
                )
            partition.lag.update(self._consumer, tp)
            if 0 <= partition.lag.end_offset <= fetched:
                partition.lag.caught_up_at = now
        return batch if batch.positions else None


def _is_shrunk(partition: AssignedPartition, now: float) -> bool:
    """Whether the record before the position was awaited for LAGGING_BROKER_SECONDS."""
    since = partition.shrunk_at
    return since is not None and now - since >= LAGGING_BROKER_SECONDS
