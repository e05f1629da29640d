"""Subscriptions and outlets: which events a flow or a sink wants, checked when they are made.

`app.on` and `app.send` call `subscribe` and `outlet`; routing.py asks what they made about each event.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, cast

import msgspec
import orjson

from eventflow.core.errors import UsageError
from eventflow.events.event import Event, EventSink, LateSpec
from eventflow.routing.binding import Binder
from eventflow.routing.delivery import Delivery, Each
from eventflow.routing.filters import Filter, Where, compile_filter, wildcard
from eventflow.routing.pattern_machine import Machine
from eventflow.store.protocol import Gather

EMITTED = "events"
"""The trigger of events that flows emit."""
RUN_EVENT_PREFIX = "eventflow.run."
"""Begins the types of events that tell of runs: `completed`, `failed`, `cancelled`, `dead`, `held` and `late` may follow it."""

Key: TypeAlias = "str | Callable[[Event], str | None] | None"
Params: TypeAlias = "Callable[[Event], Mapping[str, Any]] | None"


class FlowLike(Protocol):
    """What routing asks of a flow."""

    @property
    def name(self) -> str: ...
    @property
    def priority(self) -> int: ...
    @property
    def binder(self) -> Binder: ...


class Leaf(msgspec.Struct, frozen=True):
    """What one part of a pattern asks of an event: from where, of which types, which ones; `key` joins it to others."""

    place: str
    types: tuple[str, ...]
    filter: Filter | None
    key: Callable[[Event], str | None] | None
    label: str


class Joins(Protocol):
    """What routing asks of a pattern (patterns.py)."""

    @property
    def leaves(self) -> Sequence[Leaf]: ...
    @property
    def places(self) -> Collection[str]: ...
    @property
    def label(self) -> str: ...
    @property
    def machine(self) -> Machine: ...
    def hearing(self, place: str, event_type: str) -> Sequence[int]: ...


class Subscription(msgspec.Struct, frozen=True, kw_only=True):
    """A trigger's events for a flow. Made by `subscribe`.

    `types`: event types it hears of at all, with `*` as in filters; none: all. `key`: events of equal keys run one after
    another (per flow). `on_failure="block"`: a failed run keeps its lane shut until somebody retries or cancels it. `gather`:
    how several events make one run; `lane`: the one of events without a key. `joined`: the pattern that makes its runs, of
    events of several triggers. `late`: the runs to look out for, whose lateness it wants to hear of.
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
    batch_policy: Gather | None = None
    lane: str | None = None
    pattern: Joins | None = None
    late: tuple[LateSpec, ...] = ()

    def accepts(self, event_type: str, trigger: str = EMITTED) -> bool:
        """Whether events of this type (of this trigger, for a pattern) are deliveries to it, and get a verdict."""
        return (
            type_accepted(self.types, event_type)
            if self.pattern is None
            else bool(self.pattern.hearing(trigger, event_type))
        )


class SinkSubscription(msgspec.Struct, frozen=True, kw_only=True):
    """Emitted events of these types, or (`dead`) everything that becomes a dead letter, for a sink. Made by `outlet`."""

    name: str
    sink: EventSink
    types: tuple[str, ...] = ()
    filter: Filter | None = None
    is_for_dead_letters: bool = False

    def accepts(self, event_type: str) -> bool:
        return not self.is_for_dead_letters and type_accepted(self.types, event_type)


def type_accepted(types: tuple[str, ...], event_type: str) -> bool:
    if event_type.startswith(
        RUN_EVENT_PREFIX
    ):  # only by name: whoever asks for `*` does not mean what eventflow tells of runs
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
    where: Where = None,
    params: Params = None,
    key: Key = None,
    priority: int | None = None,
    on_failure: str = "continue",
    types: Iterable[str] = (),
    deliver: Delivery | None = None,
    name: str | None = None,
    taken: Collection[str] = (),
    late: LateSpec | None = None,
) -> Subscription:
    """A subscription, checked: UsageError says what is wrong with `where`, `key`, `on_failure` or `deliver`.

    Its name is `trigger/flow`, or what is given; with `#2`, `#3` … when that is among the `taken`.
    `key` is a dotted path into `data`, `@attribute`, `"record"` (the `partitionkey` extension or the subject), or a callable.
    """
    if on_failure not in ("continue", "block"):
        raise UsageError(f'on_failure= expected "continue" or "block", found {on_failure!r}')
    for wanted in (kinds := tuple(types)):
        wildcard(wanted, "types")
    mode = _mode(deliver)
    if params is not None and mode.batch_policy() is not None:
        raise UsageError(
            f"params= makes one event's arguments; with deliver={mode!r} let the flow take list[Event]"
        )
    unique = _unique(name or f"{trigger}/{flow.name}", taken)
    return Subscription(
        name=unique,
        trigger=trigger,
        flow=flow,
        filter=compile_filter(where),
        params=params,
        key=compile_key(key),
        priority=flow.priority if priority is None else priority,
        on_failure=on_failure,
        types=kinds,
        batch_policy=mode.batch_policy(),
        lane=unique if mode.one_at_a_time else None,
        late=() if late is None else (late,),
    )


