"""Subscriptions of flows, patterns and sinks: which events each of them wants.

`App.on` and `App.send` call `subscribe`, `subscribe_pattern` and `subscribe_sink`, which check
every option and raise UsageError. The results are immutable values; `router.py` tests each event
against them, `app.py` lists them. The subscription's name is part of the ledger (verdicts and runs
carry it), so it stays the same as long as the trigger and the flow keep their names.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Protocol, TypeAlias, cast

import msgspec
import orjson

from eventflow.core.declarations import whole_number
from eventflow.core.errors import UsageError
from eventflow.events.event import Event, EventSink, LateSpec
from eventflow.routing.binding import Binder
from eventflow.routing.delivery import Delivery, Each
from eventflow.routing.filters import Filter, FilterSpec, compile_filter, wildcard
from eventflow.routing.pattern_machine import Machine
from eventflow.store.protocol import BatchPolicy

EMITTED = "events"
"""The trigger name of events that flows emit."""
RUN_EVENT_PREFIX = "eventflow.run."
"""Prefix of run-state event types; a state (`completed` … `held`) or `late` follows."""

Key: TypeAlias = "str | Callable[[Event], str | None] | None"
Params: TypeAlias = "Callable[[Event], Mapping[str, Any]] | None"


class FlowLike(Protocol):
    """What routing needs of a flow; implemented by `sdk.flow.Flow`, which is in a higher layer."""

    @property
    def name(self) -> str: ...
    @property
    def priority(self) -> int: ...
    @property
    def binder(self) -> Binder: ...


class PatternPart(msgspec.Struct, frozen=True):
    """One part of a compiled pattern.

    It takes events of trigger `trigger_name` whose type is among `types` (empty: any type) and
    that pass `filter`. `key` computes the join key, None: the pattern has no key. `label` names
    the part in verdicts.
    """

    trigger_name: str
    types: tuple[str, ...]
    filter: Filter | None
    key: Callable[[Event], str | None] | None
    label: str


class CompiledPattern(msgspec.Struct, frozen=True):
    """A pattern as the router uses it. Made by `patterns.compile_pattern`.

    `label` is the pattern's kind (`all_of` …). `machine` numbers its parts as `parts` lists them.
    """

    parts: tuple[PatternPart, ...]
    machine: Machine
    label: str

    @property
    def trigger_names(self) -> set[str]:
        """The triggers whose events any part takes."""
        return {part.trigger_name for part in self.parts}

    def parts_for(self, trigger: str, event_type: str) -> list[int]:
        """Numbers of the parts that take events of this trigger and type, filters aside."""
        return [
            number
            for number, part in enumerate(self.parts)
            if part.trigger_name == trigger and type_accepted(part.types, event_type)
        ]


class Subscription(msgspec.Struct, frozen=True, kw_only=True):
    """A flow's subscription to a trigger or a pattern. Made by `subscribe`, `subscribe_pattern`.

    - `types`: accepted event types, `*` is a wildcard as in filters; empty: all.
    - `key`: computes the ordering key of an event. Runs of a flow with equal ordering keys execute
      one after another.
    - `on_failure="block"`: a failed run blocks the later runs of its ordering key until it is
      retried or cancelled.
    - `batch_policy`: how several events make one run; None: one run per event.
    - `default_ordering_key`: that of events without a key; None: their runs are not ordered.
    - `pattern`: the pattern whose matches make the runs; `trigger` is empty then.
    - `late`: the runs whose lateness is an event of this subscription.
    """

    name: str
    trigger: str
    flow: FlowLike
    filter: Filter | None = None
    params: Params = None
    key: Callable[[Event], str | None] | None = None
    priority: int = 0
    on_failure: str = "continue"
    types: tuple[str, ...] = ()
    batch_policy: BatchPolicy | None = None
    default_ordering_key: str | None = None
    pattern: CompiledPattern | None = None
    late: tuple[LateSpec, ...] = ()

    def accepts(self, event_type: str, trigger: str = EMITTED) -> bool:
        """Whether an event of this type is a delivery to this subscription and gets a verdict.

        `trigger` matters for patterns only: their parts may be of several triggers.
        """
        return (
            type_accepted(self.types, event_type)
            if self.pattern is None
            else bool(self.pattern.parts_for(trigger, event_type))
        )


class SinkSubscription(msgspec.Struct, frozen=True, kw_only=True):
    """A sink's subscription to emitted events. Made by `subscribe_sink`.

    `types` as in `Subscription`. With `is_for_dead_letters` the sink gets every dead letter
    instead of emitted events.
    """

    name: str
    sink: EventSink
    types: tuple[str, ...] = ()
    filter: Filter | None = None
    is_for_dead_letters: bool = False

    def accepts(self, event_type: str) -> bool:
        """Whether emitted events of this type go to the sink, filters aside."""
        return not self.is_for_dead_letters and type_accepted(self.types, event_type)


def type_accepted(types: tuple[str, ...], event_type: str) -> bool:
    """Whether `types` accept an event type. Empty `types` accept every type but run states.

    Run-state events are accepted only by a type that starts with their prefix: a subscription to
    `*` means the user's events, not eventflow's own.
    """
    if event_type.startswith(RUN_EVENT_PREFIX):
        types = tuple(wanted for wanted in types if wanted.startswith(RUN_EVENT_PREFIX)) or (
            RUN_EVENT_PREFIX,
        )
    return not types or any(
        event_type == wanted or _type_matches(wanted, event_type) for wanted in types
    )


def subscribe(
    trigger: str,
    flow: FlowLike,
    *,
    where: FilterSpec = None,
    params: Params = None,
    key: Key = None,
    priority: int | None = None,
    on_failure: str = "continue",
    types: Iterable[str] = (),
    deliver: Delivery | None = None,
    name: str | None = None,
    used_names: Collection[str] = (),
    late: LateSpec | None = None,
) -> Subscription:
    """A checked subscription of a flow to a trigger.

    The name is `TRIGGER/FLOW` or the given `name`, with `#2`, `#3` … if it is among `used_names`.
    `key` is a dotted path into `data`, `@attribute`, `"record"` (the `partitionkey` extension, else
    the subject), or a callable. Raises UsageError for a bad `where`, `types`, `key`, `on_failure`,
    `deliver`, or a `params` that a batch cannot use.
    """
    if on_failure not in ("continue", "block"):
        raise UsageError(f'on_failure= expected "continue" or "block", found {on_failure!r}')
    check_types(kinds := tuple(types))
    mode = _delivery_mode(deliver)
    if params is not None and not callable(cast(object, params)):
        raise UsageError(
            "params= expected a function from the event to the flow's arguments, such as "
            f"lambda event: {{'name': event.data['field']}}; found {params!r}"
        )
    if params is not None and mode.batch_policy() is not None:
        raise UsageError(
            f"params= makes one event's arguments; with deliver={mode!r} let the flow take "
            "list[Event]"
        )
    unique = unique_name(name or f"{trigger}/{flow.name}", used_names)
    return Subscription(
        name=unique,
        trigger=trigger,
        flow=flow,
        filter=compile_filter(where),
        params=params,
        key=compile_key(key),
        priority=_checked_priority(priority, flow),
        on_failure=on_failure,
        types=kinds,
        batch_policy=mode.batch_policy(),
        default_ordering_key=unique if mode.one_at_a_time else None,
        late=() if late is None else (late,),
    )


def subscribe_pattern(
    pattern: CompiledPattern,
    flow: FlowLike,
    *,
    priority: int | None = None,
    deliver: Delivery | None = None,
    name: str | None = None,
    used_names: Collection[str] = (),
    late: Iterable[LateSpec] = (),
) -> Subscription:
    """A checked subscription of a flow to a pattern. Its name is `PATTERN/FLOW` or `name`."""
    mode = _delivery_mode(deliver)
    unique = unique_name(name or f"{pattern.label}/{flow.name}", used_names)
    level = _checked_priority(priority, flow)
    return Subscription(
        name=unique,
        trigger="",
        flow=flow,
        priority=level,
        pattern=pattern,
        batch_policy=mode.batch_policy(),
        default_ordering_key=unique if mode.one_at_a_time else None,
        late=tuple(late),
    )


def subscribe_sink(
    sink: EventSink,
    *,
    types: Iterable[str] = (),
    where: FilterSpec = None,
    dead_letters: bool = False,
    name: str | None = None,
    used_names: Collection[str] = (),
) -> SinkSubscription:
    """A checked subscription of a sink.

    The name is `events/SINK`, `dead/SINK` or the given one, with `#2`, `#3` … if it is among
    `used_names`. Raises UsageError for what is no sink and for bad `types` or `where`.
    """
    if not isinstance(sink, EventSink):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UsageError(f"expected a sink (with a name, send() and close()), found {sink!r}")
    check_types(kinds := tuple(types))
    unique = unique_name(name or f"{'dead' if dead_letters else EMITTED}/{sink.name}", used_names)
    return SinkSubscription(
        name=unique,
        sink=sink,
        types=kinds,
        filter=compile_filter(where),
        is_for_dead_letters=dead_letters,
    )


_CRON_EXPRESSION = (  # compiled by `re` at its first use
    r"@(yearly|annually|monthly|weekly|daily|midnight|hourly)"
    r"|[-0-9*/,]+( +[-0-9*/,?#A-Za-z]+){4,5}"
)


def check_types(types: Iterable[str]) -> None:
    """UsageError for a malformed wildcard, and for a schedule in place of an event type."""
    for wanted in types:
        wildcard(wanted, "types")
        if re.fullmatch(_CRON_EXPRESSION, wanted.strip()):
            raise UsageError(
                f"expected a trigger or an event type, found {wanted!r}, which is a cron "
                f"expression; did you mean Cron({wanted!r})? (from triggers import Cron)"
            )


def _checked_priority(priority: int | None, flow: FlowLike) -> int:
    if priority is None:
        return flow.priority
    return whole_number(priority, "priority=", minimum=-(1 << 63))


def _delivery_mode(deliver: Delivery | None) -> Delivery:
    mode = deliver or Each()
    if isinstance(mode, type) or not isinstance(mode, Delivery):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UsageError(
            "deliver= expected Each(), Batch(), Debounce(), Latest() or Singleflight(), found "
            f"{mode!r}"
        )
    return mode


def unique_name(name: str, used_names: Collection[str]) -> str:
    """`name`, or `name#2`, `name#3` … whichever is the first not among `used_names`."""
    number = 1
    unique = name
    while unique in used_names:
        number += 1
        unique = f"{name}#{number}"
    return unique


def _type_matches(wanted: str, found: str) -> bool:
    return "*" in wanted and wildcard(wanted, "types")(found)


def compile_key(key: Key) -> Callable[[Event], str | None] | None:
    """The function behind `key=`: the key of an event as text, None where it has none.

    Values other than strings become their JSON. Raises UsageError for a malformed path.
    """
    if key is None or callable(key):
        return key
    if key == "record":
        return _record_key
    if key.startswith("@"):
        return lambda event: _key_text(
            getattr(event, key[1:], None) or event.extensions.get(key[1:])
        )
    path = key.split(".")
    if not all(path):
        raise UsageError(
            'key= expected a dotted path such as "customer.id", "@attribute" or "record", found '
            f"{key!r}"
        )
    return lambda event: _key_text(_value_at(event.data, path))


def _record_key(event: Event) -> str | None:
    return _key_text(event.extensions.get("partitionkey", event.subject))


def _value_at(data: Any, path: list[str]) -> Any:
    for step in path:
        if not isinstance(data, dict):
            return None
        data = cast(dict[str, Any], data).get(step)
    return data


def _key_text(value: Any) -> str | None:
    return (
        value
        if value is None or isinstance(value, str)
        else orjson.dumps(value, default=str, option=orjson.OPT_SORT_KEYS).decode()
    )


def combine_filters(pattern: Mapping[str, Any], where: FilterSpec) -> FilterSpec:
    """A `where=` that holds if `pattern`, which is the trigger's own, and `where` both hold."""
    if where is None:
        return pattern
    if isinstance(where, Mapping):
        if repeated := pattern.keys() & where.keys():
            raise UsageError(
                f"where= names {', '.join(sorted(repeated))}, which the trigger sets already"
            )
        return {**pattern, **where}
    compiled = compile_filter(pattern)
    assert compiled is not None

    def test(event: Event) -> bool:
        return compiled.mismatch(event) is None and where(event)

    test.__qualname__ = "both.<locals>.<lambda>"  # in the fingerprints of patterns in stores
    return test
