"""The rooms of one open App: store, router, worker, reactor, put together, opened in order, closed in reverse.

Made by `App.open`. The way in lives on the loop that opens it; flows live there too, or (`own_loop`) on a loop and thread of
their own, so that a flow that blocks cannot stop intake or HTTP. The lifespan begins and ends in one task, on the flows' loop.
"""

import asyncio
import random
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from eventflow.core.clock import SECOND, Clock
from eventflow.core.errors import NotFound, RunDead, StoreError, StoreFailed
from eventflow.engine.late_runs import Lookout
from eventflow.engine.worker import Worker
from eventflow.events.event import Trigger
from eventflow.intake.reactor import Reactor
from eventflow.logs.log import Sink, get_logger
from eventflow.routing.router import Router
from eventflow.routing.subscriptions import Outlet, Subscription
from eventflow.runs.run import Cancelled, Completed, Failed, Held, Ids, Outcome, show_id
from eventflow.sdk.checkpoint import Checkpoints
from eventflow.sdk.flow import Flow
from eventflow.serialization.blobs import Blobs
from eventflow.serialization.s3_blobs import Bucket
from eventflow.sinks.dispatcher import Relay
from eventflow.store import open_store
from eventflow.store.key_files import secret_beside

T = TypeVar("T")
Lifespan = Callable[[], AbstractAsyncContextManager[Any]]

SWEEP = 3600 * SECOND
"""Microseconds between two sweeps for blobs that no row names; younger ones are left to the row that is about to."""

RETAIN_AFTER = 10.0
"""Seconds of a life before the first step of retention: what another life left in flight has the writer to itself."""

log = get_logger("eventflow.app")


class Plan(msgspec.Struct, frozen=True):
    """What an App says there is. Instants and durations in microseconds."""

    name: str
    clock: Clock
    flows: dict[str, Flow[..., Any]]
    triggers: Sequence[Trigger]
    subscriptions: Sequence[Subscription]
    lifespan: Lifespan | None
    concurrency: int
    threads: int
    retention: int
    identities: int
    store_options: Mapping[str, Any]
    outlets: Sequence[Outlet] = ()
    results: str | None = None


