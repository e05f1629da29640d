"""Matches events to subscriptions: which runs an event starts, and why the other flows do not run.

The reactor (intake/) calls `Router.route_all` for the items of each call, the engine
`route_emitted` for events that flows emit, `app.start` and the API `route_to_flow` for a run that a
person starts. They make an `Arrival` of each event: the event with one verdict per subscription,
its runs and its dead letters, encoded for the store to insert in one transaction
(store/protocol.py). The store in turn calls the router for run-state events (`RunEventSource`) and
its `patterns` to advance patterns.

What happens to the events of one type of one trigger is a plan (plans.py), made for the first of
them. Nothing here waits or writes, and the content of an event never raises.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import orjson

from eventflow.core.clock import SECOND, Clock, in_seconds, to_datetime
from eventflow.core.errors import DepthExceeded, NotStorable, error_line, value_or_none
from eventflow.core.hashing import digest
from eventflow.events.event import MAX_DEPTH, Event, Receipt, Undecodable
from eventflow.events.storable import storable_event, storable_undecodable
from eventflow.logs.redaction import SECRETS
from eventflow.routing.dead_letter_log import log_dead_letters
from eventflow.routing.pattern_runner import PatternRunner
from eventflow.routing.plans import (
    FlowStep,
    PatternStep,
    RoutePlan,
    SinkStep,
    Step,
    add_batch_policy,
    identity,
    kept_text,
    verdict,
)
from eventflow.routing.subscriptions import (
    EMITTED,
    RUN_EVENT_PREFIX,
    FlowLike,
    SinkSubscription,
    Subscription,
)
from eventflow.runs.run import Ids, Run, State, format_id
from eventflow.serialization.tagged_json import encode_plain
from eventflow.store.protocol import Arrival, BatchPolicy
from eventflow.store.run_events import LateRun, RunEnded

MAX_SHOWN_BYTES = 1 << 20
"""Of data that cannot be recorded, as Python shows it."""

MAX_RESULT_BYTES = 64 * 1024
"""A larger JSON result of a run is left out of its run-ended event."""
MAX_PLANS = 4096
"""Plans in memory: the types of events come from outside, so there may be any number of them."""


class Router:
    """Matches events to subscriptions, in the order in which they were registered.

    Making one checks every flow's signature: UsageError for one that no event can fill.
    """

    def __init__(
        self,
        subscriptions: Iterable[Subscription],
        ids: Ids,
        clock: Clock,
        sink_subscriptions: Iterable[SinkSubscription] = (),
    ) -> None:
        self.ids: Ids = ids
        self._clock: Clock = clock
        self.sink_subscriptions = tuple(sink_subscriptions)
        self.dead_letter_sinks = tuple(
            sink.name for sink in self.sink_subscriptions if sink.is_for_dead_letters
        )
        self.subscriptions = tuple(subscriptions)
        self._by_trigger: dict[str, list[Subscription]] = {}
        self.plans: dict[tuple[str, str], RoutePlan] = {}
        self.patterns = PatternRunner(self.subscriptions, ids, self._absence_arrival)
        for subscription in self.subscriptions:
            _ = subscription.flow.binder  # raises for a signature that no event can fill
            pattern = subscription.pattern
            names = (subscription.trigger,) if pattern is None else pattern.trigger_names
            for name in names:
                self._by_trigger.setdefault(name, []).append(subscription)
        listeners = (*self._by_trigger.get(EMITTED, ()), *self.sink_subscriptions)
        ends = (state for state in State if state >= State.HELD)
        self.wanted_states = frozenset(
            state
            for state in ends
            if any(each.accepts(f"{RUN_EVENT_PREFIX}{state.label}") for each in listeners)
        )

    def route_all(
        self, trigger: str, items: Sequence[Event | Undecodable], is_paused: bool = False
    ) -> list[Arrival]:
        """The arrivals of the items of one call of a trigger, all with the same time of arrival.

        `is_paused`: whether the trigger is paused; the runs are then recorded in state PAUSED.
        """
        plans = self.plans
        now = self._clock.now()
        ids_per_item = 1 + len(self._by_trigger.get(trigger, ()))  # of the event, and of its runs
        ident = self.ids.next(now, ids_per_item * len(items))
        arrivals: list[Arrival] = []
        for item in items:
            if isinstance(item, Undecodable):
                arrival = self._undecodable(trigger, item, now, ident)
            else:
                try:
                    plan = plans.get((trigger, item.type)) or self._plan(trigger, item.type)
                    arrival = plan.arrival(item, now, ident, is_paused)
                except Exception as error:  # of this event: the others of its call are recorded
                    arrival = self._unstorable(trigger, item, error, now, ident)
            arrivals.append(arrival)
            ident += ids_per_item
        return arrivals

    def route(
        self,
        trigger: str,
        item: Event | Undecodable,
        *,
        ledger_id: int | None = None,
        only: str | None = None,
        same_trigger_only: bool = False,
    ) -> Arrival:
        """The arrival of one item that does not come from its trigger now.

        When a recorded event is matched again, `ledger_id` is its id, and `only` names the one
        subscription or flow that it is for. That may belong to any trigger, unless
        `same_trigger_only`.
        """
        now = self._clock.now()
        if isinstance(item, Undecodable):
            return self._undecodable(trigger, item, now, self.ids.next(now))
        try:
            if only is None:
                plan = self._plan(trigger, item.type)
            else:
                own = self._by_trigger.get(trigger, ())
                candidates = own if same_trigger_only else self.subscriptions
                plan = self._make_plan(trigger, item.type, candidates, only)
            first = self.ids.next(now, plan.id_count)
            ident = first if ledger_id is None else ledger_id
            return plan.arrival(item, now, ident, first_run=first + 1)
        except Exception as error:  # of this event: the others of its batch are recorded
            return self._unstorable(trigger, item, error, now, self.ids.next(now))

    def route_emitted(self, event: Event, depth: int | None = None) -> Arrival:
        """The arrival of an event that a run emitted, `depth` emits from an outside one.

        `depth` defaults to the event's own. Raises NotStorable when its data has no JSON form.
        """
        hops = event.depth if depth is None else depth
        if not isinstance(event.data, bytes):
            codec, _ = encode_plain(event.data, f"data of emitted event {event.type!r}")
            if codec != "json":
                raise NotStorable(
                    f"data of emitted event {event.type!r}",
                    "value that JSON cannot represent exactly",
                )
        now = self._clock.now()
        if hops > MAX_DEPTH:
            reason = str(DepthExceeded(event.type, hops))
            return self._dead_letter(
                EMITTED, event, event.to_json(), reason, now, self.ids.next(now)
            )
        plan = self._plan(EMITTED, event.type)
        return plan.arrival(event, now, self.ids.next(now, plan.id_count), depth=hops)

    def route_conflict(self, arrival: Arrival, receipt: Receipt) -> Arrival:
        """The dead letter of an arrival whose identity is known with other content. Called on the
        writer's thread.

        Its key includes the content: the same content again is a duplicate of this dead letter.
        """
        reason = f"its id is known with other content: event {receipt.id_text} came first and stays"
        return msgspec.structs.replace(
            arrival,
            id=self.ids.next(self._clock.now()),
            key=_content_key(arrival.key, arrival.digest),
            **self._as_dead(reason),
            runs=(),
            batch_policies={},
            pattern_events=(),
        )

    def _as_dead(self, reason: str) -> dict[str, Any]:
        """The fields of an arrival that is a dead letter before any subscription is matched."""
        reason = kept_text(reason)
        return {
            "verdicts": orjson.dumps([["", "dead", reason]]),
            "counts": {"dead": 1},
            "dead_letters": (("", reason),),
            "outbox": [(sink, "") for sink in self.dead_letter_sinks],
        }

    # ----------------------------------------------------------------- RunEventSource
    # called by the store, on the writer thread

    def raise_floor(self, last_id: int) -> None:
        """Give out only ids above `last_id` from now on."""
        self.ids.raise_floor(last_id)

    def route_ended(self, run: RunEnded) -> Arrival | None:
        """The run-ended event, or None if no subscription matches it."""
        try:
            return self._if_wanted(run_ended_event(run))
        except (NotStorable, TypeError):  # the result is nested too deeply for an event
            return self._if_wanted(run_ended_event(msgspec.structs.replace(run, result=None)))

    def route_late(self, run: LateRun) -> Arrival | None:
        """The late-run event, or None if no subscription matches it."""
        return self._if_wanted(late_run_event(run))

    def _if_wanted(self, event: Event) -> Arrival | None:
        arrival = self.route_emitted(event)
        if arrival.dead_letters:
            log_dead_letters(arrival)
        if arrival.runs or arrival.dead_letters or arrival.outbox or arrival.pattern_events:
            return arrival
        return None

    def _absence_arrival(self, subscription: Subscription, event: Event) -> Arrival:
        """The event of an absence, and the run that it starts."""
        return self._one_run(
            EMITTED,
            event,
            subscription.flow,
            name=subscription.name,
            priority=subscription.priority,
            ordering_key=subscription.default_ordering_key,
            batch_policy=subscription.batch_policy,
        )

    def route_to_flow(
        self,
        flow: FlowLike,
        event: Event,
        *,
        params: bytes | None = None,
        trigger: str = "api",
        ordering_key: str | None = None,
    ) -> Arrival:
        """One delivery to one flow without a subscription: `app.start`, `POST /api/runs`.

        `params` is a JSON object of arguments; without it they come from the event. Raises
        BindingError, since the caller can handle it.
        """
        if params is None:
            flow.binder.bind_event(event)
        else:
            flow.binder.bind_params(orjson.loads(params), event)
        return self._one_run(trigger, event, flow, ordering_key=ordering_key, params=params)

    def _one_run(
        self,
        trigger: str,
        event: Event,
        flow: FlowLike,
        *,
        name: str | None = None,
        priority: int | None = None,
        ordering_key: str | None = None,
        params: bytes | None = None,
        batch_policy: BatchPolicy | None = None,
    ) -> Arrival:
        """The arrival of an event that is for one flow, with its run."""
        now = self._clock.now()
        arrival = RoutePlan(trigger, ()).arrival(event, now, self.ids.next(now, 2))
        run = Run(
            id=arrival.id + 1,
            flow=flow.name,
            created_at=arrival.received_at,
            due_at=arrival.received_at,
            event=arrival.id,
            subscription=flow.name if name is None else name,
            ordering_key=ordering_key,
            priority=flow.priority if priority is None else priority,
            params=params,
            payload=arrival.body,
        )
        if batch_policy is not None:
            add_batch_policy(arrival, run, batch_policy)
        arrival.runs = [run]
        arrival.verdicts = b"[%b]" % verdict(run.subscription, "run", run.id, "pending")[0]
        arrival.counts = {"pending": 1}
        return arrival

    # ----------------------------------------------------------------- plans

    def _plan(self, trigger: str, event_type: str) -> RoutePlan:
        """What happens to events of this type of a trigger; for emitted events, with the sinks."""
        plan = self.plans.get((trigger, event_type))
        if plan is None:
            if len(self.plans) >= MAX_PLANS:
                self.plans.clear()
            subscriptions = self._by_trigger.get(trigger, ())
            plan = self._make_plan(trigger, event_type, subscriptions, None)
            self.plans[trigger, event_type] = plan
        return plan

    def _make_plan(
        self,
        trigger: str,
        event_type: str,
        subscriptions: Sequence[Subscription],
        only: str | None,
    ) -> RoutePlan:
        """The plan of these subscriptions. `only`: of those, and of the sinks, that have this name
        or whose flow has it.
        """
        dead = self.dead_letter_sinks
        steps: list[Step] = []
        for each in subscriptions:
            if only in (None, each.name, each.flow.name) and each.accepts(event_type, trigger):
                if each.pattern is None:
                    steps.append(FlowStep(each, dead))
                else:
                    steps.append(PatternStep(each, trigger, event_type, dead))
        if trigger == EMITTED:
            steps += [
                SinkStep(each)
                for each in self.sink_subscriptions
                if only in (None, each.name) and each.accepts(event_type)
            ]
        return RoutePlan(trigger, steps)

    # ----------------------------------------------------------------- dead letters

    def _undecodable(self, trigger: str, item: Undecodable, now: int, ident: int) -> Arrival:
        item = storable_undecodable(item)
        arrival = self._dead_letter(trigger, item, item.body, item.error, now, ident)
        if item.headers:
            arrival.headers = orjson.dumps(dict(item.headers))
        return arrival

    def _unstorable(
        self, trigger: str, event: Event, error: Exception, now: int, ident: int
    ) -> Arrival:
        """The dead letter of an event that cannot be recorded as it is."""
        kept, body = storable_event(event)
        if body is None:  # a redrive needs other data
            shown = value_or_none(ascii, event.data)
            body = (shown or "").encode()[:MAX_SHOWN_BYTES]
        reason = f"it cannot be recorded as it is: {error_line(error)}"
        return self._dead_letter(trigger, kept, body, reason, now, ident)

    def _dead_letter(
        self,
        trigger: str,
        item: Event | Undecodable,
        body: bytes,
        reason: str,
        now: int,
        ident: int,
    ) -> Arrival:
        """The arrival of an item that is a dead letter before any subscription is matched."""
        key = identity(trigger, item.source, item.id)
        content = digest(item.type.encode(), body, size=8)
        if isinstance(item, Undecodable):
            # Bytes that are no event do not take the id of one: it may be sent whole later.
            key = _content_key(key, content)
        return Arrival(
            id=ident,
            trigger=trigger,
            key=key,
            digest=content,
            event_id=item.id,
            source=item.source,
            type=item.type,
            subject=item.subject if isinstance(item, Event) else None,
            body=body,
            received_at=now,
            **self._as_dead(reason),
        )


def run_ended_event(run: RunEnded) -> Event:
    """The event of a run that ended. Its id has the token: a retried run may end again."""
    run_id = format_id(run.run)
    since = run.started_at or run.at
    state = run.state.label
    data: dict[str, Any] = {
        "run": run_id,
        "flow": run.flow,
        "state": state,
        "claims": run.token,
        "seconds": (run.at - since) / SECOND,
        "reason": run.reason,
        "result": None,
        "error": None,
    }
    if run.result is not None and run.codec == "json" and len(run.result) <= MAX_RESULT_BYTES:
        data["result"] = orjson.loads(run.result)
    if run.error is not None:
        error = orjson.loads(run.error)
        data["error"] = {
            "type": error.get("type"),
            "message": SECRETS.redact_text(str(error.get("message"))),
        }
    return Event(
        id=f"{run_id}/{state}/{run.token}",
        source=f"/flows/{run.flow}",
        type=f"{RUN_EVENT_PREFIX}{state}",
        subject=run_id,
        data=data,
        time=to_datetime(run.at),
        extensions={"eventflowdepth": run.depth + 1, "eventflowcause": run_id},
    )


def late_run_event(run: LateRun) -> Event:
    """The event of a late run; its time is when the run became late.

    Its id is made of the run and its allowed time, so it is recorded once for each of them.
    """
    run_id = format_id(run.run)
    since = run.started_at or run.at
    after = in_seconds(run.after)
    data: dict[str, Any] = {
        "run": run_id,
        "flow": run.flow,
        "state": "late",
        "claims": run.token,
        "seconds": max(run.at - since, 0) / SECOND,
        "reason": run.reason,
        "result": None,
        "error": None,
        "after": after,
        "due": to_datetime(run.due_at).isoformat(),
        "run_state": run.state.label,
    }
    return Event(
        id=f"{run_id}/late/{after}",
        source=f"/flows/{run.flow}",
        type=f"{RUN_EVENT_PREFIX}late",
        subject=run_id,
        data=data,
        time=to_datetime(run.due_at + run.after),
        extensions={"eventflowdepth": run.depth + 1, "eventflowcause": run_id},
    )


def _content_key(key: bytes, content: bytes) -> bytes:
    """The identity of a dead letter: that of the event it could be, and its content."""
    return digest(key, content)
