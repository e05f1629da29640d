"""The outbox: what an outlet has still to send, and what becomes of it. Called by sqlite.py for the relay.

Rows are written by ops.py, with the events they stand on. `waiting` and `depths` only read; `sent` is a transaction.
"""

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from eventflow.core.errors import caught
from eventflow.events.event import Event, Letter
from eventflow.logs.log import get_logger
from eventflow.runs.run import show_id
from eventflow.store import rows
from eventflow.store.transaction import Transaction

log = get_logger("eventflow.store")

_WAITING = """
    SELECT o.id, o.subscription, d.reason, d.body,
           e.id, e.key, e.digest, e.trigger, e.event_id, e.verdicts, e.headers, e.body, e.crc, e.source, e.type
    FROM outbox o JOIN events e ON e.id = o.event
    LEFT JOIN dead d ON d.id = (SELECT max(id) FROM dead WHERE event = o.event AND subscription = o.subscription)
    WHERE o.outlet = ? ORDER BY o.id LIMIT ?"""


def waiting(connection: sqlite3.Connection, outlet: str, limit: int) -> list[Letter]:
    """The first letters of an outlet, oldest first."""
    return [
        letter
        for row in connection.execute(_WAITING, (outlet, limit))
        if (letter := _letter(row)) is not None
    ]


def _letter(row: Sequence[Any]) -> Letter | None:
    number, subscription, reason, first_body, ident, *kept = row
    key, digest, trigger, event_id, verdicts, headers, body, crc, source, event_type = kept
    if crc != rows.event_crc(ident, key, digest, trigger, event_id, verdicts, headers, body):
        log.error("store.row_corrupt", table="events", row=show_id(ident))
        return None  # `eventflow doctor` finds it again; the letters behind it go on
    body = first_body if subscription is not None and first_body is not None else body
    event, _ = caught(Event.from_json, body)
    return Letter(
        number=number,
        event=event or Event(id=event_id, source=source, type=event_type, data=body),
        trigger=trigger,
        ledger_id=ident,
        reason=None if subscription is None else reason or "",
        subscription=subscription,
        headers=orjson.loads(headers) if headers else {},
    )


def sent(tx: Transaction, letters: Sequence[int], refused: Mapping[int, str]) -> None:
    """These need no more sending; the refused become dead letters of their outlet."""
    for number, reason in refused.items():
        asked = "SELECT outlet, event, subscription FROM outbox WHERE id = ?"
        found = tx.connection.execute(asked, (number,)).fetchone()
        if found is not None and found[2] is None:
            tx.add_dead(found[1], found[0], reason)
            tx.tally({"dead": 1})
    tx.connection.execute(
        "DELETE FROM outbox WHERE id IN (SELECT value FROM json_each(?))", (str(list(letters)),)
    )


def depths(connection: sqlite3.Connection) -> dict[str, tuple[int, int]]:
    """By outlet: letters that wait, and the time of the oldest."""
    oldest = "SELECT at FROM outbox first WHERE first.outlet = o.outlet ORDER BY id LIMIT 1"
    found = connection.execute(f"SELECT outlet, count(*), ({oldest}) FROM outbox o GROUP BY outlet")
    return {outlet: (count, oldest) for outlet, count, oldest in found}
