"""Patterns in a transaction: their states are read, advanced by the router's machines, and written
with the event.

`Transaction` makes a `Patterns` for the first event that a pattern wants, and claim.py for patterns
that are due; a plain event never comes here. An event that waits in a pattern is a pending delivery
without a run, one row of `pattern_events`. With a match the delivery is a run's; when the event
expires it is suppressed, with the reason in its row. So the sum of P9 holds at every commit, and
audit.py proves it by the rows.
"""

import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import orjson

from eventflow.runs.run import State
from eventflow.store import rows
from eventflow.store.protocol import Arrival, PatternAdvancer, PatternMatch, PatternUpdate
from eventflow.store.rows import NEVER, Values
from eventflow.store.tables import Commit
from eventflow.store.windows import Windows

DUE_BATCH_SIZE = 256
"""Patterns that one claim advances because they are due."""

_DUE = """SELECT subscription, key, due_at, open, crc, hex(state)
    FROM patterns INDEXED BY patterns_due WHERE due_at <= ? ORDER BY due_at LIMIT ?"""

_NEXT_DUE = "SELECT min(due_at) FROM patterns INDEXED BY patterns_due WHERE due_at < ?"

_WAITING_IN = "SELECT subscription FROM pattern_events WHERE event = ? AND expired IS NULL"

_PAUSED = """SELECT e.id FROM events e JOIN paused_triggers t ON t.trigger = e.trigger
    WHERE e.id IN (SELECT value FROM json_each(?)) ORDER BY e.id LIMIT 1"""

_WAITING = (
    "SELECT event, size FROM pattern_events WHERE subscription = ? AND key = ? AND expired IS NULL"
)


class PatternInstance(msgspec.Struct):
    """What is open of one pattern under one key: its state (bytes as stored, or as the router made
    it), when it is due, and how many events wait in it.
    """

    subscription: str
    key: str
    state: Any = None
    due: int = NEVER
    waiting: int = 0
    is_stored: bool = False