def subscribe_pattern(
    pattern: Joins, flow: FlowLike, *, priority: int | None = None, deliver: Delivery | None = None, name: str | None = None,
    taken: Collection[str] = (), late: Iterable[LateSpec] = (),
) -> Subscription:  # fmt: skip
    """A pattern's subscription. Its name is `PATTERN/FLOW`, or what is given."""
    mode = _mode(deliver)
    unique = _unique(name or f"{pattern.label}/{flow.name}", taken)
    level = flow.priority if priority is None else priority
    return Subscription(
        name=unique, trigger="", flow=flow, priority=level, pattern=pattern, batch_policy=mode.batch_policy(),
        lane=unique if mode.one_at_a_time else None, late=tuple(late),
    )  # fmt: skip


def subscribe_sink(
    sink: EventSink, *, types: Iterable[str] = (), where: Where = None, dead_letters: bool = False, name: str | None = None,
    taken: Collection[str] = (),
) -> SinkSubscription:  # fmt: skip
    """An outlet, checked. Its name is `events/SINK` or `dead/SINK`, with `#2`, `#3` … when that is among the `taken`."""
    if not isinstance(sink, EventSink):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UsageError(f"expected a sink (with a name, send() and close()), found {sink!r}")
    for wanted in (kinds := tuple(types)):
        wildcard(wanted, "types")
    unique = _unique(name or f"{'dead' if dead_letters else EMITTED}/{sink.name}", taken)
    return SinkSubscription(
        name=unique,
        sink=sink,
        types=kinds,
        filter=compile_filter(where),
        is_for_dead_letters=dead_letters,
    )


def _mode(deliver: Delivery | None) -> Delivery:
    mode = deliver or Each()
    if not isinstance(mode, Delivery):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UsageError(
            f"deliver= expected Each(), Batch(), Debounce(), Latest() or Singleflight(), found {mode!r}"
        )
    return mode


def _unique(name: str, taken: Collection[str]) -> str:
    number, unique = 1, name
    while unique in taken:
        number += 1
        unique = f"{name}#{number}"
    return unique


def _type_matches(wanted: str, found: str) -> bool:
    return "*" in wanted and wildcard(wanted, "types")(found)


def compile_key(key: Key) -> Callable[[Event], str | None] | None:
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
            f'key= expected a dotted path such as "customer.id", "@attribute" or "record", found {key!r}'
        )
    return lambda event: _key_text(_walk(event.data, path))


def _record_key(event: Event) -> str | None:
    return _key_text(event.extensions.get("partitionkey", event.subject))


def _walk(data: Any, path: list[str]) -> Any:
    for step in path:
        if not isinstance(data, dict):
            return None
        data = cast(dict[str, Any], data).get(step)
    return data


def _key_text(value: Any) -> str | None:
    return (
        value
        if value is None or isinstance(value, str)
        else orjson.dumps(value, default=str).decode()
    )


def combine_filters(pattern: Mapping[str, Any], where: Where) -> Where:
    """A filter that wants what both want."""
    if where is None:
        return pattern
    if isinstance(where, Mapping):
        if taken := pattern.keys() & where.keys():
            raise UsageError(
                f"where= names {', '.join(sorted(taken))}, which the trigger has said already"
            )
        return {**pattern, **where}
    compiled, wanted = compile_filter(pattern), where
    assert compiled is not None
    return lambda event: compiled.mismatch(event) is None and wanted(event)
