"""The way in: one supervised listener per trigger, and the intake that makes their events durable.

    Trigger.listen ─► TriggerIntake.accept ─► Router.arrive ─► Store.record ─► receipts ─► the trigger acknowledges

A listener that raises is logged and opened again with jittered backoff; the others never notice. Back-pressure has two bounds:
events on their way to a commit, and the ledger itself; at either `accept` raises StoreFull at once, and the source slows down
in its own way (a partition pauses, a webhook waits a little and answers 503). Nothing is dropped here. A trigger that floods
leaves room for the others: on their way to a commit it has at most SHARE times what stays free, so one alone takes two thirds,
two 40 % each, and there is always some left for who comes anew. A call that finds nothing on its way may be of any size. The
next rooms are routing, then the store.
"""

import asyncio
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence

import msgspec

from eventflow.core.clock import Clock
from eventflow.core.errors import StoreError, StoreFailed, StoreFull
from eventflow.events.event import Event, Json, Receipt, Trigger, Undecodable
from eventflow.logs.log import get_logger
from eventflow.routing.router import Router
from eventflow.store.protocol import Arrival, Record, Store

MAX_EVENTS = 4096
"""Events on their way to a commit."""
MAX_BYTES = 64 << 20
"""Their bytes."""
SHARE = 2
"""How much a trigger may have there, in events and in bytes, for each that stays free: n that flood have 2 / (1 + 2n) each."""
BACKOFF = (0.5, 60.0)
"""Seconds before a listener is opened again: first and longest; full jitter between."""
SETTLED = 60.0
"""A listener that lived this long begins its backoff anew."""

log = get_logger("eventflow.reactor")


class Health(msgspec.Struct):
    """How a trigger fares; instants in microseconds. `state`: starting, listening, reopening, paused, stopped."""

    name: str
    kind: str
    state: str = "starting"
    events: int = 0
    duplicates: int = 0
    undecodable: int = 0
    failures: int = 0
    last_event_at: int | None = None
    last_error: str | None = None
    paused: bool = False


class Underway(msgspec.Struct):
    """What a trigger has on its way to a commit."""

    events: int = 0
    size: int = 0


class TriggerIntake:
    """The way into the ledger, bound to one trigger (event.Intake)."""

    def __init__(self, reactor: "Reactor", trigger: str, health: Health) -> None:
        self._reactor, self._trigger, self._health = reactor, trigger, health
        self.log = get_logger("eventflow.trigger").bind(trigger=trigger)

    async def accept(
        self, *items: Event | Undecodable, cursor: Mapping[str, Json] | None = None
    ) -> list[Receipt]:
        reactor = self._reactor
        arrivals = [
            reactor.router.arrive(self._trigger, item, self._health.paused) for item in items
        ]
        receipts = await reactor.record(arrivals, self._trigger, cursor)
        self._count(items, receipts)
        return receipts

    def _count(self, items: Sequence[Event | Undecodable], receipts: Sequence[Receipt]) -> None:
        health = self._health
        if not items:
            return
        health.last_event_at = self._reactor.clock.now()
        fresh = 0
        for item, receipt in zip(items, receipts, strict=True):
            if receipt.conflict:
                self.log.warning("event.conflicted", event_id=receipt.event_id)
            elif receipt.duplicate:
                health.duplicates += 1
            else:
                fresh += 1
            if type(item) is Undecodable:
                health.undecodable += 1
                self.log.warning("event.dead_lettered", event_id=item.id, error=item.error)
        health.events += fresh
        if fresh:
            self.log.debug("event.recorded", count=fresh, event_id=receipts[0].event_id)

    async def cursor(self) -> Mapping[str, Json]:
        return await self._reactor.store.cursor(self._trigger)


