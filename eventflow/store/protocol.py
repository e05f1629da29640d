"""The store's verbs, and the values that go through them. `sqlite.py` is the first house behind them.

Each verb is one transaction. Verbs on the hot path are posted: `post(op, reply)` returns at once, concurrent ops share one
transaction and one fsync (a *batch*, numbered), and the replies of a batch reach each event loop in one wake-up. The awaited
form is the posted form plus a wait. Everything an op carries is already encoded: the writer only inserts.

Who calls: the reactor posts `Record`; the executor posts `Append`, `Mark` and `Settle`; the worker posts `Claim`; the doors
call the awaited verbs and the readers. Nothing here knows asyncio tasks, flows or triggers.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import msgspec

from eventflow.core.errors import StoreError, StoreFull
from eventflow.events.event import Json, OutboxMessage, Receipt
from eventflow.runs.journal import Entry
from eventflow.runs.run import Outcome, Run, State
from eventflow.store.batching import BatchPolicy, PatternEvent, PatternMatch
from eventflow.store.run_events import LateRun, LateRuns, RunEnded

# --------------------------------------------------------------------------- what goes in


class Arrival(msgspec.Struct, gc=False):
    """One event (or dead letter) with all its verdicts and runs, ready to insert.

    `key`: 16-byte digest of (trigger, source, id), unique in the ledger. `digest`: 8-byte digest of the content, to tell a
    duplicate from a conflict. `body`: CloudEvents JSON; for a dead letter, the raw bytes. `verdicts`: JSON list of
    `[subscription, fate, reason or run id]`. `tally`: deliveries by P9 column, e.g. `{"pending": 1, "suppressed": 2}`; their
    sum is what this event adds to `accepted`. `dead`: `(subscription, reason)` pairs, each a dead-letter row over `body`.
    `gathers`: of those runs (by id) that are only begun if there is no open window, and whose event else joins that.
    `facts`: of the patterns it is for, each a verdict `waits` and a pending delivery, until the store knows better; `matches`:
    the runs (by id) that are of several events already.
    `outbox`: `(outlet, None)` for the event itself, `(outlet, subscription)` for its dead letter of that subscription.
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
    """Way in: events, their runs and the trigger's cursors. Reply: `list[Receipt]`, in order."""

    arrivals: Sequence[Arrival]
    trigger: str = ""
    cursor: Mapping[str, Json] | None = None


class Append(msgspec.Struct):
    """Way through: journal entries of one run, with events they emit (`arrivals`) and child runs they start (`children`).

    Reply: `Appended`, or `Refused` when the token is stale (nothing was written, the arrivals neither) or an entry of
    the same identity is already there. The entries come back with `batch`, `pos` and `at` set (an `at` that is given stays).
    Appending to a run clears its `suspect` and `deaths` when `proof` is true (the run was a suspect).
    """

    run: int
    token: int
    entries: Sequence[Entry]
    arrivals: Sequence[Arrival] = ()
    children: Sequence[Run] = ()
    clears_suspicion: bool = False


class MarkStarted(msgspec.Struct):
    """The start of a suspect's attempt, durable before its body: `deaths += 1`. Reply: `Appended` (no entries) or `Refused`."""

    run: int
    token: int


class Settle(msgspec.Struct):
    """The end of one claim of a run, by its one outcome. Reply: `Settled` or `Refused`.

    For a child with a parent, the same transaction writes the parent's journal entry: `answer`, an unnumbered VALUE or ERROR
    entry for `parent_claim` of run `parent`. A WAITING parent becomes PENDING, due now. `entries` are the run's own, recorded
    just before the outcome.
    """

    run: int
    token: int
    outcome: Outcome
    answer: Entry | None = None
    parent: int | None = None
    entries: Sequence[Entry] = ()


class Claim(msgspec.Struct):
    """Give me up to `limit` due PENDING runs: lane heads only, `caps[flow]` of a flow at most (absent: no cap; 0: none),
    round-robin over flows, priority (higher first) then age within one. Each becomes RUNNING, token + 1.

    Reply: `Claimed`. The runs carry `body` of their event.
    """

    limit: int
    caps: Mapping[str, int]


Op: TypeAlias = RecordEvents | Append | MarkStarted | Settle | Claim

# --------------------------------------------------------------------------- what comes back


class Appended(msgspec.Struct):
    batch: int
    at: int
    entries: Sequence[Entry] = ()
    receipts: Sequence[Receipt] = ()


class Settled(msgspec.Struct):
    """`answer` is the parent's entry, numbered, when `Settle` carried one and the parent took it."""

    batch: int
    at: int
    answer: Entry | None = None


class Fenced(msgspec.Struct):
    """The token is stale or the entry exists: the run belongs to somebody else now. Nothing was written."""

    reason: str


class Claimed(msgspec.Struct):
    """`more`: due runs were left behind because of `limit` or `caps`. `next_due`: when the earliest PENDING or WAITING run
    that is not due yet will be, microseconds, or None."""

    runs: Sequence[Run]
    more: bool
    next_due: int | None


