"""Matches events to subscriptions: which runs an event starts, and why the other flows do not run.

The reactor (intake/) calls `Router.route` for every accepted item, the engine `route_emitted` for
events that flows emit, `app.start` and the API `route_to_flow` for a run that a person starts. Each
returns an `Arrival`: the event with one verdict per subscription, its runs and its dead letters,
encoded for the store to insert in one transaction (store/protocol.py). The store in turn calls the
router for run-state events (`RunEventSource`) and its `patterns` to advance patterns.

Nothing here waits or writes. The content of an event never raises: user code (`where=`, `params=`,
`key=`) that raises is the verdict *invalid*.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import msgspec
import orjson

from eventflow.core.clock import SECOND, Clock, in_seconds, to_datetime
from eventflow.core.declarations import format_location, is_own_file
from eventflow.core.errors import BindingError, DepthExceeded, NotStorable, call_catching
from eventflow.core.hashing import digest, digest_text
from eventflow.core.secrets import KNOWN_SECRETS
from eventflow.events.event import MAX_DEPTH, Event, Receipt, Undecodable
from eventflow.events.storable import (
    check_storable,
    storable_event,
    storable_text,
    storable_undecodable,
)
from eventflow.logs.redaction import SECRETS
from eventflow.routing.dead_letter_log import log_dead_letters
from eventflow.routing.filters import Filter
from eventflow.routing.pattern_runner import PatternRunner
from eventflow.routing.patterns import event_time_us
from eventflow.routing.subscriptions import (
    EMITTED,
    RUN_EVENT_PREFIX,
    CompiledPattern,
    FlowLike,
    SinkSubscription,
    Subscription,
)
from eventflow.runs.run import Ids, Run, State, format_id
from eventflow.serialization.tagged_json import encode_plain
from eventflow.store.protocol import Arrival, BatchPolicy, PatternEvent
from eventflow.store.run_events import LateRun, RunEnded

MAX_SHOWN_BYTES = 1 << 20
"""Of data that cannot be recorded, as Python shows it."""

MAX_RESULT_BYTES = 64 * 1024
"""A larger JSON result of a run is left out of its run-ended event."""


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
        """The arrival of one item of a trigger. `paused`: its runs are recorded in state PAUSED.

        When a recorded event is matched again, `ledger_id` is its id, and `only` names the one
        subscription or flow that it is for. That may belong to any trigger, unless
        `same_trigger_only`.
        """
        if isinstance(item, Undecodable):
            item = storable_undecodable(item)
            return self._dead_letter(
                trigger, item, item.body, item.error, headers=item.headers or headers
            )
        subscriptions: Iterable[Subscription] = self._by_trigger.get(trigger, ())
        if only is not None:
            candidates = subscriptions if same_trigger_only else self.subscriptions
            subscriptions = [each for each in candidates if only in (each.name, each.flow.name)]
        try:
            return self._match(
                trigger,
                item,
                subscriptions,
                paused=paused,
                ledger_id=ledger_id,
                only=only,
                headers=headers,
            )
        except Exception as error:  # of this event: the others of its batch are recorded
            kept, body = storable_event(item)
            if body is None:  # no event: a redrive asks for other data
                shown, _ = call_catching(ascii, item.data)
                body = (shown or "").encode()[:MAX_SHOWN_BYTES]
            reason = f"it cannot be recorded as it is: {type(error).__name__}: {error}"
            return self._dead_letter(trigger, kept, body, reason, headers=headers)

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
        if hops > MAX_DEPTH:
            return self._dead_letter(
                EMITTED, event, event.to_json(), str(DepthExceeded(event.type, hops))
            )
        return self._match(EMITTED, event, self._by_trigger.get(EMITTED, ()), depth=hops)

    def route_conflict(self, arrival: Arrival, receipt: Receipt) -> Arrival:
        """The dead letter of an arrival whose identity is known with other content. Called on the
        writer's thread.

        Its key includes the content: the same content again is a duplicate of this dead letter.
        """
        reason = (
            f"its id is known with other content: event {receipt.id_text} is the first, and stands"
        )
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
        reason = _kept_text(reason)
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
        except (NotStorable, TypeError):  # the result is nested too deep to lie in an event
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
        builder = _ArrivalBuilder(self, event, self._clock.now(), None, 0)
        builder.add_run(
            subscription.name,
            subscription.flow,
            subscription.priority,
            subscription.default_ordering_key,
            None,
            State.PENDING,
            subscription.batch_policy,
        )
        return builder.arrival(EMITTED, event.to_json(), None)

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
        builder = _ArrivalBuilder(self, event, self._clock.now(), None, 0)
        builder.add_run(flow.name, flow, flow.priority, ordering_key, params, State.PENDING)
        return builder.arrival(trigger, event.to_json(), None)

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
        body = event.to_json()
        check_storable(event, body)
        builder = _ArrivalBuilder(self, event, self._clock.now(), ledger_id, depth)
        state = State.PAUSED if paused else State.PENDING
        for subscription in subscriptions:
            if subscription.pattern is not None:
                builder.match_pattern(subscription.name, subscription.pattern, trigger, paused)
            elif subscription.accepts(event.type):
                builder.match(subscription, state)
        if self.sink_subscriptions and trigger == EMITTED:
            for sink in self.sink_subscriptions:
                if sink.accepts(event.type) and only in (None, sink.name):
                    builder.match_sink(sink)
        return builder.arrival(trigger, body, headers)

    def _dead_letter(
        self,
        trigger: str,
        item: Event | Undecodable,
        body: bytes,
        reason: str,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> Arrival:
        """The arrival of an item that is a dead letter before any subscription is matched."""
        now = self._clock.now()
        key = identity(trigger, item.source, item.id)
        content = digest(item.type.encode(), body, size=8)
        if isinstance(item, Undecodable):
            # Bytes that are no event do not take the id of one: it may be sent whole later.
            key = _content_key(key, content)
        return Arrival(
            id=self.ids.next(now),
            trigger=trigger,
            key=key,
            digest=content,
            event_id=item.id,
            source=item.source,
            type=item.type,
            subject=item.subject if isinstance(item, Event) else None,
            body=body,
            received_at=now,
            headers=orjson.dumps(dict(headers)) if headers else None,
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


def identity(trigger: str, source: str, ident: str) -> bytes:
    """The 16-byte identity of an event in the ledger (P2)."""
    return digest_text((trigger, source), ident.encode())


def _content_key(key: bytes, content: bytes) -> bytes:
    """The identity of a dead letter: that of the event it could be, and its content."""
    return digest(key, content)


def content_digest(event: Event) -> bytes:
    """8 bytes of type and data that distinguish a duplicate from a conflict.

    The time is left out: a sender that repeats an event may set it again. So is the order of keys.
    """
    if isinstance(event.data, bytes):
        return digest_text((event.type,), event.data, size=8)
    data = orjson.dumps(event.data, option=orjson.OPT_SORT_KEYS)
    return digest_text((event.type,), data, size=8)


class _ArrivalBuilder:
    """Matches one event to its subscriptions and collects verdicts, runs and dead letters."""

    __slots__ = (
        "_batch_policies",
        "_counts",
        "_dead_letter_sinks",
        "_dead_letters",
        "_depth",
        "_event",
        "_id",
        "_ids",
        "_now",
        "_outbox",
        "_pattern_events",
        "_runs",
        "_verdicts",
    )

    def __init__(
        self, router: Router, event: Event, now: int, ledger_id: int | None, depth: int
    ) -> None:
        self._ids: Ids = router.ids
        self._event: Event = event
        self._now: int = now
        self._depth: int = depth
        self._id: int = router.ids.next(now) if ledger_id is None else ledger_id
        self._dead_letter_sinks: tuple[str, ...] = router.dead_letter_sinks
        # the fields of the Arrival, which documents their shapes
        self._verdicts: list[tuple[str, str, str | int]] = []
        self._runs: list[Run] = []
        self._dead_letters: list[tuple[str, str]] = []
        self._outbox: list[tuple[str, str | None]] = []
        self._batch_policies: dict[int, BatchPolicy] = {}
        self._pattern_events: list[PatternEvent] = []
        self._counts: dict[str, int] = {}

    def match(self, subscription: Subscription, state: State) -> None:
        """Match one subscription and add its verdict."""
        event = self._event
        mismatch, error = _apply_filter(subscription.filter, event)
        if mismatch is not None:
            self._add_verdict(subscription.name, "filtered", mismatch, "suppressed")
            return
        if error is None:
            made, error = call_catching(_arguments, subscription, event)
            if made is not None:
                ordering_key, params = made
                self.add_run(
                    subscription.name,
                    subscription.flow,
                    subscription.priority,
                    ordering_key,
                    params,
                    state,
                    subscription.batch_policy,
                )
                return
        self._reject(subscription.name, error)

    def _reject(self, name: str, error: BaseException | None) -> None:
        """Add the verdict *invalid* and a dead letter of this subscription."""
        reason = _kept_text(_reason(error))
        self._add_verdict(name, "invalid", reason, "dead")
        self._dead_letters.append((name, reason))
        self._outbox += [(sink, name) for sink in self._dead_letter_sinks]

    def match_pattern(
        self, name: str, pattern: CompiledPattern, trigger: str, paused: bool
    ) -> None:
        """Match a pattern: the event goes to the first part that accepts it."""
        mismatch = None
        event = self._event
        for number in pattern.parts_for(trigger, event.type):
            part = pattern.parts[number]
            mismatch, error = _apply_filter(part.filter, event)
            if mismatch is not None:
                continue
            key = None
            if part.key is not None and error is None:
                key, error = call_catching(_join_key, part.key, event)
            if error is not None:
                self._reject(name, error)
            elif part.key is not None and key is None:
                reason = f"it has no join key: no field that by= of {pattern.label} names"
                self._add_verdict(name, "filtered", reason, "suppressed")
            else:
                time = event_time_us(event, self._now)
                self._pattern_events.append(
                    PatternEvent(name, key or "", number, time, paused, self._depth)
                )
                self._add_verdict(name, "waiting", part.label, "pending")
            return
        if mismatch is not None:
            self._add_verdict(name, "filtered", mismatch, "suppressed")

    def match_sink(self, subscription: SinkSubscription) -> None:
        """Put the event into the outbox of a sink if its filter accepts it.

        Not counted as a delivery (P9), since nothing runs; a filter that raises is one dead letter.
        """
        mismatch, error = _apply_filter(subscription.filter, self._event)
        if error is not None:
            reason = _kept_text(_reason(error))
            self._add_verdict(subscription.name, "invalid", reason, "dead")
            self._dead_letters.append((subscription.name, reason))
        elif mismatch is not None:
            self._verdicts.append((subscription.name, "filtered", mismatch))
        else:
            self._verdicts.append(
                (subscription.name, "outbox", f"for sink {subscription.sink.name}")
            )
            self._outbox.append((subscription.name, None))

    def add_run(
        self,
        name: str,
        flow: FlowLike,
        priority: int,
        ordering_key: str | None,
        params: bytes | None,
        state: State,
        batch_policy: BatchPolicy | None = None,
    ) -> None:
        """Add a run, due now or when its batch window closes, and its verdict."""
        run = Run(
            id=self._ids.next(self._now),
            flow=flow.name,
            created_at=self._now,
            due_at=self._now,
            event=self._id,
            subscription=name,
            state=state,
            ordering_key=ordering_key,
            priority=priority,
            depth=self._depth,
            params=params,
        )
        if batch_policy is not None:
            self._batch_policies[run.id] = batch_policy
            run.mode = batch_policy.mode
            if batch_policy.size > 1:
                run.due_at += batch_policy.wait
        self._runs.append(run)
        self._add_verdict(name, "paused" if state is State.PAUSED else "run", run.id, "pending")

    def _add_verdict(self, name: str, outcome: str, detail: str | int, column: str) -> None:
        self._verdicts.append((name, outcome, detail))
        self._counts[column] = self._counts.get(column, 0) + 1

    def arrival(self, trigger: str, body: bytes, headers: Mapping[str, str] | None) -> Arrival:
        """The result, for the store."""
        event = self._event
        for run in self._runs:
            run.payload = body
        # Positional, and the rare fields apart: by name, this costs as much as all the encoding.
        arrival = Arrival(
            self._id,
            trigger,
            identity(trigger, event.source, event.id),
            content_digest(event),
            event.id,
            event.source,
            event.type,
            body,
            orjson.dumps(self._verdicts),
            self._now,
            # P9: an event with no subscriber is one suppressed delivery
            self._counts or {"suppressed": 1},
            event.subject,
            self._runs,
        )
        if self._dead_letters or self._outbox or self._batch_policies or self._pattern_events:
            arrival.dead_letters = self._dead_letters
            arrival.outbox = self._outbox
            arrival.batch_policies = self._batch_policies
            arrival.pattern_events = self._pattern_events
        if headers:
            arrival.headers = orjson.dumps(dict(headers))
        return arrival


def _kept_text(reason: str) -> str:
    """A reason as it may be kept: without the secrets and lone surrogates that it may quote."""
    return KNOWN_SECRETS.remove_from(storable_text(reason))


def _apply_filter(filter: Filter | None, event: Event) -> "tuple[str | None, BaseException | None]":
    """The condition that did not hold, or what the user's filter raised; (None, None): it holds."""
    return (None, None) if filter is None else call_catching(filter.mismatch, event)


