"""The way through: claims due runs, gives each an Execution, bounds how many work at once, and drains.

Fresh runs come by hand from the store's writer (`take`, `ready`) and are never read back; what did not fit in memory, what fell
due, and what another life left behind comes by `Claim`. Slots count runs that work: one whose every branch waits holds none, so
parents waiting on children cannot deadlock, and neither does one whose outcome is on its way to the disk. Flows take turns.
Everything but `take` and `put_back` runs on the worker's loop. The next room is the executor; outcomes leave through the store.
"""

import asyncio
import random
import threading
from collections import deque
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from eventflow.core.clock import Clock
from eventflow.core.errors import StoreCorrupt, StoreError
from eventflow.engine.execution import Execution
from eventflow.engine.outcomes import Outcomes
from eventflow.engine.worker_services import CrashSuspectGate
from eventflow.events.event import Event
from eventflow.logs.log import Sink, get_logger
from eventflow.routing.router import Router
from eventflow.runs.journal import Entry, Journal
from eventflow.runs.run import Completed, Held, Interrupted, Outcome, Run, Suspended, format_id
from eventflow.sdk.checkpoint import CheckpointStore
from eventflow.sdk.flow import Flow, referenced_flows
from eventflow.sdk.task import TaskCall
from eventflow.serialization.blobs import Blobs
from eventflow.store.protocol import Arrival, Claim, Claimed, Refused, Settle, Settled, Store

CLAIM = 500
"""Runs asked for in one claim: enough to share a commit, few enough to stay fair."""
BEGIN = 100
"""Runs begun before the loop may do something else."""
SUSPECTS = 4
"""Suspects of a crash whose attempts run at once."""
CALM = 3.0
"""Seconds the process must have lived before a run that is one death from quarantine is tried again: longer than the lives of
a process that somebody keeps killing, well within the 10 s in which everything in flight goes on."""
UNBOUNDED = 1 << 30

log = get_logger("eventflow.worker")


