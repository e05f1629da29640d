"""The parts of one open App: store, router, worker, reactor, relay; built and opened in order,
closed in reverse order.

`App.open` makes one `Runtime`. Intake runs on the loop that opens it. Flows run there too, or
(`own_loop`) on a loop and thread of their own, so that a flow that blocks its loop cannot stop
intake or HTTP. The lifespan is entered and left in one asyncio task on the flow loop. Read on in
intake/reactor.py (events in), engine/worker.py (runs), sinks/relay.py (events out).
"""

import asyncio
import random
import threading
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import orjson

from eventflow.app_config import AppConfig, Lifespan
from eventflow.core.clock import SECOND
from eventflow.core.declarations import text
from eventflow.core.errors import (
    ANY_FAILURE,
    IdempotencyConflict,
    NotFound,
    RunDead,
    StoreError,
    StoreFailed,
)
from eventflow.core.uninterrupted import error_of, uninterrupted
from eventflow.engine.late_runs import LateRunMonitor
from eventflow.engine.retry_now import start_waiting_attempts
from eventflow.engine.worker import Worker, WorkerOptions
from eventflow.events.event import Event
from eventflow.intake.reactor import Reactor
from eventflow.logs.log import LogReceiver, get_logger
from eventflow.loop.left_behind import leave_behind
from eventflow.routing.router import Router
from eventflow.runs.run import Cancelled, Completed, Failed, Ids, NeedsAttention, Outcome, format_id
from eventflow.sdk.checkpoint import CheckpointStore
from eventflow.sdk.flow import Flow
from eventflow.serialization.blobs import Blobs, BlobStore
from eventflow.sinks.relay import OutboxRelay
from eventflow.store.key_files import load_or_create_secret
from eventflow.store.sqlite import SqliteStore
from eventflow.store.url import open_store

T = TypeVar("T")
OutcomeWaiter = tuple[asyncio.AbstractEventLoop, asyncio.Future[Outcome]]

SWEEP_INTERVAL = 3600 * SECOND
"""Microseconds between two sweeps for blobs that no row names; younger blobs are kept, for their
row may not be written yet.
"""
RETENTION_START_DELAY_SECONDS = 10.0
"""From opening to the first step of retention: until then, the runs left in flight by the last
process have the writer.
"""
RETENTION_STEP_DELAY_SECONDS = 0.05
RETENTION_INTERVAL_SECONDS = 60.0
"""Between two steps while rows are removed; after a step that found none."""
FLOW_LOOP_MARGIN_SECONDS = 3.2
"""After the grace, for a worker to unwind its runs and cancel bodies. A loop that takes longer is
blocked by a flow, and given up.
"""
STOP_SECONDS = 1.0
"""For the flow loop's thread to end."""

log = get_logger("eventflow.app")
LOG_EVENTS = {
    "app.draining": (
        "A stop was requested: no new events, no new runs; running attempts may end within the "
        "grace period."
    ),
    "app.started": "The app accepts events and executes flows.",
    "app.stopped": "The app is stopped; unfinished attempts are recorded as interrupted.",
    "loop.exit_ignored": (
        "User code on an event loop called `sys.exit()`, raised KeyboardInterrupt, or cancelled "
        "the lifespan; the loop continues."
    ),
    "store.prune_failed": "A retention step failed; it is tried again in a minute.",
}


def _remote_blobs(url: str | None) -> BlobStore | None:
    """Where `App(results=url)` stores large results."""
    if not url:
        return None
    from eventflow.serialization.s3_blobs import S3BlobStore  # few Apps have one

    return S3BlobStore(url)


