"""What happens to the events of one type of one trigger: a plan, made once and used for each event.

A plan has one step per subscription that accepts these events, in the order of registration: flows,
patterns and, for emitted events, sinks. A step is called with an event and its `Arrival`; it adds
the run, the dead letter, the message or the pattern event to the arrival and returns its verdict as
JSON, whose constant parts were written when the plan was made. router.py makes plans, keeps them
and asks them for arrivals. The content of an event never raises in a step: user code (`where=`,
`params=`, `key=`) that raises is the verdict *invalid*.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, cast

import msgspec
import orjson

from eventflow.core.declarations import format_location, is_own_file
from eventflow.core.errors import BindingError, error_line
from eventflow.core.hashing import digest_text
from eventflow.core.secrets import KNOWN_SECRETS
from eventflow.events.event import Event
from eventflow.events.storable import ID_EXPECTED, check_storable, storable_text
from eventflow.routing.patterns import event_time_us
from eventflow.routing.subscriptions import SinkSubscription, Subscription
from eventflow.runs.run import Run, State
from eventflow.store.protocol import Arrival, BatchPolicy, PatternEvent

Verdict = tuple[bytes, str]
"""The JSON of `[subscription, outcome, detail]`, and the term of P9's sum that it adds to; empty:
it is no delivery.
"""


class Incoming(msgspec.Struct, frozen=True, gc=False):
    """An event on its way to its subscriptions. `data`: the JSON of its data, None for bytes and
    for none. `is_paused`: whether its trigger is paused. `depth`: emits from an outside event.
    """

    event: Event
    data: bytes | None
    is_paused: bool
    depth: int


class Step(Protocol):
    """Matches an event to one subscription. `run_id`: for its run, if it starts one."""

    def __call__(self, arrival: Arrival, incoming: Incoming, run_id: int) -> Verdict: ...


class RoutePlan:
    """How the events of one type of one trigger become arrivals.

    An arrival takes ids in a row: one for its event and one for each step, for the run that it may
    start.
    """

    __slots__ = ("_steps", "_trigger")

    def __init__(self, trigger: str, steps: Sequence[Step]) -> None:
        self._trigger = trigger
        self._steps = steps

    @property
    def id_count(self) -> int:
        return 1 + len(self._steps)

    def arrival(
        self,
        event: Event,
        now: int,
        ident: int,
        is_paused: bool = False,
        *,
        depth: int = 0,
        first_run: int | None = None,
    ) -> Arrival:
        """The arrival of an event, with what each step adds to it.

        `ident` is its id, and `first_run` the first of the ids for its runs (None: those after
        `ident`). Raises TypeError or ValueError if it cannot be recorded as it is.
        """
        body, data = event.to_json_parts()
        key = identity(self._trigger, event.source, event.id)
        if event.subject is not None or b"null" in body:
            check_storable(event, body)
        # Positional, and rare fields are set later: keywords cost as much as all the encoding.
        arrival = Arrival(
            ident,
            self._trigger,
            key,
            content_digest(event),
            event.id,
            event.source,
            event.type,
            body,
            b"",
            now,
            {},
            event.subject,
        )
        incoming = Incoming(event, data, is_paused, depth)
        run_id = ident + 1 if first_run is None else first_run
        counts: dict[str, int] = {}
        verdicts: list[bytes] = []
        for step in self._steps:
            text, term = step(arrival, incoming, run_id)
            verdicts.append(text)
            if term:
                counts[term] = counts.get(term, 0) + 1
            run_id += 1
        arrival.verdicts = b"[%b]" % b",".join(verdicts)
        # P9: an event with no subscriber is one suppressed delivery
        arrival.counts = counts or {"suppressed": 1}
        return arrival


def identity(trigger: str, source: str, ident: str) -> bytes:
    """The 16-byte identity of an event in the ledger (P2). TypeError unless all are text."""
    try:
        return digest_text((trigger, source), ident.encode())
    except (AttributeError, TypeError):  # made by code without types
        raise TypeError(ID_EXPECTED) from None


def content_digest(event: Event) -> bytes:
    """8 bytes of type and data that distinguish a duplicate from a conflict.

    The time is left out: a sender that repeats an event may set it again. So is the order of keys.
    """
    data = event.data
    if not isinstance(data, bytes):
        data = orjson.dumps(data, option=orjson.OPT_SORT_KEYS)
    return digest_text((event.type,), data, 8)


def verdict(name: str, outcome: str, detail: str | int, term: str) -> Verdict:
    return orjson.dumps((name, outcome, detail)), term


class FlowStep:
    """A flow's subscription: a new run, or why there is none."""

    __slots__ = ("_binder", "_flow", "_paused", "_pending", "_sinks", "_subscription")

    def __init__(self, subscription: Subscription, dead_letter_sinks: Sequence[str]) -> None:
        self._subscription = subscription
        self._flow = subscription.flow.name
        self._binder = subscription.flow.binder
        self._sinks = dead_letter_sinks
        name = orjson.dumps(subscription.name)
        self._pending: bytes = b'[%b,"run",' % name
        self._paused: bytes = b'[%b,"paused",' % name

    def __call__(self, arrival: Arrival, incoming: Incoming, run_id: int) -> Verdict:
        subscription = self._subscription
        event = incoming.event
        batch_policy = subscription.batch_policy
        ordering_key = subscription.default_ordering_key
        mismatch = params = given = None
        try:
            if subscription.filter is not None:
                mismatch = subscription.filter.mismatch(event)
            if mismatch is None:
                if subscription.key is not None:
                    ordering_key = _ordering_key(subscription.key(event))
                if batch_policy is not None:
                    self._binder.bind_events((event,))
                elif subscription.params is None:
                    given = self._binder.bind_arriving(event, incoming.data)
                else:
                    params = self._binder.unpack((), dict(subscription.params(event)))
                    given = self._binder.bind_unpacked(params, event)
        except BaseException as error:  # user code: what it raises is the reason of a dead letter
            return reject(arrival, subscription.name, error, self._sinks)
        if mismatch is not None:
            return verdict(subscription.name, "filtered", mismatch, "suppressed")
        moment = arrival.received_at
        run = Run(
            id=run_id,
            flow=self._flow,
            created_at=moment,
            due_at=moment,
            event=arrival.id,
            subscription=subscription.name,
            ordering_key=ordering_key,
            priority=subscription.priority,
            depth=incoming.depth,
            params=params,
            payload=arrival.body,
            given=given,
        )
        head = self._pending
        if incoming.is_paused:
            run.state = State.PAUSED
            head = self._paused
        if batch_policy is not None:
            add_batch_policy(arrival, run, batch_policy)
        arrival.runs = [*arrival.runs, run]
        return b"%b%d]" % (head, run_id), "pending"


