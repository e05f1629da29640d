"""The interface of the store: its verbs, and the values that they take and return.

Each verb is one transaction. Verbs on the hot path are posted: `post(op, reply)` returns at once,
concurrent operations share one transaction and one fsync (a *batch*, numbered), and the replies of
a batch reach each event loop in one wake-up. The awaited form is the posted form plus a wait.
Everything in an operation is encoded already: the writer only inserts.

Callers: intake/reactor.py posts `RecordEvents`; engine/execution.py posts `Append`, `MarkStarted`
and `Settle`; engine/worker.py posts `Claim`; the API and the command line use the awaited verbs and
the queries. Nothing here knows asyncio tasks, flows or triggers. sqlite.py implements it.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import msgspec

from eventflow.core.clock import Moment
from eventflow.core.errors import StoreError, StoreFull
from eventflow.events.event import EventOutcome, Json, OutboxMessage, Receipt
from eventflow.runs.journal import Entry
from eventflow.runs.run import Outcome, Run, State
from eventflow.store.multi_event import BatchPolicy, PatternEvent, PatternMatch
from eventflow.store.run_events import LateRun, LateRuns, RunEnded

# --------------------------------------------------------------------------- operations


class Arrival(msgspec.Struct, gc=False):
    """One event (or dead letter) with all its verdicts and runs, ready to insert.

    `key`: 16-byte digest of (trigger, source, id), unique in the ledger. `digest`: 8-byte digest of
    the content, which tells a duplicate from a conflict. `body`: CloudEvents JSON; for a dead
    letter, the raw bytes. `verdicts`: JSON list of `[subscription, outcome, reason or run id]`.
    `counts`: deliveries by their term of P9's sum, e.g. `{"pending": 1, "suppressed": 2}`; their
    sum is what this event adds to `accepted`. `dead_letters`: `(subscription, reason)` pairs, each
    a row over `body`. `batch_policies`: by run id, of the runs that start only if there is no open
    window; else the event joins that. `pattern_events`: one for each pattern that wants the event,
    with the verdict `waiting` and a pending delivery; the store changes both when the pattern
    matches. `matches`: by id, the runs of patterns. `outbox`: `(sink, None)` for the event itself,
    `(sink, subscription)` for its dead letter of that subscription.
    """

    id: int
    trigger: str
    key: bytes
    digest: bytes
    event_id: str
    source: str
    type: str
    body: bytes
    verdicts: bytes
    received_at: int
    counts: Mapping[str, int]
    subject: str | None = None
    runs: Sequence[Run] = ()
    dead_letters: Sequence[tuple[str, str]] = ()
    outbox: Sequence[tuple[str, str | None]] = ()
    batch_policies: Mapping[int, BatchPolicy] = {}
    pattern_events: Sequence[PatternEvent] = ()
    matches: Mapping[int, PatternMatch] = {}
    headers: bytes | None = None


class RecordEvents(msgspec.Struct):
    """Events, their runs and the trigger's cursors. Reply: `list[Receipt]`, in order.

    `route_conflict`: the dead letter of an event with a known identity and other content, which the
    same transaction records; called on the writer's thread. Without it, the conflict is counted.
    """

    arrivals: Sequence[Arrival]
    trigger: str = ""
    cursor: Mapping[str, Json] | None = None
    route_conflict: Callable[[Arrival, Receipt], Arrival] | None = None


class Append(msgspec.Struct):
    """Journal entries of one run, with the events that they emit (`arrivals`) and the child runs
    that they start (`children`).

    Reply: `Appended`, or `Fenced` when the token is stale or an entry of the same identity is
    recorded already (then nothing is written, the arrivals neither). The entries are returned with
    `batch`, `position` and `at` set (an `at` that is given stays). `clears_suspicion`: the run was
    a crash suspect, and these entries show progress; its `crash_count` becomes 0.
    """

    run: int
    token: int
    entries: Sequence[Entry]
    arrivals: Sequence[Arrival] = ()
    children: Sequence[Run] = ()
    clears_suspicion: bool = False


class MarkStarted(msgspec.Struct):
    """The start of a crash suspect's attempt, durable before its body: `crash_count += 1`. Reply:
    `Appended` (no entries) or `Fenced`.
    """

    run: int
    token: int


class Settle(msgspec.Struct):
    """The end of one claim of a run, with its outcome. Reply: `Settled` or `Fenced`.

    For a child run the same transaction writes the parent's journal entry: `answer`, an unnumbered
    VALUE or ERROR entry for `parent_call_key` of run `parent`. A WAITING parent becomes PENDING,
    due now. `entries` are the run's own, recorded just before the outcome.
    """

    run: int
    token: int
    outcome: Outcome
    answer: Entry | None = None
    parent: int | None = None
    entries: Sequence[Entry] = ()


RunOp: TypeAlias = Append | MarkStarted | Settle
"""What the worker records of a run."""


class OpList(msgspec.Struct):
    """Operations of one turn of a loop, posted in one piece: one queued item, one reply.

    Each is applied and refused on its own, in this order. Reply: a list of their replies (or of
    StoreErrors, for those that could not be applied); a StoreError when storage failed.
    """

    ops: "Sequence[RecordEvents | RunOp]"


class Claim(msgspec.Struct):
    """Asks for up to `limit` due runs: heads of their ordering keys only, at most `caps[flow]` of a
    flow (absent: no cap; 0: none), round-robin over flows, by priority (higher first) then age
    within one. Each becomes RUNNING, token + 1.

    Reply: `Claimed`. The runs carry the payload of their event.
    """

    limit: int
    caps: Mapping[str, int]


WriteOp: TypeAlias = RecordEvents | Append | MarkStarted | Settle
Op: TypeAlias = WriteOp | OpList | Claim

# --------------------------------------------------------------------------- replies


class Appended(msgspec.Struct):
    batch: int
    at: int
    entries: Sequence[Entry] = ()
    receipts: Sequence[Receipt] = ()


class Settled(msgspec.Struct):
    """`answer` is the parent's entry, numbered, if `Settle` carried one and the call had no end
    before.
    """

    batch: int
    at: int
    answer: Entry | None = None


class Fenced(msgspec.Struct):
    """The token is stale or the entry exists: another claim owns the run now.

    Nothing was written.
    """

    reason: str


class Claimed(msgspec.Struct):
    """`has_more`: due runs were left because of `limit` or `caps`.

    `next_due`: when the earliest PENDING or WAITING run (or pattern) that is not due yet will be,
    microseconds, or None. `read_at`: when the store looked.
    """

    runs: Sequence[Run]
    has_more: bool
    next_due: int | None
    read_at: Moment


Reply: TypeAlias = "list[Receipt] | Appended | Settled | Fenced | Claimed | StoreError"


class RunReceiver(Protocol):
    """The worker, seen from the writer thread: it reserves new runs in memory, so that the hot path
    reads nothing back.

    When due runs are recorded (or parents woken) the writer calls `reserve`. The runs that this
    returns are inserted as RUNNING with token 1 and passed to `receive_runs` after the commit. The
    others stay PENDING, and `receive_runs` gets `has_due=True`.
    """

    loop: asyncio.AbstractEventLoop

    def reserve(self, runs: Sequence[Run]) -> Sequence[Run]:
        """Which of these runs go straight to memory, in their order. Called in the writer thread,
        before the commit. Must be quick and must not raise.
        """
        ...

    def receive_runs(self, runs: Sequence[Run], has_due: bool, cancels: Mapping[int, str]) -> None:
        """Called on `loop`, after the commit.

        `has_due`: runs are due that were not reserved. `cancels`: RUNNING runs whose cancel was
        requested.
        """
        ...

    def receive_answers(self, answers: Sequence[tuple[int, Entry]]) -> None:
        """Called on `loop`, after the commit: numbered entries of ended child runs, by their
        RUNNING parent.
        """
        ...

    def release(self, runs: Sequence[Run]) -> None:
        """Called in the writer thread when the commit failed after `reserve`."""
        ...


class PatternUpdate(msgspec.Struct):
    """What advancing a pattern led to.

    `state`: what is open now, for the next call and for `encode_state`; None: nothing is. `due`:
    when it must be advanced if no event comes. `absences`: matches without an event, as arrivals of
    an event of their own. `expired`: events that matched nothing, with the reason; `freed_bytes`:
    their size. `is_reset`: the state given was of another definition of the pattern, and everything
    open in it is void.
    """

    state: Any
    due: int
    matches: Sequence[PatternMatch] = ()
    absences: "Sequence[Arrival]" = ()
    expired: Sequence[tuple[int, str]] = ()
    freed_bytes: int = 0
    is_reset: bool = False


class RunEventSource(Protocol):
    """Makes the events of runs that ended or are late. The router implements it.

    Called in the writer thread, within the transaction. Must be quick and must not raise.
    """

    def raise_floor(self, last_id: int) -> None:
        """Ids up to this one may be in use. Called once, before anything else."""
        ...

    @property
    def wanted_states(self) -> Collection[State]:
        """The states, of those that end a run or hold it, that some subscription asks for."""
        ...

    def route_ended(self, run: RunEnded) -> Arrival | None:
        """The event of a run that reached a wanted state, ready to record; None when no
        subscription matches it.
        """
        ...

    def route_late(self, run: LateRun) -> Arrival | None:
        """The event of a late run, ready to record; None when no subscription matches it."""
        ...


class PatternAdvancer(Protocol):
    """Advances the state machines of patterns.

    `PatternRunner` (routing/pattern_runner.py) implements it.

    Called in the writer thread, within the transaction. Must be quick and must not raise. States
    are values that the store only passes on.
    """

    def advance(
        self,
        subscription: str,
        key: str,
        state: Any,
        now: int,
        pattern_event: PatternEvent | None = None,
        event: int = 0,
        size: int = 0,
    ) -> PatternUpdate | None:
        """Advances a pattern to `now`, with an event (its ledger id and bytes) if there is one.

        `state`: as the last update had it, or as `encode_state` made it. None: there is no pattern
        of this name.
        """
        ...

    def encode_state(self, subscription: str, key: str, state: Any) -> bytes:
        """The stored form of a state."""
        ...

    def time_driven(self) -> Sequence[str]:
        """The patterns that time alone may make match."""
        ...


class OutboxListener(Protocol):
    """What sends the outbox, seen from the writer thread."""

    loop: asyncio.AbstractEventLoop

    def notify(self, names: Sequence[str]) -> None:
        """Called on `loop`, after the commit: the sinks of these names have new messages."""
        ...


# --------------------------------------------------------------------------- the verbs


class Store(Protocol):
    """Events, verdicts, runs, journals, cursors, dead letters: durable when a reply says so.

    SqliteStore is the only implementation today. The protocol stays because a second one (Postgres)
    is planned, and because it is the list of what the rest of eventflow may use of a store.
    """

    location: str
    """What `--store` names, for messages and the ready line."""

    path: str
    """The store's file; the files beside it (token, blobs, logs) are named after it."""

    last_id: int
    """After `open`: the largest id in the ledger, the floor for new ones."""

    @property
    def failed(self) -> StoreError | None:
        """Set once, when storage failed in use. Every later verb raises it (P10)."""
        ...

    def open(self) -> None:
        """Takes the lock, checks checksums and the high-water mark, migrates, makes RUNNING rows of
        older epochs PENDING suspects. Raises StoreLocked, StoreUnwritable or StoreCorrupt.
        Blocking; call it before any loop needs the store.
        """
        ...

    def close(self) -> None:
        """Commits what was posted, checkpoints, releases the lock. Idempotent. Blocking."""
        ...

    def post(self, op: Op, reply: Callable[[Any], None], loop: asyncio.AbstractEventLoop) -> None:
        """Queues `op`; `reply(result)` runs on `loop` after its batch is durable. Result: the op's
        reply, or a StoreError *value* when the batch failed. Ops of one loop are applied in the
        order posted.
        """
        ...

    def attach_worker(self, receiver: RunReceiver | None) -> None:
        """Sets the worker that new runs are offered to, or None."""
        ...

    def attach_run_events(self, source: RunEventSource) -> None:
        """Sets what makes the events of ended runs, recorded in the transactions that end them.

        Before `open`.
        """
        ...

    def attach_patterns(self, advancer: PatternAdvancer) -> None:
        """Sets what advances patterns. Before `open`."""
        ...

    def attach_outbox_listener(self, listener: OutboxListener | None) -> None:
        """Sets what is notified of new messages in the outbox, or None."""
        ...

    def on_new_runs(self, call: Callable[[bool], None] | None) -> None:
        """Sets what is called, from any thread, when a run is recorded or due earlier, or (True)
        was retried. Must be quick.
        """
        ...

    def on_failure(self, call: Callable[[StoreError], None]) -> None:
        """Called once, from the writer thread, when `failed` is set."""
        ...

    def capacity(self) -> StoreFull | None:
        """None while the store accepts events; else why not (`max_pending`, pending bytes, the
        free-space floor) and for how long to wait. Cheap: called for every accept.
        """
        ...

    # events ------------------------------------------------------------------------------
    async def record(
        self,
        arrivals: Sequence[Arrival],
        *,
        trigger: str = "",
        cursor: Mapping[str, Json] | None = None,
    ) -> list[Receipt]:
        """`RecordEvents`, awaited. A cancel of the caller does not reach the transaction."""
        ...

    async def cursor(self, trigger: str) -> dict[str, Json]: ...

    async def outcomes(self, keys: Sequence[bytes]) -> list[EventOutcome | None]:
        """What became of the events with these identities, in their order; None: not ended."""
        ...

    # runs -------------------------------------------------------------------------
    async def load(self, run: int) -> list[Entry]:
        """The run's whole journal, in (batch, position) order; checksums verified (StoreCorrupt
        names the row).
        """
        ...

    # outbox -----------------------------------------------------------------------------
    async def unsent_messages(self, sink: str, limit: int) -> list[OutboxMessage]:
        """The first messages of a sink's outbox.

        One whose checksum does not match is left out and logged.
        """
        ...

    async def remove_sent(self, numbers: Sequence[int], rejected: Mapping[int, str]) -> None:
        """Removes these messages from the outbox.

        The rejected ones become dead letters of their sink, each with its reason; a rejected dead
        letter stays the one it is.
        """
        ...

    async def outbox_depths(self) -> dict[str, tuple[int, int]]:
        """By sink, how many messages wait, and since when the oldest does (microseconds)."""
        ...

    async def queue_heads(self, flows: Sequence[str]) -> dict[str, int]:
        """By flow, since when its first pending run is due (microseconds)."""
        ...

    async def payloads(self, run: int) -> list[bytes]:
        """The events of a run, as recorded, in order; StoreCorrupt names a row whose checksum does
        not match.
        """
        ...

    # late runs -----------------------------------------------------------------------------
    async def late_runs(self, wanted: Callable[[str], Mapping[int, bool]], now: int) -> LateRuns:
        """The late runs that are not recorded as late.

        `wanted`: by a flow's name, after how many microseconds its runs are late; False: asked for
        by a wildcard only, which leaves out runs that a late-run event started. StoreError when it
        takes too long.
        """
        ...

    async def record_late_runs(self, runs: Sequence[int], after: int) -> int:
        """Records the late-run events of these runs, unless they have ended or were recorded;
        returns how many it recorded.
        """
        ...

    # administration -------------------------------------------------------------------------------
    async def retry(self, run: int, *, discard_journal: bool = False) -> Run:
        """FAILED, CANCELLED, PAUSED, HELD or DEAD → PENDING, due now: values are kept, ERROR
        entries become CLEARED, `crash_count` 0. `discard_journal` drops the whole journal.
        WAITING → PENDING if an attempt waits for its time: it is due now. Raises NotFound, or
        UsageError from any other state.
        """
        ...

    async def retry_from(self, run: int, call: str, new: int) -> Run:
        """Records a run of the id `new` that repeats one that has ended: with what that one
        recorded before `call` (a call key, or the name of a task that it called once), and then
        afresh. Raises NotFound, or UsageError for a live run, a child, a run of several events and
        an unknown call.
        """
        ...

    async def cancel(self, run: int, reason: str, caller_token: int = 0) -> State:
        """A run that has begun is asked to end, live children too: RUNNING → `cancel_requested`,
        and the worker gets it by `RunReceiver.receive_runs`; WAITING, PENDING → PENDING, due now,
        with the cancel in its journal. PAUSED, HELD, not begun, or asked before and not RUNNING →
        CANCELLED now, with an ERROR entry for a parent. Returns the state that the run was in.

        `caller_token`: that of the claim in which a flow gave up its call of this child; 0 for a
        person. Nothing happens if that execution has ended and the next one makes the call again.
        """
        ...

    async def set_paused(self, trigger: str, paused: bool) -> None:
        """Pauses or resumes a trigger, durably. Resuming makes its paused runs PENDING."""
        ...

    async def paused_triggers(self) -> set[str]: ...

    async def redrive(self, dead_letter: int, arrival: Arrival) -> Receipt:
        """Marks the dead letter redriven (once; UsageError the second time) and records `arrival`'s
        runs on its event.
        """
        ...

    async def replay(self, event: int, arrival: Arrival) -> Receipt:
        """Adds `arrival`'s runs, verdicts and counts to an event that is recorded already."""
        ...

    async def prune(self, *, payloads_before: int, identities_before: int, step: int = 500) -> int:
        """One small step of retention: ended runs, journals and payloads older than
        `payloads_before`, identities older than `identities_before` (microseconds). Returns rows
        removed; call again until 0. Live runs and open dead letters stay.
        """
        ...

    async def backup(self, path: str) -> None:
        """A consistent copy while running. Refuses to overwrite."""
        ...

    # queries -----------------------------------------------------------------------------
    async def counts(self) -> dict[str, int]:
        """`accepted, completed, failed, dead, cancelled, suppressed, pending` (deliveries; the
        first is the sum of the rest), and `events, duplicates, conflicts, runs`.
        """
        ...

    async def events(
        self,
        *,
        trigger: str | None = None,
        type: str | None = None,
        since: int | None = None,
        until: int | None = None,
        limit: int = 50,
        after: int | None = None,
    ) -> list[dict[str, Any]]: ...

    async def past(
        self,
        *,
        triggers: Sequence[str],
        type: str | None,
        since: int,
        until: int,
        after: int,
        limit: int,
    ) -> tuple[list[dict[str, Any]], int | None]:
        """Events of these triggers received in [since, until), oldest first, with bodies; and the
        `after` of the next call, None at the end.
        """
        ...

    async def event(self, ident: str | int) -> dict[str, Any]:
        """By ledger id (number, base 32, unique prefix or suffix) or by the sender's event id."""
        ...

    async def runs(
        self,
        *,
        event: int | None = None,
        flow: str | None = None,
        state: State | None = None,
        parent: int | None = None,
        limit: int = 50,
        after: int | None = None,
    ) -> list[dict[str, Any]]: ...

    async def run(self, ident: str | int) -> dict[str, Any]:
        """One run with its outcome (`result` and `codec`, or `error`, or `reason`), by id, unique
        prefix or suffix.
        """
        ...

    async def dead_letters(
        self, *, limit: int = 50, after: int | None = None
    ) -> list[dict[str, Any]]: ...

    async def dead_letter(self, ident: str | int) -> dict[str, Any]: ...

    async def check(self) -> list[str]:
        """Every inconsistency of the store: pages, checksums, the sum of P9, ordering keys.

        Empty: sound. May take long.
        """
        ...

    async def blob_references(self) -> set[str]:
        """The blobs that a journal entry or a result names; the others may be deleted."""
        ...