Reply: TypeAlias = "list[Receipt] | Appended | Settled | Fenced | Claimed | StoreError"


class RunReceiver(Protocol):
    """The worker, seen from the writer thread: takes fresh runs in memory so that the hot path reads nothing back.

    When a run is recorded (or a parent woken) the writer asks `take(run)`; True means the run is inserted as RUNNING with
    token 1 and goes to `ready` with the batch's replies; False leaves it PENDING and `ready` is told `more=True`.
    """

    loop: asyncio.AbstractEventLoop

    def reserve(self, run: Run) -> bool:
        """Called in the writer thread, before the commit. Must be quick and must not raise."""
        ...

    def receive_runs(self, runs: Sequence[Run], more: bool, cancels: Sequence[int]) -> None:
        """Called on `loop`, after the commit. `cancels`: RUNNING runs that a door asked to cancel."""
        ...

    def receive_answers(self, answers: Sequence[tuple[int, Entry]]) -> None:
        """Called on `loop`, after the commit: what children of RUNNING runs came to, by parent, numbered."""
        ...

    def release(self, runs: Sequence[Run]) -> None:
        """Called in the writer thread when the commit failed after `take`."""
        ...


class PatternUpdate(msgspec.Struct):
    """What a pattern came to. `state`: what is open, for the next time and for `Herald.keep`; None: nothing is. `due`: when it
    must be asked again. `silences`: matches of no event, told by one of their own. `lapsed`: events that matched nothing, with
    the reason; `freed`: their bytes. `is_anew`: the state given was of another pattern, and everything open in it is void.
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
        """The event of a run that came to a wanted state, ready to record; None when no subscription matches it."""
        ...

    def route_late(self, run: LateRun) -> Arrival | None:
        """The event of a late run, ready to record; None when no subscription matches it."""
        ...


class PatternAdvancer(Protocol):
    """Advances the state machines of patterns. `PatternRunner` (routing/pattern_runner.py) implements it.

    Called in the writer thread, within the transaction. Must be quick and must not raise. States are values that the store only
    passes on.
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
        """Advances a pattern to `now`, with an event (its ledger id and bytes) if there is one. `state`: as the last update had
        it, or as `encode_state` made it. None: there is no pattern of this name."""
        ...

    def encode_state(self, subscription: str, key: str, state: Any) -> bytes:
        """The stored form of a state."""
        ...

    def time_driven(self) -> Sequence[str]:
        """The patterns that time alone may make match."""
        ...


class OutboxListener(Protocol):
    """The relay, seen from the writer thread."""

    loop: asyncio.AbstractEventLoop

    def notify(self, names: Sequence[str]) -> None:
        """Called on `loop`, after the commit: there is more to send for these."""
        ...


# --------------------------------------------------------------------------- the verbs


