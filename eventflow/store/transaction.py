"""One transaction in the making: what it has read, what it will write, what it promised.

The writer begins it, ops.py and doors.py decide in it, `flush` writes it in a few statements, the writer commits. Rows are read
once and changed in memory, so the ops of a batch see each other; nothing reaches the file before `flush`.
"""

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from eventflow.core.errors import NotFound
from eventflow.events.event import Json
from eventflow.runs.journal import Entry
from eventflow.runs.run import Run, State, format_id
from eventflow.store import rows
from eventflow.store.load import load_runs
from eventflow.store.protocol import Arrival, RunReceiver, RunEventSource, PatternMatch
from eventflow.store.rows import NEVER, KnownEvent, RunRow, Values, WindowRow

TOTALS = (
    "accepted", "completed", "failed", "dead", "cancelled", "suppressed", "pending", "events", "duplicates", "conflicts",
    "runs", "pending_bytes", "pruned_completed", "pruned_failed", "pruned_cancelled", "pruned_events", "pruned_runs",
)  # fmt: skip
"""The counting columns of the one row of `ledger`."""

COLUMN: Mapping[int, str] = {
    State.PENDING: "pending",
    State.RUNNING: "pending",
    State.WAITING: "pending",
    State.PAUSED: "pending",
    State.HELD: "pending",
    State.COMPLETED: "completed",
    State.FAILED: "failed",
    State.CANCELLED: "cancelled",
    State.DEAD: "dead",
}
"""By state (or its number), the term of P9's sum that counts a delivery."""

_LEDGER = f"UPDATE ledger SET batch = ?, at = ?, {', '.join(f'{name} = ?' for name in TOTALS)}"


class Strand(msgspec.Struct):
    """What is open of one pattern under one key: its state (bytes as kept, or as the router made it), when it is due, and how
    many events wait in it."""

    subscription: str
    key: str
    state: Any = None
    due: int = NEVER
    waiting: int = 0
    is_stored: bool = False


