"""Whether the ledger is what it says: the sum of P9 against the rows, the lanes, the backlog, every checksum.

`eventflow doctor` prints what `audit` returns, and the tests ask it after each test. An empty list is a sound ledger.
"""

import sqlite3
from collections.abc import Iterator
from typing import Any

from eventflow.store import rows
from eventflow.store.load import corrupt
from eventflow.store.readers import dicts
from eventflow.store.transaction import COLUMN

_SUM = ("completed", "failed", "dead", "cancelled", "suppressed", "pending")


def audit(connection: sqlite3.Connection) -> list[str]:
    """What does not hold, one sentence each."""
    (ledger,) = dicts(connection, "SELECT * FROM ledger", ())
    return [*_deliveries(connection, ledger), *_tables(connection, ledger), *_lanes(connection), *_patterns(connection),
            *_checksums(connection)]  # fmt: skip


def check(connection: sqlite3.Connection) -> list[str]:
    """`audit`, and SQLite's own look at its pages."""
    pages = [row[0] for row in connection.execute("PRAGMA quick_check(20)")]
    return [f"page check: {found}" for found in pages if found != "ok"] + audit(connection)


def _deliveries(connection: sqlite3.Connection, ledger: dict[str, Any]) -> Iterator[str]:
    total = sum(ledger[name] for name in _SUM)
    if ledger["accepted"] != total:
        yield f"accepted is {ledger['accepted']}, the sum of its parts {total}"
    found: dict[str, int] = dict.fromkeys(_SUM, 0)
    for state, n in connection.execute("SELECT state, sum(deliveries) FROM runs WHERE parent IS NULL GROUP BY state"):
        found[COLUMN[state]] += n
    found["dead"] += connection.execute("SELECT count(*) FROM dead WHERE redriven_at IS NULL").fetchone()[0]
    found["pending"] += connection.execute(f"SELECT count(*) FROM {_WAITING}").fetchone()[0]
    for name in ("completed", "failed", "cancelled"):
        found[name] += ledger[f"pruned_{name}"]
    for name in ("completed", "failed", "dead", "cancelled", "pending"):
        if found[name] != ledger[name]:
            yield f"{name} is {ledger[name]}, the rows say {found[name]}"


def _tables(connection: sqlite3.Connection, ledger: dict[str, Any]) -> Iterator[str]:
    events, duplicates, conflicts = connection.execute(
        "SELECT count(*), total(duplicates), total(conflicts) FROM events"
    ).fetchone()
    runs, size = connection.execute("SELECT count(*), total(CASE WHEN state < 4 THEN size END) FROM runs").fetchone()
    size += connection.execute(f"SELECT total(size) FROM {_WAITING}").fetchone()[0]
    asked = [("events", events + ledger["pruned_events"]), ("runs", runs + ledger["pruned_runs"]), ("pending_bytes", size)]
    if not ledger["pruned_events"]:
        asked += [("duplicates", duplicates), ("conflicts", conflicts)]
    for name, found in asked:
        if ledger[name] != found:
            yield f"{name} is {ledger[name]}, the rows say {found:.0f}"
    asked = "SELECT count(*) FROM runs r WHERE deliveries <> 1 + (SELECT count(*) FROM members WHERE run = r.id)"
    if n := connection.execute(asked).fetchone()[0]:
        yield f"{n} runs do not have as many events as they say"
    lost = "SELECT count(*) FROM journal WHERE run NOT IN (SELECT id FROM runs)"
    if n := connection.execute(lost).fetchone()[0]:
        yield f"{n} journal entries belong to no run"


def _lanes(connection: sqlite3.Connection) -> Iterator[str]:
    heads = "SELECT flow, lane, sum(blocked = 0) FROM runs WHERE lane IS NOT NULL AND state < 4 GROUP BY flow, lane"
    for flow, lane, n in connection.execute(f"{heads} HAVING sum(blocked = 0) <> 1"):
        yield f"lane {lane!r} of flow {flow!r} has {n} heads, expected one"
    if n := connection.execute("SELECT count(*) FROM runs WHERE blocked = 1 AND lane IS NULL").fetchone()[0]:
        yield f"{n} runs without a lane are blocked"


_WAITING = "facts WHERE lapsed IS NULL"


def _patterns(connection: sqlite3.Connection) -> Iterator[str]:
    waiting = f"SELECT count(*) FROM {_WAITING} AND subscription = p.subscription AND key = p.key"
    asked = f"SELECT subscription, key, open, ({waiting}) AS found FROM patterns p WHERE open <> found"
    for subscription, key, n, found in connection.execute(asked):
        yield f"pattern {subscription!r} has {n} events waiting under key {key!r}, the rows say {found}"
    lost = f"SELECT count(*) FROM {_WAITING} AND (subscription, key) NOT IN (SELECT subscription, key FROM patterns)"
    if n := connection.execute(lost).fetchone()[0]:
        yield f"{n} events wait in no pattern"
    for subscription, key, state, crc in connection.execute("SELECT subscription, key, state, crc FROM patterns"):
        if rows.checksum(subscription, key, state) != crc:
            yield f"pattern {subscription!r}, key {key!r}: the stored checksum does not match its content"


_EVENTS = "SELECT id, key, digest, trigger, event_id, verdicts, headers, body, crc FROM events WHERE crc IS NOT NULL"
_RUNS = "SELECT id, flow, subscription, event, lane, params, crc FROM runs"
_OUTCOMES = "SELECT id, result, codec, error, outcome_crc FROM runs WHERE outcome_crc IS NOT NULL"
_JOURNAL = "SELECT run, claim, attempt, kind, batch, pos, due_at, codec, fingerprint, value, error, crc FROM journal"


def _checksums(connection: sqlite3.Connection) -> Iterator[str]:
    for table, query in (("events", _EVENTS), ("runs", _RUNS), ("runs", _OUTCOMES), ("journal", _JOURNAL)):
        for *payload, crc in connection.execute(query):
            if rows.checksum(*payload) != crc:
                yield corrupt(table, payload[0])
