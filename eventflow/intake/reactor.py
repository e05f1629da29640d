"""The reactor: one supervised listener per trigger, and the intake that makes their events durable.

    Trigger.listen ─► TriggerIntake.accept ─► Router.route_all ─► Store.post ─► receipts ─► acks

What the calls of a trigger hand in within one turn of the loop is one operation of the store.
`Runtime` starts and stops it on the intake loop. A listener that raises is logged and restarted
with jittered backoff; the others are not affected. Back-pressure has two bounds: events in the
commit queue (here) and the ledger (`Store.capacity`). At either, `accept` waits while it is full
(core/backpressure.py); no event is dropped. A trigger that floods leaves space to others: in the
commit queue it may have FAIR_SHARE_FACTOR times what stays free, so one alone takes two thirds, two
take 40 % each, and a newcomer always finds space. A call that finds the queue empty may be of any
size. Read on in routing/router.py, then store/writer.py.
"""

import asyncio
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import msgspec

from eventflow.core.backpressure import wait_while_full
from eventflow.core.clock import Clock
from eventflow.core.errors import (
    ANY_FAILURE,
    StoreError,
    StoreFailed,
    StoreFull,
    error_line,
    value_or_none,
)
from eventflow.core.retry import Backoff
from eventflow.events.event import Event, EventOutcome, Json, Receipt, Trigger, Undecodable
from eventflow.intake.received_log import log_received
from eventflow.logs.log import get_logger
from eventflow.loop.left_behind import leave_behind
from eventflow.routing.dead_letter_log import log_dead_letters
from eventflow.routing.plans import identity
from eventflow.routing.router import Router
from eventflow.store.protocol import Arrival, RecordEvents, Store

MAX_EVENTS = 4096
"""Events in the commit queue: posted to the store, not yet committed."""
MAX_BYTES = 64 << 20
"""Bytes of their bodies."""
MAX_WAITING_BYTES = 64 << 20
"""Bytes of the calls of one trigger that wait with a `max_wait` (HTTP requests): beyond
them StoreFull comes at once.
"""
FAIR_SHARE_FACTOR = 2
"""How much a trigger may have in the queue, in events and in bytes, for each one free: n that flood
have 2 / (1 + 2n) each.
"""
STABLE_AFTER_SECONDS = 60.0
"""A listener that ran this long starts its backoff from the first delay again."""
STOP_TIMEOUT_SECONDS = 12.0
"""For all listeners to end after their cancel; a trigger may shield a poll for 10 s."""
BACKPRESSURE_LOG_INTERVAL_SECONDS = 30.0
"""Between two `trigger.backpressure` lines of one trigger: a ledger at its bound is full again
after every commit.
"""

log = get_logger("eventflow.reactor")
LOG_EVENTS = {
    "event.conflicted": (
        "A known event arrived with other content. The first one stays; the second is a dead "
        "letter, or only counted if it is a drift alert, which is repeated with its current value."
    ),
    "event.recorded": "An event and its runs are durable in the ledger (debug).",
    "trigger.backpressure": "The ledger or the commit queue is full: events of a trigger wait.",
    "trigger.restarted": (
        "The listener of a trigger ended and was started again; `error` says why it ended."
    ),
    "trigger.started": "A trigger listens.",
}


class TriggerHealth(msgspec.Struct):
    """The state of one trigger. Instants in microseconds.

    `state`: starting, listening, restarting or stopped. `backpressure`: why calls wait
    now, None while none does.
    """

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
    backpressure: str | None = None


class AcceptedCall(msgspec.Struct):
    """The items of one call on their way to their commit; `size` in bytes of their bodies."""

    arrivals: Sequence[Arrival]
    cursor: Mapping[str, Json] | None
    size: int
    receipts: "asyncio.Future[list[Receipt]]"


class InFlight(msgspec.Struct):
    """What one trigger has in the commit queue, and what waits to get there. Sizes in bytes.

    `turn`: the calls of this turn of the loop, which `Reactor` posts at its end as one operation.
    """

    turn: list[AcceptedCall] = []
    events: int = 0
    size: int = 0
    waiting_calls: int = 0
    waiting_size: int = 0
    backpressure_logged_at: float = float("-inf")


