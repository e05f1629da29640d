"""What the executions of one worker share: loop, clock, store, threads, limits, large values.

`Worker` makes one `WorkerServices` and hands it to each `Execution`. Everything is used on the
worker's loop.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any

from eventflow.core.clock import Clock
from eventflow.engine.limits import WorkerLimits
from eventflow.events.event import Event
from eventflow.logs.log import LogSink, get_logger
from eventflow.routing.router import Router
from eventflow.runs.journal import Entry
from eventflow.runs.run import Run, format_id
from eventflow.sdk.checkpoint import CheckpointStore
from eventflow.sdk.flow import Flow
from eventflow.serialization.blobs import Blobs
from eventflow.store.protocol import Arrival, Store

log = get_logger("eventflow.worker")
LOG_EVENTS = {
    "worker.task_failed": (
        "A background task of the worker failed; this is a defect in eventflow."
    ),
}


class DerivedWork:
    """Makes what a run causes: events and child runs. `flows` are those the app knows, by name."""

    def __init__(self, router: Router, clock: Clock, flows: dict[str, Flow[..., Any]]) -> None:
        self._router = router
        self._clock = clock
        self.flows = flows

    def event(self, run: Run, ident: str, event_type: str, fields: dict[str, Any]) -> Arrival:
        """An event emitted by `run`, matched and ready to record.

        Raises NotStorable, or UsageError where the chain of events is too long.
        """
        extensions = {
            **fields["extensions"],
            "eventflowdepth": run.depth + 1,
            "eventflowcause": format_id(run.id),
        }
        event = Event(
            id=ident,
            source=f"/flows/{run.flow}",
            type=event_type,
            data=fields["data"],
            subject=fields["subject"],
            extensions=extensions,
        )
        return self._router.route_emitted(event)

    def child_run(self, run: Run, call_key: str, flow: Flow[..., Any], params: bytes) -> Run:
        """A run of `flow` whose result answers the call `call_key` of `run`."""
        now = self._clock.now()
        self.flows.setdefault(flow.name, flow)
        return Run(
            id=self._router.ids.next(now),
            flow=flow.name,
            created_at=now,
            due_at=now,
            parent=run.id,
            parent_call_key=call_key,
            depth=run.depth,
            params=params,
            priority=flow.priority,
        )


class NextTurn:
    """Calls to make in the next turn of a loop, each once however often it is scheduled."""

    __slots__ = ("_calls", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._calls: dict[Callable[[], None], None] = {}

    def schedule(self, call: Callable[[], None]) -> None:
        if not self._calls:
            self._loop.call_soon(self._run)
        self._calls[call] = None

    @property
    def is_empty(self) -> bool:
        return not self._calls

    def _run(self) -> None:
        calls = self._calls
        self._calls = {}
        for call in calls:
            call()


@dataclass(slots=True, eq=False)
class WorkerServices:
    """See the module. `loop` and `next_turn` are set when the worker starts."""

    store: Store
    clock: Clock
    derived: DerivedWork
    blobs: Blobs
    checkpoints: CheckpointStore
    limits: WorkerLimits
    threads: ThreadPoolExecutor
    rng: random.Random
    secret: bytes
    """Signs what tasks pickle; never in the store."""
    sink: LogSink | None = None
    state: Any = None
    """What the App's lifespan yielded."""
    draining: bool = False
    """The worker stops: no attempt starts any more."""
    loop: asyncio.AbstractEventLoop = field(init=False)
    next_turn: NextTurn = field(init=False)
    owned_tasks: set[asyncio.Task[Any]] = field(default_factory=set[asyncio.Task[Any]])

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.next_turn = NextTurn(loop)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Runs `work` as a task that the worker owns. What it raises is logged."""
        task = self.loop.create_task(work)
        self.owned_tasks.add(task)
        task.add_done_callback(self._disown)

    def _disown(self, task: asyncio.Task[Any]) -> None:
        self.owned_tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("worker.task_failed", exc_info=error)

    def forget_checkpoints(self, run: str, call_key: str | None = None) -> None:
        """Removes the checkpoints of a call whose value is durable, or of a completed run."""
        if (remove := self.checkpoints.forget(run, call_key)) is not None:
            self.loop.run_in_executor(None, remove)

    def cancel_child(self, started: Entry, reason: str) -> None:
        """Cancels the child run that `started` records. May be called in a flow's step."""
        work = self.store.cancel(int(started.value or b"0"), reason)
        self.loop.call_soon(self.spawn, work, context=Context())  # not in the flow's context
