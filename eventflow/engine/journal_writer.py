"""Posts the journal entries of one run to the store, in order.

One value at a time may be *uncommitted*: the flow has it before its commit (see docs/design.md,
rule 7). Entries appended meanwhile wait until it is durable, so that they get a later batch: a
replay delivers batch by batch. `Execution` makes one per run; replies come back on the worker's
loop through `on_reply`.
"""

import asyncio
from collections.abc import Callable, Sequence

import msgspec

from eventflow.core.errors import StoreError
from eventflow.engine.actions import AppendEntry
from eventflow.engine.worker_services import WorkerServices
from eventflow.runs.journal import Entry
from eventflow.runs.run import Run
from eventflow.store.protocol import Append, Appended, Arrival, Fenced, MarkStarted

Reply = Appended | Fenced | StoreError


class JournalWriter(msgspec.Struct, eq=False):
    """`in_flight` counts appends without a reply: while there are any, the run is not idle."""

    _services: WorkerServices
    _run: Run
    _on_reply: Callable[[Reply], None]
    in_flight: int = 0
    uncommitted: Entry | None = None
    """The value that the flow has before its commit."""
    is_committing: bool = False
    """Whether the uncommitted value is posted."""
    _queued_behind: list[Append] = []  # appends that wait for the uncommitted value
    _start_marked: asyncio.Future[Reply] | None = None

    def append(
        self, entry: Entry, arrivals: Sequence[Arrival] = (), children: Sequence[Run] = ()
    ) -> None:
        """Records `entry`, with the events it publishes and the child runs it starts, in one
        commit.
        """
        run = self._run
        self.in_flight += 1
        proof = run.crash_suspect or self._start_marked is not None
        op = Append(run.id, run.token, (entry,), arrivals, children, proof)
        if self.uncommitted is not None:
            self._queued_behind.append(op)
        else:
            self._services.posts.post(op, self._on_appended)

    def _on_appended(self, reply: Reply) -> None:
        self.in_flight -= 1
        if isinstance(reply, Appended):
            self._run.crash_suspect = False
        self._on_reply(reply)

    # ----------------------------------------------------------------- the uncommitted value

    def keep_uncommitted(self, entry: Entry) -> bool:
        """Keeps a value for the commit by `commit_uncommitted`, or for that of the run's outcome.

        False: it must be appended, since something of the run is being recorded, or a crash counts.
        """
        if (
            self.in_flight
            or self.uncommitted is not None
            or self._run.crash_suspect
            or self._start_marked is not None
        ):
            return False
        self.uncommitted = entry
        return True

    def commit_uncommitted(self, emissions: Sequence[AppendEntry] = ()) -> None:
        """Makes the uncommitted value durable, if there is one and it is not posted yet, and
        `emissions` in the same commit, behind it.
        """
        if self.uncommitted is not None and not self.is_committing:
            run = self._run
            self.is_committing = True
            self.in_flight += 1
            entries = [self.uncommitted]
            arrivals: list[Arrival] = []
            for emission in emissions:
                entries.append(emission.entry)
                arrivals.extend(emission.arrivals)
            op = Append(run.id, run.token, entries, arrivals)
            self._services.posts.post(op, self._on_uncommitted_appended)

    def _on_uncommitted_appended(self, reply: Reply) -> None:
        self.uncommitted = None
        self.is_committing = False
        behind = self._queued_behind
        self._queued_behind = []
        for op in behind:
            self._services.posts.post(op, self._on_appended)
        self._on_appended(reply)

    def pop_uncommitted(self) -> tuple[Entry, ...]:
        """The uncommitted value, to be recorded with the outcome; empty if there is none or it is
        posted already.
        """
        entry = self.uncommitted
        if entry is None or self.is_committing:
            return ()
        self.uncommitted = None
        return (entry,)

    # ----------------------------------------------------------------- crash suspects

    async def mark_start(self) -> Reply:
        """Makes the start of a suspect's attempts durable, once per execution: a crash from here on
        counts against the run.
        """
        if self._start_marked is None:
            services = self._services
            self._start_marked = services.loop.create_future()
            op = MarkStarted(self._run.id, self._run.token)
            services.posts.post(op, self._start_marked.set_result)
        return await asyncio.shield(self._start_marked)

    def clear_suspicion(self) -> None:
        """Records that a suspect made progress: the crashes so far were not its doing."""
        op = Append(self._run.id, self._run.token, (), clears_suspicion=True)
        self._services.posts.post(op, self._on_cleared)

    def _on_cleared(self, reply: Reply) -> None:
        if isinstance(reply, Appended):
            self._run.crash_suspect = False
        else:
            self._on_reply(reply)