class TriggerIntake:
    """The intake of one trigger (implements `events.event.Intake`)."""

    def __init__(self, reactor: "Reactor", trigger: str, health: TriggerHealth) -> None:
        self._reactor = reactor
        self._trigger = trigger
        self._health = health
        self.log = get_logger("eventflow.trigger").bind(trigger=trigger)

    async def accept(
        self,
        *items: Event | Undecodable,
        cursor: Mapping[str, Json] | None = None,
        max_wait: float | None = None,
    ) -> list[Receipt]:
        route = partial(self._route, items)
        receipts = await self._reactor.record(route, self._trigger, cursor, max_wait=max_wait)
        self._count(items, receipts)
        return receipts

    def _route(self, items: Sequence[Event | Undecodable]) -> list[Arrival]:
        # Again after each wait: the trigger may have been paused or resumed meanwhile.
        return self._reactor.router.route_all(self._trigger, items, self._health.paused)

    def _count(self, items: Sequence[Event | Undecodable], receipts: Sequence[Receipt]) -> None:
        health = self._health
        if not items:
            return
        health.last_event_at = self._reactor.clock.now()
        known = [receipt for receipt in receipts if receipt.duplicate or receipt.conflict]
        for receipt in known:
            if receipt.conflict:
                self.log.warning("event.conflicted", event_id=receipt.event_id)
            else:
                health.duplicates += 1
        health.undecodable += [*map(type, items)].count(Undecodable)
        if fresh := len(receipts) - len(known):
            health.events += fresh
            self.log.debug("event.recorded", count=fresh, event_id=receipts[0].event_id)

    async def cursor(self) -> Mapping[str, Json]:
        return await self._reactor.store.cursor(self._trigger)

    async def outcomes(self, source: str, ids: Sequence[str]) -> Mapping[str, EventOutcome]:
        keys = [identity(self._trigger, source, ident) for ident in ids]
        found = await self._reactor.store.outcomes(keys)
        pairs = zip(ids, found, strict=True)
        return {ident: outcome for ident, outcome in pairs if outcome is not None}