class Runtime:
    """The running parts of one open App. `open` and `close` are called on the intake loop, once
    each.
    """

    router: Router
    worker: Worker
    reactor: Reactor
    relay: OutboxRelay
    late_run_monitor: LateRunMonitor

    def __init__(self, config: AppConfig, url: str, logs: LogReceiver | None) -> None:
        self.config = config
        self.store = open_store(url, config.clock, **config.store_options)
        self.ids = Ids()
        self.logs = logs  # where log lines of runs are stored
        self.blobs = Blobs(Path(f"{self.store.path}.blobs"), _remote_blobs(config.results))
        self.retention = Retention(config, self.store, self.blobs)
        self.own_loop: FlowThread | None = None
        self.closing: bool = False
        self._lifespan = LifespanTask()
        self._outcome_waiters: set[OutcomeWaiter] = set()

    async def open(self, own_loop: bool, listen: bool, passive: bool) -> None:
        """Opens the store, then starts the worker, the relay and (with `listen`) the listeners;
        `passive` opens the store only.
        """
        config = self.config
        self.router = Router(
            config.subscriptions, self.ids, config.clock, config.sink_subscriptions
        )
        self.store.attach_run_events(self.router)
        self.store.attach_patterns(self.router.patterns)
        await asyncio.to_thread(self.store.open)
        try:
            self.store.on_failure(self._fail_outcome_waiters)
            self.worker = Worker(
                self.store,
                config.clock,
                self.router,
                config.flows,
                self.blobs,
                self.retention.checkpoints,
                WorkerOptions(
                    concurrency=config.concurrency,
                    threads=config.threads,
                    logs=self.logs,
                    strict=config.strict,
                    secret=load_or_create_secret(self.store.path, "key").encode(),
                ),
            )
            self.reactor = Reactor(
                self.store, self.router, config.clock, config.triggers, random.Random()
            )
            self.relay = OutboxRelay(self.store, config.sink_subscriptions, random.Random())
            self.late_run_monitor = LateRunMonitor(
                self.store,
                config.clock,
                [late for each in config.subscriptions for late in each.late],
            )
            if passive:
                return
            await asyncio.to_thread(self.retention.checkpoints.load_index)
            self.own_loop = FlowThread() if own_loop else None
            await self.on_flow_loop(self._start_worker())
            self.relay.start()
            if listen:
                self.reactor.start(await self.store.paused_triggers())
                await asyncio.sleep(0)  # to each listener's first wait: webhooks have their intake
            self.late_run_monitor.start()
            self.retention.start()
            for flow in config.flows.values():
                flow.open_app = config.name
        except BaseException:
            await uninterrupted(self._undo_open())
            raise
        log.info(
            "app.started",
            app=config.name,
            store=self.store.location,
            flows=len(config.flows),
            triggers=len(config.triggers),
        )

    async def close(self, grace: float) -> None:
        """Stops intake, gives attempts up to `grace` seconds to end, then closes everything.

        Closes everything as well if a step fails, the lifespan for one, and raises that error at
        the end.
        """
        runs = len(self.worker.executions)
        hint = "runs that do not end within the grace period are resumed at the next start"
        more = {"hint": hint} if runs else {}
        log.info("app.draining", app=self.config.name, grace=grace, runs=runs, **more)
        try:
            await self._end_parts(grace)
        finally:
            await uninterrupted(self._release())
        log.info("app.stopped", app=self.config.name)

    async def _undo_open(self) -> None:
        """Closes what `open` opened before it failed."""
        if hasattr(self, "late_run_monitor"):  # all parts are built
            await error_of(self._end_parts(0.0))
        await self._release()

    async def _end_parts(self, grace: float) -> None:
        """Ends what runs. Raises the first error when all has ended."""
        self.reactor.draining = True
        await self.retention.stop()
        await self.late_run_monitor.stop()
        # Together: a trigger that finishes a slow poll uses up none of the grace.
        errors = await asyncio.gather(
            error_of(self.reactor.stop()), error_of(self._end_flows(grace))
        )
        await self.relay.stop()
        for error in filter(None, errors):
            del errors
            try:
                raise error
            finally:  # breaks a cycle: the error refers to this frame
                del error

    async def _end_flows(self, grace: float) -> None:
        """Ends the worker and the lifespan. A flow loop that a flow blocks is given up."""
        if self.own_loop is None:
            await self._stop_worker(grace)
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(grace + FLOW_LOOP_MARGIN_SECONDS):
                await self.own_loop.call(self._stop_worker(grace))

    async def _release(self) -> None:
        """Ends the threads and frees the store."""
        for flow in self.config.flows.values():
            flow.open_app = None
        if self.own_loop is not None:
            await self.own_loop.stop()
        await asyncio.to_thread(self.store.close)

    async def _start_worker(self) -> None:
        is_own_loop = self.own_loop is not None
        state = await self._lifespan.enter(self.config.lifespan, is_own_loop)
        self.worker.start(state)

    async def _stop_worker(self, grace: float) -> None:
        try:
            if self.store.failed is not None:
                self.worker.abandon()
                await self.worker.end()
            else:
                await self.worker.drain(grace)
        finally:
            await self._lifespan.leave()

    async def on_flow_loop(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the flow loop."""
        return await work if self.own_loop is None else await self.own_loop.call(work)

    @property
    def flow_loop(self) -> tuple[asyncio.AbstractEventLoop, int]:
        """The flow loop and the ident of its thread; for callers on the intake loop."""
        if self.own_loop is None:
            return asyncio.get_running_loop(), threading.get_ident()
        return self.own_loop.loop, self.own_loop.thread.ident or 0

    # ----------------------------------------------------------------- health

    def dead_part(self) -> str:
        """Which thread or task of ours has ended though nobody stopped it; empty: none. From any
        thread.
        """
        is_stopping = self.closing or self.reactor.draining
        if not self.worker.is_taking or is_stopping or self.store.failed is not None:
            return ""
        if self.own_loop is not None and not self.own_loop.thread.is_alive():
            return "the thread of the flow loop has ended"
        if not self.store.is_alive:
            return "the thread of the store's writer has ended"
        for part in (self.retention, self.late_run_monitor, self.reactor, self.relay):
            for task in part.tasks:
                if task.done() and not self.reactor.draining and self.store.failed is None:
                    error = None if task.cancelled() else task.exception()
                    return f"the task {task.get_name()!r} has ended: {error!r}"
        return ""

    @property
    def unready_reason(self) -> str:
        """Why recorded events would not be processed; empty while they are."""
        if self.worker.stall_reason:
            return self.worker.stall_reason
        threads = self.worker.threads
        if threads.is_short:
            return (
                f"{threads.left_behind} plain task bodies continue after their timeouts; "
                f"{threads.max_spare} spare threads are used up"
            )
        return self.dead_part()

    # ----------------------------------------------------------------- runs

    async def retry_now(self, run: int) -> int:
        """Ends the waits of a run in memory for its next attempts; how many there were."""

        async def on_loop() -> int:
            return start_waiting_attempts(self.worker.executions.get(run))

        return await self.on_flow_loop(on_loop())

    async def start_run(
        self,
        flow: Flow[..., Any],
        params: bytes,
        idempotency_key: str | None = None,
        *,
        max_wait: float | None = 0.0,
    ) -> tuple[int, bool]:
        """Starts a run of `params`, a JSON object. Returns its number, and whether the key was
        known.

        Waits while the ledger is full, for up to `max_wait` seconds. Raises IdempotencyConflict for
        a known key with other parameters, UsageError for an empty key. The run of a known key may
        be past its retention: then its number is that of no run.
        """
        if idempotency_key is not None:
            text(idempotency_key, "idempotency_key=")
        ident = idempotency_key or format_id(self.ids.next(self.config.clock.now()))
        event = Event(
            id=ident,
            source=f"/flows/{flow.name}",
            type="eventflow.run.requested",
            data=orjson.loads(params),
        )
        arrival = self.router.route_to_flow(flow, event, params=params)
        (receipt,) = await self.reactor.record(lambda: [arrival], "api", max_wait=max_wait)
        if receipt.conflict:
            raise IdempotencyConflict(ident)
        if receipt.duplicate:
            verdicts = (await self.store.event(receipt.ledger_id))["verdicts"]
            return next(run for _, outcome, run in verdicts if outcome == "run"), True
        return arrival.runs[0].id, False

    async def outcome(self, run: int) -> Outcome:
        """How a run ended, once it has. Raises StoreFailed when the store fails before that."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Outcome] = loop.create_future()

        def resolve(outcome: Outcome) -> None:
            _resolve_threadsafe(loop, future, outcome)

        flows, _ = self.flow_loop
        flows.call_soon_threadsafe(self.worker.outcomes.add_watcher, run, resolve)
        self._outcome_waiters.add((loop, future))
        try:
            if self.store.failed is not None:
                raise self.store.failed
            known = settled_outcome(await self.store.run(run))
            return known if known is not None else await future
        finally:
            self._outcome_waiters.discard((loop, future))
            flows.call_soon_threadsafe(self.worker.outcomes.remove_watcher, run, resolve)

    def _fail_outcome_waiters(self, error: StoreError) -> None:
        """The store failed, so no outcome will come. Called on the writer thread."""
        for loop, future in list(self._outcome_waiters):
            _resolve_threadsafe(loop, future, StoreFailed(str(error)))


def _resolve_threadsafe(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[Outcome], result: Outcome | StoreFailed
) -> None:
    def resolve() -> None:
        if future.done():
            return
        if isinstance(result, StoreFailed):
            future.set_exception(result)
        else:
            future.set_result(result)

    with suppress(RuntimeError):  # that loop is closed, and the waiting task with it
        loop.call_soon_threadsafe(resolve)


def settled_outcome(row: Mapping[str, Any]) -> Outcome | None:
    """The outcome of a run by its row in the ledger; None while it is live. Raises RunDead."""
    match row["state"]:
        case "completed":
            return Completed(row["result"], row["codec"] or "json")
        case "failed":
            return Failed(row["error"])
        case "cancelled":
            return Cancelled(row["reason"] or "")
        case "held":
            return NeedsAttention(row["reason"] or "")
        case "dead":
            raise RunDead(f"run {format_id(row['id'])} is dead: {row['reason']}")
        case _:
            return None


class LifespanTask:
    """The user's lifespan, entered and left in one task, as async context managers require."""

    def __init__(self) -> None:
        self._end: asyncio.Event | None = None
        self._task: asyncio.Task[None] | None = None

    async def enter(self, lifespan: Lifespan | None, is_own_loop: bool) -> Any:
        """What it yields; None without a lifespan. Raises what it raises.

        On a loop of our own it stays entered when user code cancels all tasks of the loop.
        """
        if lifespan is None:
            return None
        self._end = asyncio.Event()
        entered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        run = self._run(lifespan, entered, self._end, is_own_loop)
        self._task = asyncio.create_task(run)
        return await entered

    async def _run(
        self,
        lifespan: Lifespan,
        entered: asyncio.Future[Any],
        end: asyncio.Event,
        is_own_loop: bool,
    ) -> None:
        try:
            async with lifespan() as state:
                entered.set_result(state)
                while not end.is_set():
                    try:
                        await end.wait()
                    except asyncio.CancelledError as error:
                        if not is_own_loop:
                            raise
                        log.error("loop.exit_ignored", loop="flows", error=repr(error))
        except ANY_FAILURE as error:  # the user's code: raised to the caller of `App.open`
            if entered.done():
                raise
            entered.set_exception(error)

    async def leave(self) -> None:
        """Leaves it and waits for its end. Raises what it raises."""
        if self._end is not None and self._task is not None:
            self._end.set()
            await self._task


class Retention:
    """The task that removes what is older than the App keeps: rows in small steps, then blobs and
    checkpoints.
    """

    def __init__(self, config: AppConfig, store: SqliteStore, blobs: Blobs) -> None:
        self.checkpoints = CheckpointStore(Path(f"{store.path}.checkpoints"))
        self._config = config
        self._store = store
        self._blobs = blobs
        self._next_sweep_at: int = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="retention")

    @property
    def tasks(self) -> Sequence[asyncio.Task[None]]:
        return () if self._task is None else (self._task,)

    async def stop(self) -> None:
        """Cancels the task; idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self) -> None:
        await asyncio.sleep(RETENTION_START_DELAY_SECONDS)
        while True:
            try:
                removed = await self._step()
            except Exception as error:  # tried again later; nothing else depends on retention
                log.error("store.prune_failed", error=str(error))
                removed = 0
            await asyncio.sleep(
                RETENTION_STEP_DELAY_SECONDS if removed else RETENTION_INTERVAL_SECONDS
            )

    async def _step(self) -> int:
        """Removes some rows, and sweeps the files once per SWEEP_INTERVAL. Returns how many rows it
        removed.
        """
        now = self._config.clock.now()
        removed = await self._store.prune(
            payloads_before=now - self._config.retention,
            identities_before=now - self._config.identities,
        )
        if now >= self._next_sweep_at:
            self._next_sweep_at = now + SWEEP_INTERVAL
            named = await self._store.blob_references()
            await asyncio.to_thread(self._blobs.prune, named, before=now - SWEEP_INTERVAL)
            await self.sweep_checkpoints()
        return removed

    async def sweep_checkpoints(self) -> None:
        """Removes the checkpoints of runs that completed or are gone; a failed or cancelled run
        keeps its own for a retry.
        """
        for run in await asyncio.to_thread(self.checkpoints.run_ids):
            try:
                is_over = (await self._store.run(run))["state"] == "completed"
            except NotFound:
                is_over = True
            if is_over:
                await asyncio.to_thread(self.checkpoints.remove, self.checkpoints.directory / run)


class FlowThread:
    """A thread with an event loop of its own, so that a flow that blocks cannot stop intake or
    HTTP.
    """

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop = new_event_loop()
        self.thread = threading.Thread(target=self._run, name="eventflow-flows", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        while True:
            try:
                self.loop.run_forever()
                return
            except (SystemExit, KeyboardInterrupt) as error:
                # A task that a body has made called `sys.exit()`: asyncio raises it here. Whoever
                # waits for the task gets it, and the loop goes on.
                log.error("loop.exit_ignored", loop="flows", error=repr(error))

    async def call(self, work: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))

    async def stop(self) -> None:
        """Ends the thread. What user code left on the loop is cancelled, and left behind if it does
        not end.
        """
        with suppress(TimeoutError):  # a flow blocks the loop
            async with asyncio.timeout(STOP_SECONDS):
                await self.call(_cancel_tasks())
        self.loop.call_soon_threadsafe(self.loop.stop)
        await asyncio.to_thread(self.thread.join, STOP_SECONDS)
        if not self.thread.is_alive():
            for task in asyncio.all_tasks(self.loop):
                leave_behind(task)


async def _cancel_tasks() -> None:
    """Cancels the other tasks of the running loop, and waits a moment for their ends."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=STOP_SECONDS / 2)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A uvloop event loop, or asyncio's own where uvloop is not built."""
    try:
        import uvloop
    except ImportError:  # not built for this platform; asyncio's own loop does
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
