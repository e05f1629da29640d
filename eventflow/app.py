"""`App`: the composition root. It knows which flows there are, what starts them, and how the rooms are put together.

Three ways to run one, with the flows unchanged:

    async with app:              embedded: intake and flows on the caller's loop; no signals, no logging of the host touched
    app.asgi()                   mounted into another ASGI app, whose lifespan opens and closes it
    app.run() / eventflow serve  a server (server.py): flows get a loop and thread of their own, the root owns the signals

Nothing happens before: making an App opens nothing, reads no environment, starts no thread.
"""

import asyncio
import os
from collections.abc import Sequence
from typing import Any

import orjson

from eventflow.core.clock import Clock, Duration, SystemClock, microseconds
from eventflow.core.errors import NotFound, RunCancelled, RunFailed, RunHeld, UsageError
from eventflow.events.event import Event, EventSink, Json, Late, Receipt, Recorded, Trigger
from eventflow.logs.log import Sink
from eventflow.routing.delivery import Delivery
from eventflow.routing.filters import Where
from eventflow.routing.patterns import Pattern, joined
from eventflow.routing.subscriptions import (
    EMIT,
    Key,
    Outlet,
    Params,
    Subscription,
    both,
    join,
    outlet,
    subscribe,
)
from eventflow.runs.run import Cancelled, Completed, Failed, Held, Outcome, show_id
from eventflow.runtime import House, Lifespan, Plan
from eventflow.sdk.flow import Flow
from eventflow.serialization.blobs import Blobs
from eventflow.serialization.codecs import decode_error, show
from eventflow.store.sqlite import SqliteStore

DAY = 86_400.0


