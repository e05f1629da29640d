"""What the executions of one worker share: loop, clock, store, threads, limits, large values.

`Worker` makes one `WorkerServices` and hands it to each `Execution`. Everything is used on the
worker's loop.
"""

import asyncio
import random
import sys
from collections.abc import Callable, Coroutine
from contextvars import Context
from functools import partial
from typing import Any, cast

import msgspec

from eventflow.core.clock import Clock
from eventflow.core.threads import DaemonThreads
from eventflow.engine.durations import Durations
from eventflow.engine.limits import WorkerLimits
from eventflow.events.event import Event
from eventflow.logs.log import LogReceiver, get_logger
from eventflow.loop.flow_loop import FlowLoop
from eventflow.loop.left_behind import leave_behind
from eventflow.loop.unawaited import UnawaitedWatcher, watch_unawaited
from eventflow.routing.dead_letter_log import log_dead_letters
from eventflow.routing.router import Router
from eventflow.runs.journal import Entry
from eventflow.runs.run import Run, format_id
from eventflow.sdk.checkpoint import CheckpointStore
from eventflow.sdk.flow import Flow
from eventflow.serialization.blobs import Blobs
from eventflow.serialization.errors import encode_error, imported_by
from eventflow.store.protocol import Arrival, OpList, RunOp, Store
from eventflow.store.writer import run_callbacks

CANCEL_ATTEMPTS = 3
"""Times a body is cancelled before it is left behind."""
FINAL_CANCEL_INTERVAL = 0.3
"""Seconds between these cancels at the end of a drain."""

