"""The executor: one run in memory, from its claim to its one outcome.

    begin   bind the arguments, make the flow's first task on a FlowLoop of its own
    want    a call claims its place: recorded → queued for delivery; new → queued to start
    parked  the flow can go no further: deliver the next batch, else start what is new, else wait
    record  an attempt ended: append the entry; the flow sees it only when its commit comes back
    settle  the flow ended, or every branch waits for long, or somebody said stop: one Outcome, one transaction

The worker makes an Execution per claimed run and is told when it settles. Everything here runs on the worker's loop. Between two
deliveries nothing outside touches the flow, live or replaying: that is the whole of determinism (lineage.py says why).
"""

import asyncio
import heapq
import random
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from contextvars import Context, copy_context
from functools import partial
from itertools import islice
from typing import Any, Protocol, TypeAlias

import orjson

from eventflow.attempt import run_body
from eventflow.blobs import LARGE, Blobs
from eventflow.clock import SECOND, Clock, microseconds
from eventflow.errors import (
    ArgumentsChanged,
    EventflowError,
    RunCancelled,
    RunTimedOut,
    StoreError,
    TaskTimedOut,
    UsageError,
)
from eventflow.event import Event
from eventflow.flow import Flow, RunContext, enter_run
from eventflow.journal import Entry, Journal, Kind
from eventflow.lineage import FlowLoop, FlowTask, FlowTimer, leave_flow
from eventflow.log import Sink, Where, get_logger, where
from eventflow.results import decode_error, encode_error, fingerprint, fingerprint_diff
from eventflow.run import Cancelled, Completed, Failed, Held, Interrupted, Outcome, Run, Suspended, show_id
from eventflow.store.base import Append, Appended, Arrival, Mark, Refused, Settle, Settled, Store
from eventflow.task import Call, TaskContext, enter_task, settle_map, task_context

SUSPEND_AFTER = 60 * SECOND
"""A run leaves memory when every branch of it waits at least this long."""
LONG_JOURNAL = 10_000
"""Entries over which a run is told to begin afresh."""
FEW = 16
"""Waiting branches that are looked through at every park; more are looked through once a second."""

log = get_logger("eventflow.executor")