def _reason(error: BaseException | None) -> str:
    """Why an event is a dead letter: the error, and the line of the user's callable (`where=`,
    `params=`, `key=`) that raised it.
    """
    if isinstance(error, BindingError):
        return str(error)
    reason = f"{type(error).__name__}: {error}"
    if "'Event' object" in reason:
        reason += "; the argument is the event, its data is event.data"
    step = None if error is None else error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    code = None if step is None else step.tb_frame.f_code
    if step is None or code is None or is_own_file(code.co_filename):
        return reason
    at = format_location(code.co_filename, step.tb_lineno)
    return f"{reason} (in {code.co_qualname}, {at})"


def _join_key(key: Callable[[Event], str | None], event: Event) -> str | None:
    found = key(event)
    if found is not None and not isinstance(cast(object, found), str):
        raise TypeError(f"by= returned {type(found).__name__}, expected a str or None")
    return _checked_key("by=", found)


def _checked_key(option: str, key: str | None) -> str | None:
    """Raises ValueError for a key that the ledger cannot hold."""
    if key is not None and not key.isascii() and storable_text(key) != key:
        raise ValueError(f"{option} returned a str with a lone surrogate, {key!a}")
    return key


def _arguments(subscription: Subscription, event: Event) -> tuple[str | None, bytes | None]:
    """The run's ordering key and, if `params=` makes them, its arguments as JSON.

    Raises what the user's code and the binder raise.
    """
    ordering_key = (
        subscription.default_ordering_key if subscription.key is None else subscription.key(event)
    )
    if ordering_key is not None and not isinstance(cast(object, ordering_key), str):
        raise TypeError(f"key= returned {type(ordering_key).__name__}, expected a str or None")
    ordering_key = _checked_key("key=", ordering_key)
    binder = subscription.flow.binder
    if subscription.batch_policy is not None:
        binder.bind_events((event,))
        return ordering_key, None
    if subscription.params is None:
        binder.bind_event(event)
        return ordering_key, None
    params = binder.unpack((), dict(subscription.params(event)))
    binder.bind_params(orjson.loads(params), event)
    return ordering_key, params
