"""Fetches records, and finds the partition that an error of `getmany` concerns.

`Session` calls `Fetcher.fetch`. An error about one partition stops or skips in that partition only,
and the call returns no records; any other error is raised, and the consumer is not used again. Two
errors name no partition (a damaged batch, a missing codec): then each partition is fetched record
by record. See errors.py and partitions.py.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from triggers._kafka.client import Consumer, KafkaError, KafkaRecord, TopicPartition
from triggers._kafka.errors import (
    OFFSET_ERRORS,
    TOO_LARGE_ERROR,
    UNREADABLE_ERRORS,
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

MAX_SINGLE_FETCHES = 1_000
"""Records of one partition that are fetched one by one in a round."""


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
        try:
            return await self._consumer.getmany(timeout_ms=max(1, int(seconds * 1000)))
        except OFFSET_ERRORS as error:  # the position is checked before the next fetch
            for tp in partitions_without_offset(error):
                self._partitions.mark_uncertain(tp)
        except TOO_LARGE_ERROR as error:  # aiokafka has skipped the record
            self._handle_unreadable(*oversized_record(error), error)
        except UNREADABLE_ERRORS:  # names no partition
            return await self._fetch_one_by_one()
        return {}

    async def _fetch_one_by_one(self) -> Fetched:
        """Record by record in each partition, up to the first unreadable one. Returns the records
        before it.
        """
        consumer = self._consumer
        epoch = self._partitions.epoch
        fetched: dict[TopicPartition, Sequence[KafkaRecord]] = {}
        for tp in consumer.assignment() - consumer.paused():
            records: list[KafkaRecord] = []
            position = await consumer.position(tp)
            if (consumer.highwater(tp) or position + 1) <= position:
                continue
            try:
                consumer.seek(tp, position)  # drops what was fetched and partly read
                while len(records) < MAX_SINGLE_FETCHES and (
                    found := await consumer.getmany(tp, timeout_ms=500, max_records=1)
                ):
                    records += found[tp]
            except UNREADABLE_ERRORS as error:  # in this partition, at its current position
                if epoch == self._partitions.epoch:
                    self._handle_unreadable(tp, await consumer.position(tp), error)
            if epoch != self._partitions.epoch:
                return {}
            if records:
                fetched[tp] = records
        return fetched

    def _handle_unreadable(self, tp: TopicPartition, offset: int, error: KafkaError) -> None:
        reason = unreadable_reason(error, offset)
        if tp not in self._partitions:
            return
        if self._skip_corrupt:
            self._partitions.skip_record(tp, offset, reason)
        else:
            self._partitions.stop(tp, reason, PARTITION_RETRY_SECONDS, offset)
