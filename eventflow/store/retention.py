"""What the ledger forgets, and when: settled runs with their journals first, then bodies, identities last.

`prune` is one small step in a transaction of the writer's, oldest first; the app calls it again until it returns 0. Live runs,
dead runs, open dead letters, unsent letters, and the events they stand on stay, however old.
"""

from collections.abc import Sequence

from eventflow.run import State
from eventflow.store.transaction import Transaction

_ENTRIES = 20_000
"""Journal rows one step may delete (beyond one run's): some 50 ms of the writer's time."""

_PRUNED = {State.COMPLETED: "pruned_completed", State.FAILED: "pruned_failed", State.CANCELLED: "pruned_cancelled"}

# An id begins with the millisecond it was made in, so everything old has a small id and the search starts where the old is.
_SETTLED = """
    SELECT id, state, parent, deliveries, (SELECT count(*) FROM journal WHERE run = r.id) FROM runs r NOT INDEXED
    WHERE id < :ceiling AND state BETWEEN 4 AND 6 AND finished_at < :before
      AND NOT EXISTS (SELECT 1 FROM runs p WHERE p.id = r.parent AND p.state < 4)
    ORDER BY id LIMIT :step"""

_BODIES = """
    SELECT id FROM events e INDEXED BY events_scan
    WHERE id < :ceiling AND received_at < :before AND kept = 1
      AND NOT EXISTS (SELECT 1 FROM runs WHERE event = e.id)
      AND NOT EXISTS (SELECT 1 FROM members WHERE event = e.id)
      AND NOT EXISTS (SELECT 1 FROM facts WHERE event = e.id AND lapsed IS NULL)
      AND NOT EXISTS (SELECT 1 FROM dead WHERE event = e.id AND redriven_at IS NULL)
      AND NOT EXISTS (SELECT 1 FROM outbox WHERE event = e.id)
    ORDER BY id LIMIT :step"""

_IDENTITIES = """
    SELECT id FROM events INDEXED BY events_scan
    WHERE id < :ceiling AND received_at < :before AND kept = 0
    ORDER BY id LIMIT :step"""


def prune(tx: Transaction, *, bodies_before: int, identities_before: int, step: int) -> int:
    """Runs older than `bodies_before`; when there are none, bodies; then identities older than `identities_before`."""
    return (
        _prune_runs(tx, bodies_before, step)
        or _prune_bodies(tx, bodies_before, step)
        or _prune_identities(tx, min(identities_before, bodies_before), step)
    )


def _old(before: int, step: int) -> dict[str, int]:
    return {"before": before, "ceiling": min(max(before // 1000 + 1, 0) << 20, (1 << 63) - 1), "step": step}


def _prune_runs(tx: Transaction, before: int, step: int) -> int:
    gone: list[int] = []
    entries = 0
    for ident, state, parent, deliveries, journaled in tx.connection.execute(_SETTLED, _old(before, step)).fetchall():
        if gone and entries + journaled > _ENTRIES:
            break
        entries += journaled
        gone.append(ident)
        tx.count("pruned_runs")
        if parent is None:
            tx.count(_PRUNED[State(state)], deliveries)
    _delete(tx, "journal", "run", gone)
    _delete(tx, "members", "run", gone)
    _delete(tx, "windows", "run", gone)
    _delete(tx, "late", "run", gone)
    _delete(tx, "runs", "id", gone)
    return len(gone)


def _prune_bodies(tx: Transaction, before: int, step: int) -> int:
    gone = [ident for (ident,) in tx.connection.execute(_BODIES, _old(before, step))]
    forget = "UPDATE events SET kept = 0, body = NULL, headers = NULL, crc = NULL WHERE id IN (SELECT value FROM json_each(?))"
    if gone:
        tx.connection.execute(forget, (str(gone),))
    return len(gone)


def _prune_identities(tx: Transaction, before: int, step: int) -> int:
    gone = [ident for (ident,) in tx.connection.execute(_IDENTITIES, _old(before, step))]
    _delete(tx, "dead", "event", gone)
    _delete(tx, "facts", "event", gone)
    _delete(tx, "events", "id", gone)
    tx.count("pruned_events", len(gone))
    return len(gone)


def _delete(tx: Transaction, table: str, column: str, idents: Sequence[int]) -> None:
    if idents:
        tx.connection.execute(f"DELETE FROM {table} WHERE {column} IN (SELECT value FROM json_each(?))", (str(list(idents)),))
