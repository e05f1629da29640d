"""Fetches records, and finds the partition that an error of `getmany` concerns.

`Session` calls `Fetcher.fetch`. An error about one partition stops or skips in that partition only;
an error about the consumer is raised, and the consumer is not used again. The client moves the
positions of what it fetched before it raises, and drops these records: after every error each
partition is therefore sought back to what a fetch has *returned*. Most errors name no partition (a
damaged batch, a missing codec, a header that is not UTF-8): then each one is fetched by itself. See
errors.py, damaged_batches.py and partitions.py.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from triggers._kafka.client import (
    Consumer,
    KafkaError,
    KafkaRecord,
    TopicAuthorizationFailedError,
    TopicPartition,
    fetch_bytes,
)
from triggers._kafka.damaged_batches import decode_singly
from triggers._kafka.errors import (
    OFFSET_ERRORS,
    TOO_LARGE_ERROR,
    CheckReason,
    MissingOffsets,
    ends_consumer,
    oversized_record,
    partitions_without_offset,
    unreadable_reason,
)
from triggers._kafka.partitions import AssignedPartitions

Fetched: TypeAlias = Mapping[TopicPartition, Sequence[KafkaRecord]]

POLL_TIMEOUT_SECONDS = 0.5
"""That getmany waits for records."""

PARTITION_RETRY_SECONDS = 60.0
"""Between two tries of a partition that cannot be read."""

MAX_RECORDS_BY_PARTITION = 1_000
"""Records of all partitions together that are fetched partition by partition in a round."""


class Fetcher:
    """The fetches of one consumer. `skip_corrupt`: an unreadable record becomes a dead letter; else
    its partition stops.
    """

    def __init__(
        self, consumer: Consumer, partitions: AssignedPartitions, *, skip_corrupt: bool
    ) -> None:
        self._consumer: Consumer = consumer
        self._partitions: AssignedPartitions = partitions
        self._skip_corrupt: bool = skip_corrupt

    async def fetch(self, seconds: float = POLL_TIMEOUT_SECONDS) -> Fetched:
        """Waits up to `seconds` for records, or for a rebalance to end. Keeps the member in its
        group.
        """
        fetched, error = await self._getmany(timeout_ms=max(1, int(seconds * 1000)))
        if error is None:
            return fetched
        self._partitions.rewind()
        return {} if self._handle_named(error) else await self._fetch_by_partition()

    async def _getmany(
        self, *tps: TopicPartition, timeout_ms: int, max_records: int | None = None
    ) -> tuple[Fetched, Exception | None]:
        """What the client returns, or what it raises about one partition."""
        try:
            return await self._consumer.getmany(
                *tps, timeout_ms=timeout_ms, max_records=max_records
            ), None
        except Exception as error:  # the client decodes here: damaged bytes may raise anything
            if ends_consumer(error):
                raise
            return {}, error

    def _handle_named(self, error: Exception) -> bool:
        """Handles an error that names its partition; False for others."""
        if isinstance(error, OFFSET_ERRORS):  # the position is checked before the next fetch
            for tp in partitions_without_offset(error):
                self._partitions.mark_uncertain(tp, CheckReason.REFUSED)
            return True
        if isinstance(error, TOO_LARGE_ERROR):
            self._handle_unreadable(*oversized_record(error), error)
            return True
        return False

    async def _fetch_by_partition(self) -> Fetched:
        """Fetches each partition by itself. Returns the records before the first unreadable one in
        each of them.
        """
        consumer = self._consumer
        epoch = self._partitions.epoch
        fetched: dict[TopicPartition, Sequence[KafkaRecord]] = {}
        tps = consumer.assignment() - consumer.paused()
        for tp in tps:
            position = await consumer.position(tp)
            if (consumer.highwater(tp) or position + 1) <= position:
                continue
            limit = max(1, MAX_RECORDS_BY_PARTITION // len(tps))
            found, error = await self._getmany(tp, timeout_ms=500, max_records=limit)
            records = found.get(tp, ())
            if error is not None and epoch == self._partitions.epoch:
                self._partitions.rewind(tp)
                if not self._handle_named(error):
                    records = await self._fetch_up_to_damage(tp, position, error)
            if epoch != self._partitions.epoch:
                return {}
            if records:
                fetched[tp] = records
        return fetched

    async def _fetch_up_to_damage(
        self, tp: TopicPartition, position: int, error: Exception
    ) -> Sequence[KafkaRecord]:
        """The records from `position` up to the first unreadable one; when there are none, stops
        the partition or skips the record.
        """
        epoch = self._partitions.epoch
        records: list[KafkaRecord] = []
        after = position
        end: int | None = None
        while len(records) < MAX_RECORDS_BY_PARTITION:
            found, raised = await self._getmany(tp, timeout_ms=500, max_records=1)
            if not found:
                error = raised or error
                break
            records += found[tp]
            after = await self._consumer.position(tp)
        if not records and epoch == self._partitions.epoch:
            records, after, end = await self._decode_singly(tp, position)
        if epoch != self._partitions.epoch or tp not in self._partitions:
            return ()
        if records:
            self._consumer.seek(tp, after)
        else:
            self._handle_unreadable(tp, after, error, end)
        return records

    async def _decode_singly(
        self, tp: TopicPartition, position: int
    ) -> tuple[list[KafkaRecord], int, int]:
        """The records from `position` on, when the unreadable one is before them in their batch,
        and the offset behind them. None when it is the one at `position`, or the whole batch: then
        also the offset behind what cannot be read.
        """
        try:
            found, aborted = await fetch_bytes(self._consumer, tp, position)
        except KafkaError as error:  # of this partition: the error of the fetch is reported
            if ends_consumer(error):
                raise
            return [], position, position + 1
        records, after, unreadable = decode_singly(tp, found, position, aborted=aborted)
        return records, after, unreadable.end

    def _handle_unreadable(
        self, tp: TopicPartition, offset: int, error: Exception, end: int | None = None
    ) -> None:
        """Stops the partition at `offset`, or skips what cannot be read: up to, not including,
        `end`; one record by default.
        """
        reason = unreadable_reason(error, offset)
        if tp not in self._partitions:
            return
        if self._skip_corrupt and not isinstance(error, TopicAuthorizationFailedError):
            self._partitions.skip_records(tp, MissingOffsets(offset, end or offset + 1, reason))
        else:
            self._partitions.stop(tp, reason, PARTITION_RETRY_SECONDS, offset)
