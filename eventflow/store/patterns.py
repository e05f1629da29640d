"""Patterns in the ledger: their states are read, moved on by the router, and written in the transaction that records an event.

ops.py and doors.py call `weave` for what arrives, claim.py `wake` for what is due; retention and audit know the two tables. An
event that waits in a pattern is a pending delivery without a run, one row of `facts`; with a match it is a run's, and when it
lapses it is suppressed, with the reason in its row. So the sum of P9 holds at every commit, and `audit` proves it by the rows.
"""

from collections.abc import Iterable
from typing import Any

import msgspec
import orjson

from eventflow.store import rows
from eventflow.store.protocol import Arrival, RunEventSource, PatternMatch, PatternUpdate
from eventflow.store.rows import NEVER
from eventflow.store.transaction import Strand, Transaction
from eventflow.store.windows import place

AT_ONCE = 256
"""Patterns that one claim moves on because they are due."""

_DUE = """SELECT subscription, key, due_at, open, crc, hex(state) FROM patterns INDEXED BY patterns_due
    WHERE due_at <= ? ORDER BY due_at LIMIT ?"""


def know_patterns(tx: Transaction, arrivals: Iterable[Arrival]) -> None:
    """Finds what is open of the patterns that these events are for."""
    names = {
        (fact.subscription, fact.key) for arrival in arrivals for fact in arrival.pattern_events
    } - tx.strands.keys()
    if not names:
        return
    for text in rows.known_patterns.read(tx.connection, list(names)):
        for row in orjson.loads(text):
            _know(tx, *row)
    for name in names - tx.strands.keys():
        tx.strands[name] = Strand(*name)


def _know(
    tx: Transaction, subscription: str, key: str, due: int, waiting: int, crc: int, state: str
) -> Strand:
    kept = bytes.fromhex(state) or None
    strand = tx.strands[subscription, key] = Strand(
        subscription, key, kept, due, waiting, is_stored=True
    )
    if rows.checksum(subscription, key, kept) != crc:
        strand.state = None
        _void(tx, strand, "what was kept of its pattern is damaged")
    return strand


def weave(tx: Transaction, arrival: Arrival, event: int, *, known: bool = False) -> Arrival:
    """The arrival as it is once its event has been given to the patterns it is for. `known`: it may wait there already."""
    told: dict[str, list[Any]] = {}
    matches: list[PatternMatch] = []
    size = len(arrival.body)
    asked = "SELECT subscription FROM pattern_events WHERE event = ? AND expired IS NULL"
    there = {name for (name,) in tx.connection.execute(asked, (event,))} if known else ()
    for fact in arrival.pattern_events:
        name = fact.subscription
        strand = tx.strands[name, fact.key]
        woven = None
        if tx.herald is not None and name not in there:
            woven = tx.herald.advance(
                name, fact.key, strand.state, arrival.received_at, fact, event, size
            )
        if woven is None:
            told[name] = [name, "filtered", "it waits in this pattern already"]
            tx.suppress(1)
            continue
        if woven.is_reset:
            _void(tx, strand, "its pattern was changed")
        tx.hold_fact(strand, event, size)
        _take(tx, strand, woven)
        placed = {match.run.id: place(tx, match, arrival.received_at) for match in woven.matches}
        matches += [match for match in woven.matches if placed[match.run.id] == match.run.id]
        told[name] = _told(woven, name, event, placed)
    return _retold(arrival, told, matches)


def wake(tx: Transaction, herald: RunEventSource) -> None:
    """Moves patterns on that are due, the first of them if they are many. One whose code is not there is left until it is."""
    due = tx.connection.execute(_DUE, (tx.now, AT_ONCE)).fetchall()
    for row in due:
        strand = tx.strands.get((row[0], row[1])) or _know(tx, *row)
        woven = herald.advance(strand.subscription, strand.key, strand.state, tx.now)
        if woven is None:
            tx.put_strand(strand, strand.state, NEVER)
            continue
        if woven.is_reset:
            _void(tx, strand, "its pattern was changed")
        _take(tx, strand, woven)
        for match in woven.matches:
            place(tx, match, tx.now)
    if due:
        tx.flush()


def next_due(tx: Transaction) -> int | None:
    """When the next pattern is due; in the past if `wake` has left some."""
    asked = "SELECT min(due_at) FROM patterns INDEXED BY patterns_due WHERE due_at < ?"
    found: int | None = tx.connection.execute(asked, (NEVER,)).fetchone()[0]
    return found


def arm(tx: Transaction, herald: RunEventSource) -> None:
    """At start: what time alone may make match is asked at once, and so is what had lost its code."""
    tx.connection.execute("UPDATE patterns SET due_at = 0 WHERE due_at = ?", (NEVER,))
    for name in herald.time_driven():
        tx.connection.execute(
            "INSERT INTO patterns (subscription, key, due_at, open, crc) VALUES (?, '', 0, 0, ?)"
            " ON CONFLICT DO UPDATE SET due_at = 0",
            (name, rows.checksum(name, "", None)),
        )


def _take(tx: Transaction, strand: Strand, woven: PatternUpdate) -> None:
    """Writes down what a pattern came to, but for its runs."""
    for match in woven.matches:
        for event in match.events:
            tx.end_fact(strand, event)
    for event, reason in woven.expired:
        tx.end_fact(strand, event, reason)
    tx.suppress(len(woven.expired), woven.freed_bytes)
    tx.silences += woven.absences
    tx.put_strand(strand, woven.state, woven.due)


def _void(tx: Transaction, strand: Strand, reason: str) -> None:
    """Everything that waits lapses, by the rows: its state cannot be read, or is of another pattern."""
    asked = "SELECT event, size FROM pattern_events WHERE subscription = ? AND key = ? AND expired IS NULL"
    for event, size in tx.connection.execute(asked, (strand.subscription, strand.key)).fetchall():
        tx.end_fact(strand, event, reason)
        tx.suppress(1, size)


def _told(woven: PatternUpdate, name: str, event: int, placed: dict[int, int]) -> list[Any]:
    """The verdict of the event that has just come."""
    for match in woven.matches:
        if event in match.events:
            run = placed[match.run.id]
            return [
                name,
                "run" if run == match.run.id and match.run.event == event else "batched",
                run,
            ]
    for lapsed, reason in woven.expired:
        if lapsed == event:
            return [name, "expired", reason]
    return [name, "waiting", "for what its pattern still lacks"]


def _retold(arrival: Arrival, told: dict[str, list[Any]], matches: list[PatternMatch]) -> Arrival:
    verdicts = [told.get(said[0], said) for said in orjson.loads(arrival.verdicts)]
    return msgspec.structs.replace(
        arrival, verdicts=orjson.dumps(verdicts), runs=[*arrival.runs, *(match.run for match in matches)],
        matches={match.run.id: match for match in matches},
    )  # fmt: skip