class House:
    """The rooms of one open App."""

    def __init__(self, plan: Plan, url: str, sink: Sink | None) -> None:
        self.plan = plan
        self.store = open_store(url, plan.clock, **plan.store_options)
        self.ids = Ids()
        self.sink = sink
        self.blobs = Blobs(
            Path(f"{self.store.path}.blobs"), Bucket(plan.results) if plan.results else None
        )
        self.checkpoints = Checkpoints(Path(f"{self.store.path}.checkpoints"))
        self.own_loop: FlowThread | None = None
        self.closing = False
        self._stop_lifespan: asyncio.Event | None = None
        self._lifespan_task: asyncio.Task[Any] | None = None
        self._chores: set[asyncio.Task[Any]] = set()
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Future[Outcome]]] = set()
        self._sweep_at = 0

    async def open(self, own_loop: bool, listen: bool, passive: bool) -> None:
        plan = self.plan
        self.router = Router(plan.subscriptions, self.ids, plan.clock, plan.outlets)
        self.store.attach_herald(self.router)
        await asyncio.to_thread(self.store.open)
        try:
            self.store.on_failure(self._tell_waiting)
            self.worker = Worker(
                self.store, plan.clock, self.router, plan.flows, self.blobs, self.checkpoints, concurrency=plan.concurrency,
                threads=plan.threads, sink=self.sink, secret=secret_beside(self.store.path, "key").encode(),
            )  # fmt: skip
            self.reactor = Reactor(
                self.store, self.router, plan.clock, plan.triggers, random.Random()
            )
            self.relay = Relay(self.store, plan.outlets, random.Random())
            self.lookout = Lookout(
                self.store, plan.clock, [late for each in plan.subscriptions for late in each.late]
            )
            if passive:
                return
            await asyncio.to_thread(self.checkpoints.recall)
            self.own_loop = FlowThread() if own_loop else None
            await self.on_flow_loop(self._open_worker())
            self.relay.start()
            if listen:
                self.reactor.start(await self.store.paused())
                await asyncio.sleep(
                    0
                )  # each listener takes its first step: a webhook has its intake when this returns
            self.lookout.start()
            self._chores.add(asyncio.create_task(self._retain(), name="retention"))
        except BaseException:
            await asyncio.to_thread(self.store.close)
            if self.own_loop is not None:
                await asyncio.to_thread(self.own_loop.stop)
            raise
        log.info(
            "app.started",
            app=plan.name,
            store=self.store.location,
            flows=len(plan.flows),
            triggers=len(plan.triggers),
        )

    async def close(self, grace: float) -> None:
        log.info("app.draining", app=self.plan.name, grace=grace)
        self.reactor.draining = True
        for chore in self._chores:
            chore.cancel()
        await self.lookout.stop()
        await asyncio.gather(
            self.reactor.stop(), self.on_flow_loop(self._close_worker(grace))
        )  # a slow poll takes no grace
        await self.relay.stop()
        if self.own_loop is not None:
            await asyncio.to_thread(self.own_loop.stop)
        await asyncio.to_thread(self.store.close)
        log.info("app.stopped", app=self.plan.name)

    async def on_flow_loop(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine where flows run."""
        return await work if self.own_loop is None else await self.own_loop.call(work)

    @property
    def flow_loop(self) -> tuple[asyncio.AbstractEventLoop, int]:
        """The loop that flows run on, and the ident of its thread; for code on the loop of the way in."""
        if self.own_loop is None:
            return asyncio.get_running_loop(), threading.get_ident()
        return self.own_loop.loop, self.own_loop.thread.ident or 0

    # ----------------------------------------------------------------- the lifespan: it must end in the task it began in

    async def _open_worker(self) -> None:
        state = None
        if self.plan.lifespan is not None:
            self._stop_lifespan = asyncio.Event()
            entered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            self._lifespan_task = asyncio.create_task(self._live(self.plan.lifespan, entered))
            state = await entered
        self.worker.start(state)

    async def _live(self, lifespan: Lifespan, entered: asyncio.Future[Any]) -> None:
        assert self._stop_lifespan is not None
        try:
            async with lifespan() as state:
                entered.set_result(state)
                await self._stop_lifespan.wait()
        except Exception as error:
            if entered.done():
                raise
            entered.set_exception(error)

    async def _close_worker(self, grace: float) -> None:
        if self.store.failed is not None:
            self.worker.abandon()
        else:
            await self.worker.drain(grace)
        if self._stop_lifespan is not None and self._lifespan_task is not None:
            self._stop_lifespan.set()
            await self._lifespan_task

    # ----------------------------------------------------------------- waiting for a run

    async def outcome(self, run: int) -> Outcome:
        """How a run ended, once it has; StoreFailed when nobody can tell any more."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Outcome] = loop.create_future()

        def tell(outcome: Outcome) -> None:
            _from_any_thread(loop, future, outcome)

        flows, _ = self.flow_loop
        flows.call_soon_threadsafe(self.worker.outcomes.watch, run, tell)
        self._waiting.add((loop, future))
        try:
            if self.store.failed is not None:
                raise self.store.failed
            known = settled_outcome(await self.store.run(run))
            return known if known is not None else await future
        finally:
            self._waiting.discard((loop, future))
            flows.call_soon_threadsafe(self.worker.outcomes.unwatch, run, tell)

    def _tell_waiting(self, error: StoreError) -> None:
        """The store failed: those who wait for a result must not wait for ever. Writer thread."""
        for loop, future in list(self._waiting):
            _from_any_thread(loop, future, StoreFailed(str(error)))

    # ----------------------------------------------------------------- chores

    async def _retain(self) -> None:
        """Retention, in small steps, now and then. A step that fails is logged and tried again later."""
        await asyncio.sleep(RETAIN_AFTER)
        while True:
            try:
                removed = await self._prune()
            except StoreError as error:
                log.error("store.prune_failed", error=str(error))
                removed = 0
            await asyncio.sleep(0.05 if removed else 60.0)

    async def _prune(self) -> int:
        now = self.plan.clock.now()
        removed = await self.store.prune(
            bodies_before=now - self.plan.retention, identities_before=now - self.plan.identities
        )
        if not removed and now >= self._sweep_at:
            self._sweep_at = now + SWEEP
            named = await self.store.blob_references()
            await asyncio.to_thread(self.blobs.prune, named, before=now - SWEEP)
            await self._sweep_checkpoints()
        return removed

    async def _sweep_checkpoints(self) -> None:
        """Those of runs that completed or that retention took; a failed or cancelled run may be retried and wants its own."""
        for run in await asyncio.to_thread(self.checkpoints.runs):
            try:
                over = (await self.store.run(run))["state"] == "completed"
            except NotFound:
                over = True
            if over:
                await asyncio.to_thread(self.checkpoints.remove, self.checkpoints.directory / run)


def _from_any_thread(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[Outcome], result: Outcome | StoreFailed
) -> None:
    def give() -> None:
        if future.done():
            return
        if isinstance(result, StoreFailed):
            future.set_exception(result)
        else:
            future.set_result(result)

    with suppress(RuntimeError):  # the loop that waited is closed, and its waiting with it
        loop.call_soon_threadsafe(give)


def settled_outcome(row: Mapping[str, Any]) -> Outcome | None:
    """The outcome that a run's row tells of; None while it is live. RunDead is raised."""
    match row["state"]:
        case "completed":
            return Completed(row["result"], row["codec"] or "json")
        case "failed":
            return Failed(row["error"])
        case "cancelled":
            return Cancelled(row["reason"] or "")
        case "held":
            return Held(row["reason"] or "")
        case "dead":
            raise RunDead(f"run {show_id(row['id'])} is dead: {row['reason']}")
        case _:
            return None


class FlowThread:
    """A thread with an event loop of its own, so that a flow that blocks cannot stop intake or HTTP."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop = _new_loop()
        self.thread = threading.Thread(target=self._run, name="eventflow-flows", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    async def call(self, work: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(timeout=5.0)


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # not built for this platform; asyncio's own loop does
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
