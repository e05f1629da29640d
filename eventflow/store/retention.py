"""Retention: deletes ended runs with their journals first, then payloads of events, identities
last.

A step is `prune` and `drop_payloads`: each a small transaction, oldest rows first. The app repeats
it until there is nothing to do (sqlite.py: `prune`). None of the three waits until the others have
nothing to do: in a busy ledger some run is always old enough. Live runs, dead runs, open dead
letters, unsent messages, and the events that they need stay, however old.
"""

import sqlite3
from collections.abc import Iterator, Sequence

import msgspec

from eventflow.core.clock import SECOND
from eventflow.runs.run import State
from eventflow.store.transaction import Transaction

_MAX_ENTRIES_PER_STEP = 20_000
"""Journal rows that one step may delete (beyond those of one run): some 50 ms of the writer's time.
"""

FULL_SEARCH_INTERVAL = 60 * SECOND
"""Between two searches of a busy ledger for payloads that were still needed at the last one."""

_PRUNED = {
    State.COMPLETED: "pruned_completed",
    State.FAILED: "pruned_failed",
    State.CANCELLED: "pruned_cancelled",
}

# An id begins with the millisecond that it was made in, so old rows have small ids, and the search
# starts with them.
_ENDED = """
    SELECT id, state, parent, deliveries, (SELECT count(*) FROM journal WHERE run = r.id)
    FROM runs r NOT INDEXED
    WHERE id < :ceiling AND state BETWEEN 4 AND 6 AND finished_at < :before
      AND NOT EXISTS (SELECT 1 FROM runs p WHERE p.id = r.parent AND p.state < 4)
    ORDER BY id LIMIT :step"""

_UNNEEDED = """
    received_at < :before AND kept = 1
      AND NOT EXISTS (SELECT 1 FROM runs WHERE event = e.id)
      AND NOT EXISTS (SELECT 1 FROM run_events WHERE event = e.id)
      AND NOT EXISTS (SELECT 1 FROM pattern_events WHERE event = e.id AND expired IS NULL)
      AND NOT EXISTS (SELECT 1 FROM dead_letters WHERE event = e.id AND redriven_at IS NULL)
      AND NOT EXISTS (SELECT 1 FROM outbox WHERE event = e.id)"""

_PAYLOADS = f"""
    SELECT id FROM events e INDEXED BY events_scan
    WHERE id > :after AND id < :ceiling AND {_UNNEEDED} ORDER BY id LIMIT :step"""

_DROP = f"""
    UPDATE events AS e SET kept = 0, body = NULL, headers = NULL, crc = NULL
    WHERE id IN (SELECT value FROM json_each(:events)) AND {_UNNEEDED}"""

_IDENTITIES = """
    SELECT id FROM events INDEXED BY events_scan
    WHERE id < :ceiling AND received_at < :before AND kept = 0
    ORDER BY id LIMIT :step"""


def _old(before: int, step: int) -> dict[str, int]:
    return {
        "before": before,
        "ceiling": min(max(before // 1000 + 1, 0) << 20, (1 << 63) - 1),
        "step": step,
    }


def prune(tx: Transaction, *, payloads_before: int, identities_before: int, step: int) -> int:
    """Deletes runs older than `payloads_before`, and identities older than `identities_before`
    without a payload: `step` rows at most.
    """
    removed = _prune_runs(tx, payloads_before, step)
    identities_before = min(identities_before, payloads_before)
    return removed + _prune_identities(tx, identities_before, step - removed)


def _prune_runs(tx: Transaction, before: int, step: int) -> int:
    gone: list[int] = []
    entries = 0
    for ident, state, parent, deliveries, journaled in tx.connection.execute(
        _ENDED, _old(before, step)
    ).fetchall():
        if gone and entries + journaled > _MAX_ENTRIES_PER_STEP:
            break
        entries += journaled
        gone.append(ident)
        tx.commit.count("pruned_runs")
        if parent is None:
            tx.commit.count(_PRUNED[State(state)], deliveries)
    _delete(tx, "journal", "run", gone)
    _delete(tx, "run_events", "run", gone)
    _delete(tx, "windows", "run", gone)
    _delete(tx, "late_runs", "run", gone)
    _delete(tx, "runs", "id", gone)
    return len(gone)


class PayloadSearch(msgspec.Struct):
    """Where the search for unneeded payloads goes on. From the beginning it walks over every
    identity without a payload, which a busy ledger can afford once a minute.
    """

    after: int = 0
    """The last event that was found."""
    full_at: int = 0
    """Microseconds."""

    def starts(self, now: int, *, idle: bool) -> Iterator[int]:
        """The events to search from, until something is found. `idle`: nothing else was removed."""
        if self.after:
            yield self.after
        if idle or now >= self.full_at:
            self.full_at = now + FULL_SEARCH_INTERVAL
            yield 0


def unneeded_payloads(
    connection: sqlite3.Connection, *, before: int, after: int, step: int
) -> list[int]:
    """The next events whose payloads are not needed.

    For a reader, since it walks over every identity without a payload; the writer gets only what
    was found.
    """
    return [
        ident for (ident,) in connection.execute(_PAYLOADS, {**_old(before, step), "after": after})
    ]


def drop_payloads(tx: Transaction, events: Sequence[int], before: int) -> int:
    """Drops those of the found payloads that are still not needed."""
    return tx.connection.execute(_DROP, {"events": str(list(events)), "before": before}).rowcount


def _prune_identities(tx: Transaction, before: int, step: int) -> int:
    gone = [ident for (ident,) in tx.connection.execute(_IDENTITIES, _old(before, step))]
    _delete(tx, "dead_letters", "event", gone)
    _delete(tx, "pattern_events", "event", gone)
    _delete(tx, "events", "id", gone)
    tx.commit.count("pruned_events", len(gone))
    return len(gone)


def _delete(tx: Transaction, table: str, column: str, idents: Sequence[int]) -> None:
    if idents:
        tx.connection.execute(
            f"DELETE FROM {table} WHERE {column} IN (SELECT value FROM json_each(?))",
            (str(list(idents)),),
        )
