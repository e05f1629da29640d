"""The tables of a transaction: rows that were read, changed or added, before they are written.

`Commit` is shared by all tables: number and times, the counts of the ledger, and what to report
after the commit. `EventRows`, `JournalRows` and `RunRows` hold one kind of rows each; windows.py
and patterns.py have two more tables. apply.py, admin.py and claim.py decide on them;
`Transaction.flush` (transaction.py) writes.
"""

import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from eventflow.core.clock import Moment
from eventflow.core.errors import NotFound
from eventflow.events.event import Json
from eventflow.runs.journal import Entry
from eventflow.runs.run import Completed, Failed, Run, State, format_id
from eventflow.store import rows
from eventflow.store.load import load_runs
from eventflow.store.protocol import Arrival, RunReceiver
from eventflow.store.rows import NEVER, KnownEvent, RunRow, Values

TOTALS = (
    "accepted", "completed", "failed", "dead", "cancelled", "suppressed", "pending", "events",
    "duplicates", "conflicts", "runs", "pending_bytes", "pruned_completed", "pruned_failed",
    "pruned_cancelled", "pruned_events", "pruned_runs",
)  # fmt: skip
"""The counting columns of the one row of `ledger`."""

# An enum's member is looked up in Python (3.11), and these for each run.
PENDING = State.PENDING
RUNNING = State.RUNNING
HELD = State.HELD
COMPLETED = State.COMPLETED
FAILED = State.FAILED

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


class Commit:
    """One commit in preparation.

    `read_at` is when it began; `now` is its wall time, which may be behind `at`. Instants are
    microseconds.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        *,
        batch: int,
        at: int,
        read_at: Moment,
        totals: Mapping[str, int],
    ) -> None:
        self.connection = connection
        self.batch = batch
        self.at = at
        self.now = read_at.wall
        self.read_at = read_at
        self.totals = dict(totals)
        # Reported to the worker: runs that it reserved, running runs to cancel, and answers of
        # child runs by parent.
        self.reserved: list[Run] = []
        self.cancels: dict[int, str] = {}
        self.answers: list[tuple[int, Entry]] = []
        # Whether runs are due that the worker did not reserve, and when the next run or pattern
        # is due.
        self.has_due = False
        self.next_due = NEVER
        # Sinks with new messages in the outbox.
        self.sinks: set[str] = set()
        # Events that the store itself makes (late runs, absences); recorded before the commit.
        self.own_events: list[Arrival] = []

    def count(self, column: str, n: int = 1) -> None:
        self.totals[column] += n

    def add_deliveries(self, counts: Iterable[tuple[str, int]]) -> None:
        """Adds new deliveries: pairs of a term of P9's sum and a number."""
        totals = self.totals
        for (column, n), times in Counter(counts).items():
            totals[column] += n * times
            totals["accepted"] += n * times

    def suppress(self, deliveries: int, size: int = 0) -> None:
        """Pending deliveries, of `size` bytes, become suppressed: no run will have them."""
        self.totals["pending"] -= deliveries
        self.totals["suppressed"] += deliveries
        self.totals["pending_bytes"] -= size

    def due(self, at: int) -> int:
        """The `due_at` to store: 0, which is due whatever the clock does, once `at` is past."""
        return 0 if at <= self.now else at

    def due_of_new(self, run: Run) -> int:
        """The same for a new run: its wait begins now, also if the wall clock was set since the run
        was made.
        """
        wait = run.due_at - run.created_at
        return 0 if wait <= 0 else self.now + wait

    def note_due(self, at: int) -> None:
        """Something is due at this instant, for the next claim."""
        if at <= self.now:
            self.has_due = True
        elif at < self.next_due:
            self.next_due = at


# --------------------------------------------------------------------------- events