class Patterns:
    """The patterns of one transaction. Without an `advancer` (no app) events find no pattern."""

    def __init__(self, commit: Commit, windows: Windows, advancer: PatternAdvancer | None) -> None:
        self._commit = commit
        self._windows = windows
        self._advancer = advancer
        self._instances: dict[tuple[str, str], PatternInstance] = {}  # by subscription and key
        self._changed: dict[tuple[str, str], PatternInstance] = {}
        self._added: dict[tuple[int, str], Values] = {}  # events that wait since this transaction
        self._ended: list[tuple[int, str, str | None]] = []  # events that waited before it

    # ------------------------------------------------------------------- reading

    def load(self, arrivals: Iterable[Arrival]) -> None:
        """Reads what is open of the patterns that these events are for."""
        wanted = {
            (each.subscription, each.key) for arrival in arrivals for each in arrival.pattern_events
        }
        names = wanted - self._instances.keys()
        if not names:
            return
        for text in rows.known_patterns.read(self._commit.connection, list(names)):
            for row in orjson.loads(text):
                self._from_row(*row)
        for name in names - self._instances.keys():
            self._instances[name] = PatternInstance(*name)

    def _from_row(
        self, subscription: str, key: str, due: int, waiting: int, crc: int, state: str
    ) -> PatternInstance:
        """`state` in hexadecimal.

        If its checksum does not match, the events that wait in it expire.
        """
        stored = bytes.fromhex(state) or None
        instance = self._instances[subscription, key] = PatternInstance(
            subscription, key, stored, due, waiting, is_stored=True
        )
        if rows.checksum(subscription, key, stored) != crc:
            instance.state = None
            self._expire_all(instance, "the stored state of its pattern is damaged")
        return instance

    # ------------------------------------------------------------------- deciding

    def advance(self, arrival: Arrival, event: int, *, is_replay: bool = False) -> Arrival:
        """Gives the event to its patterns.

        Returns the arrival with the runs of what matched and with the verdicts. `is_replay`: the
        event may wait in a pattern already; it is not there twice.
        """
        verdicts: dict[str, list[Any]] = {}
        matches: list[PatternMatch] = []
        waits_in: set[str] = set()
        if is_replay:
            waits_in = {name for (name,) in self._commit.connection.execute(_WAITING_IN, (event,))}
        for each in arrival.pattern_events:
            name = each.subscription
            now = arrival.received_at
            instance = self._instances[name, each.key]
            update = None
            if self._advancer is not None and name not in waits_in:
                update = self._advancer.advance(
                    name, each.key, instance.state, now, each, event, len(arrival.body)
                )
            if update is None:
                verdicts[name] = [name, "filtered", "it waits in this pattern already"]
                self._commit.suppress(1)
                continue
            self._reset_if_changed(instance, update)
            self._add_event(instance, event, len(arrival.body))
            self._resume_matches(update)
            self._apply(instance, update)
            placed = {match.run.id: self._windows.place_match(match) for match in update.matches}
            matches += [match for match in update.matches if placed[match.run.id] == match.run.id]
            verdicts[name] = _verdict(update, name, event, placed)
        return msgspec.structs.replace(
            arrival,
            verdicts=orjson.dumps(
                [verdicts.get(each[0], each) for each in orjson.loads(arrival.verdicts)]
            ),
            runs=[*arrival.runs, *(match.run for match in matches)],
            matches={match.run.id: match for match in matches},
        )

    def advance_due(self) -> bool:
        """Advances the first patterns that are due, at most `DUE_BATCH_SIZE`.

        Returns whether there were any. A pattern that the app does not have is left until it has
        it.
        """
        commit = self._commit
        advancer = self._advancer
        if advancer is None:
            return False
        due = commit.connection.execute(_DUE, (commit.now, DUE_BATCH_SIZE)).fetchall()
        for row in due:
            instance = self._instances.get((row[0], row[1])) or self._from_row(*row)
            update = advancer.advance(
                instance.subscription, instance.key, instance.state, commit.now
            )
            if update is None:
                self._put(instance, instance.state, NEVER)
                continue
            self._reset_if_changed(instance, update)
            self._resume_matches(update)
            self._apply(instance, update)
            for match in update.matches:
                self._windows.place_match(match)
        return bool(due)

    def _reset_if_changed(self, instance: PatternInstance, update: PatternUpdate) -> None:
        if update.is_reset:
            self._expire_all(instance, "its pattern was changed")

    def _resume_matches(self, update: PatternUpdate) -> None:
        """A match of events that arrived while their trigger was paused is PENDING if the trigger
        was resumed meanwhile. Else its run is of an event whose trigger is paused, so that
        `resume` finds it.
        """
        for match in update.matches:
            run = match.run
            if run.state is not State.PAUSED or (run.event, run.subscription) in self._added:
                continue
            paused = self._commit.connection.execute(_PAUSED, (str(list(match.events)),)).fetchone()
            if paused is None:
                run.state = State.PENDING
            run.event = match.events[0] if paused is None else paused[0]

    def _add_event(self, instance: PatternInstance, event: int, size: int) -> None:
        """The event waits in the pattern; its delivery is pending, as its arrival counts it."""
        instance.waiting += 1
        name = instance.subscription
        self._added[event, name] = (event, name, instance.key, size)
        self._commit.totals["pending_bytes"] += size

    def _end_event(self, instance: PatternInstance, event: int, reason: str | None = None) -> None:
        """The event waits no more: it matched, or it expired for this reason.

        Of one that this transaction added nothing is written.
        """
        instance.waiting -= 1
        if self._added.pop((event, instance.subscription), None) is None:
            self._ended.append((event, instance.subscription, reason))

    def _expire_all(self, instance: PatternInstance, reason: str) -> None:
        """All events of the instance expire, by their rows: its state cannot be read, or is of
        another pattern.
        """
        waiting = self._commit.connection.execute(_WAITING, (instance.subscription, instance.key))
        for event, size in waiting.fetchall():
            self._end_event(instance, event, reason)
            self._commit.suppress(1, size)

    def _apply(self, instance: PatternInstance, update: PatternUpdate) -> None:
        """Takes over an update, but for its runs."""
        for match in update.matches:
            for event in match.events:
                self._end_event(instance, event)
        for event, reason in update.expired:
            self._end_event(instance, event, reason)
        self._commit.suppress(len(update.expired), update.freed_bytes)
        self._commit.own_events += update.absences
        self._put(instance, update.state, update.due)

    def _put(self, instance: PatternInstance, state: Any, due: int) -> None:
        """What is open of the pattern now; None: nothing is."""
        instance.state = state
        instance.due = due
        self._changed[instance.subscription, instance.key] = instance
        self._commit.note_due(due)

    # ------------------------------------------------------------------- writing

    def flush(self) -> None:
        """Writes the states, and the events that wait or end."""
        if not (self._changed or self._added or self._ended):
            return
        connection = self._commit.connection
        ended = self._ended
        matched = [(event, name) for event, name, reason in ended if reason is None]
        expired = [end for end in ended if end[2] is not None]
        stored = [self._row(each) for each in self._changed.values() if each.state is not None]
        over = [
            name for name, each in self._changed.items() if each.state is None and each.is_stored
        ]
        rows.insert_pattern_events.execute(connection, list(self._added.values()))
        rows.delete_pattern_events.execute(connection, matched)
        rows.expire_pattern_events.execute(connection, expired)
        rows.put_patterns.execute(connection, stored)
        rows.delete_patterns.execute(connection, over)
        for instance in self._changed.values():
            instance.is_stored = instance.state is not None
        self._added.clear()
        self._ended.clear()
        self._changed.clear()

    def _row(self, instance: PatternInstance) -> Values:
        name = instance.subscription
        key = instance.key
        state = instance.state
        if self._advancer is not None and not isinstance(state, bytes):
            state = self._advancer.encode_state(name, key, state)
        crc = rows.checksum(name, key, state)
        return (name, key, instance.due, instance.waiting, crc, state)


def _verdict(update: PatternUpdate, name: str, event: int, placed: dict[int, int]) -> list[Any]:
    """The verdict of the event that has just arrived."""
    for match in update.matches:
        if event in match.events:
            run = placed[match.run.id]
            is_own = run == match.run.id and match.run.event == event
            return [name, "run" if is_own else "batched", run]
    for expired, reason in update.expired:
        if expired == event:
            return [name, "expired", reason]
    return [name, "waiting", "until its pattern matches or expires"]


def next_due(connection: sqlite3.Connection) -> int | None:
    """When the next pattern is due; in the past if `advance_due` has left some."""
    return connection.execute(_NEXT_DUE, (NEVER,)).fetchone()[0]


def make_due(connection: sqlite3.Connection, time_driven: Sequence[str]) -> None:
    """At start: patterns that time alone may make match are due at once, and so are those that the
    app did not have.
    """
    connection.execute("UPDATE patterns SET due_at = 0 WHERE due_at = ?", (NEVER,))
    for name in time_driven:
        connection.execute(
            "INSERT INTO patterns (subscription, key, due_at, open, crc) VALUES (?, '', 0, 0, ?)"
            " ON CONFLICT DO UPDATE SET due_at = 0",
            (name, rows.checksum(name, "", None)),
        )
