"""The lag of a partition, in messages and in seconds, from what the session knows already.

`Kafka.gauges` calls `lag_gauges`. Lag counts what is not recorded yet, so it grows while the ledger
is full. Its seconds are an upper bound of the age of the oldest waiting record: that record came
after the last recorded one, and after the last moment without lag. A number that is not known yet
is left out.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from eventflow.core.clock import SECOND
from eventflow.events.event import Gauge
from triggers._kafka.client import Consumer, TopicPartition
from triggers._kafka.positions import PartitionPosition


@dataclass(slots=True)
class Lag:
    """What is known of the end of a partition."""

    end_offset: int = -1  # the next one to be written; -1: unknown
    caught_up_at: int = 0  # microseconds: the last moment without lag; 0: unknown

    def update(self, consumer: Consumer, tp: TopicPartition) -> None:
        """Reads the end offset of the last fetch: that of the readable records, without open
        transactions, if known.
        """
        stable = consumer.last_stable_offset(tp)
        written = consumer.highwater(tp)
        end = written if stable is None or stable < 0 else stable
        if end is not None and end > self.end_offset:
            self.end_offset = end


def lag_gauges(
    partitions: Iterable[tuple[TopicPartition, PartitionPosition, Lag]], now: int
) -> Iterator[Gauge]:
    """`lag_messages` and `lag_seconds` for each partition. `now` in microseconds."""
    for tp, position, lag in partitions:
        if lag.end_offset < 0:
            continue
        labels = {"topic": tp.topic, "partition": str(tp.partition)}
        behind = max(0, lag.end_offset - position.offset)
        yield Gauge("lag_messages", behind, labels)
        since = max(position.last_timestamp * 1000, lag.caught_up_at)
        if not behind or since > 0:
            yield Gauge(
                "lag_seconds",
                max(0.0, (now - since) / SECOND) if behind else 0.0,
                labels,
                total="max",
            )
