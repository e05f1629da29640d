"""The outbox: messages that sinks have still to send. Called by sqlite.py for sinks/relay.py.

Rows are written with their events, by tables.py. `unsent` and `depths` only read; `remove_sent`
runs in a transaction.
"""

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from eventflow.core.errors import value_or_none
from eventflow.core.secrets import KNOWN_SECRETS
from eventflow.events.event import Event, OutboxMessage
from eventflow.logs.log import get_logger
from eventflow.runs.run import format_id
from eventflow.store import rows
from eventflow.store.transaction import Transaction

log = get_logger("eventflow.store")

_UNSENT = """
    SELECT o.id, o.subscription, d.reason, d.body,
           e.id, e.key, e.digest, e.trigger, e.event_id, e.verdicts, e.headers, e.body, e.crc,
           e.source, e.type
    FROM outbox o JOIN events e ON e.id = o.event
    LEFT JOIN dead_letters d ON d.id = (SELECT max(id) FROM dead_letters
        WHERE event = o.event AND subscription = o.subscription)
    WHERE o.sink = ? ORDER BY o.id LIMIT ?"""


def unsent(connection: sqlite3.Connection, sink: str, limit: int) -> list[OutboxMessage]:
    """The first messages of a sink, oldest first."""
    return [
        message
        for row in connection.execute(_UNSENT, (sink, limit))
        if (message := _message(row)) is not None
    ]


def _message(row: Sequence[Any]) -> OutboxMessage | None:
    number, subscription, reason, first_body, ident, *kept = row
    key, digest, trigger, event_id, verdicts, headers, body, crc, source, event_type = kept
    if crc != rows.event_crc(ident, key, digest, trigger, event_id, verdicts, headers, body):
        log.error("store.row_corrupt", table="events", row=format_id(ident))
        return None  # `eventflow doctor` reports it too; the other messages are sent
    body = first_body if subscription is not None and first_body is not None else body
    event = value_or_none(Event.from_json, body)
    return OutboxMessage(
        number=number,
        event=event or Event(id=event_id, source=source, type=event_type, data=body),
        trigger=trigger,
        ledger_id=ident,
        reason=None if subscription is None else reason or "",
        subscription=subscription,
        headers=orjson.loads(headers) if headers else {},
    )


def remove_sent(tx: Transaction, numbers: Sequence[int], rejected: Mapping[int, str]) -> None:
    """Removes these messages; the rejected become dead letters of their sink."""
    for number, reason in rejected.items():
        asked = "SELECT sink, event, subscription FROM outbox WHERE id = ?"
        found = tx.connection.execute(asked, (number,)).fetchone()
        if found is not None and found[2] is None:
            tx.events.add_dead_letter(found[1], found[0], KNOWN_SECRETS.remove_from(reason))
            tx.commit.add_deliveries([("dead", 1)])
    tx.connection.execute(
        "DELETE FROM outbox WHERE id IN (SELECT value FROM json_each(?))", (str(list(numbers)),)
    )


def depths(connection: sqlite3.Connection) -> dict[str, tuple[int, int]]:
    """By sink: how many messages wait, and the time of the oldest (microseconds)."""
    oldest = "SELECT at FROM outbox first WHERE first.sink = o.sink ORDER BY id LIMIT 1"
    found = connection.execute(f"SELECT sink, count(*), ({oldest}) FROM outbox o GROUP BY sink")
    return {sink: (count, oldest) for sink, count, oldest in found}
