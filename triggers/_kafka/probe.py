"""Asks the brokers periodically for the first and end offsets of the assigned partitions.

`Session` runs `BrokerProbe.run` in parallel to its loop. The answers are the lag of paused
partitions, and show a topic that was made anew, whose offsets some brokers never call out of range;
no answer is a `problem` in the trigger's condition; and records that wait although nothing arrives
end the session, so that a new consumer is made.
"""

import asyncio

from eventflow.core.clock import Clock
from eventflow.core.errors import SourceError
from triggers._kafka.client import KafkaError, TopicPartition
from triggers._kafka.partitions import AssignedPartitions
from triggers._kafka.positions import OffsetBounds, Positions, partition_name

PROBE_INTERVAL_SECONDS = 15.0

PROBE_TIMEOUT_SECONDS = 30.0
"""After that the brokers count as unreachable."""

STALL_TIMEOUT_SECONDS = 180.0
"""Without a new record although some wait: then the consumer is replaced."""


class BrokerProbe:
    """`problem`: why the brokers do not answer; None while they do."""

    def __init__(self, partitions: AssignedPartitions, positions: Positions, clock: Clock) -> None:
        self._partitions: AssignedPartitions = partitions
        self._positions: Positions = positions
        self._clock: Clock = clock
        self.problem: str | None = None

    async def run(self) -> None:
        """Until cancelled. Raises SourceError when a partition has stalled."""
        while True:
            await asyncio.sleep(PROBE_INTERVAL_SECONDS)
            try:
                async with asyncio.timeout(PROBE_TIMEOUT_SECONDS):
                    tps = list(self._partitions)
                    begins = await self._positions.beginning_offsets(tps)
                    ends = await self._positions.end_offsets(tps)
            except (KafkaError, TimeoutError) as error:  # asked again after the interval
                self.problem = f"the brokers do not answer: {type(error).__name__}: {error}"
                continue
            self.problem = None
            for tp, end in ends.items():
                self._update(tp, begins[tp], end)

    def _update(self, tp: TopicPartition, begin: int, end: int) -> None:
        partitions = self._partitions
        if (partition := partitions.get(tp)) is None:
            return
        partition.lag.end_offset = end
        offset = partition.position.offset
        partitions.recheck(tp, OffsetBounds(partition.position, begin, end))
        is_waiting = end > offset and partition.stopped is None and partitions.store_full is None
        now = self._clock.monotonic()
        if not is_waiting:
            partition.progressed_at = now
        elif now - partition.progressed_at > STALL_TIMEOUT_SECONDS:
            raise SourceError(
                f"{partition_name(tp)}: {end - offset} records wait, "
                f"and none came in {STALL_TIMEOUT_SECONDS:g} s"
            )
