"""Patterns over several events, as a user writes them. `App.on` takes one in place of a trigger.

    all_of(A, B, within=600)                   one event of each, in any order
    any_of(A, B)                               each event of any part
    sequence(A, then=B, unless=C, within=600)  A, then B, and no C in between
    count(A, 5, within=60)                     five of them
    absent(A, for_=3600)                       none for an hour since the last one
    absent(A, for_=3600, after=B)              none for an hour after a B
    absent(A, by="06:00", tz="Europe/Berlin")  none from one day's 06:00 to the next

`by=` joins events by a key. A part is a trigger, an event type, a RunState, `(trigger, where)`,
`part(...)`, or a pattern. `compile_pattern` makes a `CompiledPattern` of a pattern: its parts,
their keys, and the state machine (pattern_machine.py). docs/guides/patterns.md defines what each
pattern matches and what happens to events that match nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from datetime import time as time_of_day
from typing import Any, TypeAlias, cast

import msgspec

from eventflow.core.clock import Duration, microseconds, to_datetime, to_us
from eventflow.core.declarations import declaration, duration, whole_number
from eventflow.core.errors import UsageError
from eventflow.core.hashing import digest
from eventflow.events.event import Event, LateSpec, LedgerTrigger, Trigger
from eventflow.routing.filters import FilterSpec, compile_filter
from eventflow.routing.pattern_machine import (
    MAX_OPEN_ITEMS,
    AllOfNode,
    AnyOfNode,
    CountNode,
    Machine,
    Node,
)
from eventflow.routing.pattern_time import DailyNode, TimedNode
from eventflow.routing.subscriptions import (
    EMITTED,
    CompiledPattern,
    Key,
    PatternPart,
    check_types,
    combine_filters,
    compile_key,
)

By: TypeAlias = "Key | Mapping[str, Key]"


class Part(msgspec.Struct, frozen=True):
    """Events of one source, narrowed by `where`. Made by `part`. `by`: its own join key."""

    source: "Trigger | LedgerTrigger | str"
    where: FilterSpec = None
    by: Key = None

    @property
    def trigger_name(self) -> str:
        """The trigger name that its events have in the ledger."""
        return EMITTED if isinstance(self.source, str | LedgerTrigger) else self.source.name

    @property
    def types(self) -> tuple[str, ...]:
        if isinstance(self.source, str):
            return (self.source,)
        if isinstance(self.source, LedgerTrigger):
            return tuple(self.source.types)
        return tuple(getattr(self.source, "default_types", ()))

    @property
    def label(self) -> str:
        return (
            " or ".join(self.types)
            if isinstance(self.source, str | LedgerTrigger)
            else self.source.name
        )

    @property
    def combined_where(self) -> FilterSpec:
        """`where`, together with the filter of a trigger that has one."""
        if isinstance(self.source, LedgerTrigger):
            return combine_filters(self.source.pattern, self.where)
        return self.where


class Pattern(msgspec.Struct, frozen=True, kw_only=True):
    """What `all_of`, `any_of`, `sequence`, `count` and `absent` return.

    `parts` with the role of each (`pattern_time.OPEN` … for sequences and absences, else its
    number). `within` and `lateness` in microseconds; `n` of `count`; `at` and `tz`: the daily
    deadline of `absent`. `by` is set on the outermost pattern only.
    """

    kind: str
    parts: "tuple[Part | Pattern, ...]"
    roles: tuple[int, ...]
    within: int = 0
    n: int = 0
    at: str = ""
    tz: str = "UTC"
    by: By = None
    lateness: int | None = None

    @property
    def label(self) -> str:
        return f"{self.kind}({', '.join(each.label for each in self.parts)})"

    @property
    def is_daily(self) -> bool:
        """Whether this pattern, or one inside it, has a daily deadline."""
        return bool(self.at) or any(
            isinstance(each, Pattern) and each.is_daily for each in self.parts
        )

    @property
    def flat_parts(self) -> list[Part]:
        """Its parts and the parts of the patterns inside it, in order."""
        return [
            part
            for each in self.parts
            for part in (each.flat_parts if isinstance(each, Pattern) else [each])
        ]

    @property
    def triggers(self) -> list[Trigger]:
        return [
            each.source
            for each in self.flat_parts
            if not isinstance(each.source, str | LedgerTrigger)
        ]

    @property
    def late(self) -> list[LateSpec]:
        """The late runs that its parts ask for."""
        sources = [part.source for part in self.flat_parts]
        return [
            each.late
            for each in sources
            if isinstance(each, LedgerTrigger) and each.late is not None
        ]


EventSource: TypeAlias = "Trigger | LedgerTrigger | str"
Source: TypeAlias = "EventSource | tuple[EventSource, FilterSpec] | Part | Pattern"


@declaration
def part(
    source: Trigger | LedgerTrigger | str, *, where: FilterSpec = None, by: Key = None
) -> Part:
    """One part of a pattern: a source, narrowed by `where`.

    `by`: where the join key is in events of this part, if not where the pattern's `by=` says.
    """
    if not isinstance(source, str | LedgerTrigger | Trigger):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UsageError(
            f"a pattern's part: expected a trigger, an event type or a RunState, found {source!r}"
        )
    if isinstance(source, str):
        check_types((source,))
    made = Part(source, where, by)
    compile_filter(made.combined_where)
    compile_key(by)
    return made


@declaration
def all_of(
    *parts: Source, within: Duration, by: By = None, lateness: Duration | None = None
) -> Pattern:
    """Match one event of each part, all within `within` of each other, in any order."""
    if len(parts) < 2:
        raise UsageError(f"all_of: expected two parts or more, found {len(parts)}")
    return _pattern("all_of", parts, range(len(parts)), within, by, lateness)


@declaration
def any_of(*parts: Source, by: By = None) -> Pattern:
    """Match each event of any part."""
    if not parts:
        raise UsageError("any_of: expected parts, found none")
    return _pattern("any_of", parts, [0] * len(parts), None, by, None)


@declaration
def sequence(
    first: Source,
    *,
    then: Source,
    unless: "Source | None" = None,
    within: Duration,
    by: By = None,
    lateness: Duration | None = None,
) -> Pattern:
    """Match `first` followed by `then` within `within`, unless an `unless` comes in between."""
    parts = (first, then) if unless is None else (first, then, unless)
    return _pattern("sequence", parts, range(len(parts)), within, by, lateness)


@declaration
def count(
    what: Source, n: int, *, within: Duration, by: By = None, lateness: Duration | None = None
) -> Pattern:
    """Match `n` events, all within `within`."""
    whole_number(n, "count: n", maximum=MAX_OPEN_ITEMS)
    return msgspec.structs.replace(_pattern("count", (what,), (0,), within, by, lateness), n=n)


@declaration
def absent(
    what: Source,
    for_: Duration | None = None,
    *,
    after: "Source | None" = None,
    by: By = None,
    tz: str = "UTC",
    lateness: Duration | None = None,
) -> Pattern:
    """Match when no event comes for `for_`, counted from the last one or from an `after`.

    Without `for_`: match when none came by the time of day `by`, in the time zone `tz`.
    """
    if for_ is not None:
        parts, roles = ((what,), (3,)) if after is None else ((after, what), (0, 2))
        return _pattern("absent", parts, roles, for_, by, lateness)
    if not isinstance(by, str) or after is not None:
        raise UsageError(
            'absent: expected for_= (a duration) or by= (a time of day such as "06:00"), found '
            "neither"
        )
    _daily_deadlines(by, tz)  # raises UsageError for a bad time or zone
    made = _pattern("absent", (what,), (0,), None, None, lateness)
    return msgspec.structs.replace(made, at=by, tz=tz)


def _pattern(
    kind: str,
    parts: Sequence[Source],
    roles: Sequence[int],
    within: Duration | None,
    by: By,
    lateness: Duration | None,
) -> Pattern:
    wait = 0
    if within is not None:
        option = "for_" if kind == "absent" else "within="
        wait = microseconds(duration(within, f"{kind}: {option}", positive=True))
    if lateness is not None:
        duration(lateness, f"{kind}: lateness=")
    made = tuple(_part(each) for each in parts)
    for each in made:
        if isinstance(each, Pattern) and each.by is not None:
            raise UsageError(
                f"{kind}: by= belongs to the outermost pattern, found one on {each.label}"
            )
    late = None if lateness is None else microseconds(lateness)
    pattern = Pattern(kind=kind, parts=made, roles=tuple(roles), within=wait, by=by, lateness=late)
    _part_keys(pattern)
    _refuse_duplicates(pattern)
    return pattern


def _part(given: Source) -> Part | Pattern:
    if isinstance(given, Part | Pattern):
        return given
    if isinstance(given, tuple):
        source, where = given
        return part(source, where=where)
    return part(given)


def _refuse_duplicates(pattern: Pattern) -> None:
    """An event goes to the first part that accepts it, so a second equal part would get none."""
    seen: list[tuple[str, tuple[str, ...], Any]] = []
    for each in pattern.flat_parts:
        same = (each.trigger_name, each.types, each.combined_where)
        if same in seen:
            raise UsageError(
                f"{pattern.label}: {each.label} occurs twice, so the second part would get no "
                "events; give them different where=, or use count()"
            )
        seen.append(same)


def _part_keys(pattern: Pattern) -> "list[Callable[[Event], str | None] | None]":
    """The key function of each flat part. Raises UsageError when only some parts have one."""
    by = pattern.by
    labels = [each.label for each in pattern.flat_parts]
    named: dict[str, Key] = (
        dict(cast(Mapping[str, Key], by)) if isinstance(by, Mapping) else dict.fromkeys(labels, by)
    )
    if unknown := set(named) - set(labels):
        raise UsageError(
            f"by= names {', '.join(sorted(unknown))}; expected parts among {', '.join(labels)}"
        )
    given = [each.by or named.get(each.label) for each in pattern.flat_parts]
    if any(given) and pattern.is_daily:
        raise UsageError(
            f"{pattern.label}: absent(by=TIME) has no join key; it cannot be combined with a by= "
            "for keys"
        )
    missing = [label for label, key in zip(labels, given, strict=True) if key is None]
    if by is not None and missing:
        raise UsageError(f"by= names no key for {', '.join(missing)}")
    return [compile_key(key) for key in given]


# --------------------------------------------------------------------------- compilation


def event_time_us(event: Event, now: int) -> int:
    """When the event happened: its `time`, or `now` if that is missing, naive or in the future."""
    if event.time is None or event.time.tzinfo is None:
        return now
    return min(to_us(event.time), now)


def compile_pattern(pattern: Pattern) -> CompiledPattern:
    """The parts of a pattern and its state machine, as the router uses them."""
    nodes: list[Node] = []
    inputs: list[tuple[Node, int]] = []
    _add_nodes(pattern, 0, nodes, inputs)
    parts = tuple(
        PatternPart(
            each.trigger_name, each.types, compile_filter(each.combined_where), key, each.label
        )
        for each, key in zip(pattern.flat_parts, _part_keys(pattern), strict=True)
    )
    return CompiledPattern(parts, Machine(nodes, inputs, _fingerprint(pattern)), pattern.kind)


def _add_nodes(
    pattern: Pattern, lateness: int, nodes: list[Node], parts: list[tuple[Node, int]]
) -> Node:
    """Append the nodes of a pattern, parents first, and per flat part its node and role."""
    late = lateness if pattern.lateness is None else pattern.lateness
    node = _make_node(pattern, late)
    nodes.append(node)
    for each, role in zip(pattern.parts, pattern.roles, strict=True):
        if isinstance(each, Pattern):
            inner = _add_nodes(each, late, nodes, parts)
            inner.parent = node
            inner.role = role
        else:
            parts.append((node, role))
    return node


def _make_node(pattern: Pattern, lateness: int) -> Node:
    labels = [each.label for each in pattern.parts]
    match pattern.kind:
        case "any_of":
            return AnyOfNode(labels, lateness)
        case "all_of":
            return AllOfNode(labels, lateness, pattern.within)
        case "count":
            return CountNode(labels, lateness, pattern.within, pattern.n)
        case "sequence":
            return TimedNode([*labels, "", ""][:4], lateness, pattern.within, absent=False)
        case _ if pattern.at:
            return DailyNode(labels, lateness, _daily_deadlines(pattern.at, pattern.tz))
        case _:
            return TimedNode(
                [labels[0], "", labels[-1], labels[-1]], lateness, pattern.within, absent=True
            )


def _daily_deadlines(at: str, tz: str) -> Callable[[int], int]:
    """A function from an instant to the next deadline after it, in microseconds."""
    from zoneinfo import ZoneInfo, ZoneInfoNotFoundError  # takes 2 ms to import

    try:
        wall = time_of_day.fromisoformat(at)
        zone: tzinfo = ZoneInfo(tz)
    except (ValueError, ZoneInfoNotFoundError) as error:
        raise UsageError(
            f'absent: expected by="06:00" or the like and tz= a time zone, found {at!r}, {tz!r}'
        ) from error
    if wall.tzinfo is not None:
        raise UsageError(f"absent: by= expected without a zone, which tz= sets, found {at!r}")

    def following(now: int) -> int:
        day = to_datetime(now).astimezone(zone).date() - timedelta(days=1)
        while (due := to_us(datetime.combine(day, wall, zone).astimezone(UTC))) <= now:
            day += timedelta(days=1)
        return due

    return following


def _fingerprint(pattern: Pattern) -> str:
    """Identifies the definition: a store drops the open state of a pattern that was changed."""
    return digest(_definition_text(pattern).encode(), size=8).hex()


def _definition_text(pattern: "Part | Pattern") -> str:
    if isinstance(pattern, Part):
        where = pattern.combined_where
        narrowed = (
            getattr(where, "__qualname__", type(where).__name__) if callable(where) else repr(where)
        )
        return f"{pattern.trigger_name} {pattern.types} {narrowed}"
    inner = ", ".join(_definition_text(each) for each in pattern.parts)
    options = f"{pattern.roles} {pattern.within} {pattern.n} {pattern.at} {pattern.tz}"
    return f"{pattern.kind}({inner}; {options} {pattern.lateness})"
