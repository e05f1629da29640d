"""`App`: the composition root. It knows which flows there are, what starts them, and how the rooms are put together.

Three ways to run one, with the flows unchanged:

    async with app:              embedded: intake and flows on the caller's loop; no signals, no logging of the host touched
    app.asgi()                   mounted into another ASGI app, whose lifespan opens and closes it
    app.run() / eventflow serve  a server (server.py): flows get a loop and thread of their own, the root owns the signals

Nothing happens before: making an App opens nothing, reads no environment, starts no thread.
"""

import asyncio
import os
import random
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import orjson

from eventflow.blobs import Blobs
from eventflow.clock import Clock, Duration, SystemClock, microseconds
from eventflow.errors import NotFound, RunCancelled, RunDead, RunFailed, RunHeld, StoreError, StoreFailed, UsageError
from eventflow.event import Event, Json, Receipt, Trigger
from eventflow.filters import Where
from eventflow.flow import Flow
from eventflow.log import Sink, get_logger
from eventflow.reactor import Reactor
from eventflow.results import decode_error
from eventflow.routing import EMIT, Key, Params, Router, Subscription, subscribe
from eventflow.run import Cancelled, Completed, Failed, Held, Ids, Outcome, show_id
from eventflow.store import open_store
from eventflow.store.keys import secret_beside
from eventflow.store.sqlite import SqliteStore
from eventflow.worker import Worker

T = TypeVar("T")
Lifespan = Callable[[], AbstractAsyncContextManager[Any]]

DAY = 86_400.0

log = get_logger("eventflow.app")


class RunHandle:
    """A run somebody asked for. `id` is its id as shown; `duplicate` says that the idempotency key was known already."""

    def __init__(self, app: "App", number: int, flow: Flow[..., Any] | None, duplicate: bool) -> None:
        self._app, self._flow = app, flow
        self.number, self.id, self.duplicate = number, show_id(number), duplicate

    async def result(self) -> Any:
        """The flow's value, once the run has settled; waits through retries and sleeps.

        Raises the flow's own error as a replay would see it, RunCancelled, RunHeld, RunDead, or StoreFailed.
        """
        outcome = await self._app.outcome(self.number)
        match outcome:
            case Completed():
                name, data = self._app.blobs.fetch(outcome.codec, outcome.value)
                return self._flow.result.decode(name, data) if self._flow else orjson.loads(data)
            case Failed():
                raise decode_error(outcome.error)
            case Cancelled():
                raise RunCancelled(f"run {self.id} was cancelled: {outcome.reason}")
            case Held():
                raise RunHeld(f"run {self.id} is held: {outcome.reason}")
            case _:
                raise RunFailed(f"run {self.id} ended as {type(outcome).__name__}")

    async def cancel(self, reason: str = "cancelled by the program") -> None:
        await self._app.store.cancel(self.number, reason)

    async def row(self) -> dict[str, Any]:
        """The run as the ledger holds it now."""
        return await self._app.store.run(self.number)


