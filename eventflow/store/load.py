"""Reads whole runs and journals, and verifies their checksums.

Called by transactions (tables.py, admin.py) and by the readers.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any

from eventflow.core.errors import StoreCorrupt
from eventflow.runs.journal import Entry, Kind
from eventflow.runs.run import Run, State, format_id
from eventflow.store import rows

_RUNS = """
    SELECT r.id, r.flow, r.subscription, r.event, r.state, r.created_at, r.due_at, r.started_at,
           r.token, r.ordering_key, r.priority, r.parent, r.parent_call_key, r.depth, r.params,
           r.crash_suspect, r.crash_count, r.cancel_requested, r.mode, r.deliveries, r.crc,
           e.id, e.key, e.digest, e.trigger, e.event_id, e.verdicts, e.headers, e.body, e.crc
    FROM runs r LEFT JOIN events e ON e.id = r.event
    WHERE r.id IN (SELECT value FROM json_each(?))"""

_JOURNAL = """
    SELECT call_key, attempt, kind, batch, position, at, due_at, codec, fingerprint, value, error,
           crc, after, waited, took
    FROM journal WHERE run = ? ORDER BY batch, position"""


def load_runs(
    connection: sqlite3.Connection, idents: Sequence[int]
) -> Iterator[tuple[Run, str | None]]:
    """The runs with their events' payloads, in the order asked for; each with the reason if a
    checksum does not match.
    """
    found = {row[0]: row for row in connection.execute(_RUNS, (str(list(idents)),)).fetchall()}
    for ident in idents:
        if ident in found:
            yield _run(found[ident])


def _run(row: Sequence[Any]) -> tuple[Run, str | None]:
    (
        ident,
        flow,
        subscription,
        event,
        state,
        created_at,
        due_at,
        started_at,
        token,
        ordering_key,
        priority,
        parent,
        parent_call_key,
        depth,
        params,
        crash_suspect,
        crash_count,
        cancel_requested,
        mode,
        deliveries,
        crc,
        *event_row,
    ) = row
    run = Run(
        id=ident,
        flow=flow,
        created_at=created_at,
        due_at=due_at or created_at,
        event=event,
        subscription=subscription,
        state=State(state),
        started_at=started_at,
        token=token,
        ordering_key=ordering_key,
        priority=priority,
        parent=parent,
        parent_call_key=parent_call_key,
        depth=depth,
        params=params,
        payload=event_row[7],
        crash_suspect=bool(crash_suspect),
        crash_count=crash_count,
        cancel_requested=bool(cancel_requested),
        mode=mode,
        deliveries=deliveries,
    )
    if crc != rows.run_crc(ident, flow, subscription, event, ordering_key, params):
        return run, corrupt("runs", ident)
    *columns, event_crc = event_row
    if columns[0] is not None and event_crc is not None and event_crc != rows.event_crc(*columns):
        return run, corrupt("events", columns[0])
    return run, None


def load_payloads(connection: sqlite3.Connection, run: int) -> list[bytes]:
    """The events of a run, in the order recorded.

    StoreCorrupt names one whose checksum does not match.
    """
    asked = f"""SELECT {", ".join(_CHECKED_COLUMNS)} FROM events e
        WHERE id = (SELECT event FROM runs WHERE id = :run)
        OR id IN (SELECT event FROM run_events WHERE run = :run) ORDER BY id"""
    payloads: list[bytes] = []
    for *columns, crc in connection.execute(asked, {"run": run}):
        if crc != rows.event_crc(*columns):
            raise StoreCorrupt(corrupt("events", columns[0]))
        payloads.append(columns[-1])
    return payloads


_CHECKED_COLUMNS = (
    "e.id",
    "e.key",
    "e.digest",
    "e.trigger",
    "e.event_id",
    "e.verdicts",
    "e.headers",
    "e.body",
    "e.crc",
)


def load_journal(connection: sqlite3.Connection, run: int) -> list[Entry]:
    """The run's journal in (batch, position) order.

    StoreCorrupt names the row whose checksum does not match.
    """
    entries: list[Entry] = []
    for row in connection.execute(_JOURNAL, (run,)):
        (
            call_key,
            attempt,
            kind,
            batch,
            position,
            at,
            due_at,
            codec,
            fingerprint,
            value,
            error,
            crc,
            after,
            waited,
            took,
        ) = row
        entry = Entry(
            call_key=call_key,
            kind=Kind(kind),
            attempt=attempt,
            batch=batch,
            position=position,
            at=at,
            due_at=due_at,
            fingerprint=fingerprint,
            codec=codec,
            value=value,
            error=error,
            after=after,
            waited=waited,
            took=took,
        )
        if crc != rows.entry_crc(run, entry):
            raise StoreCorrupt(corrupt("journal", run) + f", entry {call_key!r} attempt {attempt}")
        entries.append(entry)
    return entries


def corrupt(table: str, ident: int) -> str:
    return f"{table} row {format_id(ident)}: the stored checksum does not match its content"