class Worker:
    """The one worker of a process. `start` it on the loop it is to live on; `drain` it there too.

    `concurrency` bounds the runs that work at once, `window` those held in memory (working, waiting for a slot, or in a short
    sleep); the rest waits in the ledger. `threads` bounds plain `def` task bodies.
    """

    def __init__(
        self, store: Store, clock: Clock, router: Router, flows: dict[str, Flow[..., Any]], blobs: Blobs,
        checkpoints: CheckpointStore, *, concurrency: int = 1000, window: int = 20_000, threads: int = 32, sink: Sink | None = None,
        secret: bytes = b"", seed: int | None = None,
    ) -> None:  # fmt: skip
        self.store, self.clock, self.router, self.blobs, self.checkpoints = (
            store,
            clock,
            router,
            blobs,
            checkpoints,
        )
        self.flows: Mapping[str, Flow[..., Any]] = flows
        self._flows = flows
        self.rng = random.Random(seed)
        self.threads = ThreadPoolExecutor(threads, thread_name_prefix="eventflow-task")
        self.state: Any = None
        self.sink, self.secret = sink, secret
        self.draining = self._taking = False
        self.pause_reason = ""  # why nothing new is begun
        self.executions: dict[int, Execution] = {}
        self._concurrency = concurrency
        self._lock = threading.Lock()
        self._room = window  # what may still be taken into memory; the writer thread takes, this loop gives back
        self._backlog = True  # the ledger holds due runs that are not in memory
        self._queues: dict[str, deque[Run]] = {}
        self._turns: deque[str] = deque()
        self._busy = self._ending = (
            0  # runs that work; runs whose outcome is on its way to the disk
        )
        self._in_memory: dict[str, int] = {}
        self._resuming: dict[
            int, tuple[Run, list[Entry]]
        ] = {}  # their journals are being read; what is answered meanwhile
        self._claiming = self._asked_meanwhile = self._beginning = False
        self._due_timer: Any = None
        self._dirty: list[Execution] = []
        self._limits: dict[str, asyncio.Semaphore] = {}
        self._owned: set[asyncio.Task[Any]] = set()
        self.outcomes = Outcomes(self.spawn)
        self._empty = asyncio.Event()

    # ----------------------------------------------------------------- life

    def start(self, state: Any = None) -> None:
        """Begins taking runs. Call on the loop that flows are to run on."""
        self.loop = asyncio.get_running_loop()
        self.suspects = CrashSuspectGate(SUSPECTS, self.loop.time() + CALM)
        self.state = state
        for flow in list(self._flows.values()):
            for child in referenced_flows(flow):
                self._flows.setdefault(child.name, child)
        self._taking = True
        self._backlog = True
        self.store.attach(self)
        self._claim()

    async def drain(self, grace: float) -> None:
        """Takes nothing new, lets bodies under way end for up to `grace` seconds, then interrupts what is left.

        Interrupted runs go back to pending as they were. Returns when every run has left memory.
        """
        self._taking, self.draining = False, True
        self.store.attach(None)
        self._return_unbegun()
        for execution in list(self.executions.values()):
            if execution.is_idle:
                execution.interrupt()
        await self._wait_empty(grace)
        for execution in list(self.executions.values()):
            execution.interrupt()
        await self._wait_empty(2.0)
        if self._due_timer is not None:
            self._due_timer.cancel()
        for task in list(self._owned):
            task.cancel()
        self.threads.shutdown(wait=False, cancel_futures=True)

    async def _wait_empty(self, limit: float) -> None:
        with suppress(TimeoutError):  # the caller decides what happens to those that did not end
            async with asyncio.timeout(limit):
                while self.executions and self.store.failed is None:
                    self._empty.clear()
                    await self._empty.wait()

    def _return_unbegun(self) -> None:
        for queue in self._queues.values():
            for run in queue:
                self.store.post(Settle(run.id, run.token, Interrupted()), lambda _: None, self.loop)
            queue.clear()

    def abandon(self) -> None:
        """The store failed: nothing can be written any more. Bodies are cancelled, nothing is recorded."""
        self._taking, self.draining = False, True
        for execution in list(self.executions.values()):
            execution.abandon()
        self._empty.set()

    # ----------------------------------------------------------------- hand-over (store.base.Handover)

    def take(self, run: Run) -> bool:
        """Whether a run just recorded goes straight to memory. Writer thread."""
        flow = self.flows.get(run.flow)
        if (
            not self._taking
            or self._backlog
            or flow is None
            or flow.options.concurrency is not None
        ):
            return False
        with self._lock:
            if self._room <= 0:
                return False
            self._room -= 1
        return True

    def put_back(self, runs: Sequence[Run]) -> None:
        """The commit failed. Writer thread."""
        self._give_room(len(runs))

    def ready(self, runs: Sequence[Run], more: bool, cancels: Sequence[int]) -> None:
        """Runs to begin, news that the ledger holds more, and runs that a door asked to cancel."""
        if self.draining:
            for run in runs:
                self.store.post(Settle(run.id, run.token, Interrupted()), lambda _: None, self.loop)
            return
        for run in runs:
            self._enqueue(run)
        for ident in cancels:
            self._cancel(ident)
        if more:
            self._backlog = True
            self._claim()
        self._begin_some()

    def answered(self, answers: Sequence[tuple[int, Entry]]) -> None:
        """Children settled: parents in memory hear of it."""
        for parent, entry in answers:
            if (execution := self.executions.get(parent)) is not None:
                execution.recorded(entry)
            elif parent in self._resuming:
                self._resuming[parent][1].append(entry)

    def _cancel(self, ident: int) -> None:
        execution = self.executions.get(ident)
        if execution is not None:
            execution.cancel("cancel requested")
            return
        if ident in self._resuming:
            self._resuming[ident][0].cancel_requested = True
            return
        for queue in self._queues.values():
            for run in queue:
                if run.id == ident:
                    run.cancel_requested = True

    def _give_room(self, count: int) -> None:
        with self._lock:
            self._room += count

    def set_pause_reason(self, reason: str) -> None:
        """Takes, claims and begins nothing while there is a reason: no room is left. What works goes on, who waits leaves."""
        if bool(reason) != bool(self.pause_reason):
            self._give_room(-UNBOUNDED if reason else UNBOUNDED)
        self.pause_reason = reason
        if not reason and not self.draining:
            self._due()
            self._begin_some()

    # ----------------------------------------------------------------- claiming

    def _claim(self) -> None:
        """Asks the ledger for due runs, when there may be some and there is room for them."""
        self._asked_meanwhile = self._claiming
        if self._claiming or self.draining or not self._backlog:
            return
        limit = min(self._room, CLAIM)
        if limit < min(CLAIM // 4, 1 + self._room):
            return
        with self._lock:
            self._room -= limit
        self._claiming = True
        caps = {name: self._cap(flow) for name, flow in self.flows.items()}
        self.store.post(Claim(limit, caps), lambda reply: self._claimed(limit, reply), self.loop)

    def _cap(self, flow: Flow[..., Any]) -> int:
        bound = flow.options.concurrency
        return UNBOUNDED if bound is None else max(0, bound - self._in_memory.get(flow.name, 0))

    def _claimed(self, limit: int, reply: Claimed | StoreError) -> None:
        self._claiming = False
        if isinstance(reply, StoreError):
            return
        self._give_room(limit - len(reply.runs))
        self._backlog = reply.more
        for run in reply.runs:
            self._enqueue(run)
        self._wake_when_due(reply.next_due)
        if (
            reply.runs or self._asked_meanwhile
        ):  # a run that settled meanwhile may have made room below its flow's cap
            self._begin_some()
            self._claim()

    def _wake_when_due(self, due: int | None) -> None:
        if self._due_timer is not None:
            self._due_timer.cancel()
            self._due_timer = None
        if due is not None:
            self._due_timer = self.clock.timer(self.loop, due, self._due)

    def _due(self) -> None:
        self._backlog = True
        self._claim()

    # ----------------------------------------------------------------- beginning

    def _enqueue(self, run: Run) -> None:
        queue = self._queues.get(run.flow)
        if queue is None:
            queue = self._queues[run.flow] = deque()
        if not queue:
            self._turns.append(run.flow)
        queue.append(run)
        self._in_memory[run.flow] = self._in_memory.get(run.flow, 0) + 1

    def _begin_some(self) -> None:
        """Begins queued runs while there are slots, one per flow in turn."""
        if self._beginning:
            return
        begun, turns = 0, self._turns
        while turns and self._has_slot():
            if begun == BEGIN:
                self._begin_soon()
                return
            flow = turns.popleft()
            queue = self._queues[flow]
            if not queue:
                continue
            run = queue.popleft()
            if queue:
                turns.append(flow)
            self._begin(run)
            begun += 1

    def _has_slot(self) -> bool:
        """Besides those that work as many again may wait for their commit: on a disk that hangs memory stays bounded."""
        return not self.pause_reason and self._busy < min(
            self._concurrency, 2 * self._concurrency - self._ending
        )

    def _begin_soon(self) -> None:
        if self._turns and not self._beginning:
            self._beginning = True
            self.loop.call_soon(self._begin_more)

    def _begin_more(self) -> None:
        self._beginning = False
        self._begin_some()

    def _begin(self, run: Run) -> None:
        self._busy += 1
        if run.token == 1 and not run.suspect and run.mode is None:
            self._execute(run, Journal())
        else:
            self.spawn(self._resume(run))

    async def _resume(self, run: Run) -> None:
        self._resuming[run.id] = (run, [])
        try:
            entries = await self.store.load(run.id) if run.token > 1 or run.suspect else ()
            if run.mode is not None:
                run.bodies = await self.store.bodies(run.id)
        except StoreCorrupt as damage:
            del self._resuming[run.id]
            self._hold(run, f"what is stored of it cannot be read: {damage}")
            return
        if entries or run.token > 1:
            log.info(
                "run.resumed",
                run=format_id(run.id),
                flow=run.flow,
                entries=len(entries),
                suspect=run.suspect,
            )
        self.loop.call_soon(self._execute, run, Journal(entries))

    def _execute(self, run: Run, journal: Journal) -> None:
        _, late = self._resuming.pop(run.id, (run, ()))
        if self.draining:
            self._busy -= 1
            self.store.post(Settle(run.id, run.token, Interrupted()), lambda _: None, self.loop)
            return
        flow = self.flows.get(run.flow)
        if flow is None:
            missing = f"the app has no flow named {run.flow!r}"
            self._hold(
                run, f"{missing}; deploy the code that has it, or app.add(it), then retry the run"
            )
            return
        execution = Execution(self, run, flow, journal)
        self.executions[run.id] = execution
        execution.begin()
        for entry in late:
            execution.recorded(entry)

    def _hold(self, run: Run, reason: str) -> None:
        """A run that cannot be begun: a person must look."""
        held = Held(reason)
        log.error("run.held", run=format_id(run.id), flow=run.flow, reason=reason)
        self.store.post(
            Settle(run.id, run.token, held), lambda _: self.outcomes.notify(run.id, held), self.loop
        )
        self._busy -= 1
        self._in_memory[run.flow] -= 1
        self._give_room(1)
        self.loop.call_soon(self._due)
        self._begin_soon()

    # ----------------------------------------------------------------- what executions ask (executor.Pool)

    def soon(self, execution: Execution) -> None:
        """Pumps it in the next turn of the loop: by then every reply of the batch under way has been given."""
        if execution.dirty:
            return
        execution.dirty = True
        if not self._dirty:
            self.loop.call_soon(self._pump_dirty)
        self._dirty.append(execution)

    def _pump_dirty(self) -> None:
        dirty, self._dirty = self._dirty, []
        for execution in dirty:
            execution.dirty = False
            execution.pump()

    def idle(self, execution: Execution, idle: bool) -> None:
        if idle:
            self._busy -= 1
            if self.draining:
                execution.interrupt()
            else:
                self._begin_soon()
        else:
            self._busy += 1

    def ending(self, execution: Execution) -> None:
        self._ending += 1
        if not execution.is_idle:
            self.idle(execution, True)

    def slots(self, call: TaskCall) -> asyncio.Semaphore | None:
        bound = call.task.options.concurrency
        if bound is None:
            return None
        return self._limits.setdefault(call.task.name, asyncio.Semaphore(bound))

    def emitted(self, run: Run, ident: str, event_type: str, fields: dict[str, Any]) -> Arrival:
        extensions = {
            **fields["extensions"],
            "eventflowdepth": run.depth + 1,
            "eventflowcause": format_id(run.id),
        }
        return self.router.route_emitted(
            Event(id=ident, source=f"/flows/{run.flow}", type=event_type, data=fields["data"], subject=fields["subject"],
                  extensions=extensions)
        )  # fmt: skip

    def child(self, run: Run, claim: str, flow: Flow[..., Any], params: bytes) -> Run:
        now = self.clock.now()
        self._flows.setdefault(flow.name, flow)
        return Run(
            id=self.router.ids.next(now), flow=flow.name, created_at=now, due_at=now, parent=run.id, parent_claim=claim,
            depth=run.depth, params=params, priority=flow.priority,
        )  # fmt: skip

    def forget(self, run: str, claim: str | None = None) -> None:
        if (remove := self.checkpoints.forget(run, claim)) is not None:
            self.loop.run_in_executor(None, remove)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = self.loop.create_task(work)
        self._owned.add(task)
        task.add_done_callback(self._disown)

    def _disown(self, task: asyncio.Task[Any]) -> None:
        self._owned.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("worker.task_failed", exc_info=error)

    # ----------------------------------------------------------------- settling

    def settled(
        self, execution: Execution, outcome: Outcome, reply: Settled | Refused | StoreError
    ) -> None:
        run = execution.run
        self.executions.pop(run.id, None)
        self._ending -= 1
        self._in_memory[run.flow] -= 1
        self._give_room(1)
        execution.part()  # first: a run that is at rest replays no more, and its last line must not say so
        if isinstance(reply, Settled):
            self.outcomes.on_settled(execution, outcome, reply.at)
            if self.checkpoints.used and isinstance(outcome, Completed):
                self.forget(execution.name)
        if not self.executions:
            self._empty.set()
        if self.draining:
            return
        if self._backlog:
            self._claim()
        elif self.flows[run.flow].options.concurrency is not None or isinstance(outcome, Suspended):
            self._due()
        self._begin_soon()

    @property
    def memory_is_tight(self) -> bool:
        """Memory is nearly full: who only waits should leave it."""
        return self._room < CLAIM

    @property
    def is_idle(self) -> bool:
        """Nothing goes on until time passes or something arrives: no run works or is about to. On this worker's loop."""
        busy = (
            self._busy
            or self._ending
            or self._claiming
            or self._beginning
            or self._dirty
            or self._owned
        )
        return not (
            busy
            or any(self._queues.values())
            or any(each.loop.unjournaled_awaits for each in self.executions.values())
        )

    @property
    def load(self) -> dict[str, int]:
        """How many runs work, sit in memory, and wait for a slot there."""
        waiting = sum(len(queue) for queue in self._queues.values())
        return {
            "working": self._busy,
            "in_memory": len(self.executions) + waiting,
            "queued": waiting,
        }
