"""Many runs over several processes: parents and children, emits, suspensions, drains, crashes,
retries by hand.

A `Simulation` is a ledger and a virtual clock; `run_process()` is one process that works on it. It
decides as the store and the worker do, one commit at a time, so that a test can end a process after
any commit and examine exactly what was durable.
"""

import asyncio
import heapq
import random
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, cast

import msgspec
import orjson

from eventflow.core.errors import NotStorable, StoreError
from eventflow.engine.execution import Execution
from eventflow.engine.limits import CrashSuspectGate, WorkerLimits
from eventflow.engine.worker_services import WorkerServices
from eventflow.runs.journal import Entry, Journal, Kind
from eventflow.runs.run import (
    Cancelled,
    Completed,
    Failed,
    Interrupted,
    NeedsAttention,
    Outcome,
    Restarted,
    Run,
    State,
    Suspended,
)
from eventflow.sdk.checkpoint import CheckpointStore
from eventflow.sdk.flow import Flow
from eventflow.serialization.blobs import Blobs
from eventflow.serialization.errors import decode_error
from eventflow.store.protocol import (
    Append,
    Appended,
    Arrival,
    Fenced,
    MarkStarted,
    OpList,
    RunOp,
    Settle,
    Settled,
)
from tests.engine.replay_check.seeded_run import START_TIME, Crash

SECOND = 1_000_000
DAY = 86_400 * SECOND

THREAD_POLL = 0.001
"""Seconds of the real clock between two looks at threads at work."""

SPIN_SECONDS = 30.0
"""Of the real clock, in which the virtual one must have moved on: else something spins."""


class Row(msgspec.Struct):
    """One run as the ledger knows it."""

    run: Run
    flow: Flow[..., Any]
    journal: list[Entry] = []
    state: State = State.PENDING
    due: int | None = START_TIME
    outcome: Outcome | None = None
    suspensions: list[int | None] = []
    known: set[tuple[str, int, Kind]] = set()

    @property
    def value(self) -> Any:
        assert isinstance(self.outcome, Completed), self.outcome
        return self.flow.result.decode(self.outcome.codec, self.outcome.value)

    @property
    def error(self) -> BaseException:
        assert isinstance(self.outcome, Failed), self.outcome
        return decode_error(self.outcome.error)

    @property
    def reason(self) -> str:
        assert isinstance(self.outcome, NeedsAttention | Cancelled), self.outcome
        return self.outcome.reason

    def claims(self, kind: Kind = Kind.VALUE) -> list[str]:
        return [entry.call_key for entry in self.journal if entry.kind is kind]


class Timer:
    def __init__(self, call: Callable[[], None]) -> None:
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self.call = None


class Threads(ThreadPoolExecutor):
    """Counts the bodies that have not ended."""

    busy = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.busy += 1
        future = super().submit(fn, *args, **kwargs)
        future.add_done_callback(self._less)
        return future

    def _less(self, _: Future[Any]) -> None:
        self.busy -= 1