class Store(Protocol):
    """Events, verdicts, runs, journals, cursors, dead letters: durable when a reply says so."""

    location: str
    """What `--store` names, for messages and the ready line."""

    path: str
    """The store's file; what lies beside it (token, blobs, logs) is named after it."""

    last_id: int
    """After `open`: the largest id in the ledger, the floor for new ones."""

    @property
    def failed(self) -> StoreError | None:
        """Set once, when storage failed in use. Every later verb raises it (P10)."""
        ...

    def open(self) -> None:
        """Takes the lock, checks checksums and the high-water mark, migrates, makes RUNNING rows of older epochs PENDING
        suspects. Raises StoreLocked, StoreUnwritable or StoreCorrupt. Blocking; call it before any loop needs the store."""
        ...

    def close(self) -> None:
        """Commits what was posted, checkpoints, releases the lock. Idempotent. Blocking."""
        ...

    def post(self, op: Op, reply: Callable[[Any], None], loop: asyncio.AbstractEventLoop) -> None:
        """Queues `op`; `reply(result)` runs on `loop` after its batch is durable. Result: the op's reply, or a StoreError
        *value* when the batch failed. Ops of one loop are applied in the order posted."""
        ...

    def attach_worker(self, handover: RunReceiver | None) -> None:
        """Whom fresh runs are handed to; None: nobody."""
        ...

    def attach_run_events(self, source: RunEventSource) -> None:
        """Sets what makes the events of ended runs, recorded in the transactions that end them. Before `open`."""
        ...

    def attach_patterns(self, advancer: PatternAdvancer) -> None:
        """Sets what advances patterns. Before `open`."""
        ...

    def attach_outbox_listener(self, relay: OutboxListener | None) -> None:
        """Who hears of new rows in the outbox; None: nobody."""
        ...

    def on_new_runs(self, heard: Callable[[bool], None] | None) -> None:
        """Whom to call, from any thread, once a run is there that is new, or due earlier, or (True) lives again. Quick."""
        ...

    def on_failure(self, call: Callable[[StoreError], None]) -> None:
        """Called once, from the writer thread, when `failed` is set."""
        ...

    def capacity(self) -> StoreFull | None:
        """None while the ledger takes more; else why not (`max_pending`, pending bytes, the free-space floor) and for how
        long to wait. Cheap: called for every accept."""
        ...

    # way in ------------------------------------------------------------------------------
    async def record(
        self,
        arrivals: Sequence[Arrival],
        *,
        trigger: str = "",
        cursor: Mapping[str, Json] | None = None,
    ) -> list[Receipt]:
        """`Record`, awaited. The caller's cancellation does not reach the transaction."""
        ...

    async def cursor(self, trigger: str) -> dict[str, Json]: ...

    # way through -------------------------------------------------------------------------
    async def load(self, run: int) -> list[Entry]:
        """The run's whole journal, in (batch, pos) order; checksums verified (StoreCorrupt names the row)."""
        ...

    # way out -----------------------------------------------------------------------------
    async def outbox(self, outlet: str, limit: int) -> list[OutboxMessage]:
        """The first letters that this outlet has not sent yet. One whose checksum does not hold is set apart and logged."""
        ...

    async def sent(self, letters: Sequence[int], refused: Mapping[int, str]) -> None:
        """These letters (by number) need no more sending. The refused ones become dead letters of their outlet, each with its
        reason; a dead letter that a sink refuses stays the one it is."""
        ...

    async def outbox_depths(self) -> dict[str, tuple[int, int]]:
        """By outlet, how many letters wait, and since when the oldest does (microseconds)."""
        ...

    async def payloads(self, run: int) -> list[bytes]:
        """The events of a run that gathered them, as recorded, in order; StoreCorrupt names a row that is damaged."""
        ...

    # lookout -----------------------------------------------------------------------------
    async def late_runs(self, wanted: Callable[[str], Mapping[int, bool]], now: int) -> LateRuns:
        """The late runs that nobody was told of. `wanted`: by a flow's name, after how many microseconds it is asked for;
        False: only by a wildcard, which leaves out the runs that such an event started. StoreError when it takes too long."""
        ...

    async def record_late_runs(self, runs: Sequence[int], after: int) -> int:
        """Records the events that tell of these runs, unless they have ended or were told of; returns of how many."""
        ...

    # doors -------------------------------------------------------------------------------
    async def retry(self, run: int, *, discard_journal: bool = False) -> Run:
        """FAILED, CANCELLED, PAUSED, HELD or DEAD → PENDING, due now: values kept, ERROR entries become FORGIVEN, `deaths` 0.
        `fresh` drops the whole journal. Raises NotFound, or UsageError from any other state."""
        ...

    async def cancel(self, run: int, reason: str) -> State:
        """PENDING, WAITING, PAUSED, HELD → CANCELLED now (with `Settle`'s answer to a parent: an ERROR entry), live children too;
        RUNNING → `cancel_requested`, and the worker hears of it by `Handover.ready`. Returns the state it was in."""
        ...

    async def set_paused(self, trigger: str, paused: bool) -> None:
        """Pauses or resumes a trigger, durably. `await paused()` tells which are."""
        ...

    async def paused_triggers(self) -> set[str]: ...

    async def redrive(self, dead: int, arrival: Arrival) -> Receipt:
        """Marks dead letter `dead` redriven (once; UsageError the second time) and records `arrival`'s runs on its event."""
        ...

    async def replay(self, event: int, arrival: Arrival) -> Receipt:
        """Adds `arrival`'s runs, verdicts and tally to an event that is already recorded."""
        ...

    async def prune(self, *, payloads_before: int, identities_before: int, step: int = 500) -> int:
        """One small step of retention: settled runs, journals and bodies older than `bodies_before`, identities older than
        `identities_before` (microseconds). Returns rows removed; call again until 0. Live runs and open dead letters stay."""
        ...

    async def backup(self, path: str) -> None:
        """A consistent copy while running. Refuses to overwrite."""
        ...

    # readers -----------------------------------------------------------------------------
    async def counts(self) -> dict[str, int]:
        """`accepted, completed, failed, dead, cancelled, suppressed, pending` (deliveries; the first is the sum of the rest),
        and `events, duplicates, conflicts, runs`."""
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
        """Events of these triggers received in [since, until), oldest first, with bodies; and what to give as `after` for the
        next of them, None at the end."""
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
        """One run with its outcome (`result` and `codec`, or `error`, or `reason`), by id, unique prefix or suffix."""
        ...

    async def dead_letters(self, *, limit: int = 50, after: int | None = None) -> list[dict[str, Any]]: ...

    async def dead_letter(self, ident: str | int) -> dict[str, Any]: ...

    async def check(self) -> list[str]:
        """What does not hold in the ledger: pages, checksums, the sum of P9, lanes. Empty: sound. May take long."""
        ...

    async def blob_references(self) -> set[str]:
        """The blobs that a journal entry or a result names; the others may be swept."""
        ...
