"""`App`: the public entry point. It declares flows and what starts them, and opens a `Runtime` that
runs them.

Three ways to run one, with the same flows:

    async with app:              embedded: on the caller's loop; no signal handlers, no log set-up
    app.asgi()                   mounted into another ASGI app, whose lifespan opens and closes it
    app.run() / eventflow serve  a server: flows have their own loop and thread; signals drain it

Making an App has no side effect: it opens nothing, reads no environment, starts no thread. Read on
in runtime.py.
"""

import asyncio
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar, Unpack, cast, overload

import msgspec

from eventflow.app_config import AppConfig, Lifespan, StoreOptions
from eventflow.core.clock import Clock, Duration, SystemClock, microseconds
from eventflow.core.declarations import declaration, duration, one_of, text, whole_number
from eventflow.core.errors import (
    NotFound,
    RunCancelled,
    RunFailed,
    RunHeld,
    StoreLocked,
    UsageError,
)
from eventflow.core.uninterrupted import uninterrupted
from eventflow.events.event import Event, EventSink, Json, LedgerTrigger, Receipt, Trigger
from eventflow.hosting import Hosting
from eventflow.logs.log import LogReceiver
from eventflow.routing.delivery import Delivery
from eventflow.routing.filters import FilterSpec
from eventflow.routing.patterns import Pattern
from eventflow.routing.subscriptions import (
    EMITTED,
    Key,
    Params,
    Subscription,
    combine_filters,
    subscribe,
    subscribe_sink,
)
from eventflow.runs.run import Cancelled, Completed, Failed, NeedsAttention, format_id
from eventflow.sdk.flow import Flow, opened_app
from eventflow.serialization.codecs import to_readable
from eventflow.serialization.errors import decode_error

if TYPE_CHECKING:  # loaded when an App opens: a program that only declares flows starts sooner
    from eventflow.runtime import Runtime
    from eventflow.store.sqlite import SqliteStore

DAY = 86_400.0


T = TypeVar("T")


class RunHandle(Generic[T]):
    """A run that was started. `id` is its id in base 32; `duplicate`: the idempotency key was
    known, this is the first run of it.
    """

    def __init__(
        self, app: "App", number: int, flow: Flow[..., Any] | None, duplicate: bool
    ) -> None:
        self._app = app
        self._flow = flow
        self.number = number
        self.id = format_id(number)
        self.duplicate = duplicate

    def __repr__(self) -> str:
        flow = "" if self._flow is None else f", flow={self._flow.name!r}"
        return f"RunHandle({self.id!r}{flow}{', duplicate=True' if self.duplicate else ''})"

    def __await__(self) -> NoReturn:
        raise TypeError("a run is not awaited itself; write `await run.result()`")

    async def result(self) -> T:
        """The flow's value, once the run has settled; waits through retries and sleeps.

        Raises the flow's own error as a replay would see it, RunCancelled, RunHeld, RunDead, or
        StoreFailed.
        """
        outcome = await self._app.runtime.outcome(self.number)
        match outcome:
            case Completed():
                name = outcome.codec
                data = outcome.value
                if name.endswith("@blob"):  # a file or an object in S3
                    name, data = await asyncio.to_thread(self._app.runtime.blobs.fetch, name, data)
                if self._flow is None:
                    return cast(T, to_readable(name, data))
                return self._flow.result.decode(name, data)
            case Failed():
                raise decode_error(outcome.error)
            case Cancelled():
                raise RunCancelled(f"run {self.id} was cancelled: {outcome.reason}")
            case NeedsAttention():
                raise RunHeld(f"run {self.id} is held: {outcome.reason}")
            case _:
                raise RunFailed(f"run {self.id} ended as {type(outcome).__name__}")

    async def cancel(self, reason: str = "cancelled by the program") -> None:
        await self._app.store.cancel(self.number, reason)

    async def row(self) -> dict[str, Any]:
        """The run's row in the ledger, as it is now."""
        return await self._app.store.run(self.number)