class App:
    """Flows, what starts them, and where they are remembered.

    `store`: `sqlite:///path` (relative) or `sqlite:////path`; default `$EVENTFLOW_STORE`, else `sqlite:///.eventflow/NAME.db`.
    `lifespan`: an async context manager entered once on the flows' loop; flows and tasks read what it yields as
    `current_run().state`. `concurrency`: runs that work at once. `threads`: plain `def` tasks that run at once. `retention`:
    how long bodies, journals and settled runs are kept; `identities`: how long an event's id is remembered.
    """

    def __init__(
        self,
        name: str,
        *,
        store: str | None = None,
        lifespan: Lifespan | None = None,
        concurrency: int = 1000,
        threads: int = 32,
        retention: Duration = 30 * DAY,
        identities: Duration = 90 * DAY,
        clock: Clock | None = None,
        **store_options: Any,
    ) -> None:
        self.name = name
        self.clock = clock or SystemClock()
        self.flows: dict[str, Flow[..., Any]] = {}
        self.triggers: list[Trigger] = []
        self._url = store
        self._lifespan = lifespan
        self._concurrency, self._threads = concurrency, threads
        self._retention, self._identities = microseconds(retention), microseconds(identities)
        self._store_options = store_options
        self._subscriptions: list[Subscription] = []
        self._names: set[str] = set()
        self._house: _House | None = None

    # ----------------------------------------------------------------- what there is

    def on(
        self,
        trigger: Trigger | str,
        flow: Flow[..., Any],
        *,
        where: Where = None,
        params: Params = None,
        key: Key = None,
        priority: int | None = None,
        on_failure: str = "continue",
        types: Sequence[str] = (),
        name: str | None = None,
    ) -> None:
        """Subscribes a flow to a trigger; or, with a text, to events of that type that flows emit or the API receives.

        `where`: an EventBridge pattern over the data, or a quick plain callable. `params`: a callable from the event to the
        flow's arguments, instead of binding by name. `key`: events of equal keys run one after another. UsageError says what
        does not fit.
        """
        if isinstance(trigger, str):
            types, place = (trigger, *types), EMIT
        else:
            self._add_trigger(trigger)
            place = trigger.name
        self.add(flow)
        made = subscribe(
            place, flow, where=where, params=params, key=key, priority=priority, on_failure=on_failure, types=types, name=name,
            taken=self._names,
        )  # fmt: skip
        self._names.add(made.name)
        self._subscriptions.append(made)

    def add(self, flow: Flow[..., Any]) -> None:
        """Makes a flow known by its name, so that it can be started by name, and children of it resume."""
        if not isinstance(flow, Flow):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"expected a flow, found {flow!r}; decorate the function with @flow")
        if self.flows.setdefault(flow.name, flow) is not flow:
            raise UsageError(f"two flows are named {flow.name!r}; give one of them @flow(name=...)")

    def _add_trigger(self, trigger: Trigger) -> None:
        if any(trigger is known for known in self.triggers):
            return
        if not isinstance(trigger, Trigger):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"expected a trigger (with a name and listen()), found {trigger!r}")
        if any(trigger.name == known.name for known in self.triggers):
            raise UsageError(f"two triggers are named {trigger.name!r}; give one of them name=...")
        self.triggers.append(trigger)

    @property
    def subscriptions(self) -> Sequence[Subscription]:
        return self._subscriptions

    # ----------------------------------------------------------------- open and close

    @property
    def url(self) -> str:
        """Where the store is, read from the environment when it was not given."""
        return self._url or os.environ.get("EVENTFLOW_STORE") or f"sqlite:///.eventflow/{self.name}.db"

    async def open(
        self, *, store: str | None = None, own_loop: bool = False, sink: Sink | None = None,
        listen: bool = True, passive: bool = False,
    ) -> None:  # fmt: skip
        """Opens the store, the worker, then the listeners. `own_loop` gives flows a loop and thread of their own.

        For the command line: without `listen` no trigger is opened; a `passive` app runs nothing either, it records and shows.
        """
        if self._house is not None:
            raise UsageError(f"the app {self.name!r} is open already")
        house = _House(self, store or self.url, sink)
        await house.open(own_loop, listen and not passive, passive)
        self._house = house

    async def close(self, grace: float = 20.0) -> None:
        """Drains: stops intake, lets bodies under way end for up to `grace` seconds, puts the rest back, closes. Idempotent."""
        house = self._house
        if house is None or house.closing:
            return
        house.closing = True  # the doors show what there is until the end, so the house stays in sight
        try:
            await house.close(grace)
        finally:
            self._house = None

    async def __aenter__(self) -> "App":
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def house(self) -> "_House":
        """What is running. UsageError while the app is closed."""
        if self._house is None:
            raise UsageError(f"the app {self.name!r} is not open; use `async with app:`, app.run() or `eventflow serve`")
        return self._house

    @property
    def is_open(self) -> bool:
        return self._house is not None

    @property
    def store(self) -> SqliteStore:
        return self.house.store

    @property
    def blobs(self) -> Blobs:
        return self.house.blobs

    # ----------------------------------------------------------------- doors for the program

    async def start(
        self, flow: Flow[..., Any] | str, /, *, idempotency_key: str | None = None, **params: Any
    ) -> RunHandle:
        """Starts a run; durable when it returns. With a known `idempotency_key`, the first run of that key.

        Raises BindingError when the parameters do not fit the flow's signature, NotFound for an unknown flow name.
        """
        known = self.flow(flow)
        self.house.known(known)
        body = known.binder.unpack((), params)
        return await self.start_with(known, body, idempotency_key)

    async def start_with(self, flow: Flow[..., Any], params: bytes, idempotency_key: str | None = None) -> RunHandle:
        """`start`, with the parameters as a JSON object."""
        house = self.house
        ident = idempotency_key or show_id(house.ids.next(self.clock.now()))
        event = Event(id=ident, source=f"/flows/{flow.name}", type="eventflow.run.requested", data=orjson.loads(params))
        arrival = house.router.arrive_flow(flow, event, params=params)
        (receipt,) = await house.reactor.record([arrival], "api")
        if receipt.conflict:
            raise UsageError(f"idempotency key {ident!r} is known with other parameters; the first run stands, use another key")
        return await self._handle(flow, arrival.runs[0].id, receipt)

    async def _handle(self, flow: Flow[..., Any], run: int, receipt: Receipt) -> RunHandle:
        if receipt.duplicate:
            (first,) = await self.store.runs(event=receipt.ledger_id, limit=1)
            run = first["id"]
        return RunHandle(self, run, flow, receipt.duplicate)

    def flow(self, flow: Flow[..., Any] | str) -> Flow[..., Any]:
        """A flow by its name, or itself."""
        if isinstance(flow, Flow):
            self.add(flow)
            return flow
        if flow not in self.flows:
            raise NotFound("flow", flow)
        return self.flows[flow]

    async def emit(
        self, event_type: str, data: Json = None, *, id: str | None = None, subject: str | None = None, source: str = "/app"
    ) -> Receipt:
        """Records an event for the subscriptions on its type; durable when it returns. With an `id`, once."""
        house = self.house
        ident = id or show_id(house.ids.next(self.clock.now()))
        return await self.accept(Event(id=ident, source=source, type=event_type, data=data, subject=subject))

    async def accept(self, *events: Event) -> Any:
        """Records events on behalf of nobody's trigger: they reach the subscriptions on their types."""
        house = self.house
        receipts = await house.reactor.record([house.router.arrive(EMIT, event) for event in events], EMIT)
        return receipts[0] if len(events) == 1 else receipts

    async def run_handle(self, run: str | int) -> RunHandle:
        """A handle on a run by its id, or a unique prefix or suffix of it."""
        row = await self.store.run(run)
        return RunHandle(self, row["id"], self.flows.get(row["flow"]), False)

    async def outcome(self, run: int) -> Outcome:
        """How a run ended, once it has (or is held)."""
        return await self.house.outcome(run)

    # ----------------------------------------------------------------- as a server

    def asgi(self, **options: Any) -> Any:
        """An ASGI app: webhooks, API, health. Its lifespan opens and closes this App; mount it, or serve it.

        Mounted into another app, whose lifespan does not reach it, open the App yourself: `async with app:`.
        """
        from eventflow.web.api import make_asgi  # the one lazy import: an embedded App needs no HTTP

        return make_asgi(self, **options)

    def run(self, **options: Any) -> None:
        """Serves until SIGTERM or SIGINT, then exits the process: `eventflow serve` from a program's own main."""
        from eventflow.server import run_app

        run_app(self, **options)


