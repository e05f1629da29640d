"""The audit of a ledger: its pages, every checksum, and the sums of promise P9 against the rows.

`SqliteStore.check` runs it for `eventflow doctor`, and tests run it after each test. It reads all
rows in one transaction, so it runs on a ledger that nobody writes, or on a copy (backup.py): beside
a writer it would keep the WAL from being reset. An empty list is a sound ledger.
"""

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from eventflow.store import rows
from eventflow.store.load import corrupt
from eventflow.store.readers import fetch_dicts
from eventflow.store.tables import COLUMN

Row = Sequence[Any]

_OUTCOMES = ("completed", "failed", "dead", "cancelled", "suppressed", "pending")

_COUNTED = {
    "gathered": "runs have another number of events than they state",
    "lost": "journal entries belong to no run",
    "blocked": "runs without an ordering key are blocked",
    "astray": "events wait in no pattern",
}
"""Violations that are reported once each, with the number of rows."""


def audit(connection: sqlite3.Connection) -> list[str]:
    """The violations, one sentence each. Raises OperationalError if interrupted."""
    found = Audit()
    wrong = check_pages(connection)
    is_complete = True
    for table in _TABLES:
        last: Row = ()
        try:
            for last in connection.execute(table.query):
                wrong += table.check(found, last)
        except sqlite3.OperationalError:  # interrupted, or the file is not accessible
            raise
        except sqlite3.DatabaseError as error:
            wrong.append(f"table {table.name} cannot be read after {last[:2]}: {error}")
            is_complete = False
    wrong += [
        f"{found.counted[name]} {text}" for name, text in _COUNTED.items() if found.counted[name]
    ]
    if is_complete:
        wrong[:0] = found.compare(fetch_dicts(connection, "SELECT * FROM ledger", ())[0])
    return wrong


def check_pages(connection: sqlite3.Connection) -> list[str]:
    """SQLite's own check of the pages of the file."""
    try:
        found = [text for (text,) in connection.execute("PRAGMA quick_check(20)")]
    except sqlite3.OperationalError:  # interrupted, or the file is not accessible
        raise
    except sqlite3.DatabaseError as error:
        found = [str(error)]
    return [f"page check: {text}" for text in found if text != "ok"]


class Audit:
    """What the rows add up to. Each `check_…` method takes a row of the query of its table."""

    def __init__(self) -> None:
        self.sums: Counter[str] = Counter()
        self.counted: Counter[str] = Counter()

    def check_event(self, row: Row) -> Iterator[str]:
        *content, crc, duplicates, conflicts = row
        self.sums["events"] += 1
        self.sums["duplicates"] += duplicates
        self.sums["conflicts"] += conflicts
        if crc is not None and rows.checksum(*content) != crc:
            yield corrupt("events", row[0])

    def check_run(self, row: Row) -> Iterator[str]:
        *request, crc, result, codec, error, outcome_crc = row[:11]
        blocked, members, state, deliveries, size, is_child = row[11:]
        ident = row[0]
        ordering_key = row[4]
        self.sums["runs"] += 1
        if not is_child:
            self.sums[COLUMN[state]] += deliveries
        if state < 4:
            self.sums["pending_bytes"] += size
        if rows.checksum(*request) != crc or (
            outcome_crc is not None and rows.checksum(ident, result, codec, error) != outcome_crc
        ):
            yield corrupt("runs", ident)
        self.counted["blocked"] += blocked and ordering_key is None
        self.counted["gathered"] += deliveries != 1 + members

    def check_entry(self, row: Row) -> Iterator[str]:
        *content, after, waited, took, crc, has_run = row
        times = () if took is None else (after, waited, took)
        if rows.checksum(*content, *times) != crc:
            yield corrupt("journal", row[0])
        self.counted["lost"] += not has_run

    def check_dead_letter(self, row: Row) -> Iterator[str]:
        _, is_open = row
        self.sums["dead"] += is_open
        yield from ()

    def check_pattern_event(self, row: Row) -> Iterator[str]:
        _, _, is_astray, is_waiting, size = row
        self.counted["astray"] += is_astray
        if is_waiting:
            self.sums["pending"] += 1
            self.sums["pending_bytes"] += size
        yield from ()

    def check_pattern(self, row: Row) -> Iterator[str]:
        subscription, key, state, crc, stated, found = row
        if stated != found:
            yield (
                f"pattern {subscription!r} has {stated} events waiting under key {key!r}, the rows "
                f"say {found}"
            )
        if rows.checksum(subscription, key, state) != crc:
            yield (
                f"pattern {subscription!r}, key {key!r}: the stored checksum does not match its "
                "content"
            )

    def check_ordering_key(self, row: Row) -> Iterator[str]:
        flow, ordering_key, heads = row
        if heads != 1:
            yield f"ordering key {ordering_key!r} of flow {flow!r} has {heads} heads, expected one"

    def compare(self, ledger: dict[str, Any]) -> Iterator[str]:
        """The differences between the one row of `ledger` and the sums of the rows."""
        total = sum(ledger[name] for name in _OUTCOMES)
        if ledger["accepted"] != total:
            yield f"accepted is {ledger['accepted']}, the sum of its parts {total}"
        compared = [name for name in _OUTCOMES if name != "suppressed"]
        compared += ["events", "runs", "pending_bytes"]
        if not ledger["pruned_events"]:
            compared += ["duplicates", "conflicts"]
        for name in compared:
            found = self.sums[name] + ledger.get(f"pruned_{name}", 0)
            if ledger[name] != found:
                yield f"{name} is {ledger[name]}, the rows say {found}"


class AuditedTable(NamedTuple):
    name: str
    check: Callable[[Audit, Row], Iterator[str]]
    query: str


_TABLES = (
    AuditedTable("events", Audit.check_event, """
        SELECT id, key, digest, trigger, event_id, verdicts, headers, body, crc,
            duplicates, conflicts
        FROM events"""),
    AuditedTable("runs", Audit.check_run, """
        SELECT id, flow, subscription, event, ordering_key, params, crc,
            result, codec, error, outcome_crc,
            blocked, (SELECT count(*) FROM run_events WHERE run = runs.id), state, deliveries,
            size, parent IS NOT NULL
        FROM runs"""),
    AuditedTable("journal", Audit.check_entry, """
        SELECT run, call_key, attempt, kind, batch, position, due_at, codec, fingerprint, value,
            error, after, waited, took, crc,
            EXISTS (SELECT 1 FROM runs WHERE id = journal.run)
        FROM journal"""),
    AuditedTable("dead_letters", Audit.check_dead_letter, """
        SELECT id, redriven_at IS NULL FROM dead_letters"""),
    AuditedTable("pattern_events", Audit.check_pattern_event, """
        SELECT event, subscription, expired IS NULL AND NOT EXISTS (
                SELECT 1 FROM patterns p WHERE p.subscription = w.subscription AND p.key = w.key),
            expired IS NULL, size
        FROM pattern_events w"""),
    AuditedTable("patterns", Audit.check_pattern, """
        SELECT subscription, key, state, crc, open, (
            SELECT count(*) FROM pattern_events w
            WHERE expired IS NULL AND w.subscription = p.subscription AND w.key = p.key)
        FROM patterns p"""),
    AuditedTable("ordering keys", Audit.check_ordering_key, """
        SELECT flow, ordering_key, sum(blocked = 0) FROM runs
        WHERE ordering_key IS NOT NULL AND state < 4 GROUP BY flow, ordering_key"""),
)  # fmt: skip
