"""The worker: takes due runs, gives each an Execution, bounds how many work at once, and drains.

New runs are handed over in memory by the store's writer (`reserve`, `receive_runs`) and are never
read back; runs that did not fit in memory, that fell due, or that an earlier process left are
claimed (claimer.py). A run whose every branch waits holds no slot, so that parents which wait for
children cannot deadlock. Flows take turns (limits.py). Everything except `reserve`
and `release` runs on the worker's loop. An outcome is recorded by the store and then followed up by
outcomes.py.
"""

import asyncio
import random
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any

import msgspec

from eventflow.core.clock import Clock
from eventflow.core.errors import StoreError, error_line
from eventflow.core.threads import DaemonThreads
from eventflow.engine.claimer import Claimer
from eventflow.engine.durations import Durations
from eventflow.engine.execution import Execution
from eventflow.engine.limits import RunQueues, WorkerLimits
from eventflow.engine.outcomes import Outcomes
from eventflow.engine.run_end import answer_to_parent
from eventflow.engine.run_parts import RunningCall
from eventflow.engine.worker_services import DerivedWork, WorkerServices
from eventflow.logs.log import LogReceiver, get_logger
from eventflow.routing.router import Router
from eventflow.runs.journal import Entry, Journal
from eventflow.runs.run import (
    Cancelled,
    Completed,
    Interrupted,
    NeedsAttention,
    Outcome,
    Retried,
    Run,
    Suspended,
    format_id,
)
from eventflow.sdk.checkpoint import CheckpointStore
from eventflow.sdk.flow import Flow, referenced_flows
from eventflow.serialization.blobs import Blobs
from eventflow.store.protocol import Fenced, Settle, Settled, Store

NO_CANCELS: Mapping[int, str] = MappingProxyType({})

START_BATCH_SIZE = 100
"""Runs started before the loop may do something else."""

QUARANTINE_RETRY_DELAY = 3.0
"""Seconds the process must have lived before it retries a run that is one crash from quarantine:
longer than the lives of a process that is killed repeatedly, well within the 10 s in which
everything in flight resumes.
"""

UNWIND_TIMEOUT = 2.0
"""Seconds that interrupted runs get at the end of a drain."""

log = get_logger("eventflow.worker")
LOG_EVENTS = {
    "run.resumed": (
        "A waiting or interrupted run continues; `entries` counts its journal entries. "
        "`suspect`: it was running when the process crashed."
    ),
}


class WorkerOptions(msgspec.Struct, frozen=True):
    """`concurrency` bounds the runs that work at once, `max_in_memory` those held in memory
    (working, waiting for a slot, or in a short sleep); the rest waits in the store. `threads`
    bounds plain `def` task bodies. `secret` signs pickled values; `strict`: a run whose flow forgot
    to await a call fails; `seed` is that of the retries' jitter.
    """

    concurrency: int = 1000
    max_in_memory: int = 20_000
    threads: int = 32
    logs: LogReceiver | None = None
    secret: bytes = b""
    strict: bool = False
    seed: int | None = None


