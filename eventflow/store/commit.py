"""What the parts of one transaction share: its number and times, the counts of the ledger, and what
to report after it.

`Transaction` (transaction.py) makes one for each commit and gives it to the tables: event_rows.py,
run_rows.py, journal_rows.py, windows.py, patterns.py. The writer reads the reports once the commit
is durable.
"""

import sqlite3
from collections.abc import Mapping

from eventflow.runs.journal import Entry
from eventflow.runs.run import Run, State
from eventflow.store.protocol import Arrival
from eventflow.store.rows import NEVER

TOTALS = (
    "accepted", "completed", "failed", "dead", "cancelled", "suppressed", "pending", "events",
    "duplicates", "conflicts", "runs", "pending_bytes", "pruned_completed", "pruned_failed",
    "pruned_cancelled", "pruned_events", "pruned_runs",
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
        self.cancels: list[int] = []
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

    def note_due(self, at: int) -> None:
        """Something is due at this instant, for the next claim."""
        if at <= self.now:
            self.has_due = True
        elif at < self.next_due:
            self.next_due = at