class Pool(Protocol):
    """What the executions of one worker share; the worker is it."""

    loop: asyncio.AbstractEventLoop
    store: Store
    clock: Clock
    draw: random.Random
    threads: ThreadPoolExecutor
    blobs: Blobs
    state: Any
    flows: Mapping[str, Flow[..., Any]]
    suspects: asyncio.Semaphore
    draining: bool
    sink: Sink | None
    secret: bytes
    """Signs what tasks pickle; never in the store."""

    def emitted(self, run: Run, ident: str, event_type: str, fields: dict[str, Any]) -> Arrival:
        """An event that a run emits, matched and ready to record."""
        ...

    def child(self, run: Run, claim: str, flow: Flow[..., Any], params: bytes) -> Run: ...

    def slots(self, call: Call) -> asyncio.Semaphore | None:
        """The task's concurrency limit."""
        ...

    def soon(self, execution: "Execution") -> None:
        """Pump this execution once the replies of the batch under way have all been given."""
        ...

    def idle(self, execution: "Execution", idle: bool) -> None:
        """Every branch waits (idle), or works again: an idle run holds no slot."""
        ...

    def settled(self, execution: "Execution", outcome: Outcome, reply: Settled | Refused | StoreError) -> None: ...

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Runs `work` as a task that the worker owns."""
        ...


class Child:
    """A call of a flow in a flow."""

    __slots__ = ("claim", "fingerprint", "flow", "future", "params")

    def __init__(self, flow: Flow[..., Any], claim: str, params: bytes) -> None:
        self.flow, self.claim, self.params = flow, claim, params
        self.fingerprint = fingerprint(("params",), (orjson.loads(params),), {}, {})
        self.future: asyncio.Future[Any] | None = None


class Emission:
    """An event to publish with the commit that records it."""

    __slots__ = ("claim", "fields", "fingerprint", "future", "type")

    def __init__(self, claim: str, event_type: str, fields: dict[str, Any]) -> None:
        self.claim, self.type, self.fields = claim, event_type, fields
        self.fingerprint: bytes | None = None
        self.future: asyncio.Future[Any] | None = None


class Order:
    """Something told to the run from outside, delivered in its turn: a cancel, or its own timeout."""

    __slots__ = ("claim", "due", "handle")

    def __init__(self, claim: str, due: int | None = None) -> None:
        self.claim, self.due = claim, due
        self.handle: Any = None


Target: TypeAlias = Call | Child | Emission | FlowTimer | Order

CANCEL, TIMEOUT, START = "@cancel", "@timeout", "@start"


class Execution:
    """One run in memory. `begin` it, `pump` it when told, `interrupt` it on drain; it settles itself."""

    def __init__(self, pool: Pool, run: Run, flow: Flow[..., Any], journal: Journal) -> None:
        self.pool, self.run, self.flow, self.journal = pool, run, flow, journal
        self.loop = FlowLoop(self, pool.loop, run.id)
        self.now = run.started_at or pool.clock.now()
        self.seen_batch = 0
        self.name = show_id(run.id)
        self.is_idle = False
        self.settling = False
        self.dirty = False
        self.kept_at_start = journal.count
        self._heap: list[tuple[int, int, Entry, Target]] = []
        self._waiting: dict[str, Target] = {}
        self._starting: list[Target] = []
        self._working = 0  # bodies and appends under way: while there are any, the run is not idle
        self._ending: Outcome | None = None
        self._unwound = 0
        self._cancelled: str | None = None
        self._timed_out = False
        self._checking = False
        self._started_noted = journal.count > 0 or journal.started_at is not None
        self._event: Event | None = None
        self.replaying = journal.count > 0
        self._where = Where(
            run.id, flow.name, run.event, sink=pool.sink, replaying=lambda: self.replaying, show=show_id
        )  # fmt: skip
        self._root: FlowTask | None = None

    # ----------------------------------------------------------------- begin

    def begin(self) -> None:
        """Binds the arguments and takes the flow's first steps. Call from a plain callback on the worker's loop."""
        if self.journal.started_at is not None:
            self.now = self.journal.started_at
        elif self.journal.count == 0:
            self.now = self.pool.clock.now()
        context = copy_context()
        context.run(self._enter)
        coro = context.run(self._coroutine)
        if coro is None:
            return
        self._root = self.loop.root(coro, context)
        self._listen_for_orders()
        self.pump()

    def _enter(self) -> None:
        where.set(self._where)
        enter_run(RunContext(self.name, self._read_event, self.read_now, self.pool.state, get_logger(self.flow.name)))

    def read_now(self) -> int:
        """The time as the flow sees it. Read before anything was delivered it is the start, which then must be durable too."""
        self._note_start()
        return self.now

    def _read_event(self) -> Event | None:
        if self._event is None and self.run.body is not None:
            self._event = Event.recorded(self.run.body)
        return self._event

    def _coroutine(self) -> Coroutine[Any, Any, Any] | None:
        try:
            return self.flow.fn(**self._arguments())
        except Exception as error:  # around a run: whatever binding or the signature raises is this run's failure
            self._settle(Failed(encode_error(error)))
            return None

    def _arguments(self) -> dict[str, Any]:
        event = self._read_event()
        if self.run.params is not None:
            return self.flow.binder.bind_params(orjson.loads(self.run.params), event)
        if event is None:
            return {}
        return self.flow.binder.bind_event(event)

    def _listen_for_orders(self) -> None:
        if CANCEL in self.journal.finals:
            self._want(Order(CANCEL))
        if self.flow.options.timeout is not None:
            started = self.run.started_at or self.now
            self._want(Order(TIMEOUT, started + microseconds(self.flow.options.timeout)))
        if self.run.cancel_requested:
            self.cancel("cancel requested")

    # ----------------------------------------------------------------- calls, as flow code makes them

    async def perform(self, call: Call) -> Any:
        """Waits for a task call (task.Caller)."""
        return await self._answer(call)

    async def _answer(self, call: Call | Child | Emission) -> Any:
        future = self._request(call)
        try:
            return await future
        except asyncio.CancelledError:
            self._abandon(call)
            raise

    def _request(self, call: Call | Child | Emission) -> asyncio.Future[Any]:
        if self._ending is not None:
            raise asyncio.CancelledError(self._ending)
        future: asyncio.Future[Any] = asyncio.Future(loop=self.loop)
        call.future = future
        if type(call) is Call:
            call.context = copy_context()
        self._want(call)
        return future

    def perform_flow(self, flow: Flow[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Coroutine[Any, Any, Any]:
        """A child run and its result (flow.FlowCaller)."""
        return self._perform(Child(flow, self.loop.scope().claim(flow.name), flow.binder.unpack(args, kwargs)))

    def perform_emit(self, event_type: str, fields: dict[str, Any]) -> Coroutine[Any, Any, str]:
        call = Emission(self.loop.scope().claim(f"emit:{event_type}"), event_type, fields)
        return self._perform(call)

    async def _perform(self, call: Child | Emission) -> Any:
        return await self._answer(call)

    async def perform_all(self, calls: Iterable[Call], limit: int, return_exceptions: bool) -> list[Any]:
        """`task.map`: a window of `limit` calls moves over the items, without a task each."""
        results: list[Any] = []
        pending: set[int] = set()
        current: list[Call | None] = []
        failed = False
        more = asyncio.Event()
        source = iter(calls)

        def finish(place: int, future: asyncio.Future[Any]) -> None:
            nonlocal failed
            pending.discard(place)
            current[place] = None
            if not future.cancelled():
                error = future.exception()
                results[place] = future.result() if error is None else error
                failed = failed or error is not None
            more.set()

        try:
            while True:
                if not failed or return_exceptions:
                    for call in islice(source, limit - len(pending)):
                        place = len(results)
                        results.append(None)
                        current.append(call)
                        pending.add(place)
                        self._request(call).add_done_callback(partial(finish, place))
                if not pending:
                    break
                more.clear()
                await more.wait()
        except asyncio.CancelledError:
            for call in current:
                if call is not None:
                    self._abandon(call)
            raise
        return settle_map("task", results, return_exceptions)

    # ----------------------------------------------------------------- claims meet entries

    def _want(self, target: Target) -> None:
        entry = self.journal.finals.get(target.claim)
        self.journal.orphans.discard(target.claim)
        if type(target) is Child and (started := self.journal.children.get(target.claim)) is not None:
            self._fits(started, target)
        if entry is not None and self._fits(entry, target):
            heapq.heappush(self._heap, (entry.batch, entry.pos, entry, target))
        else:
            self._waiting[target.claim] = target
            self._starting.append(target)

    def _fits(self, entry: Entry, target: Target) -> bool:
        """Whether the recorded entry answers this call: its arguments are those of then, or its policy takes it anyway."""
        mine = getattr(target, "fingerprint", None)
        if mine is None or entry.fingerprint is None or mine == entry.fingerprint:
            return True
        diff = fingerprint_diff(entry.fingerprint, mine)
        if not diff:
            return True
        policy = target.task.options.on_changed if type(target) is Call else "error"
        if policy == "error":
            self._hold(str(ArgumentsChanged(target.claim, diff)))
        return policy == "accept"

    def _hold(self, reason: str) -> None:
        if self._ending is None:
            self._ending = Held(reason)
            self.wake()

    # ----------------------------------------------------------------- the host of a FlowLoop

    def pump(self) -> None:
        """Lets the flow take every step it can."""
        if not self.settling:
            self.loop.pump()

    def wake(self) -> None:
        self.pool.soon(self)

    def complain(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        log.error("flow.callback_failed", run=self.name, problem=context.get("message"), exc_info=error)

    def parked(self) -> bool:
        """Nothing is ready: the one place where the outside reaches the flow."""
        root = self._root
        assert root is not None
        if self._ending is not None:
            return self._unwind()
        if root.done():
            self._end(self._verdict(root))
            return True
        if self._heap:
            self._deliver()
            return True
        self.replaying = False
        if self._starting and not self.pool.draining:
            self._start_all()
        self._rest()
        return False

    def _deliver(self) -> None:
        """Hands the flow the next batch, whole, in its order."""
        batch = self._heap[0][0]
        self.seen_batch = max(self.seen_batch, batch)
        while self._heap and self._heap[0][0] == batch:
            _, _, entry, target = heapq.heappop(self._heap)
            if entry.at > self.now:
                self.now = entry.at
            self._hand(entry, target)

    def _hand(self, entry: Entry, target: Target) -> None:
        if isinstance(target, FlowTimer):
            target.fire()
        elif isinstance(target, Order):
            self._obey(entry, target)
        elif target.future is not None and not target.future.done():
            self._answer_with(entry, target, target.future)

    def _answer_with(self, entry: Entry, target: Call | Child | Emission, future: asyncio.Future[Any]) -> None:
        if entry.kind is Kind.ERROR:
            future.set_exception(decode_error(entry.error or b"{}"))
        elif type(target) is Emission:
            future.set_result((entry.value or b"").decode())
        else:
            codec = target.task.result if type(target) is Call else target.flow.result
            try:
                name, data = self.pool.blobs.fetch(entry.codec or "json", entry.value or b"null")
                future.set_result(codec.decode(name, data, allow_pickle=True, key=self.pool.secret))
            except (EventflowError, ValueError, OSError) as error:
                # What was stored no longer reads as what the code says it is: a person must look, the value stays.
                self._hold(f"{target.claim}: the recorded value cannot be read back: {error}")

    # ----------------------------------------------------------------- starting what is new

    def _start_all(self) -> None:
        starting, self._starting = self._starting, []
        for target in starting:
            if target.claim in self._waiting:
                self._start(target)

    def _start(self, target: Target) -> None:
        match target:
            case Call():
                target.attempt, target.spent, due = self.journal.attempts(target.claim)
                if due is not None and due > self.pool.clock.now():
                    self._wait_to_launch(target, due)
                else:
                    self._launch(target)
            case FlowTimer():
                self._note_start()
                target.handle = self._timer(target.due, target.claim)
            case Order():
                if target.due is not None:
                    target.handle = self._timer(target.due, target.claim)
            case Emission():
                self._start_emission(target)
            case Child():
                self._start_child(target)

    def _timer(self, due: int, claim: str) -> Any:
        return self.pool.clock.timer(self.pool.loop, due, partial(self._fired, claim))

    def _fired(self, claim: str) -> None:
        if claim in self._waiting and not self.settling:
            self._append(Entry(claim=claim, kind=Kind.TIMER))

    def _note_start(self) -> None:
        """What counts from the start, before anything was delivered, must count from the same instant after a crash."""
        if not self._started_noted and self.seen_batch == 0:
            self._started_noted = True
            self._append(Entry(claim=START, kind=Kind.NOTE, due_at=self.now))

    def _start_emission(self, target: Emission) -> None:
        ident = f"{self.name}/{target.claim}"
        arrival = self.pool.emitted(self.run, ident, target.type, target.fields)
        entry = Entry(claim=target.claim, kind=Kind.EMIT, value=ident.encode())
        self._append(entry, arrivals=(arrival,))

    def _start_child(self, target: Child) -> None:
        known = self.journal.children.get(target.claim)
        if known is None:
            child = self.pool.child(self.run, target.claim, target.flow, target.params)
            entry = Entry(claim=target.claim, kind=Kind.CHILD, value=str(child.id).encode(), fingerprint=target.fingerprint)
            self._append(entry, children=(child,))
        elif target.claim in self.journal.failures:
            self.pool.spawn(self._retry_child(int(known.value or b"0")))

    async def _retry_child(self, child: int) -> None:
        """This run was retried, and the child whose error it dropped goes again too."""
        try:
            await self.pool.store.retry(child)
        except UsageError:
            pass  # It is live already, or completed meanwhile: its answer comes by itself.

    # ----------------------------------------------------------------- attempts

    def _wait_to_launch(self, call: Call, due: int) -> None:
        call.handle = self.pool.clock.timer(self.pool.loop, due, partial(self._launch_due, call))

    def _launch_due(self, call: Call) -> None:
        if call.claim in self._waiting and not self.settling and self._ending is None:
            self._launch(call)
            self._rest()

    def _launch(self, call: Call) -> None:
        call.attempt += 1
        call.running = True
        self._working += 1
        context: Context = call.context.copy()
        context.run(self._enter_body, call)
        # Not loop.create_task: an eager task factory would run the body here, inside the flow's own step.
        call.handle = asyncio.Task(self._attempt(call), loop=self.pool.loop, context=context)

    def _enter_body(self, call: Call) -> None:
        leave_flow()
        task = call.task.name
        where.set(self._where.during(task, call.attempt))
        enter_task(TaskContext(self.name, task, call.attempt, f"{self.name}/{call.claim}", []))

    async def _attempt(self, call: Call) -> None:
        """Runs one body and records what came of it. Whatever it raises ends here."""
        me = asyncio.current_task()
        try:
            codec, data, emitted = await self._bounded(call)
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            # Around an attempt: its failure is recorded, and retried if its Retry says so. An abandoned one (cancelled by the flow,
            # by a drain, or left behind) is nobody's any more.
            if call.handle is me and self._ending is None:
                self._failed(call, error)
        else:
            if call.handle is me and self._ending is None:
                self._succeeded(call, codec, data, emitted)
        finally:
            if (here := where.get()) is not None:
                here.close()

    def _stopped_working(self, call: Call) -> None:
        if call.running:
            call.running = False
            call.handle = None
            self._working -= 1

    async def _bounded(self, call: Call) -> tuple[str, bytes, list[Any]]:
        """The body within the limits set for it: the task's concurrency, and the gate of those suspected of killing us."""
        slots = self.pool.slots(call)
        if slots is None and not self.run.suspect:
            return await self._body(call)
        async with slots or nullcontext():
            if not self.run.suspect:
                return await self._body(call)
            async with self.pool.suspects:
                await self._mark()
                return await self._body(call)

    async def _mark(self) -> None:
        """Makes the start of a suspect's attempt durable before its body: a death from here on counts against this run."""
        done: asyncio.Future[Any] = self.pool.loop.create_future()
        self.pool.store.post(Mark(self.run.id, self.run.token), done.set_result, self.pool.loop)
        if not isinstance(await asyncio.shield(done), Appended):
            raise asyncio.CancelledError("lost the lease")

    async def _body(self, call: Call) -> tuple[str, bytes, list[Any]]:
        value = await run_body(call, self.pool.clock, self.pool.threads, partial(self._deaf, call, call.attempt))
        codec, data = call.task.result.encode(value, key=self.pool.secret)
        if len(data) > LARGE:
            codec, data = await asyncio.to_thread(self.pool.blobs.offload, codec, data)
        if call.task.options.on_success:
            await self.hook(call.task.options.on_success, value)
        context = task_context()
        return codec, data, context.emitted if context else []

    def _deaf(self, call: Call, attempt: int) -> None:
        """A body did not listen when its time was up: record the timeout, leave it behind, refuse what it still returns."""
        if call.running and call.attempt == attempt and self._ending is None:
            log.error("task.abandoned", run=self.name, task=call.task.name, attempt=attempt)
            self._failed(call, TaskTimedOut(call.task.name, call.task.options.timeout or 0.0))

    def _succeeded(self, call: Call, codec: str, data: bytes, emitted: list[Any]) -> None:
        entry = Entry(
            claim=call.claim, kind=Kind.VALUE, attempt=call.attempt, fingerprint=call.fingerprint, codec=codec, value=data
        )
        arrivals = [self.pool.emitted(self.run, *fields) for fields in emitted] if emitted else ()
        self._stopped_working(call)
        self._append(entry, arrivals=arrivals)

    def _failed(self, call: Call, error: BaseException) -> None:
        self._stopped_working(call)
        options = call.task.options
        call.spent += 1
        delay = options.retries.delay_after(call.spent, error, self.pool.draw)
        log.warning(
            "task.attempt_failed", run=self.name, task=call.task.name, attempt=call.attempt, retry_in=delay,
            error=f"{type(error).__name__}: {error}",
        )  # fmt: skip
        kind = Kind.ERROR if delay is None else Kind.FAILED
        entry = Entry(
            claim=call.claim, kind=kind, attempt=call.attempt, fingerprint=call.fingerprint, error=encode_error(error)
        )
        if delay is None:
            self._run_hook(options.on_failure, error)
        else:
            self._run_hook(options.on_retry, error, delay)
            entry.due_at = self.pool.clock.now() + microseconds(delay)
        self._append(entry)
        if delay == 0:
            self._launch(call)

    async def hook(self, hook: Callable[..., Any], *args: Any) -> None:
        try:
            result = hook(*args)
            if asyncio.iscoroutine(result):
                await result
        except Exception as error:  # around an attempt's hook: it must not change what the attempt came to
            log.error("task.hook_failed", run=self.name, hook=getattr(hook, "__name__", "?"), exc_info=error)

    def _run_hook(self, hook: Callable[..., Any] | None, *args: Any) -> None:
        if hook is not None:
            self.pool.spawn(self.hook(hook, *args))

    # ----------------------------------------------------------------- recording

    def _append(self, *entries: Entry, arrivals: Iterable[Arrival] = (), children: Iterable[Run] = ()) -> None:
        self._working += 1
        run = self.run
        op = Append(run.id, run.token, entries, list(arrivals), list(children), proof=run.suspect)
        self.pool.store.post(op, self._appended, self.pool.loop)

    def _appended(self, reply: Appended | Refused | StoreError) -> None:
        self._working -= 1
        if isinstance(reply, Appended):
            self.run.suspect = False
            for entry in reply.entries:
                self.recorded(entry)
        elif not self.settling:
            self._lost(reply)

    def recorded(self, entry: Entry) -> None:
        """An entry of this run is durable (its own, or a child's answer): queue it for delivery."""
        self.journal.add(entry)
        if self.journal.count == LONG_JOURNAL:
            log.warning("journal.long", run=self.name, entries=LONG_JOURNAL)
        if entry.kind.final:
            target = self._waiting.pop(entry.claim, None)
            if target is not None:
                heapq.heappush(self._heap, (entry.batch, entry.pos, entry, target))
        elif entry.kind is Kind.FAILED and entry.due_at is not None:
            self._wait_for_retry(entry)
        self.pool.soon(self)

    def _wait_for_retry(self, entry: Entry) -> None:
        target = self._waiting.get(entry.claim)
        if type(target) is Call and target.attempt == entry.attempt and entry.due_at is not None:
            self._wait_to_launch(target, entry.due_at)

    def _abandon(self, call: Call | Child | Emission) -> None:
        """Flow code cancelled this call: nothing of it is recorded from here on."""
        if self._waiting.pop(call.claim, None) is None:
            return
        if type(call) is Call:
            if call.handle is not None:
                call.handle.cancel()
            self._stopped_working(call)
        elif type(call) is Child and self._ending is None and call.claim in self.journal.children:
            child = int(self.journal.children[call.claim].value or b"0")
            self.pool.spawn(self.pool.store.cancel(child, f"the call in {self.name} was cancelled"))

    # ----------------------------------------------------------------- orders from outside

    def arm(self, timer: FlowTimer) -> None:
        if self._ending is None:
            self._want(timer)

    def cancel(self, reason: str) -> None:
        """A door asks to cancel: recorded, then delivered in its turn."""
        if self.settling or self._ending is not None or CANCEL in self.journal.finals or CANCEL in self._waiting:
            return
        self._waiting[CANCEL] = Order(CANCEL)
        self._append(Entry(claim=CANCEL, kind=Kind.CANCEL, value=orjson.dumps(reason)))

    def _obey(self, entry: Entry, order: Order) -> None:
        root = self._root
        if root is None or root.done():
            return
        if order.claim == CANCEL:
            self._cancelled = orjson.loads(entry.value or b'""')
        else:
            self._timed_out = True
        root.cancel()
        grace = microseconds(self.flow.options.grace)
        self.pool.clock.timer(self.pool.loop, self.pool.clock.now() + grace, self._grace_is_over)

    def _grace_is_over(self) -> None:
        if not self.settling and self._ending is None:
            self._end(self._stopped())
            self.wake()

    def interrupt(self) -> None:
        """Drain: bodies under way are cancelled, nothing is recorded of them, the run goes back to pending."""
        self._stop(Interrupted())

    def abandon(self) -> None:
        """The store is gone: cancel everything, record nothing, tell nobody."""
        if not self.settling:
            self._finish_up()

    def _lost(self, reply: Refused | StoreError) -> None:
        """The lease is gone, or the store is: nothing more may be written."""
        log.warning("run.lost", run=self.name, reason=str(getattr(reply, "reason", reply)))
        self._stop(None)

    def _stop(self, outcome: Outcome | None) -> None:
        if self.settling:
            return
        if outcome is None:
            self._finish_up()
            self.pool.settled(self, Interrupted(), Refused("the lease was lost"))
        else:
            self._end(outcome)
            self.wake()

    # ----------------------------------------------------------------- waiting for long

    def _rest(self) -> None:
        """Parked with nothing to do now: idle runs give up their slot, long sleepers their memory."""
        idle = self._working == 0
        if idle is not self.is_idle:
            self.is_idle = idle
            self.pool.idle(self, idle)
        if not idle or self.loop.foreign or self._heap or self.pool.draining:
            return
        if not self._waiting or (self.journal.orphans and self._waiting.keys() <= {TIMEOUT}):
            self._stuck()
        elif len(self._waiting) <= FEW:
            self._consider_suspending()
        elif not self._checking:
            self._checking = True
            self.pool.loop.call_later(1.0, self._check_later)

    def _check_later(self) -> None:
        self._checking = False
        if not self.settling and self.is_idle and not self._heap and self._ending is None:
            self._consider_suspending()

    def _consider_suspending(self) -> None:
        due = min((d for t in self._waiting.values() if (d := self._due(t)) is not None), default=None)
        if due is None or due - self.pool.clock.now() >= SUSPEND_AFTER:
            self._end(Suspended(due, self.seen_batch))
            self.wake()

    def _due(self, target: Target) -> int | None:
        match target:
            case FlowTimer() | Order():
                return target.due
            case Call():
                return self.journal.attempts(target.claim)[2]
            case _:
                return None

    def _stuck(self) -> None:
        orphans = sorted(self.journal.orphans)
        if orphans:
            shown = ", ".join(orphans[:5]) + (" …" if len(orphans) > 5 else "")
            self._hold(f"diverged: the flow no longer makes the recorded calls {shown}; deploy the code that made them, or retry afresh")
        else:
            self._hold("the flow waits for something that no task, sleep or child run of it will bring about")

    # ----------------------------------------------------------------- settling

    def _end(self, outcome: Outcome) -> None:
        if self._ending is None:
            self._ending = outcome

    def _verdict(self, root: FlowTask) -> Outcome:
        """What the flow's own end means."""
        if root.cancelled():
            return self._stopped()
        error = root.exception()
        if error is not None:
            return Failed(encode_error(error))
        try:
            codec, data = self.flow.result.encode(root.result())
            if len(data) > LARGE:
                codec, data = self.pool.blobs.offload(codec, data)
        except EventflowError as unfit:
            return Failed(encode_error(unfit))
        return Completed(data, codec, len(self.journal.orphans))

    def _stopped(self) -> Outcome:
        if self._timed_out:
            return Failed(encode_error(RunTimedOut(self.flow.name, self.flow.options.timeout or 0.0)))
        return Cancelled(self._cancelled or "the flow cancelled itself")

    def _unwind(self) -> bool:
        """Cancels what is left of the flow, a few times, then closes it; then settles. Journaled calls re-raise meanwhile."""
        left = [task for task in self.loop.tasks if not task.done()]
        if left and self._unwound < 3:
            self._unwound += 1
            for task in left:
                task.cancel()
            return True
        outcome = self._ending
        assert outcome is not None
        self._settle(outcome)
        return False

    def _settle(self, outcome: Outcome) -> None:
        self._finish_up()
        run = self.run
        op = Settle(run.id, run.token, outcome, self._parents_entry(outcome), run.parent)
        self.pool.store.post(op, partial(self.pool.settled, self, outcome), self.pool.loop)

    def _finish_up(self) -> None:
        """Nothing more is taken in: bodies are cancelled, timers disarmed, the loop closed."""
        self.settling = True
        for target in self._waiting.values():
            if (handle := getattr(target, "handle", None)) is not None:
                handle.cancel()
        self._waiting.clear()
        self._starting.clear()
        self._heap.clear()
        self.loop.close()
        self._where.close()
        if self.is_idle:
            self.is_idle = False
            self.pool.idle(self, False)

    def _parents_entry(self, outcome: Outcome) -> Entry | None:
        run = self.run
        if run.parent is None or run.parent_claim is None:
            return None
        match outcome:
            case Completed():
                return Entry(claim=run.parent_claim, kind=Kind.VALUE, attempt=run.token, codec=outcome.codec, value=outcome.value)
            case Failed():
                return Entry(claim=run.parent_claim, kind=Kind.ERROR, attempt=run.token, error=outcome.error)
            case Cancelled():
                error = encode_error(RunCancelled(f"child run {self.name} was cancelled: {outcome.reason}"))
                return Entry(claim=run.parent_claim, kind=Kind.ERROR, attempt=run.token, error=error)
            case _:
                return None