class Worker:
    """The one worker of a process. Call `start` and `drain` on the loop that flows run on."""

    loop: asyncio.AbstractEventLoop

    def __init__(
        self,
        store: Store,
        clock: Clock,
        router: Router,
        flows: dict[str, Flow[..., Any]],
        blobs: Blobs,
        checkpoints: CheckpointStore,
        options: WorkerOptions | None = None,
    ) -> None:
        options = options or WorkerOptions()
        self._services = WorkerServices(
            store=store,
            clock=clock,
            derived=DerivedWork(router, clock, flows),
            blobs=blobs,
            checkpoints=checkpoints,
            limits=WorkerLimits(options.concurrency, options.max_in_memory),
            threads=DaemonThreads(options.threads, "eventflow-task"),
            rng=random.Random(options.seed),
            secret=options.secret,
            strict=options.strict,
            logs=options.logs,
        )
        self._limits = self._services.limits
        self._limits.slots.on_release = self._begin_soon
        self._flows = flows
        self.executions: dict[int, Execution] = {}
        self._queues = RunQueues(self._limits.flow_slots.taken)
        self._claimer = Claimer(self._services, flows, self.receive_runs)
        self._limits.flow_slots.on_free = self._claimer.claim_due
        # Runs whose journals are being read, with the answers of children that arrive meanwhile.
        self._loading: dict[int, tuple[Run, list[Entry]]] = {}
        self.outcomes = Outcomes(self._services)
        self.stall_reason = ""
        """Which loop or thread of the process stands still; set by the server's watchdog."""
        self.pause_reason = ""
        """Why no run is started; empty while runs are started."""
        self.is_taking = False
        self._begin_is_scheduled = False
        self._has_settled = asyncio.Event()

    # ----------------------------------------------------------------- life

    def start(self, state: Any = None) -> None:
        """Begins to take runs. `state` is what the App's lifespan yielded."""
        services = self._services
        self.loop = asyncio.get_running_loop()
        services.start(self.loop)
        services.state = state
        self._limits.suspects.exclusive_from = self.loop.time() + QUARANTINE_RETRY_DELAY
        for flow in list(self._flows.values()):
            for child in referenced_flows(flow):
                self._flows.setdefault(child.name, child)
        self.is_taking = True
        services.store.attach_worker(self)
        self._claimer.claim_due()

    async def drain(self, grace: float) -> None:
        """Takes nothing new, lets running bodies end for up to `grace` seconds, then interrupts
        what is left.

        Interrupted runs go back to pending as they were. Returns when every run has left memory.
        """
        services = self._services
        self.is_taking = False
        services.draining = True
        services.store.attach_worker(None)
        for run in self._queues.clear():
            self._put_back(run)
        for execution in list(self.executions.values()):
            if execution.suspension.is_idle:
                execution.end_run(Interrupted())
        await self._wait_empty(grace)
        for execution in list(self.executions.values()):
            execution.end_run(Interrupted())
        await self._wait_empty(UNWIND_TIMEOUT)
        await self.end()

    async def _wait_empty(self, timeout: float) -> None:
        with suppress(TimeoutError):  # the caller decides what happens to the runs that are left
            async with asyncio.timeout(timeout):
                while self.executions and self._services.store.failed is None:
                    self._has_settled.clear()
                    await self._has_settled.wait()

    def abandon(self) -> None:
        """The store failed: bodies are cancelled, nothing is recorded."""
        self.is_taking = False
        self._services.draining = True
        for execution in list(self.executions.values()):
            execution.close()
        self._has_settled.set()

    async def end(self) -> None:
        """The last step, after `drain` or `abandon`: ends what user code left running."""
        services = self._services
        self._claimer.close()
        for task in list(services.owned_tasks):
            task.cancel()
        services.threads.close()
        await services.end_bodies()
        services.close()

    def set_pause_reason(self, reason: str) -> None:
        """While there is a reason no run is taken, claimed or started. Those that work continue;
        those that wait leave memory.
        """
        if bool(reason) != bool(self.pause_reason):
            self._limits.capacity.set_blocked(bool(reason))
        self.pause_reason = reason
        if not reason and not self._services.draining:
            self._claimer.claim_due()
            self._begin_some()

    # ----------------------------------------------------------------- runs from the store
    # (store.protocol.RunReceiver)

    def reserve(self, runs: Sequence[Run]) -> Sequence[Run]:
        """Returns those of the runs being recorded that go straight to memory. Writer thread."""
        if not self.is_taking or self._claimer.has_backlog:
            return ()
        names = {run.flow for run in runs}
        unlimited = {
            name
            for name in names
            if (flow := self._flows.get(name)) is not None and flow.options.concurrency is None
        }
        if unlimited < names:
            runs = [run for run in runs if run.flow in unlimited]
        return runs[: self._limits.capacity.reserve_some(len(runs))]

    def release(self, runs: Sequence[Run]) -> None:
        """The commit of reserved runs failed. Writer thread."""
        self._limits.capacity.release(len(runs))

    def receive_runs(
        self, runs: Sequence[Run], has_due: bool = False, cancels: Mapping[int, str] = NO_CANCELS
    ) -> None:
        """Runs to start, whether the store has more due runs, and runs to cancel: id to reason."""
        if self._services.draining:
            for run in runs:
                self._put_back(run)
            return
        for run in runs:
            self._queues.add(run)
        for ident, reason in cancels.items():
            self._cancel(ident, reason)
        if has_due:
            self._claimer.claim_due()
        self._begin_some()

    def receive_answers(self, answers: Sequence[tuple[int, Entry]]) -> None:
        """Children settled: `(parent, entry)`."""
        for parent, entry in answers:
            if (execution := self.executions.get(parent)) is not None:
                execution.guarded(execution.on_durable, entry)
            elif parent in self._loading:
                self._loading[parent][1].append(entry)

    def _cancel(self, ident: int, reason: str) -> None:
        if (execution := self.executions.get(ident)) is not None:
            execution.cancel(reason)
            return
        run = self._loading[ident][0] if ident in self._loading else self._queues.find(ident)
        if run is not None:
            run.cancel_requested = True
            run.cancel_reason = reason

    # ----------------------------------------------------------------- starting

    def _begin_some(self, scheduled: bool = False) -> None:
        """Starts queued runs while there are slots. `scheduled`: called by `_begin_soon`."""
        if self._begin_is_scheduled and not scheduled:
            return
        self._begin_is_scheduled = False
        for _ in range(START_BATCH_SIZE):
            if self.pause_reason or not self._limits.slots.is_free:
                return
            if (run := self._queues.pop()) is None:
                return
            self._limits.slots.working += 1
            if run.token == 1 and not run.crash_suspect and run.mode is None:
                self._execute(run, ())
            else:
                self._services.spawn(self._load(run))
        self._begin_soon()

    def _begin_soon(self) -> None:
        if self._queues.turns and not self._begin_is_scheduled:
            self._begin_is_scheduled = True
            self.loop.call_soon(self._begin_some, True)

    async def _load(self, run: Run) -> None:
        """Reads the run's journal, and the events of a run that has several."""
        self._loading[run.id] = (run, [])
        store = self._services.store
        try:
            entries = await store.load(run.id) if run.token > 1 or run.crash_suspect else ()
            if run.mode is not None:
                run.payloads = await store.payloads(run.id)
        except Exception as fault:  # around a run: whatever keeps it from starting settles it
            del self._loading[run.id]
            if store.failed is None:
                self._end(run, NeedsAttention(f"what is stored of it cannot be read: {fault}"))
            return
        except asyncio.CancelledError:  # by code of the app that cancels every task of the loop
            del self._loading[run.id]
            self._end(run, Interrupted())
            raise
        if entries or run.token > 1:
            log.info(
                "run.resumed",
                run=format_id(run.id),
                flow=run.flow,
                entries=len(entries),
                **({"suspect": True} if run.crash_suspect else {}),
            )
        self.loop.call_soon(self._execute, run, entries)

    def _execute(self, run: Run, entries: Iterable[Entry]) -> None:
        _, answers = self._loading.pop(run.id, (run, ()))
        if self._services.draining:
            self._limits.slots.release()
            self._put_back(run)
            return
        flow = self._flows.get(run.flow)
        if flow is None and run.cancel_requested:
            self._end(run, Cancelled(run.cancel_reason or "cancel requested"))
            return
        if flow is None:
            reason = (
                f"the app has no flow named {run.flow!r}; deploy the code that has it, or"
                " app.add(it), then retry the run"
            )
            self._end(run, NeedsAttention(reason))
            return
        journal = Journal(entries) if entries or run.token > 1 or run.crash_suspect else None
        try:
            execution = Execution(self._services, run, flow, journal, self._on_settled)
        except BaseException as fault:  # of this run: the others continue
            self._end(run, NeedsAttention(f"it cannot be started: {error_line(fault)}"))
            return
        self.executions[run.id] = execution
        execution.guarded(execution.begin)
        for entry in answers:
            execution.guarded(execution.on_durable, entry)

    def _put_back(self, run: Run) -> None:
        """A run that was not started goes back to pending."""
        op = Settle(run.id, run.token, Interrupted())
        self._services.posts.post(op, lambda _: None)

    def _end(self, run: Run, outcome: Outcome) -> None:
        """Settles a run that has no Execution."""
        if isinstance(outcome, NeedsAttention):
            log.error("run.held", run=format_id(run.id), flow=run.flow, reason=outcome.reason)
        to_parent = answer_to_parent(run, format_id(run.id), outcome)
        op = Settle(run.id, run.token, outcome, to_parent, run.parent)

        def on_ended(_reply: object) -> None:
            if not isinstance(outcome, Interrupted):
                self.outcomes.notify(run.id, outcome)

        self._services.posts.post(op, on_ended)
        self._limits.flow_slots.taken[run.flow] -= 1
        self._limits.capacity.release()
        self.loop.call_soon(self._claimer.claim_due)
        self._limits.slots.release()

    # ----------------------------------------------------------------- the end of an execution

    def _on_settled(
        self, execution: Execution, outcome: Outcome, reply: Settled | Fenced | StoreError
    ) -> None:
        run = execution.run
        services = self._services
        self.executions.pop(run.id, None)
        self._limits.slots.committing -= 1
        if execution.has_flow_slot:
            self._limits.flow_slots.release(run.flow, execution.flow.options.concurrency)
        self._limits.capacity.release()
        # First of all: the last log line must not be tagged as a replay.
        execution.detach()
        if isinstance(reply, Settled):
            self.outcomes.on_settled(execution, outcome, reply.at)
            if services.checkpoints.is_used and isinstance(outcome, Completed):
                services.forget_checkpoints(execution.run_id)
        if not self.executions:
            self._has_settled.set()
        if services.draining:
            return
        if self._claimer.has_backlog:
            self._claimer.claim()
        elif isinstance(outcome, Suspended | Retried):
            self._claimer.claim_due()
        self._begin_soon()

    # ----------------------------------------------------------------- status

    @property
    def is_idle(self) -> bool:
        """Whether nothing happens until time passes or something arrives: no run works or is about
        to. On this worker's loop.
        """
        slots = self._limits.slots
        services = self._services
        return not (
            slots.working
            or slots.committing
            or self._claimer.is_claiming
            or self._begin_is_scheduled
            or not services.next_turn.is_empty
            or not services.posts.is_empty
            or services.owned_tasks
            or services.abandoned
            or self._queues.turns
            or any(each.loop.unjournaled_awaits for each in self.executions.values())
        )

    def running_calls(self, run: int) -> list[RunningCall]:
        """The attempts of a run that execute now. From any thread."""
        execution = self.executions.get(run)
        return [] if execution is None else execution.running_calls()

    @property
    def threads(self) -> DaemonThreads:
        """Those of plain task bodies."""
        return self._services.threads

    @property
    def durations(self) -> tuple[Durations, Durations]:
        """Of runs by flow, and of attempts by task."""
        return self._services.run_durations, self._services.task_durations

    @property
    def load(self) -> dict[str, int]:
        """How many runs work, are in memory, and wait there for a slot."""
        queued = len(self._queues)
        return {
            "working": self._limits.slots.working,
            "in_memory": len(self.executions) + queued,
            "queued": queued,
        }