class Transaction:
    """`batch` and `at` are its number and time; `now` is the wall clock, which may be behind `at`."""

    def __init__(
        self, connection: sqlite3.Connection, *, batch: int, at: int, now: int, totals: Mapping[str, int],
        handover: RunReceiver | None, running: dict[int, RunRow], herald: RunEventSource | None = None,
    ) -> None:  # fmt: skip
        self.connection, self.batch, self.at, self.now, self.handover = (
            connection,
            batch,
            at,
            now,
            handover,
        )
        self.herald = herald
        self.totals = dict(totals)
        self.known: dict[bytes, KnownEvent] = {}
        self.arrived: dict[bytes, Arrival] = {}
        self.children: set[tuple[int, str]] = set()
        self.finals: set[tuple[int, str]] = set()
        self.appended: set[int] = set()
        self.taken: list[Run] = []
        self.cancels: list[int] = []
        self.answers: list[tuple[int, Entry]] = []
        self.woken: set[int] = set()
        self.outlets: set[str] = set()
        self.windows: dict[tuple[str, str], WindowRow] = {}
        self.ended: list[RunRow] = []
        self.replayed: set[int] = set()
        self.more = False
        self.probe = False
        self.soonest = NEVER
        self._running = running
        self._rows: dict[int, RunRow | None] = {}
        self._changed: dict[int, RunRow] = {}
        self._pos = 0
        self._events: list[Values] = []
        self._runs: list[Values] = []
        self._entries: list[Values] = []
        self._dead: list[Values] = []
        self._outbox: list[Values] = []
        self._bumps: dict[int, list[int]] = {}
        self._cursors: dict[tuple[str, str], bytes | None] = {}
        self._lanes: set[tuple[str, str]] = set()
        self._members: list[Values] = []
        self._grown: dict[int, RunRow] = {}
        self._opened: set[tuple[str, str]] = set()
        self.strands: dict[tuple[str, str], Strand] = {}
        self.silences: list[Arrival] = []
        self._woven: dict[tuple[str, str], Strand] = {}
        self._held: dict[tuple[int, str], Values] = {}
        self._fact_ends: list[tuple[int, str, str | None]] = []

    # ------------------------------------------------------------------- reading

    def fetch(self, idents: Iterable[int]) -> None:
        """Reads these runs, so that `row` finds them in memory. The writer remembers the running ones."""
        missing: list[int] = []
        for ident in idents:
            if ident not in self._rows:
                row = self._rows[ident] = self._running.get(ident)
                if row is None:
                    missing.append(ident)
        if not missing:
            return
        text = self.connection.execute(rows.READ_ROWS, (str(missing),)).fetchone()[0]
        self._rows.update((row.id, row) for row in rows.decode_rows(text))

    def row(self, ident: int) -> RunRow | None:
        """The run as this transaction will leave it, as far as decided; None when there is none."""
        if ident not in self._rows:
            self.fetch((ident,))
        return self._rows[ident]

    def disown(self, parent: int) -> None:
        """The children of this run have no claim on it any more."""
        self.children = {name for name in self.children if name[0] != parent}
        self.finals = {name for name in self.finals if name[0] != parent}
        self.connection.execute("UPDATE runs SET parent_call_key = NULL WHERE parent = ?", (parent,))
        for row in (*self._rows.values(), *self._running.values()):
            if row is not None and row.parent == parent:
                row.parent_call_key = None

    def need(self, ident: int) -> RunRow:
        row = self.row(ident)
        if row is None:
            raise NotFound("run", format_id(ident))
        return row

    # ------------------------------------------------------------------- deciding

    def count(self, column: str, n: int = 1) -> None:
        self.totals[column] += n

    def tally(self, tally: Mapping[str, int]) -> None:
        """Adds deliveries to P9's sum."""
        for column, n in tally.items():
            self.totals[column] += n
            self.totals["accepted"] += n

    def add_event(self, row: Values) -> None:
        self._events.append(row)

    def add_dead(self, event: int, subscription: str, reason: str) -> None:
        self._dead.append((event, subscription, reason, self.at))

    def add_letter(self, outlet: str, event: int, subscription: str | None) -> None:
        """The event, or its dead letter of this subscription, for an outlet."""
        self._outbox.append((outlet, event, subscription, self.at))
        self.outlets.add(outlet)

    def bump(self, event: int, *, conflict: bool) -> None:
        """Counts a duplicate, or a conflict, on the first one's row."""
        tally = self._bumps.setdefault(event, [0, 0])
        tally[conflict] += 1
        self.count("conflicts" if conflict else "duplicates")

    def put_cursors(self, trigger: str, cursor: Mapping[str, Json]) -> None:
        for key, value in cursor.items():
            self._cursors[trigger, key] = None if value is None else msgspec.json.encode(value)

    def add_entry(self, run: int, entry: Entry) -> Entry:
        """Numbers the entry and queues it."""
        entry.batch, entry.position, entry.at = self.batch, self._pos, entry.at or self.at
        self._pos += 1
        self._entries.append(rows.entry_row(run, entry))
        self.appended.add(run)
        return entry

    def add_run(self, run: Run, body: bytes | None) -> None:
        """A new run: RUNNING at once when the worker takes it, else as it comes. A run with a lane starts blocked."""
        size = len(run.params or b"") + len(body or b"")
        due_at = 0 if run.due_at <= self.now else run.due_at
        if run.payload is None:
            run.payload = body
        if run.ordering_key is not None:
            self._lanes.add((run.flow, run.ordering_key))
        elif run.state is State.PENDING and self._offer(run, due_at):
            self._rows[run.id] = rows.fresh_row(run, due_at, size)
        self._runs.append(rows.run_row(run, due_at, size))
        self.totals["runs"] += 1
        self.totals["pending_bytes"] += size

    def open_window(self, run: Run, body: bytes, at: int) -> None:
        """A new run that further events may join until it begins."""
        self.add_run(run, body)
        if run.id not in self._rows:
            row = self._rows[run.id] = rows.fresh_row(
                run, 0 if run.due_at <= self.now else run.due_at, len(body)
            )
            row.blocked = int(run.ordering_key is not None)
        name = (run.subscription, run.ordering_key or "")
        self.windows[name] = WindowRow(*name, run.id, 1, at)
        self._opened.add(name)

    def join(self, window: WindowRow, row: RunRow, event: int, size: int, due_at: int) -> None:
        """An event joins a run that has not begun; `due_at` is when the run is due now."""
        window.count += 1
        row.deliveries += 1
        row.size += size
        row.due_at = 0 if due_at <= self.now else due_at
        self.totals["pending_bytes"] += size
        self._members.append((row.id, event))
        self._grown[row.id] = row
        self._opened.add((window.subscription, window.ordering_key))
        if row.due_at == 0:
            self.more = True
        else:
            self.soonest = min(self.soonest, row.due_at)

    def hold_fact(self, strand: Strand, event: int, size: int) -> None:
        """An event waits in a pattern: a pending delivery, as its tally says, and bytes of the backlog."""
        strand.waiting += 1
        self._held[event, strand.subscription] = (event, strand.subscription, strand.key, size)
        self.totals["pending_bytes"] += size

    def end_fact(self, strand: Strand, event: int, reason: str | None = None) -> None:
        """It waits no more: it is in a match, or lapses with a reason. Nothing is written of one that never waited."""
        strand.waiting -= 1
        if self._held.pop((event, strand.subscription), None) is None:
            self._fact_ends.append((event, strand.subscription, reason))

    def suppress(self, deliveries: int, size: int = 0) -> None:
        """Pending deliveries that no run will have."""
        self.totals["pending"] -= deliveries
        self.totals["suppressed"] += deliveries
        self.totals["pending_bytes"] -= size

    def add_match(self, match: PatternMatch, at: int) -> None:
        """The run of a pattern, as a window if others may join; its deliveries are pending and its bytes counted already."""
        run, events = match.run, match.events
        run.deliveries = len(events)
        self.add_run(run, None)
        row = self._rows.get(run.id)
        if row is None:
            row = rows.fresh_row(run, 0 if run.due_at <= self.now else run.due_at, 0)
            row.blocked = int(run.ordering_key is not None)
        self._rows[run.id] = self._grown[run.id] = row
        row.deliveries, row.size = len(events), match.size
        self._members += [(run.id, event) for event in events if event != run.event]
        if match.batch_policy is not None:
            name = (run.subscription, run.ordering_key or "")
            self.windows[name] = WindowRow(*name, run.id, len(events), at)
            self._opened.add(name)

    def put_strand(self, strand: Strand, state: Any, due: int) -> None:
        """What is open of a pattern now; None: nothing is."""
        strand.state, strand.due = state, due
        self._woven[strand.subscription, strand.key] = strand
        if due <= self.now:
            self.more = True
        else:
            self.soonest = min(self.soonest, due)

    def _offer(self, run: Run, due_at: int) -> bool:
        """Whether the worker took it."""
        if due_at:
            self.soonest = min(self.soonest, due_at)
        elif self.handover is not None and self.handover.reserve(run):
            run.state, run.token, run.started_at = (
                State.RUNNING,
                run.token + 1,
                run.started_at or self.at,
            )
            self.taken.append(run)
            return True
        else:
            self.more = True
        return False

    def change(self, row: RunRow) -> None:
        self._changed[row.id] = row

    def move(self, row: RunRow, state: State, due_at: int | None = None) -> None:
        """Every change of a run's state goes through here: the sum of P9, the backlog and its lane follow."""
        before, row.state = row.state, state
        if due_at is not None:
            row.due_at = due_at
        if row.parent is None:
            self.totals[COLUMN[before]] -= row.deliveries
            self.totals[COLUMN[state]] += row.deliveries
        if state >= State.HELD and before is not state:
            self.ended.append(row)
        was_live, live = before < State.COMPLETED, state < State.COMPLETED
        if was_live != live:
            self.totals["pending_bytes"] += row.size if live else -row.size
            row.finished_at = None if live else self.at
            if row.ordering_key is not None:
                row.blocked = int(live)
                self._lanes.add((row.flow, row.ordering_key))
        self._changed[row.id] = row

    def wake(self, row: RunRow) -> None:
        """PENDING, due now; the worker may have it at once."""
        self.move(row, State.PENDING, 0)
        self.woken.add(row.id)

    def sleep(self, row: RunRow, until: int | None) -> None:
        """WAITING until an instant, or until woken."""
        self.move(row, State.WAITING, NEVER if until is None else until)
        if until is not None:
            self.soonest = min(self.soonest, until)

    # ------------------------------------------------------------------- writing

    def flush(self) -> None:
        """Writes everything decided so far, but for the ledger's own row."""
        connection = self.connection
        for bulk, values in (
            (rows.insert_events, self._events),
            (rows.insert_runs, self._runs),
            (rows.insert_entries, self._entries),
            (rows.insert_dead, self._dead),
            (rows.insert_outbox, self._outbox),
        ):
            if values:
                bulk.run(connection, values)
                values.clear()
        if self._opened or self._grown:
            self._write_windows()
        if self._woven or self._held or self._fact_ends:
            self._write_patterns()
        self._hand_over_woken()
        if self._changed:
            rows.update_runs.run(
                connection, [rows.change_row(row) for row in self._changed.values()]
            )
            self._changed.clear()
        if self._lanes:
            self.more |= rows.open_lanes.run(connection, list(self._lanes)) > 0
            self._lanes.clear()
        if self._bumps:
            bumps = [(event, n, c, self.at if n else None) for event, (n, c) in self._bumps.items()]
            rows.bump_duplicates.run(connection, bumps)
            self._bumps.clear()
        self._write_cursors()

    def _write_windows(self) -> None:
        connection = self.connection
        rows.grow_runs.run(
            connection,
            [(row.id, row.deliveries, row.due_at, row.size) for row in self._grown.values()],
        )
        rows.insert_members.run(connection, self._members)
        rows.put_windows.run(
            connection, [msgspec.structs.astuple(self.windows[name]) for name in self._opened]
        )
        self._grown.clear()
        self._members.clear()
        self._opened.clear()

    def _write_patterns(self) -> None:
        connection, ends = self.connection, self._fact_ends
        rows.insert_facts.run(connection, list(self._held.values()))
        rows.drop_facts.run(
            connection, [(event, name) for event, name, reason in ends if reason is None]
        )
        rows.lapse_facts.run(connection, [end for end in ends if end[2] is not None])
        rows.put_patterns.run(
            connection,
            [self._strand_row(each) for each in self._woven.values() if each.state is not None],
        )
        gone = [name for name, each in self._woven.items() if each.state is None and each.is_stored]
        rows.drop_patterns.run(connection, gone)
        for strand in self._woven.values():
            strand.is_stored = strand.state is not None
        self._held.clear()
        self._fact_ends.clear()
        self._woven.clear()

    def _strand_row(self, strand: Strand) -> Values:
        name, key, state = strand.subscription, strand.key, strand.state
        if self.herald is not None and not isinstance(state, bytes):
            state = self.herald.encode_state(name, key, state)
        return (name, key, strand.due, strand.waiting, rows.checksum(name, key, state), state)

    def _hand_over_woken(self) -> None:
        """Runs that became PENDING go to the worker at once if it takes them. A lane's head may too: it is not blocked."""
        ready = [
            row
            for row in map(self.row, self.woken)
            if row is not None and row.state is State.PENDING
        ]
        self.woken.clear()
        free = [row for row in ready if not row.blocked]
        if free and self.handover is None:
            self.more = True
        elif free:
            for run in self.load(free):
                self._take_woken(run)

    def _take_woken(self, run: Run) -> None:
        row = self.need(run.id)
        if self._offer(run, 0):
            row.state, row.token, row.started_at = State.RUNNING, run.token, run.started_at

    def load(self, wanted: Sequence[RunRow]) -> list[Run]:
        """These runs with their events' bodies, as this transaction leaves them. What its checksum disowns is HELD instead."""
        found: list[Run] = []
        for run, corrupt in load_runs(self.connection, [row.id for row in wanted]):
            row = self.need(run.id)
            if corrupt:
                row.reason = corrupt
                self.move(row, State.HELD)
                continue
            run.state, run.token, run.crash_suspect, run.crash_count = (
                row.state,
                row.token,
                bool(row.crash_suspect),
                row.crash_count,
            )
            run.started_at, run.cancel_requested = row.started_at, bool(row.cancel_requested)
            found.append(run)
        return found

    def _write_cursors(self) -> None:
        if not self._cursors:
            return
        kept = [
            (trigger, key, value)
            for (trigger, key), value in self._cursors.items()
            if value is not None
        ]
        gone = [name for name, value in self._cursors.items() if value is None]
        rows.put_cursors.run(self.connection, kept)
        rows.drop_cursors.run(self.connection, gone)
        self._cursors.clear()

    def finish(self) -> None:
        """Writes the rest and the ledger's row; the writer commits."""
        self.flush()
        self.connection.execute(_LEDGER, (self.batch, self.at, *self.totals.values()))

    def remember(self) -> None:
        """It is durable: what the writer knows of running runs is what this transaction left."""
        running = self._running
        for ident, row in self._rows.items():
            if row is not None and row.state is State.RUNNING:
                running[ident] = row
            else:
                running.pop(ident, None)

    def undo(self) -> None:
        """The transaction came to nothing: what the worker took goes back as it was, what was remembered is forgotten."""
        self._running.clear()
        if self.taken and self.handover is not None:
            for run in self.taken:
                run.state, run.token = State.PENDING, run.token - 1
                run.started_at = run.started_at if run.token else None
            self.handover.release(self.taken)
        self.taken = []
