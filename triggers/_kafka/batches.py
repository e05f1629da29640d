"""What one poll brought, read and ready to be recorded: events, dead letters, and how far each partition is then.

session.py calls `read_batch`, in a thread when a decoder of the user's takes part; nothing here touches the consumer. Records
of a partition keep their order. Next room: records.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from eventflow.events.event import Event, Undecodable
from triggers._kafka.client import Record, TopicPartition
from triggers._kafka.errors import Stopped
from triggers._kafka.lag import Level
from triggers._kafka.positions import Place
from triggers._kafka.records import Later, Reader


@dataclass(slots=True)
class Partition:
    """One assigned partition. `place` is what is recorded, `committed` the group's offset; `stopped` says why it is not read.

    `overlap` is the offset of the last record that was recorded before this assignment: it is read once more, to see that it
    is still the same one; -1 when there is nothing to check. `moved_at`: when it last got on (monotonic).
    """

    tp: TopicPartition
    place: Place
    moved_at: float
    overlap: int = -1
    committed: int = -1
    stopped: Stopped | None = None
    complaint: str = ""
    level: Level = field(default_factory=Level)


@dataclass(slots=True)
class Batch:
    """`places` are the partitions' once it is recorded. `passed`: those that go on behind a gap; `changed`: whose overlap holds
    another record than before; `later`: whose decoder asked for time, at the offset in `places`."""

    epoch: int
    items: list[Event | Undecodable] = field(default_factory=list[Event | Undecodable])
    places: dict[TopicPartition, Place] = field(default_factory=dict[TopicPartition, Place])
    passed: set[TopicPartition] = field(default_factory=set[TopicPartition])
    changed: list[TopicPartition] = field(default_factory=list[TopicPartition])
    later: dict[TopicPartition, Later] = field(default_factory=dict[TopicPartition, Later])


def read_batch(
    reader: Reader,
    fetched: Iterable[tuple[Partition, Sequence[Record]]],
    positions: Mapping[TopicPartition, int],
    epoch: int,
) -> Batch:
    """Reads the records. `positions`: where the consumer stands, which may be past records that nobody is shown."""
    batch = Batch(epoch)
    for partition, records in fetched:
        tp = partition.tp
        first = records[0]
        if first.offset == partition.overlap:
            if first.timestamp != partition.place.stamp:
                batch.changed.append(tp)
                continue
            records = records[1:]
        partition.overlap = -1
        _read_partition(reader, partition, records, positions[tp], batch)
    return batch


def _read_partition(
    reader: Reader, partition: Partition, records: Sequence[Record], position: int, batch: Batch
) -> None:
    read, items = reader.read, batch.items
    last = None
    try:
        for record in records:
            item = read(record)
            if item is not None:
                items.append(item)
            last = record
    except Later as later:
        batch.later[partition.tp] = later
        position = partition.place.offset if last is None else last.offset + 1
    place = partition.place
    batch.places[partition.tp] = Place(
        position,
        place.last if last is None else last.offset,
        place.stamp if last is None else last.timestamp,
    )
