"""Claims meet entries: what one run waits for, what its journal answers, and what is started because it does not.

    want     recorded → queued for delivery; new → queued to start
    deliver  the next batch, whole, in its order, into the futures the flow awaits
    start    bodies, timers, children, emissions: once the flow is parked and nothing is left to deliver
    append   something ended: posted to the store; `recorded` when its commit comes back, and queued for delivery
    came     the one value that the flow waits for: delivered at once, and recorded with what follows from it

The executor makes one per run and says when. Deliveries come in the order of commits, live and replaying alike. A value that
came alone will have a commit of its own, so the flow may go on with it before: it gets what a replay will give it. Until that
commit is durable nothing is started and nothing else recorded; if the flow ends meanwhile, value and outcome are one commit.
"""

import asyncio
import heapq
from collections.abc import Iterable
from contextvars import Context
from functools import partial
from typing import Any, Protocol

from eventflow.core.errors import ArgumentsChanged, ResultsUnavailable, StoreError, call_catching
from eventflow.engine.attempts import Attempts, Host
from eventflow.engine.awaitables import ChildCall, EmitCall, ControlSignal, Target
from eventflow.engine.flow_result import later
from eventflow.logs.log import get_logger
from eventflow.loop.flow_loop import FlowTimer
from eventflow.runs.journal import START, TIMEOUT, Entry, Journal, Kind
from eventflow.runs.run import Outcome, Run
from eventflow.sdk.task import TaskCall
from eventflow.serialization.codecs import decode_error, encode_error, fingerprint_diff
from eventflow.store.protocol import Append, Appended, Arrival, Refused

LONG_JOURNAL = 10_000
"""Entries over which a run is told to begin afresh."""

log = get_logger("eventflow.executor")


class Master(Host, Protocol):
    """What claims need of their run's execution."""

    settling: bool
    replaying: bool

    def hold(self, reason: str) -> None:
        """A person must look."""
        ...

    def stop(self, outcome: Outcome) -> None:
        """End with this, unless it is ending already."""
        ...

    def obey(self, entry: Entry, order: ControlSignal) -> None: ...

    def rest(self) -> None:
        """Something began or ended while the flow was parked."""
        ...

    def final(self) -> bool:
        """Whether the run goes on or ends for good, not only leaves memory: nobody asks for its children again."""
        ...

    def wake(self) -> None: ...


