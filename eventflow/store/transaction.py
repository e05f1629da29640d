"""One write transaction: the tables it reads and changes, and how they are written.

`Writer` begins it; apply.py, claim.py and admin.py decide in it; `flush` writes the decisions in a
few statements; `Writer` commits. Rows are read once and changed in memory, so the operations of a
batch see each other's changes. Events are inserted as they come, so that the ledger itself tells
which are new; whatever is decided is a row in one of the tables until `flush`, never a statement on
its way. The few statements that administration executes itself are in admin.py and retention.py.
"""

import sqlite3
from collections.abc import Mapping

from eventflow.core.clock import Moment
from eventflow.store import rows
from eventflow.store.patterns import Patterns
from eventflow.store.protocol import PatternAdvancer, RunReceiver, Settled
from eventflow.store.rows import RunRow
from eventflow.store.tables import TOTALS, Commit, EventRows, JournalRows, RunRows
from eventflow.store.windows import Windows

_UPDATE_LEDGER = (
    f"UPDATE ledger SET batch = ?, at = ?, {', '.join(f'{name} = ?' for name in TOTALS)}"
)


class Transaction:
    """`commit`: number, times, counts, and what to report.

    Windows and patterns exist once an operation asks for them.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        *,
        batch: int,
        at: int,
        read_at: Moment,
        totals: Mapping[str, int],
        receiver: RunReceiver | None,
        running: dict[int, RunRow],
        advancer: PatternAdvancer | None = None,
    ) -> None:
        self.connection = connection
        self.commit = Commit(connection, batch=batch, at=at, read_at=read_at, totals=totals)
        self.events = EventRows(self.commit)
        self.runs = RunRows(self.commit, receiver, running)
        self.journal = JournalRows(self.commit)
        self.operations = 1
        self.settled = Settled(batch, at)  # the usual reply to `Settle`
        self.is_shared = False  # by several operations: see `apply.prefetch`
        self._advancer = advancer
        self._windows: Windows | None = None
        self._patterns: Patterns | None = None

    @property
    def windows(self) -> Windows:
        if self._windows is None:
            self._windows = Windows(self.commit, self.runs)
        return self._windows

    @property
    def patterns(self) -> Patterns:
        if self._patterns is None:
            self._patterns = Patterns(self.commit, self.windows, self._advancer)
        return self._patterns

    def flush(self) -> None:
        """Writes everything decided so far, but for the ledger's own row."""
        events = self.events
        for statement, values in (
            (rows.decide_events, events.decided),
            (rows.insert_dead_letters, events.dead_letters),
            (rows.insert_outbox, events.messages),
        ):
            if values:
                statement.execute(self.connection, values)
                values.clear()
        self.runs.flush_added()
        if self.journal.added:
            self.journal.flush()
        if events.has_updates:
            events.flush_updates()
        if self._windows is not None:
            self._windows.flush()
        if self._patterns is not None:
            self._patterns.flush()
        self.runs.flush_changes()

    def finish(self) -> None:
        """Writes the rest and the ledger's row; the writer commits."""
        self.flush()
        commit = self.commit
        self.connection.execute(_UPDATE_LEDGER, (commit.batch, commit.at, *commit.totals.values()))
