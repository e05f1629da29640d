"""Which flows an event starts, and why the others do not: the `Router` that matches events to subscriptions.

The reactor calls `Router.arrive` for every accepted item, the worker `Router.emit` for what flows emit, the doors
`Router.arrive_flow` for a run that somebody asked for. Each returns an `Arrival`: the event with one verdict per subscription,
its runs and its dead letters, encoded and ready for the store to insert in one transaction. Nothing here waits or writes, and
nothing raises for what an event carries: user code (`where=`, `params=`, `key=`) that raises is the verdict *invalid*.
Next room: `store/`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import msgspec
import orjson

from eventflow.core.clock import SECOND, Clock, in_seconds, to_datetime
from eventflow.core.errors import BindingError, DepthExceeded, NotStorable, call_catching
from eventflow.core.hashing import digest, digest_text
from eventflow.events.event import MAX_DEPTH, Event, Undecodable
from eventflow.logs.redaction import SECRETS
from eventflow.routing.pattern_runner import PatternRunner
from eventflow.routing.patterns import event_time_us
from eventflow.routing.subscriptions import (
    EMITTED,
    RUN_EVENT_PREFIX,
    FlowLike,
    Joins,
    SinkSubscription,
    Subscription,
)
from eventflow.runs.run import Ids, Run, State, format_id
from eventflow.serialization.tagged_json import encode_plain
from eventflow.store.protocol import Arrival, Fact, Gather, Woven
from eventflow.store.run_events import Ended, Overdue

MAX_RESULT_BYTES = 64 * 1024
"""Bytes of a run's JSON result that such an event carries."""