class Claims:
    """What one run waits for, by claim. `now` is the time as its flow sees it: that of the last delivery."""

    def __init__(self, master: Master, journal: Journal) -> None:
        self._master, self.journal = master, journal
        self.pool = master.pool
        self.attempts = Attempts(master)
        self.waiting: dict[str, Target] = {}
        self.due: list[
            tuple[int, int, Entry, Target]
        ] = []  # a heap by (batch, pos): recorded, and to be delivered
        self._starting: list[Target] = []
        self._ahead: Entry | None = (
            None  # delivered before its commit; `_behind` waits until that has come back
        )
        self._ahead_posted = False
        self._behind: list[Append] = []
        self.began_at = self.pool.clock.now()
        self.now = journal.started_at or journal.first_at or self.began_at
        self._noted = journal.started_at is not None
        # A crash may have come before the lines that followed the last delivery were stored; a suspension came after them.
        self._told = journal.last_own - master.run.suspect

    def read_now(self) -> int:
        """`now`, to the flow. Before the first delivery it is the start, which then must be the same after a crash."""
        if not self._noted:
            self._noted = True
            self.append(Entry(claim=START, kind=Kind.NOTE, due_at=self.now))
        return self.now

    # ----------------------------------------------------------------- wanting

    def request(
        self, call: TaskCall | ChildCall | EmitCall, loop: asyncio.AbstractEventLoop
    ) -> asyncio.Future[Any]:
        """Wants a call; the future is the flow's."""
        future: asyncio.Future[Any] = asyncio.Future(loop=loop)
        call.future = future
        self.want(call)
        return future

    def want(self, target: Target) -> None:
        journal, claim = self.journal, target.call_key
        if type(target) is ChildCall and (started := journal.children.get(claim)) is not None:
            self._fits(started, target)
        if (entry := journal.finals.get(claim)) is not None:
            journal.orphans.discard(claim)
            if self._fits(entry, target):
                heapq.heappush(self.due, (entry.batch, entry.pos, entry, target))
                return
        self.waiting[claim] = target
        self._starting.append(target)

    def _fits(self, entry: Entry, target: Target) -> bool:
        """Whether the recorded entry answers this call: its arguments are those of then, or its policy takes it anyway."""
        mine: bytes | None = getattr(target, "fingerprint", None)
        if mine is None or entry.fingerprint is None or mine == entry.fingerprint:
            return True
        diff = fingerprint_diff(entry.fingerprint, mine)
        if not diff:
            return True
        policy = target.task.options.on_changed if type(target) is TaskCall else "error"
        if policy == "error":
            self._master.hold(str(ArgumentsChanged(target.call_key, diff)))
        return policy == "accept"

    def give_up(self, call: TaskCall | ChildCall | EmitCall) -> None:
        """Flow code does not wait for this call any more: nothing of it is recorded from here on."""
        if self.waiting.pop(call.call_key, None) is not None:
            self._drop(call)

    def disarm(self, timer: FlowTimer) -> None:
        if self.waiting.pop(timer.call_key, None) is not None:
            self._drop(timer)

    def close(self) -> None:
        """Nothing more is taken in: bodies are cancelled, timers disarmed."""
        waiting, self.waiting = self.waiting, {}
        for target in waiting.values():
            self._drop(target)
        self._starting.clear()
        self.due.clear()

    def _drop(self, target: Target) -> None:
        if type(target) is TaskCall:
            self.attempts.abandon(target)
        elif type(target) is ChildCall:
            if (started := self.journal.children.get(target.call_key)) is not None:
                self._cancel_child(started)
        elif (handle := getattr(target, "handle", None)) is not None:
            handle.cancel()

    def _cancel_child(self, started: Entry) -> None:
        """Cancel goes down, unless this run only leaves memory: its next life asks for the child again."""
        if self._master.final():
            work = self.pool.store.cancel(
                int(started.value or b"0"), f"the call in {self._master.name} was cancelled"
            )
            self.pool.loop.call_soon(
                self.pool.spawn, work, context=Context()
            )  # not in the flow's step, nor in its context

    # ----------------------------------------------------------------- delivering

    def deliver(self) -> None:
        """Hands the flow the next batch, whole, in its order."""
        due, batch = self.due, self.due[0][0]
        if batch > self._told:
            self._master.replaying = False
        while due and due[0][0] == batch:
            _, _, entry, target = heapq.heappop(due)
            if entry.at > self.now or not self._noted:
                self.now, self._noted = entry.at, True
            if isinstance(target, FlowTimer):
                target.fire()
            elif isinstance(target, ControlSignal):
                self._master.obey(entry, target)
            elif target.future is not None and not target.future.done():
                self._answer(entry, target, target.future)

    def _answer(
        self, entry: Entry, target: TaskCall | ChildCall | EmitCall, future: asyncio.Future[Any]
    ) -> None:
        if entry.kind is Kind.ERROR:
            future.set_exception(decode_error(entry.error or b"{}"))
            future._log_traceback = False  # pyright: ignore  (recorded: nobody needs to hear that nobody looked)
        elif isinstance(target, EmitCall):
            future.set_result((entry.value or b"").decode())
        else:
            value, error = call_catching(self._decode, entry, target)
            if error is None:
                future.set_result(value)
            elif isinstance(error, ResultsUnavailable):
                self._master.stop(later(self.pool, self.journal))
            else:  # What was stored no longer reads as what the code says it is: a person must look, the value stays.
                self._master.hold(
                    f"{target.call_key}: the recorded value cannot be read back: {error}"
                )

    def _decode(self, entry: Entry, target: TaskCall | ChildCall) -> Any:
        codec = target.task.result if isinstance(target, TaskCall) else target.flow.result
        name, data = entry.codec or "json", entry.value or b"null"
        if name.endswith("@blob"):
            name, data = self.pool.blobs.fetch(name, data)
        return codec.decode(name, data, allow_pickle=True, key=self.pool.secret)

    # ----------------------------------------------------------------- starting

    def start_all(self) -> None:
        """Starts what is new, unless the worker drains; what the flow had of it ahead of its commit is made durable first."""
        if self._ahead is not None:
            self.commit_ahead()
        elif self._starting and not self.pool.draining:
            starting, self._starting = self._starting, []
            for target in starting:
                if target.call_key in self.waiting:
                    self._start(target)

    def _start(self, target: Target) -> None:
        match target:
            case TaskCall():
                self._start_call(target)
            case FlowTimer() | ControlSignal():
                if target.due is not None:
                    target.handle = self.pool.clock.timer(
                        self.pool.loop, target.due, partial(self._fired, target.call_key)
                    )
            case EmitCall():
                self._start_emission(target)
            case ChildCall():
                self._start_child(target)

    def _start_call(self, call: TaskCall) -> None:
        journal = self.journal
        due: int | None = None
        if journal.count:
            call.attempt, call.spent, due = journal.attempts(call.call_key)
            if (replaced := journal.finals.get(call.call_key)) is not None:  # on_changed="rerun"
                call.attempt = max(call.attempt, replaced.attempt)
        if due is not None and due > self.pool.clock.now():
            self._wait_to_launch(call, due)
        else:
            self.attempts.launch(call)

    def _start_emission(self, target: EmitCall) -> None:
        ident = f"{self._master.name}/{target.call_key}"
        arrival, error = call_catching(
            self.pool.emitted, self._master.run, ident, target.type, target.fields
        )
        if arrival is not None:
            self.append(
                Entry(claim=target.call_key, kind=Kind.EMIT, value=ident.encode()), arrivals=(arrival,)
            )
        elif error is not None:
            attempt = self.journal.attempts(target.call_key)[0] + 1
            self.append(
                Entry(
                    claim=target.call_key, kind=Kind.ERROR, attempt=attempt, error=encode_error(error)
                )
            )

    def _start_child(self, target: ChildCall) -> None:
        if target.call_key not in self.journal.children:  # else its answer is on its way
            child = self.pool.child(self._master.run, target.call_key, target.flow, target.params)
            entry = Entry(
                claim=target.call_key,
                kind=Kind.CHILD,
                value=str(child.id).encode(),
                fingerprint=target.fingerprint,
            )
            self.append(entry, children=(child,))

    def _fired(self, claim: str) -> None:
        target = self.waiting.get(claim)
        if isinstance(target, FlowTimer | ControlSignal):
            self.append(Entry(claim=claim, kind=Kind.TIMER, due_at=target.due))

    def _wait_to_launch(self, call: TaskCall, due: int) -> None:
        call.handle = self.pool.clock.timer(self.pool.loop, due, partial(self._launch_due, call))

    def _launch_due(self, call: TaskCall) -> None:
        if call.call_key in self.waiting and self._master.takes() and not self.pool.draining:
            self.attempts.launch(call)
            self._master.rest()

    # ----------------------------------------------------------------- ahead of the commit

    def came(self, entry: Entry, arrivals: Iterable[Arrival] = ()) -> None:
        """Records a body's value, after the flow went on with it if that is all it waits for."""
        if arrivals or not self._is_alone(entry.claim):
            self.append(entry, arrivals)
            return
        entry.at = max(
            self.now, self.pool.clock.now()
        )  # the flow's time from here on, so the store keeps it
        self._ahead = entry
        heapq.heappush(
            self.due, (self.journal.last_batch + 1, 0, entry, self.waiting.pop(entry.claim))
        )
        self._master.wake()

    def _is_alone(self, claim: str) -> bool:
        """Whether this call is all that goes on in the run, so that its entry can share its commit with no other of the run."""
        master, waiting = self._master, self.waiting
        if self.due or self._starting or master.working or self._ahead is not None:
            return False
        others = len(waiting) - (TIMEOUT in waiting)
        return (
            others == 1
            and claim in waiting
            and not (master.run.suspect or self.attempts.marked or self.pool.draining)
        )

    def take_ahead(self) -> tuple[Entry, ...]:
        """What the flow had ahead of its commit, to be recorded with its outcome; nothing if it is on its way already."""
        if self._ahead is None or self._ahead_posted:
            return ()
        entry, self._ahead = self._ahead, None
        return (entry,)

    def commit_ahead(self) -> None:
        """Makes durable what the flow had ahead of its commit, if there is such a thing and it is not on its way."""
        if self._ahead is not None and not self._ahead_posted:
            self._ahead_posted = True
            run = self._master.run
            self._master.working += 1
            self.pool.store.post(
                Append(run.id, run.token, (self._ahead,)), self._caught_up, self.pool.loop
            )

    def _caught_up(self, reply: Appended | Refused | StoreError) -> None:
        self._ahead, self._ahead_posted = None, False
        behind, self._behind = self._behind, []
        for op in behind:
            self.pool.store.post(op, self._appended, self.pool.loop)
        self._appended(reply)

    # ----------------------------------------------------------------- recording

    def append(
        self, entry: Entry, arrivals: Iterable[Arrival] = (), children: Iterable[Run] = ()
    ) -> None:
        """Records `entry`, with the events and child runs that come of it."""
        self._master.working += 1
        run = self._master.run
        op = Append(
            run.id,
            run.token,
            (entry,),
            tuple(arrivals),
            tuple(children),
            run.suspect or self.attempts.marked,
        )
        if self._ahead is not None:
            self._behind.append(op)
        else:
            self.pool.store.post(op, self._appended, self.pool.loop)

    def _appended(self, reply: Appended | Refused | StoreError) -> None:
        master = self._master
        master.working -= 1
        if isinstance(reply, Appended):
            master.run.suspect = False
            for entry in reply.entries:
                master.safely(self.recorded, entry)
        elif not master.settling:
            master.lost(reply)

    def recorded(self, entry: Entry) -> None:
        """An entry of this run is durable (its own, or a child's answer, perhaps told twice): queue it for delivery."""
        journal = self.journal
        known = journal.finals.get(entry.claim)
        if known is not None and (known.batch, known.pos) == (entry.batch, entry.pos):
            return
        journal.add(entry)
        if journal.count == LONG_JOURNAL:
            log.warning("journal.long", run=self._master.name, entries=LONG_JOURNAL)
        if entry.kind is Kind.VALUE or entry.kind.final:
            if entry.kind is Kind.VALUE and self.pool.checkpoints.used:
                self.pool.forget(self._master.name, entry.claim)
            if (target := self.waiting.pop(entry.claim, None)) is not None:
                heapq.heappush(self.due, (entry.batch, entry.pos, entry, target))
        elif entry.kind is Kind.FAILED:
            call = self.waiting.get(entry.claim)
            if (
                isinstance(call, TaskCall)
                and call.attempt == entry.attempt
                and not call.running
                and entry.due_at is not None
            ):
                self._wait_to_launch(call, entry.due_at)
        elif entry.kind is Kind.CHILD and entry.claim not in self.waiting:
            self._cancel_child(entry)  # given up while its start was being recorded
        self._master.wake()