class EventRows:
    """The events of one transaction.

    They are inserted first, before anything is decided about them: the index that keeps identities
    unique tells which are new, and only for those that are not the first event is looked up.
    `firsts`: by the id of an arrival that is not the first of its identity, the first. `are_plain`:
    each is the first of its identity, and joins no window and no pattern.
    """

    def __init__(self, commit: Commit) -> None:
        self.firsts: dict[int, KnownEvent] = {}
        self.are_plain = True
        self.decided: list[Values] = []  # verdicts of windows and patterns
        self.dead_letters: list[Values] = []
        self.messages: list[Values] = []  # for the outbox
        self.has_updates = False
        self._commit = commit
        self._duplicates: dict[int, list[int]] = {}  # by event: duplicates, conflicts
        self._cursors: dict[tuple[str, str], bytes | None] = {}

    def insert(self, arrivals: Sequence[Arrival]) -> None:
        """Inserts these events, in order, but for those with an identity that is known already,
        from the ledger or from an earlier one of these.
        """
        commit = self._commit
        if [each for each in arrivals if each.subject or each.headers]:
            added = rows.insert_events.execute(commit.connection, rows.event_rows(arrivals))
        else:
            values = rows.bare_event_rows(arrivals)
            added = rows.insert_bare_events.execute(commit.connection, values)
        commit.totals["events"] += added
        if added < len(arrivals):
            self.are_plain = False
            self._find_firsts(arrivals)

    def _find_firsts(self, arrivals: Sequence[Arrival]) -> None:
        wanted = [(arrival.event_id, arrival.key) for arrival in arrivals]
        known: dict[bytes, KnownEvent] = {}
        for text in rows.known_events.read(self._commit.connection, wanted):
            known.update((bytes.fromhex(event.key), event) for event in rows.decode_known(text))
        fresh = set[bytes]()
        for arrival in arrivals:
            first = known[arrival.key]
            if first.id != arrival.id:
                self.firsts[arrival.id] = first
            elif arrival.key in fresh:
                raise sqlite3.IntegrityError(f"event {arrival.id} was posted twice")
            else:
                fresh.add(arrival.key)

    def decide(self, arrival: Arrival) -> None:
        """Windows or patterns decided about this event: its verdicts and runs are not those that it
        was inserted with.
        """
        self.decided.append(rows.decided_row(arrival))

    def add_dead_letter(self, event: int, subscription: str, reason: str) -> None:
        self.dead_letters.append((event, subscription, reason, self._commit.at))

    def add_messages(self, arrival: Arrival) -> None:
        """Adds its dead letters; and to the outbox of sinks the event, or such a dead letter."""
        for subscription, reason in arrival.dead_letters:
            self.add_dead_letter(arrival.id, subscription, reason)
        for sink, subscription in arrival.outbox:
            self.messages.append((sink, arrival.id, subscription, self._commit.at))
            self._commit.sinks.add(sink)

    def count_duplicate(self, event: int, *, conflict: bool) -> None:
        """Counts a duplicate, or a conflict, on the row of the first event."""
        counts = self._duplicates.setdefault(event, [0, 0])
        counts[conflict] += 1
        self.has_updates = True
        self._commit.count("conflicts" if conflict else "duplicates")

    def put_cursors(self, trigger: str, cursor: Mapping[str, Json]) -> None:
        """Stores the cursor's values by key; None deletes a key."""
        self.has_updates = True
        for key, value in cursor.items():
            try:
                stored = None if value is None else msgspec.json.encode(value)
            except (TypeError, ValueError, RecursionError) as error:
                raise TypeError(f"cursor {key!r}: expected a JSON value; {error}") from error
            self._cursors[trigger, key] = stored

    def flush_updates(self) -> None:
        """Writes duplicates and cursors."""
        connection = self._commit.connection
        at = self._commit.at
        self.has_updates = False
        if self._duplicates:
            rows.count_duplicates.execute(
                connection,
                [(event, n, c, at if n else None) for event, (n, c) in self._duplicates.items()],
            )
            self._duplicates.clear()
        if self._cursors:
            kept = [(*name, value) for name, value in self._cursors.items() if value is not None]
            deleted = [name for name, value in self._cursors.items() if value is None]
            rows.put_cursors.execute(connection, kept)
            rows.delete_cursors.execute(connection, deleted)
            self._cursors.clear()


# --------------------------------------------------------------------------- journal

CallName = tuple[int, str]
"""A run and the key of one of its calls."""


