"""How far a partition is behind, in messages and in seconds, from what the session knows anyway.

`kafka.py` asks `gauges` whenever somebody looks. Lag counts what is not recorded yet, so it grows while the ledger is full. Its
seconds are the age of the oldest record that waits, as an upper bound: it came after the last recorded one, and after the last
moment at which nothing waited. A number that is not known yet is left out.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from eventflow.core.clock import SECOND
from eventflow.events.event import Gauge
from triggers._kafka.client import Consumer, TopicPartition
from triggers._kafka.positions import Place


@dataclass(slots=True)
class Level:
    """What is known of a partition's end. `end`: the next offset to be written, -1 when unknown; `at`: the last moment when
    nothing waited, in microseconds, 0 when unknown."""

    end: int = -1
    at: int = 0

    def look(self, consumer: Consumer, tp: TopicPartition) -> None:
        """Takes what the last fetch told: the end of what may be read, so without open transactions where that is known."""
        stable, written = consumer.last_stable_offset(tp), consumer.highwater(tp)
        told = written if stable is None or stable < 0 else stable
        if told is not None and told > self.end:
            self.end = told


def gauges(partitions: Iterable[tuple[TopicPartition, Place, Level]], now: int) -> Iterator[Gauge]:
    """`lag_messages` and `lag_seconds` for each partition. `now` in microseconds."""
    for tp, place, level in partitions:
        if level.end < 0:
            continue
        labels = {"topic": tp.topic, "partition": str(tp.partition)}
        behind = max(0, level.end - place.offset)
        yield Gauge("lag_messages", behind, labels)
        since = max(place.stamp * 1000, level.at)
        if not behind or since > 0:
            yield Gauge(
                "lag_seconds",
                max(0.0, (now - since) / SECOND) if behind else 0.0,
                labels,
                total="max",
            )