log = get_logger("eventflow.worker")
LOG_EVENTS = {
    "task.left_behind": (
        "A body ignored every cancel until the end of the drain; the process ends without it."
    ),
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
        arrival = self._router.route_emitted(event)
        if arrival.dead_letters:
            log_dead_letters(arrival)
        return arrival

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


class Posts:
    """Operations on their way to the store.

    The first one in a turn of the loop is posted at once, so a result does not wait while user code
    blocks the loop. While the store has not answered others, those that follow in that turn are
    collected and posted in the next turn as one `OpList`, which takes the lock of the writer's
    queue once and wakes its thread once.
    """

    __slots__ = ("_collects", "_context", "_loop", "_ops", "_replies", "_store", "_under_way")

    def __init__(self, store: Store, loop: asyncio.AbstractEventLoop) -> None:
        self._store = store
        self._loop = loop
        self._context = Context()  # not that of the body or flow that posts first
        self._collects = False
        self._under_way = 0  # posted, and not answered by the store
        self._ops: list[RunOp] = []
        self._replies: list[Callable[[Any], None]] = []

    def post(self, op: RunOp, reply: Callable[[Any], None]) -> None:
        """`reply` gets what the store answers, on the worker's loop."""
        if self._collects:
            self._ops.append(op)
            self._replies.append(reply)
            return
        if self._under_way:
            self._collects = True
            self._loop.call_soon(self.flush, context=self._context)
        self._post(op, partial(self._answer, reply))

    def _post(self, op: RunOp | OpList, reply: Callable[[Any], None]) -> None:
        self._under_way += 1
        self._store.post(op, reply, self._loop)

    @property
    def is_empty(self) -> bool:
        return not self._ops

    def flush(self) -> None:
        """Posts the collected operations now."""
        self._collects = False
        if not self._ops:
            return
        ops = self._ops
        replies = self._replies
        self._ops = []
        self._replies = []
        if len(ops) == 1:
            self._post(ops[0], partial(self._answer, replies[0]))
        else:
            self._post(OpList(ops), partial(self._answer_all, replies))

    def _answer(self, reply: Callable[[Any], None], answer: Any) -> None:
        self._under_way -= 1
        reply(answer)

    def _answer_all(self, replies: list[Callable[[Any], None]], answer: Any) -> None:
        """Gives each its answer, or all of them the failure of the store."""
        self._under_way -= 1
        answers = cast(list[Any], answer) if isinstance(answer, list) else [answer] * len(replies)
        pairs = zip(replies, answers, strict=True)
        run_callbacks([(self._loop, reply, (each,)) for reply, each in pairs])


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


_AT_START: Any = None


class WorkerServices(msgspec.Struct, eq=False):
    """See the module. What is `_AT_START` is set when the worker starts."""

    store: Store
    clock: Clock
    derived: DerivedWork
    blobs: Blobs
    checkpoints: CheckpointStore
    limits: WorkerLimits
    threads: DaemonThreads
    rng: random.Random
    secret: bytes
    """Signs what tasks pickle; never in the store."""
    logs: LogReceiver | None = None
    run_durations: Durations = msgspec.field(default_factory=Durations)
    task_durations: Durations = msgspec.field(default_factory=Durations)
    strict: bool = False
    """A run whose flow forgot to await a call fails."""
    state: Any = None
    """What the App's lifespan yielded."""
    draining: bool = False
    """The worker stops: no attempt starts any more."""
    loop: asyncio.AbstractEventLoop = _AT_START
    posts: Posts = _AT_START
    next_turn: NextTurn = _AT_START
    imported: frozenset[str] = _AT_START
    """Names of the modules that were imported when the worker started."""
    _unawaited_watcher: UnawaitedWatcher | None = None
    owned_tasks: set[asyncio.Task[Any]] = set()
    abandoned: dict[asyncio.Task[Any], str] = {}
    """Bodies that have not ended although no run waits for them any more, with their names."""
    _cancelled_calls: set[tuple[int, str]] = set()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """To be called before the first run: every process has imported the modules that this one
        has imported now.
        """
        self.imported = frozenset(sys.modules)
        self.loop = loop
        self.posts = Posts(self.store, loop)
        self.next_turn = NextTurn(loop)
        self._unawaited_watcher = watch_unawaited(FlowLoop)

    def close(self) -> None:
        """Ends what `start` began; idempotent."""
        if self._unawaited_watcher is not None:
            self.posts.flush()  # the store may be closed before the loop's next turn
            self._unawaited_watcher.remove()
            self._unawaited_watcher = None

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Runs `work` as a task that the worker owns. What it raises is logged."""
        task = self.loop.create_task(work)
        self.owned_tasks.add(task)
        task.add_done_callback(self._disown)

    def _disown(self, task: asyncio.Task[Any]) -> None:
        self.owned_tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("worker.task_failed", exc_info=error)

    def encode_error(self, error: BaseException, flow: Flow[..., Any]) -> bytes:
        """The record of an error in a run of `flow`: with the classes that every process has by the
        time that the flow receives it.
        """
        own = imported_by(flow.fn)
        return encode_error(
            error,
            lambda module: (
                module in self.imported
                or any(module == each or module.startswith(f"{each}.") for each in own)
            ),
        )

    def may_be_closing(self, run: int, call_key: str) -> bool:
        """Whether a body that was cancelled, though not by eventflow, may have been so because the
        loop is being closed: that happens once. The second time code of the app has cancelled it.
        """
        call = (run, call_key)
        if call in self._cancelled_calls:
            self._cancelled_calls.discard(call)
            return False
        self._cancelled_calls.add(call)
        return True

    def abandon(self, body: asyncio.Task[Any], name: str) -> None:
        """Holds a body that was cancelled until it has ended."""
        if not body.done():
            self.abandoned[body] = name
            body.add_done_callback(self._on_body_ended, context=Context())  # not the flow's

    def _on_body_ended(self, body: asyncio.Task[Any]) -> None:
        self.abandoned.pop(body, None)
        if not body.cancelled():
            body.exception()  # nobody asks for it

    async def end_bodies(self) -> None:
        """Cancels abandoned bodies a few times more. Those that ignore it are left behind."""
        for _ in range(CANCEL_ATTEMPTS):
            if not self.abandoned:
                return
            for body in self.abandoned:
                body.cancel()
            await asyncio.wait(list(self.abandoned), timeout=FINAL_CANCEL_INTERVAL)
        for body, name in self.abandoned.items():
            log.error("task.left_behind", body=name)
            leave_behind(body)
        self.abandoned.clear()

    def forget_checkpoints(self, run: str, call_key: str | None = None) -> None:
        """Removes the checkpoints of a call whose value is durable, or of a completed run."""
        if (remove := self.checkpoints.forget(run, call_key)) is not None:
            self.loop.run_in_executor(None, remove)

    def cancel_child(self, started: Entry, reason: str, caller_token: int) -> None:
        """Cancels the child run that `started` records. May be called in a flow's step.
        `caller_token`: that of the claim in which the flow gave up the call (`Store.cancel`).
        """
        work = self.store.cancel(int(started.value or b"0"), reason, caller_token)
        self.loop.call_soon(self.spawn, work, context=Context())  # not in the flow's context