class Reactor:
    """Runs the listeners and records events. Everything here is called on the intake loop."""

    def __init__(
        self,
        store: Store,
        router: Router,
        clock: Clock,
        triggers: Sequence[Trigger],
        rng: random.Random,
    ) -> None:
        self.store = store
        self.router = router
        self.clock = clock
        self.health: dict[str, TriggerHealth] = {
            trigger.name: TriggerHealth(trigger.name, type(trigger).__name__)
            for trigger in triggers
        }
        self.draining: bool = False  # also set by the server's signal handler
        self.logs_received: bool = False  # whether each event gets a log line
        self._triggers = triggers
        self._repeats_may_differ = frozenset(
            trigger.name for trigger in triggers if getattr(trigger, "repeats_may_differ", False)
        )
        self._rng = rng
        self._listeners: list[asyncio.Task[None]] = []
        self._events: int = 0  # in the commit queue
        self._bytes: int = 0
        self._in_flight: defaultdict[str, InFlight] = defaultdict(InFlight)  # by trigger

    def start(self, paused: set[str]) -> None:
        """Starts every listener. `paused`: names of the triggers that are paused."""
        self.draining = False
        for trigger in self._triggers:
            self.health[trigger.name].paused = trigger.name in paused
            self._listeners.append(
                asyncio.create_task(self._keep_listening(trigger), name=f"listen {trigger.name}")
            )

    async def stop(self) -> None:
        """Accepts no more events and cancels the listeners; a poll under way may finish for up to
        10 s.
        """
        self.draining = True
        for listener in self._listeners:
            listener.cancel()
        if self._listeners:
            _, left = await asyncio.wait(self._listeners, timeout=STOP_TIMEOUT_SECONDS)
            for listener in left:  # it ignores its cancel
                leave_behind(listener)
        self._listeners.clear()

    @property
    def tasks(self) -> Sequence[asyncio.Task[None]]:
        """One per listener."""
        return tuple(self._listeners)

    # ----------------------------------------------------------------- listeners

    async def _keep_listening(self, trigger: Trigger) -> None:
        health = self.health[trigger.name]
        intake = TriggerIntake(self, trigger.name, health)
        backoff = Backoff(rng=self._rng)
        try:
            while True:
                started = self.clock.monotonic()
                health.state = "listening"
                log.info("trigger.started", trigger=trigger.name, kind=health.kind)
                end = "the listener returned"
                is_failed_store = False
                try:
                    await trigger.listen(intake)
                except (
                    ANY_FAILURE
                ) as error:  # a source may fail in any way; the others are unaffected
                    if self.draining and isinstance(error, StoreFull):
                        return  # the drain ended its wait; it is cancelled next
                    end = error_line(error)
                    is_failed_store = isinstance(error, StoreFailed)
                if self.clock.monotonic() - started > STABLE_AFTER_SECONDS:
                    backoff.reset()
                retry_in = next(backoff)
                self._note_end(health, end, retry_in, is_failed_store)
                await asyncio.sleep(retry_in)
        finally:
            health.state = "stopped"

    def _note_end(
        self, health: TriggerHealth, end: str, retry_in: float, is_failed_store: bool
    ) -> None:
        health.state = "restarting"
        health.failures += 1
        health.last_error = end
        if is_failed_store:
            return  # the server stops the process and logs the reason once
        log.warning(
            "trigger.restarted",
            trigger=health.name,
            error=health.last_error,
            failures=health.failures,
            retry_in=round(retry_in, 3),
        )

    def pause(self, trigger: str, paused: bool) -> None:
        """While paused, events are recorded and their runs are paused."""
        self.health[trigger].paused = paused

    # ----------------------------------------------------------------- recording

    async def record(
        self,
        route: Callable[[], Sequence[Arrival]],
        trigger: str = "",
        cursor: Mapping[str, Json] | None = None,
        *,
        max_wait: float | None = 0.0,
    ) -> list[Receipt]:
        """Records what `route` returns, in one transaction; durable when it returns.

        `route` is called before each try. While the ledger or the queue is full it waits for up to
        `max_wait` seconds, None for as long as it takes. Raises StoreFull then, and at once while
        draining; StoreFailed when the outcome is unknown.
        """
        try:
            return await self._enter(route(), trigger, cursor)
        except StoreFull as full:  # nothing was recorded
            if not full.closing:
                self._log_backpressure(trigger, full)
            if full.closing or max_wait == 0:
                raise
            size = 0 if max_wait is None else sum(len(arrival.body) for arrival in route())
            if self._in_flight[trigger].waiting_size + size > MAX_WAITING_BYTES:
                raise
            reason = str(full)
        return await self._record_later(route, trigger, cursor, max_wait, size, reason)

    async def _record_later(
        self,
        route: Callable[[], Sequence[Arrival]],
        trigger: str,
        cursor: Mapping[str, Json] | None,
        max_wait: float | None,
        size: int,
        reason: str,
    ) -> list[Receipt]:
        """`size`: bytes of the waiting events. `reason`: why there is no room."""
        own = self._in_flight[trigger]
        health = self.health.get(trigger)
        own.waiting_calls += 1
        own.waiting_size += size
        if health is not None:
            health.backpressure = reason
        try:
            return await wait_while_full(lambda: self._enter(route(), trigger, cursor), max_wait)
        finally:
            own.waiting_calls -= 1
            own.waiting_size -= size
            if health is not None and not own.waiting_calls:
                health.backpressure = None

    def _log_backpressure(self, trigger: str, full: StoreFull) -> None:
        own = self._in_flight[trigger]
        now = self.clock.monotonic()
        if trigger in self.health and (
            now - own.backpressure_logged_at >= BACKPRESSURE_LOG_INTERVAL_SECONDS
        ):
            own.backpressure_logged_at = now
            log.warning("trigger.backpressure", trigger=trigger, reason=str(full))

    def _enter(
        self, arrivals: Sequence[Arrival], trigger: str, cursor: Mapping[str, Json] | None
    ) -> "asyncio.Future[list[Receipt]]":
        """Adds a call to the commit queue. Raises StoreFull if that is full."""
        size = sum([len(arrival.body) for arrival in arrivals])
        events = len(arrivals)
        own = self._in_flight[trigger]
        if events:
            self._check_room(own, events, size)
        self._events += events
        self._bytes += size
        own.events += events
        own.size += size
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Receipt]] = loop.create_future()
        if not own.turn:
            loop.call_soon(self._post_turn, trigger, own)
        own.turn.append(AcceptedCall(arrivals, cursor, size, future))
        return future

    def _post_turn(self, trigger: str, own: InFlight) -> None:
        calls = own.turn
        own.turn = []
        self._post(trigger, calls)

    def _post(self, trigger: str, calls: Sequence[AcceptedCall]) -> None:
        if len(calls) == 1:
            arrivals = calls[0].arrivals
            cursor = calls[0].cursor
        else:
            arrivals = [arrival for call in calls for arrival in call.arrivals]
            cursor = _merged_cursor(calls)
            if cursor is None:
                self._post_each(trigger, calls)
                return
        route_conflict = None if trigger in self._repeats_may_differ else self.router.route_conflict
        op = RecordEvents(arrivals, trigger, cursor, route_conflict)
        try:
            reply = partial(self._answer, trigger, calls, arrivals)
            self.store.post(op, reply, asyncio.get_running_loop())
        except StoreError as error:  # the store is closed
            self._answer(trigger, calls, arrivals, error)

    def _post_each(self, trigger: str, calls: Sequence[AcceptedCall]) -> None:
        """Each call in its own operation: one cannot be applied, and must not fail the others."""
        for call in calls:
            self._post(trigger, [call])

    def _answer(
        self,
        trigger: str,
        calls: Sequence[AcceptedCall],
        arrivals: Sequence[Arrival],
        result: list[Receipt] | StoreError,
    ) -> None:
        """Gives each call its part of the reply."""
        is_error = isinstance(result, StoreError)
        if is_error and len(calls) > 1 and not isinstance(result, StoreFull | StoreFailed):
            self._post_each(trigger, calls)
            return
        own = self._in_flight[trigger]
        size = sum([call.size for call in calls])
        self._events -= len(arrivals)
        self._bytes -= size
        own.events -= len(arrivals)
        own.size -= size
        if not is_error:
            self._log_arrivals(arrivals, result)
        first = 0
        for call in calls:
            after = first + len(call.arrivals)
            if call.receipts.done():  # the caller was cancelled; the transaction was not
                pass
            elif is_error:
                call.receipts.set_exception(result)
            else:
                call.receipts.set_result(result[first:after])
            first = after

    def _log_arrivals(self, arrivals: Sequence[Arrival], receipts: Sequence[Receipt]) -> None:
        if not self.logs_received and not [each for each in arrivals if each.dead_letters]:
            return
        for arrival, receipt in zip(arrivals, receipts, strict=True):
            if arrival.dead_letters and not receipt.duplicate:
                log_dead_letters(arrival)
            elif self.logs_received:
                log_received(arrival, receipt)

    def _check_room(self, own: InFlight, events: int, size: int) -> None:
        """Raises StoreFull if these events have no room."""
        if self.draining:
            raise StoreFull("the server is stopping", 5.0, closing=True)
        if self._events:
            # In a full queue the free share is negative, so the share bounds the sum too.
            free = MAX_EVENTS - self._events - events
            free_bytes = MAX_BYTES - self._bytes - size
            if (
                own.events + events > FAIR_SHARE_FACTOR * free
                or own.size + size > FAIR_SHARE_FACTOR * free_bytes
            ):
                raise StoreFull(
                    f"{self._events} events wait for their commit,"
                    f" {own.events} from the same trigger",
                    1.0,
                )
        if (full := self.store.capacity()) is not None:
            raise full.copy()


def _merged_cursor(calls: Sequence[AcceptedCall]) -> dict[str, Json] | None:
    """The cursor of several calls; None if a value that a later call replaces cannot be stored,
    because the call with that value must fail.
    """
    merged: dict[str, Json] = {}
    for call in calls:
        if not call.cursor:
            continue
        for key, at in call.cursor.items():
            if key in merged and value_or_none(msgspec.json.encode, merged[key]) is None:
                return None
            merged[key] = at
    return merged
