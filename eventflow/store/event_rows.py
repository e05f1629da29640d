"""Events in a transaction: the identities that are known, and the rows of events, dead letters,
outbox and cursors to write.

Called by apply.py and admin.py; `Transaction.flush` writes. Every event of a batch is looked up by
identity in one statement (`load_known`), so that a duplicate is found also within the batch.
"""

from collections.abc import Iterable, Mapping

import msgspec

from eventflow.events.event import Json
from eventflow.store import rows
from eventflow.store.commit import Commit
from eventflow.store.protocol import Arrival
from eventflow.store.rows import KnownEvent, Values


class EventRows:
    """The events of one transaction."""

    def __init__(self, commit: Commit) -> None:
        self._commit = commit
        self._known: dict[bytes, KnownEvent] = {}  # by key: in the ledger before this transaction
        self._added: dict[bytes, Arrival] = {}  # by key: added by it
        self._events: list[Values] = []
        self._dead_letters: list[Values] = []
        self._outbox: list[Values] = []
        self._duplicates: dict[int, list[int]] = {}  # by event: duplicates, conflicts
        self._cursors: dict[tuple[str, str], bytes | None] = {}

    def load_known(self, arrivals: Iterable[Arrival]) -> None:
        """Reads which of these events are in the ledger already."""
        wanted = [(arrival.event_id, arrival.key) for arrival in arrivals]
        for text in rows.known_events.read(self._commit.connection, wanted):
            self._known.update(
                (bytes.fromhex(known.key), known) for known in rows.decode_known(text)
            )

    def first_of(self, arrival: Arrival) -> KnownEvent | None:
        """The event of the same identity that was recorded before; None if there is none."""
        first = self._known.get(arrival.key)
        if first is None and (earlier := self._added.get(arrival.key)) is not None:
            first = KnownEvent(
                earlier.id, earlier.key.hex(), earlier.digest.hex(), len(earlier.runs)
            )
        return first

    def reserve(self, arrival: Arrival) -> None:
        """Makes this arrival the first of its identity."""
        self._added[arrival.key] = arrival

    def add(self, arrival: Arrival) -> None:
        self._events.append(rows.event_row(arrival))
        self._commit.totals["events"] += 1

    def add_dead_letter(self, event: int, subscription: str, reason: str) -> None:
        self._dead_letters.append((event, subscription, reason, self._commit.at))

    def add_message(self, sink: str, event: int, subscription: str | None) -> None:
        """Adds the event, or its dead letter of this subscription, to the outbox of a sink."""
        self._outbox.append((sink, event, subscription, self._commit.at))
        self._commit.sinks.add(sink)

    def count_duplicate(self, event: int, *, conflict: bool) -> None:
        """Counts a duplicate, or a conflict, on the row of the first event."""
        counts = self._duplicates.setdefault(event, [0, 0])
        counts[conflict] += 1
        self._commit.count("conflicts" if conflict else "duplicates")

    def put_cursors(self, trigger: str, cursor: Mapping[str, Json]) -> None:
        """Stores the cursor's values by key; None deletes a key."""
        for key, value in cursor.items():
            self._cursors[trigger, key] = None if value is None else msgspec.json.encode(value)

    def flush(self) -> None:
        connection, at = self._commit.connection, self._commit.at
        for statement, values in (
            (rows.insert_events, self._events),
            (rows.insert_dead_letters, self._dead_letters),
            (rows.insert_outbox, self._outbox),
        ):
            if values:
                statement.execute(connection, values)
                values.clear()
        if self._duplicates:
            rows.count_duplicates.execute(
                connection,
                [(event, n, c, at if n else None) for event, (n, c) in self._duplicates.items()],
            )
            self._duplicates.clear()
        if self._cursors:
            kept = [(*name, value) for name, value in self._cursors.items() if value is not None]
            deleted = [name for name, value in self._cursors.items() if value is None]
            rows.put_cursors.execute(connection, kept)
            rows.delete_cursors.execute(connection, deleted)
            self._cursors.clear()
