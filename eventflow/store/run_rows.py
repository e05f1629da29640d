"""Runs in a transaction: rows that were read or added, their states, and what to write of them.

Called by apply.py, admin.py, claim.py, windows.py and patterns.py; `Transaction.flush` writes. A
row is read once and changed in memory. Every change of a run's state goes through `move`, so that
the sum of P9, the backlog and the ordering key follow.
"""

from collections.abc import Iterable, Sequence

from eventflow.core.errors import NotFound
from eventflow.runs.run import Run, State, format_id
from eventflow.store import rows
from eventflow.store.commit import COLUMN, Commit
from eventflow.store.load import load_runs
from eventflow.store.protocol import RunReceiver
from eventflow.store.rows import NEVER, RunRow, Values


class RunRows:
    """The runs of one transaction.

    `running` are the rows that the writer remembers of running runs, shared by all commits.
    """

    def __init__(
        self, commit: Commit, receiver: RunReceiver | None, running: dict[int, RunRow]
    ) -> None:
        self.ended: list[RunRow] = []  # came to HELD, or ended
        self._commit = commit
        self._receiver = receiver
        self._running = running
        self._rows: dict[int, RunRow | None] = {}
        self._added: list[Values] = []
        self._changed: dict[int, RunRow] = {}
        self._woken: set[int] = set()
        self._ordering: set[tuple[str, str]] = (
            set()
        )  # flows and ordering keys whose head may change

    # ------------------------------------------------------------------- reading

    def fetch(self, idents: Iterable[int]) -> None:
        """Reads these runs, so that `get` finds them in memory."""
        known, missing = self._rows, list[int]()
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
                self.move(row, State.HELD)
                continue
            run.state = row.state
            run.token = row.token
            run.started_at = row.started_at
            run.crash_suspect = bool(row.crash_suspect)
            run.crash_count = row.crash_count
            run.cancel_requested = bool(row.cancel_requested)
            found.append(run)
        return found

    # ------------------------------------------------------------------- deciding

    def add(self, run: Run, payload: bytes | None) -> None:
        """A new run: RUNNING at once if the worker reserves it, else in its own state. With an
        ordering key it starts blocked.
        """
        commit = self._commit
        size = len(run.params or b"") + len(payload or b"")
        due_at = commit.due(run.due_at)
        if run.payload is None:
            run.payload = payload
        if run.ordering_key is not None:
            self._ordering.add((run.flow, run.ordering_key))
        elif run.state is State.PENDING and self._offer(run, due_at):
            self._rows[run.id] = rows.new_run_row(run, due_at, size)
        self._added.append(rows.run_row(run, due_at, size))
        commit.totals["runs"] += 1
        commit.totals["pending_bytes"] += size

    def add_growing(self, run: Run, payload: bytes | None) -> RunRow:
        """A new run that further events may join.

        Returns its row; windows.py writes what grows of it.
        """
        self.add(run, payload)
        row = self._rows.get(run.id)
        if row is None:
            due_at = self._commit.due(run.due_at)
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
            run.state = State.RUNNING
            run.token += 1
            run.started_at = run.started_at or commit.at
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
        before, row.state = row.state, state
        totals = self._commit.totals
        if due_at is not None:
            row.due_at = due_at
        if row.parent is None:
            totals[COLUMN[before]] -= row.deliveries
            totals[COLUMN[state]] += row.deliveries
        if state >= State.HELD and before is not state:
            self.ended.append(row)
        was_live, is_live = before < State.COMPLETED, state < State.COMPLETED
        if was_live != is_live:
            totals["pending_bytes"] += row.size if is_live else -row.size
            row.finished_at = None if is_live else self._commit.at
            if row.ordering_key is not None:
                row.blocked = int(is_live)
                self._ordering.add((row.flow, row.ordering_key))
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

    def flush_added(self) -> None:
        if self._added:
            rows.insert_runs.execute(self._commit.connection, self._added)
            self._added.clear()

    def flush_changed(self) -> None:
        """After everything that was added: woken runs are offered to the worker as the file has
        them.
        """
        connection = self._commit.connection
        if self._woken:
            self._offer_woken()
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
                    row.state = State.RUNNING
                    row.token = run.token
                    row.started_at = run.started_at

    def remember(self) -> None:
        """The commit is durable: what the writer knows of running runs is what this transaction
        left.
        """
        running = self._running
        for ident, row in self._rows.items():
            if row is not None and row.state is State.RUNNING:
                running[ident] = row
            else:
                running.pop(ident, None)

    def undo(self) -> None:
        """The commit failed: runs that the worker reserved go back as they were, remembered rows
        are forgotten.
        """
        self._running.clear()
        reserved, self._commit.reserved = self._commit.reserved, []
        if reserved and self._receiver is not None:
            for run in reserved:
                run.state = State.PENDING
                run.token -= 1
                run.started_at = run.started_at if run.token else None
            self._receiver.release(reserved)