class Router:
    """Matches events to subscriptions, in the order they were registered. Checks every flow's signature when it is made."""

    def __init__(
        self,
        subscriptions: Iterable[Subscription],
        ids: Ids,
        clock: Clock,
        outlets: Iterable[SinkSubscription] = (),
    ) -> None:
        self.ids, self._clock = ids, clock
        self.sink_subscriptions = tuple(outlets)
        self.dead_letter_sinks = tuple(
            outlet.name for outlet in self.sink_subscriptions if outlet.is_for_dead_letters
        )
        self.subscriptions = tuple(subscriptions)
        self._by_trigger: dict[str, list[Subscription]] = {}
        self._weaver = PatternRunner(self.subscriptions, ids, self._silence)
        for subscription in self.subscriptions:
            _ = (
                subscription.flow.binder
            )  # a signature that no event can fill is a mistake now, not a dead letter later
            for place in (
                (subscription.trigger,)
                if subscription.pattern is None
                else subscription.pattern.places
            ):
                self._by_trigger.setdefault(place, []).append(subscription)
        listeners = (*self._by_trigger.get(EMITTED, ()), *self.sink_subscriptions)
        ends = (state for state in State if state >= State.HELD)
        self.heard = frozenset(
            state
            for state in ends
            if any(each.accepts(f"{RUN_EVENT_PREFIX}{state.word}") for each in listeners)
        )

    def route(
        self,
        trigger: str,
        item: Event | Undecodable,
        paused: bool = False,
        *,
        ledger_id: int | None = None,
        only: str | None = None,
        same_trigger_only: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> Arrival:
        """What becomes of one item of a trigger. `paused`: its runs are recorded in state PAUSED.

        For a replay: `ledger_id` is the event's in the ledger; `only` names the one subscription or flow it is for, of any
        trigger unless that must be its `own`.
        """
        if isinstance(item, Undecodable):
            return self._bury(trigger, item, item.body, item.error, headers=item.headers or headers)
        subscriptions: Iterable[Subscription] = self._by_trigger.get(trigger, ())
        if only is not None:
            asked = subscriptions if same_trigger_only else self.subscriptions
            subscriptions = [each for each in asked if only in (each.name, each.flow.name)]
        return self._match(
            trigger,
            item,
            subscriptions,
            paused=paused,
            ledger_id=ledger_id,
            only=only,
            headers=headers,
        )

    def route_emitted(self, event: Event, depth: int | None = None) -> Arrival:
        """An event that a run emitted, `depth` hops (default: its own) from outside. NotStorable: its data is no JSON."""
        hops = event.depth if depth is None else depth
        if not isinstance(event.data, bytes):
            codec, _ = encode_plain(event.data, f"data of emitted event {event.type!r}")
            if codec != "json":
                raise NotStorable(
                    f"data of emitted event {event.type!r}", "value that JSON cannot say exactly"
                )
        if hops > MAX_DEPTH:
            return self._bury(EMITTED, event, event.to_json(), str(DepthExceeded(event.type, hops)))
        return self._match(EMITTED, event, self._by_trigger.get(EMITTED, ()), depth=hops)

    # ----------------------------------------------------------------- ended and late runs (store.base.Herald), writer thread

    def raise_floor(self, last_id: int) -> None:
        self.ids.raise_floor(last_id)

    def ended(self, run: Ended) -> Arrival | None:
        """The event that a run ended (or is held), if somebody wants it."""
        return self._tell(run_ended_event(run))

    def late(self, run: Overdue) -> Arrival | None:
        """The event that a run is late, if somebody wants it."""
        return self._tell(late_run_event(run))

    def _tell(self, event: Event) -> Arrival | None:
        arrival = self.route_emitted(event)
        return arrival if arrival.runs or arrival.dead or arrival.outbox or arrival.facts else None

    # ----------------------------------------------------------------- patterns (store.base.Herald), writer thread

    def weave(
        self,
        subscription: str,
        key: str,
        state: Any,
        now: int,
        fact: Fact | None = None,
        event: int = 0,
        size: int = 0,
    ) -> Woven | None:
        return self._weaver.weave(subscription, key, state, now, fact, event, size)

    def keep(self, subscription: str, key: str, state: Any) -> bytes:
        return self._weaver.keep(subscription, key, state)

    def armed(self) -> Sequence[str]:
        return self._weaver.armed()

    def _silence(self, subscription: Subscription, event: Event) -> Arrival:
        """The event that stands for what did not come, and its run."""
        delivery = _Delivery(self, event, self._clock.now(), None, 0)
        delivery.start(
            subscription.name, subscription.flow, subscription.priority, subscription.lane, None, State.PENDING,
            subscription.batch_policy,
        )  # fmt: skip
        return delivery.arrival(EMITTED, event.to_json(), None)

    def route_to_flow(
        self,
        flow: FlowLike,
        event: Event,
        *,
        params: bytes | None = None,
        trigger: str = "api",
        lane: str | None = None,
    ) -> Arrival:
        """One delivery to one flow, without a subscription: `app.start`, `POST /api/runs`, `eventflow run`.

        `params` is a JSON object of arguments; without it they come from the event. Raises BindingError: the caller is there.
        """
        if params is None:
            flow.binder.bind_event(event)
        else:
            flow.binder.bind_params(orjson.loads(params), event)
        delivery = _Delivery(self, event, self._clock.now(), None, 0)
        delivery.start(flow.name, flow, flow.priority, lane, params, State.PENDING)
        return delivery.arrival(trigger, event.to_json(), None)

    def _match(
        self,
        trigger: str,
        event: Event,
        subscriptions: Iterable[Subscription],
        *,
        paused: bool = False,
        depth: int = 0,
        ledger_id: int | None = None,
        only: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Arrival:
        try:
            body = event.to_json()
        except TypeError as error:  # what a trigger put into `data` is no JSON; the attributes are all that can be kept
            bare = msgspec.structs.replace(event, data=None)
            return self._bury(
                trigger, bare, bare.to_json(), f"its data cannot be written as JSON: {error}"
            )
        delivery = _Delivery(self, event, self._clock.now(), ledger_id, depth)
        state = State.PAUSED if paused else State.PENDING
        for subscription in subscriptions:
            if subscription.pattern is not None:
                delivery.weave(subscription.name, subscription.pattern, trigger, paused)
            elif subscription.accepts(event.type):
                delivery.deliver(subscription, state)
        if self.sink_subscriptions and trigger == EMITTED:
            for outlet in self.sink_subscriptions:
                if outlet.accepts(event.type) and only in (None, outlet.name):
                    delivery.post(outlet)
        return delivery.arrival(trigger, body, headers)

    def _bury(
        self,
        trigger: str,
        item: Event | Undecodable,
        body: bytes,
        reason: str,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> Arrival:
        """A dead letter for what no subscription was asked about."""
        now = self._clock.now()
        return Arrival(
            id=self.ids.next(now),
            trigger=trigger,
            key=identity(trigger, item.source, item.id),
            digest=digest(item.type.encode(), body, size=8),
            event_id=item.id,
            source=item.source,
            type=item.type,
            subject=item.subject if isinstance(item, Event) else None,
            body=body,
            verdicts=orjson.dumps([["", "dead", reason]]),
            received_at=now,
            tally={"dead": 1},
            dead=(("", reason),),
            outbox=[(outlet, "") for outlet in self.dead_letter_sinks],
            headers=orjson.dumps(dict(headers)) if headers else None,
        )


def run_ended_event(run: Ended) -> Event:
    """What an event tells of an ended run. Its id has the claim's number: a run that is retried ends again."""
    shown, since, state = format_id(run.run), run.started_at or run.at, run.state.word
    data: dict[str, Any] = {
        "run": shown, "flow": run.flow, "state": state, "attempts": run.token,
        "seconds": (run.at - since) / SECOND, "reason": run.reason, "result": None, "error": None,
    }  # fmt: skip
    if run.result is not None and run.codec == "json" and len(run.result) <= MAX_RESULT_BYTES:
        data["result"] = orjson.loads(run.result)
    if run.error is not None:
        error = orjson.loads(run.error)
        data["error"] = {
            "type": error.get("type"),
            "message": SECRETS.text(str(error.get("message"))),
        }
    return Event(
        id=f"{shown}/{state}/{run.token}", source=f"/flows/{run.flow}", type=f"{RUN_EVENT_PREFIX}{state}", subject=shown, data=data,
        time=to_datetime(run.at), extensions={"eventflowdepth": run.depth + 1, "eventflowcause": shown},
    )  # fmt: skip


def late_run_event(run: Overdue) -> Event:
    """What an event tells of a late run; it happened when the run became late. Its id is the run and the time it was given."""
    shown, since, after = format_id(run.run), run.started_at or run.at, in_seconds(run.after)
    data: dict[str, Any] = {
        "run": shown, "flow": run.flow, "state": "late", "attempts": run.token, "seconds": max(run.at - since, 0) / SECOND,
        "reason": run.reason, "result": None, "error": None, "after": after, "due": to_datetime(run.due_at).isoformat(),
        "run_state": run.state.word,
    }  # fmt: skip
    return Event(
        id=f"{shown}/late/{after}", source=f"/flows/{run.flow}", type=f"{RUN_EVENT_PREFIX}late", subject=shown, data=data,
        time=to_datetime(run.due_at + run.after), extensions={"eventflowdepth": run.depth + 1, "eventflowcause": shown},
    )  # fmt: skip


def identity(trigger: str, source: str, ident: str) -> bytes:
    """The 16 bytes by which the ledger knows an event again (P2)."""
    return digest_text((trigger, source), ident.encode())


def content_digest(event: Event) -> bytes:
    """The 8 bytes that tell a duplicate from a conflict: type and data. Not the time, which a sender may stamp anew."""
    data = event.data if isinstance(event.data, bytes) else orjson.dumps(event.data)
    return digest_text((event.type,), data, size=8)


class _Delivery:
    """One event on its way to its subscriptions, collecting verdicts."""

    __slots__ = (
        "_dead",
        "_dead_outlets",
        "_depth",
        "_event",
        "_facts",
        "_gathers",
        "_id",
        "_ids",
        "_now",
        "_outbox",
        "_runs",
        "_tally",
        "_verdicts",
    )

    def __init__(
        self, router: Router, event: Event, now: int, ledger_id: int | None, depth: int
    ) -> None:
        self._ids, self._event, self._now, self._depth = router.ids, event, now, depth
        self._id = router.ids.next(now) if ledger_id is None else ledger_id
        self._verdicts: list[tuple[str, str, str | int]] = []
        self._runs: list[Run] = []
        self._dead: list[tuple[str, str]] = []
        self._outbox: list[tuple[str, str | None]] = []
        self._dead_outlets = router.dead_letter_sinks
        self._gathers: dict[int, Gather] = {}
        self._facts: list[Fact] = []
        self._tally: dict[str, int] = {}

    def deliver(self, subscription: Subscription, state: State) -> None:
        """Asks one subscription and notes its verdict."""
        event = self._event
        unwanted, broken = (
            (None, None)
            if subscription.filter is None
            else call_catching(subscription.filter.mismatch, event)
        )
        if unwanted is not None:
            self._note(subscription.name, "filtered", unwanted, "suppressed")
            return
        if broken is None:
            made, broken = call_catching(_arguments, subscription, event)
            if made is not None:
                lane, params = made
                self.start(
                    subscription.name,
                    subscription.flow,
                    subscription.priority,
                    lane,
                    params,
                    state,
                    subscription.batch_policy,
                )
                return
        self._invalid(subscription.name, broken)

    def _invalid(self, name: str, broken: BaseException | None) -> None:
        """A dead letter of this subscription's own."""
        reason = (
            str(broken)
            if isinstance(broken, BindingError)
            else f"{type(broken).__name__}: {broken}"
        )
        self._note(name, "invalid", reason, "dead")
        self._dead.append((name, reason))
        self._outbox += [(outlet, name) for outlet in self._dead_outlets]

    def weave(self, name: str, joined: Joins, place: str, paused: bool) -> None:
        """Asks a pattern: the event is of the first part that wants it."""
        unwanted, event = None, self._event
        for number in joined.hearing(place, event.type):
            leaf = joined.leaves[number]
            unwanted, broken = (
                (None, None) if leaf.filter is None else call_catching(leaf.filter.mismatch, event)
            )
            if broken is None and unwanted is not None:
                continue
            key, broken = (
                (None, broken)
                if leaf.key is None or broken is not None
                else call_catching(_join_key, leaf.key, event)
            )
            if broken is not None:
                self._invalid(name, broken)
            elif leaf.key is not None and key is None:
                self._note(name, "filtered", "it has no key to be joined by", "suppressed")
            else:
                self._facts.append(
                    Fact(
                        name,
                        key or "",
                        number,
                        event_time_us(event, self._now),
                        paused,
                        self._depth,
                    )
                )
                self._note(name, "waits", leaf.label, "pending")
            return
        if unwanted is not None:
            self._note(name, "filtered", unwanted, "suppressed")

    def post(self, outlet: SinkSubscription) -> None:
        """Puts the event into the outbox, unless the outlet's filter does not want it. No delivery of P9: nothing runs."""
        unwanted, broken = (
            (None, None)
            if outlet.filter is None
            else call_catching(outlet.filter.mismatch, self._event)
        )
        if broken is not None:
            self._note(outlet.name, "invalid", f"{type(broken).__name__}: {broken}", "dead")
            self._dead.append((outlet.name, f"{type(broken).__name__}: {broken}"))
        elif unwanted is not None:
            self._verdicts.append((outlet.name, "filtered", unwanted))
        else:
            self._verdicts.append((outlet.name, "outbox", f"for sink {outlet.sink.name}"))
            self._outbox.append((outlet.name, None))

    def start(
        self, name: str, flow: FlowLike, priority: int, lane: str | None, params: bytes | None, state: State,
        gather: Gather | None = None,
    ) -> None:  # fmt: skip
        """A run, due now or when its window closes, or paused."""
        run = Run(
            id=self._ids.next(self._now),
            flow=flow.name,
            created_at=self._now,
            due_at=self._now,
            event=self._id,
            subscription=name,
            state=state,
            lane=lane,
            priority=priority,
            depth=self._depth,
            params=params,
        )
        if gather is not None:
            self._gathers[run.id] = gather
            run.mode = gather.mode
            if gather.size > 1:
                run.due_at += gather.wait
        self._runs.append(run)
        self._note(name, "paused" if state is State.PAUSED else "run", run.id, "pending")

    def _note(self, name: str, fate: str, detail: str | int, column: str) -> None:
        self._verdicts.append((name, fate, detail))
        self._tally[column] = self._tally.get(column, 0) + 1

    def arrival(self, trigger: str, body: bytes, headers: Mapping[str, str] | None) -> Arrival:
        event = self._event
        for run in self._runs:
            run.body = body
        # In the order of its fields, and the rare ones apart: by name, this costs as much as all the encoding.
        arrival = Arrival(
            self._id, trigger, identity(trigger, event.source, event.id), content_digest(event), event.id, event.source,
            event.type, body, orjson.dumps(self._verdicts), self._now,
            self._tally or {"suppressed": 1},  # P9: an event with no subscriber is one suppressed delivery
            event.subject, self._runs,
        )  # fmt: skip
        if self._dead or self._outbox or self._gathers or self._facts:
            arrival.dead, arrival.outbox, arrival.gathers, arrival.facts = (
                self._dead,
                self._outbox,
                self._gathers,
                self._facts,
            )
        if headers:
            arrival.headers = orjson.dumps(dict(headers))
        return arrival


def _join_key(key: Callable[[Event], str | None], event: Event) -> str | None:
    found = key(event)
    if found is not None and not isinstance(cast(object, found), str):
        raise TypeError(f"by= returned {type(found).__name__}, expected a str or None")
    return found


def _arguments(subscription: Subscription, event: Event) -> tuple[str | None, bytes | None]:
    """The run's lane and, where `params=` makes them, its arguments. Raises what the user's code and the binder raise."""
    lane = subscription.lane if subscription.key is None else subscription.key(event)
    if lane is not None and not isinstance(cast(object, lane), str):
        raise TypeError(f"key= returned {type(lane).__name__}, expected a str or None")
    binder = subscription.flow.binder
    if subscription.batch_policy is not None:
        binder.bind_events((event,))
        return lane, None
    if subscription.params is None:
        binder.bind_event(event)
        return lane, None
    params = binder.unpack((), dict(subscription.params(event)))
    binder.bind_params(orjson.loads(params), event)
    return lane, params