class _House:
    """The rooms of one open App."""

    def __init__(self, app: App, url: str, sink: Sink | None) -> None:
        self.app = app
        self.store = open_store(url, app.clock, **app._store_options)  # pyright: ignore[reportPrivateUsage]
        self.ids = Ids()
        self.sink = sink
        self.blobs = Blobs(Path(f"{self.store.path}.blobs"))
        self.triggers: list[Trigger] = app.triggers
        self.own_loop: _FlowThread | None = None
        self.closing = False
        self._stop_lifespan: asyncio.Event | None = None
        self._lifespan_task: asyncio.Task[Any] | None = None
        self._chores: set[asyncio.Task[Any]] = set()

    async def open(self, own_loop: bool, listen: bool, passive: bool) -> None:
        app = self.app
        await asyncio.to_thread(self.store.open)
        try:
            self.ids.raise_floor(self.store.last_id)
            self.router = Router(app.subscriptions, self.ids, app.clock)
            self.worker = Worker(
                self.store, app.clock, self.router, app.flows, self.blobs, concurrency=app._concurrency,  # pyright: ignore
                threads=app._threads, sink=self.sink, secret=secret_beside(self.store.path, "key").encode(),  # pyright: ignore
            )  # fmt: skip
            self.reactor = Reactor(self.store, self.router, app.clock, app.triggers, random.Random())
            if passive:
                return
            self.own_loop = _FlowThread() if own_loop else None
            await self.on_flow_loop(self._open_worker())
            if listen:
                self.reactor.start(await self.store.paused())
            self._chores.add(asyncio.create_task(self._retain(), name="retention"))
        except BaseException:
            await asyncio.to_thread(self.store.close)
            if self.own_loop is not None:
                await asyncio.to_thread(self.own_loop.stop)
            raise
        log.info("app.started", app=app.name, store=self.store.location, flows=len(app.flows), triggers=len(app.triggers))

    async def close(self, grace: float) -> None:
        log.info("app.draining", app=self.app.name, grace=grace)
        self.reactor.draining = True
        for chore in self._chores:
            chore.cancel()
        await asyncio.gather(self.reactor.stop(), self.on_flow_loop(self._close_worker(grace)))  # a slow poll takes no grace
        if self.own_loop is not None:
            await asyncio.to_thread(self.own_loop.stop)
        await asyncio.to_thread(self.store.close)
        log.info("app.stopped", app=self.app.name)

    async def on_flow_loop(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine where flows run."""
        return await work if self.own_loop is None else await self.own_loop.call(work)

    @property
    def flow_loop(self) -> tuple[asyncio.AbstractEventLoop, int]:
        """The loop that flows run on, and the ident of its thread; for code on the loop of the way in."""
        if self.own_loop is None:
            return asyncio.get_running_loop(), threading.get_ident()
        return self.own_loop.loop, self.own_loop.thread.ident or 0

    def known(self, flow: Flow[..., Any]) -> None:
        self.app.add(flow)

    # ----------------------------------------------------------------- the lifespan, in a task of its own: it must end where it began

    async def _open_worker(self) -> None:
        state = None
        if self.app._lifespan is not None:  # pyright: ignore[reportPrivateUsage]
            self._stop_lifespan = asyncio.Event()
            entered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            self._lifespan_task = asyncio.create_task(self._live(self.app._lifespan, entered))  # pyright: ignore
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
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Outcome] = loop.create_future()

        def tell(outcome: Outcome) -> None:
            loop.call_soon_threadsafe(lambda: None if future.done() else future.set_result(outcome))

        def fail(error: StoreError) -> None:
            loop.call_soon_threadsafe(lambda: None if future.done() else future.set_exception(StoreFailed(str(error))))

        self.worker.loop.call_soon_threadsafe(self.worker.watch, run, tell)
        self.store.on_failure(fail)
        row = await self.store.run(run)
        known = settled_outcome(row)
        return known if known is not None else await future

    # ----------------------------------------------------------------- chores

    async def _retain(self) -> None:
        """Retention, in small steps, now and then."""
        app = self.app
        while True:
            now = app.clock.now()
            removed = await self.store.prune(
                bodies_before=now - app._retention, identities_before=now - app._identities  # pyright: ignore
            )  # fmt: skip
            await asyncio.sleep(0.05 if removed else 60.0)


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


class _FlowThread:
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


@asynccontextmanager
async def opened(app: App, **options: Any) -> AsyncIterator[App]:
    """`async with opened(app, own_loop=True):`"""
    await app.open(**options)
    try:
        yield app
    finally:
        await app.close()