class RunHandle:
    """A run somebody asked for. `id` is its id as shown; `duplicate` says that the idempotency key was known already."""

    def __init__(
        self, app: "App", number: int, flow: Flow[..., Any] | None, duplicate: bool
    ) -> None:
        self._app, self._flow = app, flow
        self.number, self.id, self.duplicate = number, show_id(number), duplicate

    async def result(self) -> Any:
        """The flow's value, once the run has settled; waits through retries and sleeps.

        Raises the flow's own error as a replay would see it, RunCancelled, RunHeld, RunDead, or StoreFailed.
        """
        outcome = await self._app.outcome(self.number)
        match outcome:
            case Completed():
                name, data = outcome.codec, outcome.value
                if name.endswith("@blob"):  # a file, or far away
                    name, data = await asyncio.to_thread(self._app.blobs.fetch, name, data)
                return self._flow.result.decode(name, data) if self._flow else show(name, data)
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
    `results`: `s3://bucket/prefix` for results too large for a row; by default they are files beside the store.
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
        results: str | None = None,
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
        self._store_options, self._results = store_options, results
        self._subscriptions: list[Subscription] = []
        self._outlets: list[Outlet] = []
        self._names: set[str] = set()
        self._house: House | None = None

    # ----------------------------------------------------------------- what there is

    def on(
        self,
        trigger: Trigger | Recorded | Pattern | str,
        flow: Flow[..., Any],
        *,
        where: Where = None,
        params: Params = None,
        key: Key = None,
        priority: int | None = None,
        on_failure: str = "continue",
        types: Sequence[str] = (),
        deliver: Delivery | None = None,
        name: str | None = None,
    ) -> None:
        """Subscribes a flow to a trigger; or, with a text, to events of that type that flows emit or the API receives.

        `types`: what it hears of, with `*` for any part; by default what the trigger says is usually meant, else everything.
        `where`: an EventBridge pattern over the data, or a quick plain callable. `params`: a callable from the event to the
        flow's arguments, instead of binding by name. `key`: events of equal keys run one after another. `deliver`: how many
        events make a run (`Each()`, `Batch(...)`, `Debounce(...)`, `Latest()`, `Singleflight()`). UsageError says what does
        not fit. A pattern over several events stands where a trigger does, and has its own `where` and `by`.
        """
        if isinstance(trigger, Pattern):
            if where or params or key or types or on_failure != "continue":
                raise UsageError(
                    f"{trigger.label}: where and by are said in its parts; it takes priority=, deliver= and name="
                )
            self._on_pattern(trigger, flow, priority, deliver, name)
            return
        late: Late | None = None
        if isinstance(trigger, str):
            types, place = (trigger, *types), EMIT
        elif isinstance(trigger, Recorded):
            types, place, where, late = (
                trigger.types,
                EMIT,
                both(trigger.pattern, where),
                trigger.late,
            )
        else:
            self._add_trigger(trigger)
            place, types = trigger.name, types or getattr(trigger, "heard", ())
        self.add(flow)
        made = subscribe(
            place, flow, where=where, params=params, key=key, priority=priority, on_failure=on_failure, types=types,
            deliver=deliver, name=name, taken=self._names, late=late,
        )  # fmt: skip
        self._names.add(made.name)
        self._subscriptions.append(made)

    def _on_pattern(
        self,
        pattern: Pattern,
        flow: Flow[..., Any],
        priority: int | None,
        deliver: Delivery | None,
        name: str | None,
    ) -> None:
        for each in pattern.triggers:
            self._add_trigger(each)
        self.add(flow)
        made = join(
            joined(pattern),
            flow,
            priority=priority,
            deliver=deliver,
            name=name,
            taken=self._names,
            late=pattern.late,
        )
        self._names.add(made.name)
        self._subscriptions.append(made)

    def send(
        self,
        types: str | Sequence[str],
        to: EventSink,
        *,
        where: Where = None,
        name: str | None = None,
    ) -> None:
        """Sends emitted events of these types (`*` matches any part) to a sink: at least once, in the order of recording.

        What is to be sent is recorded with the event, in one transaction, and goes on after a crash; no run waits for a sink.
        An event that the sink can never take becomes a dead letter of this outlet. `where`: as for `on`.
        """
        kinds = [types] if isinstance(types, str) else types
        self._add_outlet(outlet(to, types=kinds, where=where, name=name, taken=self._names))

    def send_dead_letters(self, to: EventSink, *, name: str | None = None) -> None:
        """Sends a copy of everything that becomes a dead letter to a sink; the ledger keeps it all the same."""
        self._add_outlet(outlet(to, dead=True, name=name, taken=self._names))

    def _add_outlet(self, made: Outlet) -> None:
        self._names.add(made.name)
        self._outlets.append(made)

    def add(self, *flows: Flow[..., Any]) -> None:
        """Makes flows known by their names, so that they can be started by name, and children of them resume."""
        for flow in flows:
            self._add(flow)

    def _add(self, flow: Flow[..., Any]) -> None:
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
        return (
            self._url or os.environ.get("EVENTFLOW_STORE") or f"sqlite:///.eventflow/{self.name}.db"
        )

    async def open(
        self, *, store: str | None = None, own_loop: bool = False, sink: Sink | None = None,
        listen: bool = True, passive: bool = False,
    ) -> None:  # fmt: skip
        """Opens the store, the worker, then the listeners. `own_loop` gives flows a loop and thread of their own.

        For the command line: without `listen` no trigger is opened; a `passive` app runs nothing either, it records and shows.
        """
        if self._house is not None:
            raise UsageError(f"the app {self.name!r} is open already")
        house = House(self._plan(), store or self.url, sink)
        await house.open(own_loop, listen and not passive, passive)
        self._house = house

    async def close(self, grace: float = 20.0) -> None:
        """Drains: stops intake, lets bodies under way end for up to `grace` seconds, puts the rest back, closes. Idempotent."""
        house = self._house
        if house is None or house.closing:
            return
        house.closing = (
            True  # the doors show what there is until the end, so the house stays in sight
        )
        try:
            await house.close(grace)
        finally:
            self._house = None

    async def __aenter__(self) -> "App":
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _plan(self) -> Plan:
        return Plan(
            self.name, self.clock, self.flows, self.triggers, self._subscriptions, self._lifespan, self._concurrency,
            self._threads, self._retention, self._identities, self._store_options, self._outlets, self._results,
        )  # fmt: skip

    @property
    def house(self) -> "House":
        """What is running. UsageError while the app is closed."""
        if self._house is None:
            raise UsageError(
                f"the app {self.name!r} is not open; use `async with app:`, app.run() or `eventflow serve`"
            )
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
        body = known.binder.unpack((), params)
        return await self.start_with(known, body, idempotency_key)

    async def start_with(
        self, flow: Flow[..., Any], params: bytes, idempotency_key: str | None = None
    ) -> RunHandle:
        """`start`, with the parameters as a JSON object."""
        house = self.house
        ident = idempotency_key or show_id(house.ids.next(self.clock.now()))
        event = Event(
            id=ident,
            source=f"/flows/{flow.name}",
            type="eventflow.run.requested",
            data=orjson.loads(params),
        )
        arrival = house.router.arrive_flow(flow, event, params=params)
        (receipt,) = await house.reactor.record([arrival], "api")
        if receipt.conflict:
            raise UsageError(
                f"idempotency key {ident!r} is known with other parameters; the first run stands, use another key"
            )
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
        self,
        event_type: str,
        data: Json = None,
        *,
        id: str | None = None,
        subject: str | None = None,
        source: str = "/app",
    ) -> Receipt:
        """Records an event for the subscriptions on its type; durable when it returns. With an `id`, once."""
        house = self.house
        ident = id or show_id(house.ids.next(self.clock.now()))
        return await self.accept(
            Event(id=ident, source=source, type=event_type, data=data, subject=subject)
        )

    async def accept(self, *events: Event) -> Any:
        """Records events on behalf of nobody's trigger: they reach the subscriptions on their types."""
        house = self.house
        receipts = await house.reactor.record(
            [house.router.arrive(EMIT, event) for event in events], EMIT
        )
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
        from eventflow.web.api import (
            make_asgi,
        )  # the one lazy import: an embedded App needs no HTTP

        return make_asgi(self, **options)

    def run(self, **options: Any) -> None:
        """Serves until SIGTERM or SIGINT, then exits the process: `eventflow serve` from a program's own main."""
        from eventflow.server.server import run_app

        run_app(self, **options)