class JournalRows:
    """The journal entries of one transaction.

    `finals`: calls that have an end; `children`: calls that have a child run.
    """

    def __init__(self, commit: Commit) -> None:
        self.added: list[tuple[int, Entry]] = []
        self.finals: set[CallName] = set()
        self.children: set[CallName] = set()
        self.unseen: set[int] = set()  # runs with entries that their flow may not have seen
        self.must_probe = False  # whether an entry may be in the ledger already (see `Writer`)
        self._commit = commit
        self._position = 0

    def add(self, run: int, entries: Iterable[Entry]) -> None:
        """Adds entries of this run, which are numbered when they are written."""
        for entry in entries:
            self.added.append((run, entry))
            self.unseen.add(run)

    def flush(self) -> None:
        """Numbers the entries that were added, and writes them; an `at` that is given stays."""
        commit = self._commit
        batch = commit.batch
        now = commit.now
        values: list[tuple[int, Entry]] = []
        others: list[tuple[int, Entry]] = []
        for position, added in enumerate(self.added, self._position):
            entry = added[1]
            entry.batch = batch
            entry.position = position
            entry.at = entry.at or now  # a run's time is the wall clock's
            if entry.due_at is None and entry.error is None:
                values.append(added)
            else:
                others.append(added)
        rows.insert_values.execute(commit.connection, rows.value_rows(values))
        rows.insert_entries.execute(commit.connection, rows.entry_rows(others))
        self._position += len(self.added)
        self.added.clear()

    def load_children(self, children: Iterable[Run]) -> None:
        """Reads which of these child runs their parents have started already."""
        calls = [(child.parent, child.parent_call_key) for child in children]
        for text in rows.known_children.read(self._commit.connection, calls):
            self.children.update(rows.decode_pairs(text))

    def load_finals(self, calls: Sequence[CallName]) -> None:
        """Reads which of these calls have an end already."""
        for text in rows.finals.read(self._commit.connection, calls):
            self.finals.update(rows.decode_pairs(text))

    def load_unseen(self, suspensions: Sequence[tuple[int, int, int]]) -> None:
        """Reads which runs have entries after the batch, or more entries, than the run has seen:
        (run, batch, entries).
        """
        for text in rows.later_entries.read(self._commit.connection, suspensions):
            self.unseen.update(rows.decode_ids(text))

    def has_any(self, run: int, entries: Sequence[Entry]) -> bool:
        """Whether the ledger has one of these entries already, or two of them are the same."""
        names = [(run, entry.call_key, entry.attempt, int(entry.kind)) for entry in entries]
        if len(set(names)) < len(names):
            return True
        return any(rows.known_entries.read(self._commit.connection, names))

    def forget_calls(self, run: int) -> None:
        """This run's calls have no child and no end any more."""
        self.children = {call for call in self.children if call[0] != run}
        self.finals = {call for call in self.finals if call[0] != run}


# --------------------------------------------------------------------------- runs