class Reactor:
    """Runs the listeners. `start` it on the loop of the way in, `stop` it there."""

    def __init__(
        self,
        store: Store,
        router: Router,
        clock: Clock,
        triggers: Sequence[Trigger],
        draw: random.Random,
    ) -> None:
        self.store, self.router, self.clock = store, router, clock
        self.health = {
            trigger.name: Health(trigger.name, type(trigger).__name__) for trigger in triggers
        }
        self.draining = False
        self._triggers = triggers
        self._draw = draw
        self._listeners: list[asyncio.Task[None]] = []
        self._events = 0
        self._bytes = 0
        self._underway: defaultdict[str, Underway] = defaultdict(
            Underway
        )  # by trigger, of which an app has few

    def start(self, paused: set[str]) -> None:
        """Opens every listener."""
        self.draining = False
        for trigger in self._triggers:
            self.health[trigger.name].paused = trigger.name in paused
            self._listeners.append(
                asyncio.create_task(self._keep_listening(trigger), name=f"listen {trigger.name}")
            )

    async def stop(self) -> None:
        """Accepts nothing more; listeners end what they have under way (they are given 10 s)."""
        self.draining = True
        for listener in self._listeners:
            listener.cancel()
        if self._listeners:
            await asyncio.wait(self._listeners, timeout=12.0)
        self._listeners.clear()

    # ----------------------------------------------------------------- listeners

    async def _keep_listening(self, trigger: Trigger) -> None:
        health = self.health[trigger.name]
        intake = TriggerIntake(self, trigger.name, health)
        wait = BACKOFF[0]
        while True:
            opened = self.clock.monotonic()
            health.state = "listening"
            log.info("trigger.opened", trigger=trigger.name, kind=health.kind)
            try:
                await trigger.listen(intake)
                error: Exception | None = None
            except Exception as raised:  # around a listener: a source may fail in any way; the others must not notice
                error = raised
            if self.clock.monotonic() - opened > SETTLED:
                wait = BACKOFF[0]
            self._note_end(health, error)
            await asyncio.sleep(self._draw.uniform(0, wait))
            wait = min(wait * 2, BACKOFF[1])

    def _note_end(self, health: Health, error: Exception | None) -> None:
        health.state = "reopening"
        health.failures += 1
        health.last_error = (
            "the listener returned" if error is None else f"{type(error).__name__}: {error}"
        )
        if isinstance(error, StoreFailed):
            return  # The root stops the process, and says why once.
        log.warning(
            "trigger.reopened",
            trigger=health.name,
            error=health.last_error,
            failures=health.failures,
        )

    def pause(self, trigger: str, paused: bool) -> None:
        """While paused, events are recorded and their runs held."""
        self.health[trigger].paused = paused

    # ----------------------------------------------------------------- recording

    async def record(
        self,
        arrivals: Sequence[Arrival],
        trigger: str = "",
        cursor: Mapping[str, Json] | None = None,
    ) -> list[Receipt]:
        """Durable when it returns. Raises StoreFull when there is no room, StoreFailed when the outcome is unknown."""
        size = 0
        for arrival in arrivals:
            size += len(arrival.body)
        own = self._underway[trigger]
        if arrivals and (full := self._full(own, len(arrivals), size)) is not None:
            raise full
        self._events += len(arrivals)
        self._bytes += size
        own.events += len(arrivals)
        own.size += size
        try:
            return await self._post(Record(arrivals, trigger, cursor))
        finally:
            self._events -= len(arrivals)
            self._bytes -= size
            own.events -= len(arrivals)
            own.size -= size

    def _post(self, op: Record) -> asyncio.Future[list[Receipt]]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Receipt]] = loop.create_future()

        def reply(result: list[Receipt] | StoreError) -> None:
            if future.done():
                return  # The caller was cancelled; the transaction was not.
            if isinstance(result, StoreError):
                future.set_exception(result)
            else:
                future.set_result(result)

        self.store.post(op, reply, loop)
        return future

    def _full(self, own: Underway, events: int, size: int) -> StoreFull | None:
        if self.draining:
            return StoreFull("the server is stopping", 5.0)
        if self._events:
            # Of a full queue less than nothing is free, so the share bounds the sum too.
            free, free_bytes = MAX_EVENTS - self._events - events, MAX_BYTES - self._bytes - size
            if own.events + events > SHARE * free or own.size + size > SHARE * free_bytes:
                return StoreFull(
                    f"{self._events} events wait for their commit, {own.events} from the same trigger",
                    1.0,
                )
        return self.store.room()
