"""The tables of a transaction: rows that were read, changed or added, before they are written.

`Commit` is shared by all tables: number and times, the counts of the ledger, and what to report
after the commit. `EventRows`, `JournalRows` and `RunRows` hold one kind of rows each; windows.py
and patterns.py have two more tables. apply.py, admin.py and claim.py decide on them;
`Transaction.flush` (transaction.py) writes.
"""

import sqlite3
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from eventflow.core.errors import NotFound
from eventflow.events.event import Json
from eventflow.runs.journal import Entry
from eventflow.runs.run import Run, State, format_id
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

    `now` is the wall clock, which may be behind `at`; instants are microseconds.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        *,
        batch: int,
        at: int,
        now: int,
        totals: Mapping[str, int],
    ) -> None:
        self.connection = connection
        self.batch = batch
        self.at = at
        self.now = now
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

    def add_deliveries(self, counts: Mapping[str, int]) -> None:
        """Adds new deliveries, by their term of P9's sum."""
        totals = self.totals
        for column, n in counts.items():
            totals[column] += n
            totals["accepted"] += n

    def suppress(self, deliveries: int, size: int = 0) -> None:
        """Pending deliveries, of `size` bytes, become suppressed: no run will have them."""
        self.totals["pending"] -= deliveries
        self.totals["suppressed"] += deliveries
        self.totals["pending_bytes"] -= size

    def due(self, at: int) -> int:
        """The `due_at` to store: 0, which is due whatever the clock does, once `at` is past."""
        return 0 if at <= self.now else at

    def due_of_new(self, run: Run) -> int:
        """The same for a new run. One that is due when it is made is due also if the wall clock was
        set back since then.
        """
        return 0 if run.due_at <= run.created_at else self.due(run.due_at)

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
    `firsts`: by the id of an arrival that is not the first of its identity, the first.
    """

    def __init__(self, commit: Commit) -> None:
        self.firsts: dict[int, KnownEvent] = {}
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
        added = rows.insert_events.execute(
            commit.connection, [rows.event_row(arrival) for arrival in arrivals]
        )
        commit.totals["events"] += added
        if added < len(arrivals):
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

    def add_message(self, sink: str, event: int, subscription: str | None) -> None:
        """Adds the event, or its dead letter of this subscription, to the outbox of a sink."""
        self.messages.append((sink, event, subscription, self._commit.at))
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
        self.added: list[Values] = []
        self.finals: set[CallName] = set()
        self.children: set[CallName] = set()
        self.unseen: set[int] = set()  # runs with entries that their flow may not have seen
        self.must_probe = False  # whether an entry may be in the ledger already (see `Writer`)
        self._commit = commit
        self._position = 0

    def add(self, run: int, entry: Entry) -> Entry:
        """Numbers the entry and adds it; an `at` that is given stays."""
        commit = self._commit
        entry.batch = commit.batch
        entry.position = self._position
        entry.at = entry.at or commit.now  # a run's time is the wall clock's
        self._position += 1
        self.added.append(rows.entry_row(run, entry))
        self.unseen.add(run)
        return entry

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

    `running` are the rows that the writer remembers of running runs, shared by all commits.
    """

    def __init__(
        self, commit: Commit, receiver: RunReceiver | None, running: dict[int, RunRow]
    ) -> None:
        self.added: list[Values] = []
        self.started: list[Values] = []  # added, and reserved by the worker
        self.ended: list[RunRow] = []  # became HELD, or ended
        self._commit = commit
        self._receiver = receiver
        self._running = running
        self._rows: dict[int, RunRow | None] = {}
        self._changed: dict[int, RunRow] = {}
        self._completed: list[RunRow] = []  # completed or failed, and nothing else changed
        self._woken: set[int] = set()
        # Flows and ordering keys whose head may change.
        self._ordering: set[tuple[str, str]] = set()

    # ------------------------------------------------------------------- reading

    def fetch(self, idents: Iterable[int]) -> None:
        """Reads these runs, so that `get` finds them in memory."""
        known = self._rows
        missing: list[int] = []
        for ident in idents:
            if ident not in known:
                row = known[ident] = self._running.get(ident)
                if row is None:
                    missing.append(ident)
        if missing:
            found = self._commit.connection.execute(rows.READ_ROWS, (str(missing),)).fetchone()[0]
            known.update((row.id, row) for row in rows.decode_rows(found))

    def get(self, ident: int) -> RunRow | None:
        """The run as this transaction will leave it, as far as decided; None when there is none."""
        if ident not in self._rows:
            self.fetch((ident,))
        return self._rows[ident]

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

    def add(self, run: Run, payload: bytes | None) -> None:
        """A new run: RUNNING at once if the worker reserves it, else in its own state. With an
        ordering key it starts blocked.
        """
        totals = self._commit.totals
        size = len(run.params or b"") + len(payload or b"")
        due_at = self._commit.due_of_new(run)
        totals["runs"] += 1
        totals["pending_bytes"] += size
        if run.payload is None:
            run.payload = payload
        if run.ordering_key is not None:
            self._ordering.add((run.flow, run.ordering_key))
        elif run.state is PENDING and self._offer(run, due_at):
            if run.token == 1 and run.parent is None and run.params is None and run.mode is None:
                row = RunRow(run.id, run.flow, run.event, size, run.started_at, run.depth)
                self._rows[run.id] = row
                self.started.append(rows.started_row(run, size))
                return
            self._rows[run.id] = rows.new_run_row(run, due_at, size)
        self.added.append(rows.run_row(run, due_at, size))

    def add_growing(self, run: Run, payload: bytes | None) -> RunRow:
        """A new run that further events may join.

        Returns its row; windows.py writes what grows of it.
        """
        self.add(run, payload)
        row = self._rows.get(run.id)
        if row is None:
            due_at = self._commit.due_of_new(run)
            row = self._rows[run.id] = rows.new_run_row(run, due_at, len(payload or b""))
            row.blocked = int(run.ordering_key is not None)
        return row

    def _offer(self, run: Run, due_at: int) -> bool:
        """Whether the worker reserves the run."""
        commit = self._commit
        if due_at:
            if due_at < commit.next_due:
                commit.next_due = due_at
        elif self._receiver is not None and self._receiver.reserve(run):
            run.state = RUNNING
            run.token += 1
            if run.started_at is None:
                run.started_at = commit.at
                run.begins = True
            commit.reserved.append(run)
            return True
        else:
            commit.has_due = True
        return False

    def change(self, row: RunRow) -> None:
        """Columns of this row were changed that `move` does not know of."""
        self._changed[row.id] = row

    def move(self, row: RunRow, state: State, due_at: int | None = None) -> None:
        """Changes the run's state, and with it the sum of P9, the backlog and the head of its
        ordering key.
        """
        before = row.state
        row.state = state
        totals = self._commit.totals
        if due_at is not None:
            row.due_at = due_at
        if row.parent is None:
            totals[COLUMN[before]] -= row.deliveries
            totals[COLUMN[state]] += row.deliveries
        if state >= HELD and before is not state:
            self.ended.append(row)
        was_live = before < COMPLETED
        is_live = state < COMPLETED
        if was_live != is_live:
            totals["pending_bytes"] += row.size if is_live else -row.size
            row.finished_at = None if is_live else self._commit.at
            if row.ordering_key is not None:
                row.blocked = int(is_live)
                self._ordering.add((row.flow, row.ordering_key))
        if (
            before is RUNNING
            and (state is COMPLETED or state is FAILED)
            and row.id not in self._changed
        ):
            self._completed.append(row)
        else:
            self._changed[row.id] = row

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
        for row in (*self._rows.values(), *self._running.values()):
            if row is not None and row.parent == parent:
                row.parent_call_key = None

    # ------------------------------------------------------------------- writing

    def flush_changes(self) -> None:
        """Writes changed runs, after everything that was added: woken runs are offered to the
        worker as the file has them.
        """
        connection = self._commit.connection
        if self._woken:
            self._offer_woken()
        if self._completed:
            rows.end_runs.execute(connection, [rows.end_row(row) for row in self._completed])
            self._completed.clear()
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
            if row is not None and row.state is State.PENDING and not row.blocked
        ]
        self._woken.clear()
        if ready and self._receiver is None:
            self._commit.has_due = True
        elif ready:
            for run in self.load(ready):
                row = self.need(run.id)
                if self._offer(run, 0):
                    row.clear_wait_reason()
                    row.state = State.RUNNING
                    row.token = run.token
                    row.started_at = run.started_at

    def remember(self) -> None:
        """The commit is durable: what the writer knows of running runs is what this transaction
        left.
        """
        running = self._running
        for ident, row in self._rows.items():
            if row is not None and row.state is RUNNING:
                running[ident] = row
            else:
                running.pop(ident, None)

    def undo(self) -> None:
        """The commit failed: runs that the worker reserved go back as they were, remembered rows
        are forgotten.
        """
        self._running.clear()
        reserved = self._commit.reserved
        self._commit.reserved = []
        if reserved and self._receiver is not None:
            for run in reserved:
                run.state = State.PENDING
                run.token -= 1
                run.started_at = run.started_at if run.token else None
            self._receiver.release(reserved)