class Simulation:
    """Ledger, clock and store; it claims what is due."""

    flows: ClassVar[dict[str, Any]] = {}
    failed: StoreError | None = None
    blobs = Blobs(Path("/nonexistent"))  # nothing here is large
    checkpoints = CheckpointStore(Path("/nonexistent"))  # nor saves anything

    def __init__(self) -> None:
        self.rows: dict[int, Row] = {}
        self.time = START_TIME
        self.batch = 0
        self.commits = 0
        self.published: list[tuple[str, str]] = []
        self.marks: list[int] = []
        self.faults: list[dict[str, Any]] = []
        self.refuse: Callable[[Any], Any] | None = None
        self.limits = WorkerLimits(max_in_memory=0)  # memory is full: runs that only wait leave it
        self.eager = False
        """The worker's loop has an eager task factory, as the host program may have set."""
        self.threads_may_block = False
        """Time advances while a thread works: the thread waits for that."""
        self.in_memory_at_end: set[int] = set()
        self._ids = count(100)
        self.services: WorkerServices

    # ----------------------------------------------------------------- what a test does

    def add(self, flow: Flow[..., Any], **params: Any) -> Row:
        run = Run(
            id=next(self._ids),
            flow=flow.name,
            created_at=self.time,
            due_at=self.time,
            params=orjson.dumps(params),
        )
        row = self.rows[run.id] = Row(run, flow, due=self.time)
        return row

    def run_process(
        self,
        *,
        until: int | None = None,
        crash_after: int | None = None,
        then: Callable[["Simulation"], None] | None = None,
    ) -> bool:
        """Runs until nothing is left to do, or `until`, or a crash after so many commits (returns
        False).

        `then` is called once when all is quiet, before the process continues.
        """
        self.crash_after = None if crash_after is None else self.commits + crash_after
        for row in self.rows.values():
            if row.state is State.RUNNING:
                row.state = State.PENDING
                row.due = self.time
                row.run.crash_suspect = True
        self.services = WorkerServices(
            store=cast(Any, self),
            clock=self,
            derived=cast(Any, self),
            blobs=self.blobs,
            checkpoints=self.checkpoints,
            limits=self.limits,
            threads=cast(Any, None),
            rng=random.Random(1),
            secret=b"k",
        )
        self.executions: dict[int, Execution] = {}
        self._events: list[tuple[int, int, Timer]] = []
        self._order = count()
        self._posted: list[tuple[Any, Callable[[Any], None]]] = []
        self._then = then
        with Threads(2) as self.threads:
            self.services.threads = cast(Any, self.threads)
            try:
                return asyncio.run(self._run_process(until))
            finally:
                self.executions.clear()

    def done(self, flow: Flow[..., Any], **params: Any) -> Row:
        """A new run, executed until nothing is left to do."""
        row = self.add(flow, **params)
        self.run_process()
        return row

    def retry(self, row: Row) -> None:
        """As `Store.retry`: values stay, errors are cleared, recorded cancels and timeouts dropped;
        children too.
        """
        assert row.state in (State.FAILED, State.CANCELLED, State.HELD, State.DEAD)
        failed_calls = {entry.call_key for entry in row.journal if entry.kind is Kind.ERROR}
        kept = [
            entry
            for entry in row.journal
            if entry.kind is not Kind.CANCEL and entry.call_key != "@timeout"
        ]
        row.journal = [
            msgspec.structs.replace(e, kind=Kind.CLEARED) if e.kind is Kind.ERROR else e
            for e in kept
        ]
        row.known = {(entry.call_key, entry.attempt, entry.kind) for entry in row.journal}
        row.state = State.PENDING
        row.due = self.time
        row.outcome = None
        row.run.started_at = None
        row.run.cancel_requested = False
        for child in list(self.rows.values()):
            if (
                child.run.parent == row.run.id
                and child.run.parent_call_key in failed_calls
                and child.state is not State.COMPLETED
            ):
                self.retry(child)

    def advance(self, microseconds: int) -> None:
        self.time += microseconds

    # ----------------------------------------------------------------- one process

    async def _run_process(self, until: int | None) -> bool:
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(lambda _, context: self.faults.append(context))
        if self.eager:
            self.loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined]
        self.services.start(self.loop)
        self.limits.suspects = CrashSuspectGate()
        try:
            at, since = self.time, time.monotonic()
            while await self._turn(until):
                if self.time > at:
                    at, since = self.time, time.monotonic()
                assert time.monotonic() - since < SPIN_SECONDS, f"a run spins at {self.time}"
            alive = True
        except Crash:
            alive = False
        assert not self.faults, self.faults
        self.in_memory_at_end = set(self.executions)
        for execution in self.executions.values():
            execution.run_end.is_closed = True
            execution.loop.close()
        return alive

    async def _turn(self, until: int | None) -> bool:
        await self._quiet()
        if self._claim():
            return True
        while self._events and self._events[0][2].call is None:
            heapq.heappop(self._events)
        if self._posted:
            self._commit()
            return True
        waits = [
            row.due
            for row in self.rows.values()
            if row.state in (State.PENDING, State.WAITING) and row.due is not None
        ]
        waits = [] if self.draining else waits
        due = min([*waits, *(self._events[0][:1] if self._events else ())], default=None)
        if self._then is not None and (due is None or due > self.time):
            then, self._then = self._then, None
            then(self)
            return True
        if due is None and self.threads.busy:
            await asyncio.sleep(THREAD_POLL)
            return True
        if due is None or (until is not None and due > until):
            self.time = max(self.time, until or 0)
            return False
        self.time = max(self.time, due)
        if self._events and self._events[0][0] <= self.time:
            call = heapq.heappop(self._events)[2].call
            if call is not None:
                call()
        return True

    async def _quiet(self) -> None:
        """Waits until the loop has nothing ready and no thread works, or a flow polls."""
        idle = turns = 0
        busy = False
        began = time.monotonic()
        while idle < 2 and turns < 500:
            await asyncio.sleep(THREAD_POLL if busy else 0)
            threads = self.threads.busy and not self.threads_may_block
            busy = threads or any(
                execution.loop.unjournaled_awaits for execution in self.executions.values()
            )
            turns = 0 if busy else turns + 1
            idle = 0 if self.loop._ready or busy else idle + 1  # type: ignore[attr-defined]
            assert time.monotonic() - began < SPIN_SECONDS, "a thread or an await does not end"

    def _claim(self) -> bool:
        found = [
            row
            for row in self.rows.values()
            if row.state in (State.PENDING, State.WAITING)
            and row.due is not None
            and row.due <= self.time
        ]
        if self.draining:
            return False
        for row in found:
            row.state = State.RUNNING
            row.run.token += 1
            row.run.started_at = row.run.started_at or self.time
            run = msgspec.structs.replace(row.run)
            entries = [msgspec.structs.replace(entry) for entry in row.journal]
            journal = Journal(entries) if entries or run.token > 1 else None
            execution = Execution(self.services, run, row.flow, journal, self._on_settled)
            self.executions[run.id] = execution
            self.loop.call_soon(execution.begin)
        return bool(found)

    # ----------------------------------------------------------------- clock

    def now(self) -> int:
        return self.time

    def monotonic(self) -> float:
        return self.time / SECOND

    def timer(
        self, loop: asyncio.AbstractEventLoop, due_us: int, call: Callable[[], None]
    ) -> Timer:
        timer = Timer(call)
        heapq.heappush(self._events, (due_us, next(self._order), timer))
        return timer

    async def spend(self, seconds: float) -> None:
        """Takes some virtual time, as the work of a task body."""
        done: asyncio.Future[None] = self.loop.create_future()
        self.timer(
            self.loop,
            self.time + int(seconds * SECOND),
            lambda: None if done.done() else done.set_result(None),
        )
        await done

    # ----------------------------------------------------------------- store

    def post(self, op: Any, reply: Callable[[Any], None], loop: asyncio.AbstractEventLoop) -> None:
        self._posted.append((op, reply))

    def _commit(self) -> None:
        """One group commit of everything posted."""
        if self.crash_after is not None and self.commits >= self.crash_after:
            raise Crash
        posted, self._posted = self._posted, []
        self.commits += 1
        self.batch += 1
        self.time += 1000
        self._pos = 0
        replies = [(reply, self._apply(op)) for op, reply in posted]
        for reply, answer in replies:
            reply(answer)

    def _apply(self, op: OpList | Append | MarkStarted | Settle) -> Any:
        if isinstance(op, OpList):
            return [self._apply(cast(RunOp, each)) for each in op.ops]
        row = self.rows[op.run]
        if self.refuse is not None and (refusal := self.refuse(op)) is not None:
            return refusal
        if row.state is not State.RUNNING or row.run.token != op.token:
            return Fenced(f"token {op.token} is stale")
        match op:
            case Append():
                return self._append(row, op)
            case MarkStarted():
                self.marks.append(op.run)
                return Appended(self.batch, self.time)
            case Settle():
                return self._settle(row, op)

    def _append(self, row: Row, op: Append) -> Appended | Fenced:
        if any((entry.call_key, entry.attempt, entry.kind) in row.known for entry in op.entries):
            return Fenced("has an entry of the same claim, attempt and kind already")
        for entry in op.entries:
            self._add(row, entry)
        self.published += [(arrival.event_id, arrival.type) for arrival in op.arrivals]
        children = {(other.run.parent, other.run.parent_call_key) for other in self.rows.values()}
        for child in op.children:
            if (child.parent, child.parent_call_key) not in children:
                self.rows[child.id] = Row(child, self.flows[child.flow], due=self.time)
        row.run.crash_suspect = row.run.crash_suspect and not op.clears_suspicion
        return Appended(self.batch, self.time, op.entries)

    def _add(self, row: Row, entry: Entry) -> None:
        entry.batch = self.batch
        entry.position = self._pos
        entry.at = entry.at or self.time
        self._pos += 1
        row.journal.append(msgspec.structs.replace(entry))
        row.known.add((entry.call_key, entry.attempt, entry.kind))

    def _settle(self, row: Row, op: Settle) -> Settled:
        for entry in op.entries:
            self._add(row, entry)
        row.outcome = op.outcome
        match op.outcome:
            case Suspended(until, seen):
                self._suspend(row, until, seen)
            case Interrupted():
                row.state = State.PENDING
                row.due = self.time
                row.run.crash_suspect = False
            case Restarted(params, first):
                row.state = State.PENDING
                row.due = self.time
                row.journal = []
                row.run.params = params
                row.run.started_at = None
                row.known = set()
                self._add(row, first)
            case NeedsAttention():
                row.state = State.HELD
            case Completed():
                row.state = State.COMPLETED
            case Failed():
                row.state = State.FAILED
            case Cancelled():
                row.state = State.CANCELLED
        answer = None
        if (
            op.answer is not None
            and op.parent is not None
            and self._answer(self.rows[op.parent], op.answer)
        ):
            answer = op.answer
        return Settled(self.batch, self.time, answer)

    def _suspend(self, row: Row, until: int | None, seen: int) -> None:
        row.suspensions.append(until)
        late = any(entry.batch > seen for entry in row.journal)
        row.state = State.PENDING if late else State.WAITING
        row.due = self.time if late else until

    def _answer(self, parent: Row, entry: Entry) -> bool:
        if any(
            known.call_key == entry.call_key and known.kind.is_final for known in parent.journal
        ):
            return False
        self._add(parent, entry)
        if parent.state is State.WAITING:
            parent.state = State.PENDING
            parent.due = self.time
        return True

    async def cancel(self, run: int, reason: str, caller_token: int = 0) -> State:
        row = self.rows[run]
        before = row.state
        if before is State.RUNNING:
            row.run.cancel_requested = True
            if run in self.executions:
                self.executions[run].cancel(reason)
        elif before.is_live:
            row.state = State.CANCELLED
            row.outcome = Cancelled(reason)
        for child in list(self.rows.values()):
            if child.run.parent == run and before.is_live:
                await self.cancel(child.run.id, reason)
        return before

    # ----------------------------------------------------------------- worker

    @property
    def draining(self) -> bool:
        return self.services.draining

    @draining.setter
    def draining(self, draining: bool) -> None:
        self.services.draining = draining

    def _on_settled(
        self, execution: Execution, outcome: Outcome, reply: Settled | Fenced | StoreError
    ) -> None:
        assert self.executions.pop(execution.run.id, None) is execution, "settled twice"
        parent = execution.run.parent
        if isinstance(reply, Settled) and reply.answer is not None and parent in self.executions:
            execution = self.executions[parent]
            execution.guarded(execution.on_durable, reply.answer)

    def event(self, run: Run, ident: str, event_type: str, fields: dict[str, Any]) -> Arrival:
        if isinstance(fields["data"], set):
            raise NotStorable("data", "set")
        return Arrival(
            id=0,
            trigger="emit",
            key=b"",
            digest=b"",
            event_id=ident,
            source="",
            type=event_type,
            body=b"",
            verdicts=b"",
            received_at=0,
            counts={},
        )

    def child_run(self, run: Run, claim: str, flow: Flow[..., Any], params: bytes) -> Run:
        self.flows[flow.name] = flow
        return Run(
            id=next(self._ids),
            flow=flow.name,
            created_at=self.time,
            due_at=self.time,
            parent=run.id,
            parent_call_key=claim,
            params=params,
        )


def crash_after_every_commit(
    make: Callable[[Simulation], Row], check: Callable[[Simulation, Row], None] | None = None
) -> int:
    """Executes a run without a crash, then again with a crash after each commit and a second one
    after the next commit.

    Its outcome must be the same each time. Returns the number of commits.
    """
    sim = Simulation()
    row = make(sim)
    assert sim.run_process()
    assert row.state is State.COMPLETED, row.outcome
    for cut in range(sim.commits):
        other = Simulation()
        again = make(other)
        assert not other.run_process(crash_after=cut), cut
        other.run_process(crash_after=1)
        other.run_process()
        assert again.outcome == row.outcome, (cut, again.outcome, row.outcome)
        if check is not None:
            check(other, again)
    return sim.commits