def _ordering_key(key: object) -> str | None:
    if key is not None and not isinstance(key, str):
        raise TypeError(f"key= returned {type(key).__name__}, expected a str or None")
    return _checked_key("key=", key)


def add_batch_policy(arrival: Arrival, run: Run, policy: BatchPolicy) -> None:
    """The run is due when its batch window closes."""
    arrival.batch_policies = {**arrival.batch_policies, run.id: policy}
    run.mode = policy.mode
    if policy.size > 1:
        run.due_at += policy.wait


def kept_text(reason: str) -> str:
    """The reason without the secrets and lone surrogates that it may quote."""
    return KNOWN_SECRETS.remove_from(storable_text(reason))


def reject(arrival: Arrival, name: str, error: BaseException, sinks: Sequence[str]) -> Verdict:
    """Add a dead letter of this subscription; the verdict *invalid*."""
    reason = kept_text(_reason(error))
    arrival.dead_letters = [*arrival.dead_letters, (name, reason)]
    arrival.outbox = [*arrival.outbox, *((sink, name) for sink in sinks)]
    return verdict(name, "invalid", reason, "dead")


def _reason(error: BaseException) -> str:
    """Why an event is a dead letter: the error, and the line of the user's callable (`where=`,
    `params=`, `key=`) that raised it.
    """
    if isinstance(error, BindingError):
        return str(error)
    reason = error_line(error)
    if "'Event' object" in reason:
        reason += "; the argument is the event, its data is event.data"
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    code = None if step is None else step.tb_frame.f_code
    if step is None or code is None or is_own_file(code.co_filename):
        return reason
    at = format_location(code.co_filename, step.tb_lineno)
    return f"{reason} (in {code.co_qualname}, {at})"


class PatternStep:
    """A pattern: the event goes to the first part that accepts it."""

    __slots__ = ("_label", "_name", "_parts", "_sinks")

    def __init__(
        self,
        subscription: Subscription,
        trigger: str,
        event_type: str,
        dead_letter_sinks: Sequence[str],
    ) -> None:
        pattern = subscription.pattern
        assert pattern is not None
        self._label: str = pattern.label
        self._name: str = subscription.name
        self._parts = [
            (number, pattern.parts[number]) for number in pattern.parts_for(trigger, event_type)
        ]
        self._sinks = dead_letter_sinks

    def __call__(self, arrival: Arrival, incoming: Incoming, run_id: int) -> Verdict:
        name = self._name
        event = incoming.event
        mismatch: str | None = None
        for number, part in self._parts:
            key = None
            try:
                if part.filter is not None:
                    mismatch = part.filter.mismatch(event)
                    if mismatch is not None:
                        continue
                if part.key is not None:
                    key = _join_key(part.key, event)
            except BaseException as error:  # user code: as in FlowStep
                return reject(arrival, name, error, self._sinks)
            if part.key is not None and key is None:
                missing = f"it has no join key: no field that by= of {self._label} names"
                return verdict(name, "filtered", missing, "suppressed")
            time = event_time_us(event, arrival.received_at)
            pattern_event = PatternEvent(
                name, key or "", number, time, incoming.is_paused, incoming.depth
            )
            arrival.pattern_events = [*arrival.pattern_events, pattern_event]
            return verdict(name, "waiting", part.label, "pending")
        return verdict(name, "filtered", mismatch or "", "suppressed")


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


class SinkStep:
    """A sink: the event goes into its outbox if its filter accepts it.

    Not counted as a delivery (P9), since nothing runs; a filter that raises is one dead letter.
    """

    __slots__ = ("_subscription",)

    def __init__(self, subscription: SinkSubscription) -> None:
        self._subscription = subscription

    def __call__(self, arrival: Arrival, incoming: Incoming, run_id: int) -> Verdict:
        subscription = self._subscription
        name = subscription.name
        if subscription.filter is not None:
            try:
                mismatch = subscription.filter.mismatch(incoming.event)
            except BaseException as error:  # user code: as in FlowStep
                return reject(arrival, name, error, ())
            if mismatch is not None:
                return verdict(name, "filtered", mismatch, "")
        arrival.outbox = [*arrival.outbox, (name, None)]
        return verdict(name, "outbox", f"for sink {subscription.sink.name}", "")