class RunRows:
    """The runs of one transaction.

    `known`: the rows that the writer remembers of running runs, which nobody else writes, and those
    that this transaction has read or added. Only rows of RUNNING runs stay after it.
    """

    def __init__(
        self, commit: Commit, receiver: RunReceiver | None, known: dict[int, RunRow]
    ) -> None:
        self.known = known
        self.ended: list[RunRow] = []  # became HELD, or ended
        self._commit = commit
        self._receiver = receiver
        self._touched: list[RunRow] = []  # may have left RUNNING
        self._added: list[Values] = []
        self._started: list[tuple[Run, int]] = []  # reserved by the worker; with their sizes
        self._ended: dict[State, list[tuple[RunRow, Any]]] = {COMPLETED: [], FAILED: []}
        self._changed: dict[int, RunRow] = {}
        self._woken: set[int] = set()
        # Flows and ordering keys whose head may change.
        self._ordering: set[tuple[str, str]] = set()

    # ------------------------------------------------------------------- reading

    def fetch(self, idents: Iterable[int]) -> None:
        """Reads these runs, so that `known` has those that exist."""
        if missing := set(idents).difference(self.known):
            wanted = (str(list(missing)),)
            found = self._commit.connection.execute(rows.READ_ROWS, wanted).fetchone()[0]
            for row in rows.decode_rows(found):
                self.known[row.id] = row
                self._touched.append(row)

    def get(self, ident: int) -> RunRow | None:
        """The run as this transaction will leave it, as far as decided; None when there is none."""
        if ident not in self.known:
            self.fetch((ident,))
        return self.known.get(ident)

    def need(self, ident: int) -> RunRow:
        """`get`, or NotFound."""
        row = self.get(ident)
        if row is None:
            raise NotFound("run", format_id(ident))
        return row

    def load(self, wanted: Sequence[RunRow]) -> list[Run]:
        """These runs with their events' payloads, as this transaction leaves them.

        A run whose checksum does not match becomes HELD and is left out.
        """
        found: list[Run] = []
        for run, corrupt in load_runs(self._commit.connection, [row.id for row in wanted]):
            row = self.need(run.id)
            if corrupt:
                row.reason = corrupt
                self.move(row, HELD)
                continue
            run.state = row.state
            run.token = row.token
            run.started_at = row.started_at
            run.crash_suspect = bool(row.crash_suspect)
            run.crash_count = row.crash_count
            run.cancel_requested = bool(row.cancel_requested)
            run.cancel_reason = row.reason if row.cancel_requested else None
            found.append(run)
        return found

    # ------------------------------------------------------------------- deciding

    def add(self, runs: Sequence[Run], sizes: Sequence[int]) -> None:
        """Adds new runs, with the bytes of each: RUNNING at once if the worker reserves them, else
        in their own state. Those with an ordering key start blocked.
        """
        commit = self._commit
        commit.totals["runs"] += len(runs)
        commit.totals["pending_bytes"] += sum(sizes)
        self._offer(
            [
                run
                for run in runs
                if run.ordering_key is None
                and run.state is PENDING
                and run.due_at <= run.created_at
            ]
        )
        for run, size in zip(runs, sizes, strict=True):
            if run.state is RUNNING:
                if (
                    run.token == 1
                    and run.parent is None
                    and run.params is None
                    and run.mode is None
                ):
                    self.known[run.id] = RunRow(
                        run.id, run.flow, run.event, size, run.started_at, run.depth
                    )
                    self._started.append((run, size))
                    continue
                self.known[run.id] = rows.new_run_row(run, 0, size)
            due_at = commit.due_of_new(run)
            if run.ordering_key is not None:
                self._ordering.add((run.flow, run.ordering_key))
            elif run.state is PENDING and 0 < due_at < commit.next_due:
                commit.next_due = due_at
            self._added.append(rows.run_row(run, due_at, size))

    def add_growing(self, run: Run, size: int) -> RunRow:
        """A new run that further events may join.

        Returns its row; windows.py writes what grows of it.
        """
        self.add([run], [size])
        row = self.known.get(run.id)
        if row is None:
            row = self.known[run.id] = rows.new_run_row(run, self._commit.due_of_new(run), size)
            row.blocked = int(run.ordering_key is not None)
            self._touched.append(row)
        return row

    def _offer(self, due: Sequence[Run]) -> Sequence[Run]:
        """Offers due runs to the worker. Returns those that it reserves, which are then RUNNING."""
        if not due:
            return ()
        commit = self._commit
        reserved = () if self._receiver is None else self._receiver.reserve(due)
        for run in reserved:
            run.state = RUNNING
            run.token += 1
            if run.started_at is None:
                run.started_at = commit.at
                run.begins = True
        commit.reserved += reserved
        commit.has_due |= len(reserved) < len(due)
        return reserved

    def change(self, row: RunRow) -> None:
        """Columns of this row were changed that `move` does not know of."""
        self._changed[row.id] = row

    def move(self, row: RunRow, state: State, due_at: int | None = None) -> None:
        """Changes the run's state, and what depends on it (`_count`)."""
        before = row.state
        row.state = state
        if due_at is not None:
            row.due_at = due_at
        self._changed[row.id] = row
        self._count([row], before, state)

    def end(self, ended: Sequence[tuple[RunRow, Completed | Failed]], state: State) -> None:
        """Ends running runs with these outcomes. `state`: COMPLETED or FAILED."""
        for row, outcome in ended:
            row.state = state
            row.reason = None
            row.outcome = outcome
        self._ended[state] += ended
        self._count([row for row, _ in ended], RUNNING, state)

    def _count(self, moved: Sequence[RunRow], before: State, state: State) -> None:
        """Rows have moved from one state to another: the sum of P9, the backlog, and the heads of
        their ordering keys.
        """
        totals = self._commit.totals
        deliveries = 0
        size = 0
        for row in moved:
            size += row.size
            if row.parent is None:
                deliveries += row.deliveries
        totals[COLUMN[before]] -= deliveries
        totals[COLUMN[state]] += deliveries
        if state >= HELD and before is not state:
            self.ended += moved
        was_live = before < COMPLETED
        is_live = state < COMPLETED
        if was_live != is_live:
            totals["pending_bytes"] += size if is_live else -size
            finished_at = None if is_live else self._commit.at
            for row in moved:
                row.finished_at = finished_at
                if row.ordering_key is not None:
                    row.blocked = int(is_live)
                    self._ordering.add((row.flow, row.ordering_key))
        self._touched += moved

    def wake(self, row: RunRow) -> None:
        """PENDING, due now; the worker may reserve it at once."""
        self.move(row, State.PENDING, 0)
        self._woken.add(row.id)

    def sleep(self, row: RunRow, until: int | None) -> None:
        """WAITING until an instant, or until woken."""
        self.move(row, State.WAITING, NEVER if until is None else until)
        if until is not None and until < self._commit.next_due:
            self._commit.next_due = until

    def release_children(self, parent: int) -> None:
        """The children of this run answer no call of it any more."""
        self._commit.connection.execute(
            "UPDATE runs SET parent_call_key = NULL WHERE parent = ?", (parent,)
        )
        for row in self.known.values():
            if row.parent == parent:
                row.parent_call_key = None

    # ------------------------------------------------------------------- writing

    def flush_added(self) -> None:
        """Writes the runs that were added."""
        connection = self._commit.connection
        if self._started:
            rows.insert_started_runs.execute(connection, rows.started_rows(self._started))
            self._started.clear()
        if self._added:
            rows.insert_runs.execute(connection, self._added)
            self._added.clear()

    def flush_changes(self) -> None:
        """Writes changed runs, after everything that was added: woken runs are offered to the
        worker as the file has them.
        """
        connection = self._commit.connection
        if self._woken:
            self._offer_woken()
        if completed := self._ended[COMPLETED]:
            rows.end_completed_runs.execute(connection, rows.completed_rows(completed))
            completed.clear()
        if failed := self._ended[FAILED]:
            rows.end_failed_runs.execute(connection, rows.failed_rows(failed))
            failed.clear()
        if self._changed:
            changes = [rows.run_changes(row) for row in self._changed.values()]
            rows.update_runs.execute(connection, changes)
            self._changed.clear()
        if self._ordering:
            unblocked = rows.unblock_heads.execute(connection, list(self._ordering))
            self._commit.has_due |= unblocked > 0
            self._ordering.clear()

    def _offer_woken(self) -> None:
        """Runs that became PENDING go to the worker at once if it reserves them; with an ordering
        key, only its head.
        """
        ready = [
            row
            for row in map(self.get, self._woken)
            if row is not None and row.state is PENDING and not row.blocked
        ]
        self._woken.clear()
        if ready and self._receiver is None:
            self._commit.has_due = True
        elif ready:
            for run in self._offer(self.load(ready)):
                row = self.need(run.id)
                row.clear_wait_reason()
                row.state = RUNNING
                row.token = run.token
                row.started_at = run.started_at

    def forget_ended(self) -> None:
        """The commit is durable: only the rows of running runs are kept for the next one."""
        for row in self._touched:
            if row.state is not RUNNING:
                self.known.pop(row.id, None)

    def undo(self) -> None:
        """The commit failed: runs that the worker reserved go back as they were, remembered rows
        are forgotten.
        """
        self.known.clear()
        reserved = self._commit.reserved
        self._commit.reserved = []
        if reserved and self._receiver is not None:
            for run in reserved:
                run.state = State.PENDING
                run.token -= 1
                run.started_at = run.started_at if run.token else None
            self._receiver.release(reserved)