class App:
    """Flows, what starts them, and the store that keeps them.

    `store`: `sqlite:///path` (relative) or `sqlite:////path`; default `$EVENTFLOW_STORE`, else
    `sqlite:///.eventflow/NAME.db`. `lifespan`: an async context manager entered once on the flow
    loop; flows and tasks read what it yields as `current_run().state`. `concurrency`: runs that
    work at once. `threads`: plain `def` tasks that run at once. `retention`: how long bodies,
    journals and settled runs are kept; `identities`: how long an event's id is remembered.
    `results`: `s3://bucket/prefix` for results too large for a row; by default they are files
    beside the store. `strict`: a run fails if its flow forgot to await a call, instead of only a
    warning.
    """

    @declaration
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
        results: str | None = None,
        strict: bool = False,
        clock: Clock | None = None,
        **store_options: Unpack[StoreOptions],
    ) -> None:
        _check_store_options(store_options)
        self._config = AppConfig(
            name=text(name, "App(name)"),
            clock=clock or SystemClock(),
            lifespan=lifespan,
            concurrency=whole_number(concurrency, "App(concurrency=)"),
            threads=whole_number(threads, "App(threads=)"),
            retention=microseconds(duration(retention, "App(retention=)")),
            identities=microseconds(duration(identities, "App(identities=)")),
            results=results,
            strict=strict,
            store_options=store_options,
        )
        self.name: str = name
        self.clock: Clock = self._config.clock
        self.flows: dict[str, Flow[..., Any]] = self._config.flows  # by name
        self.triggers: list[Trigger] = self._config.triggers
        self.subscriptions: Sequence[Subscription] = self._config.subscriptions
        self._url = store
        self._runtime: Runtime | None = None
        self._hosting = Hosting()

    def __repr__(self) -> str:
        state = "closed" if self._runtime is None else "open"
        return (
            f"<App {self.name!r} {state}, store={self.url!r}, flows={len(self.flows)}, "
            f"triggers={len(self.triggers)}, subscriptions={len(self.subscriptions)}>"
        )

    # ----------------------------------------------------------------- declaration

    @declaration
    def on(
        self,
        trigger: Trigger | LedgerTrigger | Pattern | str,
        flow: Flow[..., Any],
        *,
        where: FilterSpec = None,
        params: Params = None,
        key: Key = None,
        priority: int | None = None,
        on_failure: str = "continue",
        types: Sequence[str] = (),
        deliver: Delivery | None = None,
        name: str | None = None,
    ) -> None:
        """Subscribes a flow to a trigger; with a string, to emitted and posted events of that type.

        `types`: the event types it receives, with `*` for any part; by default the trigger's
        default types, else all. `where`: an EventBridge pattern over the data, or a quick
        synchronous callable. `params`: a callable from the event to the flow's arguments, instead
        of binding by name. `key`: events of equal keys run one after another. `deliver`: how many
        events make a run (`Each()`, `Batch(...)`, `Debounce(...)`, `Latest()`, `Singleflight()`). A
        pattern over several events takes the place of a trigger and has its own `where` and `by`.
        Raises UsageError for what does not fit.
        """
        if isinstance(trigger, Pattern):
            if where or params or key or types or on_failure != "continue":
                raise UsageError(
                    f"{trigger.label}: where and by belong to its parts;"
                    " it takes priority=, deliver= and name="
                )
            self._config.add_pattern(trigger, flow, priority, deliver, name)
            return
        source = EMITTED
        if isinstance(trigger, str):
            types = (trigger, *types)
        elif isinstance(trigger, LedgerTrigger):
            types = trigger.types
            where = combine_filters(trigger.pattern, where)
        else:
            self._config.add_trigger(trigger)
            types = types or getattr(trigger, "default_types", ())
            source = trigger.name
        self.add(flow)
        self._config.subscriptions.append(
            subscribe(
                source,
                flow,
                where=where,
                params=params,
                key=key,
                priority=priority,
                on_failure=on_failure,
                types=types,
                deliver=deliver,
                name=name,
                used_names=self._config.subscription_names(),
                late=trigger.late if isinstance(trigger, LedgerTrigger) else None,
            )
        )

    @declaration
    def send(
        self,
        types: str | Sequence[str],
        to: EventSink,
        *,
        where: FilterSpec = None,
        name: str | None = None,
    ) -> None:
        """Sends emitted events of these types (`*` matches any part) to a sink: at least once, in
        the order of recording.

        What to send is recorded with the event, in one transaction, so that a crash loses nothing;
        no run waits for a sink. An event that the sink rejects for good becomes a dead letter of
        this sink subscription. `where`: as for `on`.
        """
        kinds = [types] if isinstance(types, str) else types
        self._config.sink_subscriptions.append(
            subscribe_sink(
                to,
                types=kinds,
                where=where,
                name=name,
                used_names=self._config.subscription_names(),
            )
        )

    @declaration
    def send_dead_letters(self, to: EventSink, *, name: str | None = None) -> None:
        """Sends a copy of every new dead letter to a sink; the ledger keeps the original."""
        self._config.sink_subscriptions.append(
            subscribe_sink(
                to, dead_letters=True, name=name, used_names=self._config.subscription_names()
            )
        )

    @declaration
    def add(self, *flows: Flow[..., Any]) -> None:
        """Registers flows by name, so that they can be started by name and their unfinished runs
        resume.
        """
        for flow in flows:
            self._config.add_flow(flow)

    # ----------------------------------------------------------------- open and close

    @property
    def url(self) -> str:
        """The store's URL; read from the environment when it was not given."""
        return (
            self._url or os.environ.get("EVENTFLOW_STORE") or f"sqlite:///.eventflow/{self.name}.db"
        )

    async def open(
        self,
        *,
        store: str | None = None,
        own_loop: bool = False,
        logs: LogReceiver | None = None,
        listen: bool = True,
        passive: bool = False,
        read_only: bool = False,
        require_secrets: bool = True,
    ) -> None:
        """Opens the store, the worker, then the listeners. With `own_loop` flows get a loop and
        thread of their own.

        For the command line: without `listen` no trigger is started; a `passive` app runs no flow
        either, it only records and reads; with `read_only` it opens the store of another process,
        and what would change it raises StoreError. `store` replaces the App's own URL; `logs`
        stores the log lines of runs. `require_secrets`: raise EmptySecret before anything is
        opened; without it, a webhook whose secret is unset refuses every request (for tests).
        """
        if self._runtime is not None:
            raise UsageError(f"the app {self.name!r} is open already")
        if listen and not (passive or read_only) and require_secrets:
            self.check_secrets()
        config = msgspec.structs.replace(self._config, clock=self.clock)  # tests may set it
        if read_only:
            options = {**config.store_options, "read_only": True}
            config = msgspec.structs.replace(config, store_options=options)
        from eventflow.runtime import Runtime

        runtime = Runtime(config, store or self.url, logs)
        await runtime.open(own_loop, listen and not passive, passive)
        self._runtime = runtime
        opened_app.set(self)

    async def close(self, grace: float = 20.0) -> None:
        """Drains and closes: intake stops, attempts may end within `grace` seconds, the rest is
        recorded as interrupted.

        Idempotent. The App counts as open until the end, so that HTTP can show the drain. A cancel
        of the caller, or a lifespan that raises, is raised when everything is closed.
        """
        runtime = self._runtime
        if runtime is None or runtime.closing:
            return
        runtime.closing = True
        try:
            await uninterrupted(runtime.close(grace))
        finally:
            self._runtime = None

    async def __aenter__(self) -> "App":
        """`open`, for a host: the log lines of runs are kept beside the store.

        If another worker of the same server has the store, the App stays closed, with a line in the
        log, and what needs it raises StoreLocked.
        """
        await self._hosting.open(self.name, self.url, self.clock, lambda logs: self.open(logs=logs))
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self.close()
        finally:
            await uninterrupted(self._hosting.close())

    @property
    def runtime(self) -> "Runtime":
        """The running parts. UsageError while the App is closed, StoreLocked if another worker of
        the server has its store.
        """
        if self._runtime is None:
            if (locked := self._hosting.locked) is not None:
                raise StoreLocked(locked.path, locked.pid, by_sibling=True)
            raise UsageError(
                f"the app {self.name!r} is not open; make the call inside of `async with app:`,"
                " or use app.run() or `eventflow serve`"
            )
        return self._runtime

    def check_secrets(self) -> None:
        """Raises EmptySecret for a secret of the environment that is empty or unset.

        `open` calls it before it listens; importing the app needs no secret.
        """
        self._config.check_secrets()

    @property
    def is_open(self) -> bool:
        return self._runtime is not None

    @property
    def store(self) -> "SqliteStore":
        return self.runtime.store

    # ----------------------------------------------------------------- runs and events

    @overload
    async def start(
        self, flow: Flow[..., T], /, *, idempotency_key: str | None = None, **params: Any
    ) -> RunHandle[T]: ...
    @overload
    async def start(
        self, flow: str, /, *, idempotency_key: str | None = None, **params: Any
    ) -> RunHandle[Any]: ...
    async def start(
        self,
        flow: Flow[..., Any] | str,
        /,
        *args: Any,
        idempotency_key: str | None = None,
        **params: Any,
    ) -> RunHandle[Any]:
        """Starts a run; durable when it returns. With a known `idempotency_key`, the first run of
        that key, which may be past its retention.

        Raises BindingError when the parameters do not fit the flow's signature, NotFound for an
        unknown flow name, IdempotencyConflict for a key that is known with other parameters,
        StoreFull at once when the ledger is full.
        """
        known = self.flow(flow)
        if args:
            raise UsageError(
                f"app.start({known.name}, …): expected parameters by name, found {len(args)} "
                f"positional; write app.start({known.call_form})"
            )
        try:
            body = known.binder.unpack((), params)
        except TypeError as error:  # it quotes the call of a plain function
            raise known.binder.misfit(params, error) from None
        number, duplicate = await self.runtime.start_run(known, body, idempotency_key)
        return RunHandle(self, number, known, duplicate)

    def flow(self, flow: Flow[..., Any] | str) -> Flow[..., Any]:
        """A flow by its name, or itself."""
        if not isinstance(flow, str):
            self.add(flow)
            return flow
        if flow not in self.flows:
            known = ", ".join(self.flows) or "none"
            hint = f"the app {self.name!r} has {known}; app.add(flow) adds one"
            raise NotFound("flow", flow, hint)
        return self.flows[flow]

    async def emit(
        self,
        event_type: str,
        data: Json = None,
        *,
        id: str | None = None,
        subject: str | None = None,
        source: str = "/app",
    ) -> Receipt:
        """Records an event for the subscriptions on its type; durable when it returns. With an
        `id`, once.

        Raises StoreFull at once when the ledger is full.
        """
        if id is not None:
            text(id, "app.emit(id=)")
        ident = id or format_id(self.runtime.ids.next(self.clock.now()))
        (receipt,) = await self.accept(
            Event(id=ident, source=source, type=event_type, data=data, subject=subject)
        )
        return receipt

    async def accept(self, *events: Event, max_wait: float | None = 0.0) -> list[Receipt]:
        """Records events that come from no trigger, for the subscriptions on their types; durable
        when it returns.

        Waits while the ledger is full, for up to `max_wait` seconds (None: as long as it takes),
        then raises StoreFull.
        """
        runtime = self.runtime
        for event in events:
            if not isinstance(event, Event):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise UsageError(
                    f"app.accept(): expected an Event, found {event!r}; to record data as "
                    "an event: app.emit(type, data)"
                )
        return await runtime.reactor.record(
            lambda: runtime.router.route_all(EMITTED, events),
            EMITTED,
            max_wait=max_wait,
        )

    async def run_handle(self, run: str | int) -> RunHandle[Any]:
        """A handle for a run, by its id or a unique prefix or suffix of it."""
        row = await self.store.run(run)
        return RunHandle(self, row["id"], self.flows.get(row["flow"]), False)

    # ----------------------------------------------------------------- as a server

    def asgi(self, **options: Any) -> Any:
        """An ASGI app: webhooks, API, health. Its lifespan opens and closes this App; mount it, or
        serve it.

        Mounted into another app, whose lifespan does not reach it, open the App yourself: `async
        with app:`.
        """
        from eventflow.web.api import make_asgi  # lazy: an embedded App needs no HTTP

        return make_asgi(self, **options)

    def run(self, **options: Any) -> None:
        """Serves until SIGTERM or SIGINT, then exits the process: `eventflow serve` from a
        program's own main.
        """
        from eventflow.server.server import run_app  # lazy: an embedded App needs no server

        run_app(self, **options)


def _check_store_options(given: StoreOptions) -> None:
    one_of(given.get("synchronous", "FULL"), "App(synchronous=)", ("FULL", "NORMAL"))
    whole_number(given.get("max_pending", 1), "App(max_pending=)")
    whole_number(given.get("max_pending_bytes", 1), "App(max_pending_bytes=)")
    whole_number(given.get("free_floor") or 0, "App(free_floor=)", minimum=0)
    whole_number(given.get("ballast", 0), "App(ballast=)", minimum=0)
