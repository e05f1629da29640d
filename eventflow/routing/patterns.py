"""Patterns over several events, as a user writes them: where a trigger may stand, one of these may stand too.

    all_of(A, B, within=600)                 one event of each, in any order
    any_of(A, B)                             each event of any
    sequence(A, then=B, unless=C, within=600)  A, then B, and no C between
    count(A, 5, within=60)                   five of them
    absent(A, for_=3600)                     none for an hour since the last; `after=B`: none for an hour after a B
    absent(A, by="06:00", tz="Europe/Berlin")  none by then, since yesterday then

`by=` joins events by a key. A part is a trigger, an event type, a RunState, `(trigger, where)`, `part(...)`, or a pattern.
`app.on` makes a `Joined` of one: which part an event is of, under which key, and the machine (matching.py) that keeps what
is open. What each means, and what becomes of events that match nothing, is in docs/guides/patterns.md.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from datetime import time as time_of_day
from typing import Any, TypeAlias, cast
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from eventflow.core.clock import Duration, microseconds, to_datetime, to_us
from eventflow.core.errors import UsageError
from eventflow.core.hashing import digest
from eventflow.events.event import Event, LateSpec, LedgerTrigger, Trigger
from eventflow.routing.filters import Where, compile_filter
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
    Key,
    Leaf,
    combine_filters,
    compile_key,
    type_accepted,
)

By: TypeAlias = "Key | Mapping[str, Key]"


class Part(msgspec.Struct, frozen=True):
    """Events of one source that `where` wants. Made by `part`."""

    source: "Trigger | LedgerTrigger | str"
    where: Where = None
    by: Key = None

    @property
    def place(self) -> str:
        """The trigger that the ledger has its events under."""
        return EMITTED if isinstance(self.source, str | LedgerTrigger) else self.source.name

    @property
    def types(self) -> tuple[str, ...]:
        if isinstance(self.source, str):
            return (self.source,)
        return (
            tuple(self.source.types)
            if isinstance(self.source, LedgerTrigger)
            else tuple(getattr(self.source, "default_types", ()))
        )

    @property
    def label(self) -> str:
        return (
            " or ".join(self.types)
            if isinstance(self.source, str | LedgerTrigger)
            else self.source.name
        )

    @property
    def wanted(self) -> Where:
        return (
            combine_filters(self.source.pattern, self.where)
            if isinstance(self.source, LedgerTrigger)
            else self.where
        )


class Pattern(msgspec.Struct, frozen=True, kw_only=True):
    """What `all_of`, `any_of`, `sequence`, `count` and `absent` return; `app.on` takes it like a trigger."""

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
        """Whether it, or a pattern in it, has a deadline each day."""
        return bool(self.at) or any(
            isinstance(each, Pattern) and each.is_daily for each in self.parts
        )

    @property
    def leaves(self) -> list[Part]:
        """Its parts, and the parts of the patterns in it, in order."""
        return [
            leaf
            for each in self.parts
            for leaf in (each.leaves if isinstance(each, Pattern) else [each])
        ]

    @property
    def triggers(self) -> list[Trigger]:
        return [
            leaf.source for leaf in self.leaves if not isinstance(leaf.source, str | LedgerTrigger)
        ]

    @property
    def late(self) -> list[LateSpec]:
        """The runs whose lateness a part of it is."""
        sources = [leaf.source for leaf in self.leaves]
        return [
            each.late
            for each in sources
            if isinstance(each, LedgerTrigger) and each.late is not None
        ]


Source: TypeAlias = (
    "Trigger | LedgerTrigger | str | tuple[Trigger | LedgerTrigger | str, Where] | Part | Pattern"
)


def part(source: Trigger | LedgerTrigger | str, *, where: Where = None, by: Key = None) -> Part:
    """One part of a pattern: a source, narrowed by `where`, with the place of the join key in its events if it has its own."""
    if not isinstance(source, str | LedgerTrigger | Trigger):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UsageError(
            f"a pattern's part: expected a trigger, an event type or a RunState, found {source!r}"
        )
    made = Part(source, where, by)
    compile_filter(made.wanted)
    compile_key(by)
    return made


def all_of(
    *parts: Source, within: Duration, by: By = None, lateness: Duration | None = None
) -> Pattern:
    """One event of each part, within `within` of each other, in any order."""
    if len(parts) < 2:
        raise UsageError(f"all_of: expected two parts or more, found {len(parts)}")
    return _pattern("all_of", parts, range(len(parts)), within, by, lateness)


def any_of(*parts: Source, by: By = None) -> Pattern:
    """Each event of any part."""
    if not parts:
        raise UsageError("any_of: expected parts, found none")
    return _pattern("any_of", parts, [0] * len(parts), None, by, None)


def sequence(
    first: Source, *, then: Source, unless: "Source | None" = None, within: Duration, by: By = None,
    lateness: Duration | None = None,
) -> Pattern:  # fmt: skip
    """`first`, then `then` within `within` of it, if no `unless` comes between."""
    parts = (first, then) if unless is None else (first, then, unless)
    return _pattern("sequence", parts, range(len(parts)), within, by, lateness)


def count(
    what: Source, n: int, *, within: Duration, by: By = None, lateness: Duration | None = None
) -> Pattern:
    """`n` of them, all within `within`."""
    if not 1 <= n <= MAX_OPEN_ITEMS:
        raise UsageError(f"count: n expected from 1 to {MAX_OPEN_ITEMS:,}, found {n}")
    return msgspec.structs.replace(_pattern("count", (what,), (0,), within, by, lateness), n=n)


def absent(
    what: Source, for_: Duration | None = None, *, after: "Source | None" = None, by: By = None, tz: str = "UTC",
    lateness: Duration | None = None,
) -> Pattern:  # fmt: skip
    """None for `for_` since the last one, or since `after`. Without `for_`: none by the time of day `by`, in the zone `tz`."""
    if for_ is not None:
        parts, roles = ((what,), (3,)) if after is None else ((after, what), (0, 2))
        return _pattern("absent", parts, roles, for_, by, lateness)
    if not isinstance(by, str) or after is not None:
        raise UsageError(
            'absent: expected for_= (a duration) or by= (a time of day such as "06:00"), found neither'
        )
    _daily(by, tz)
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
    wait = 0 if within is None else microseconds(within)
    if within is not None and wait <= 0:
        raise UsageError(f"{kind}: a positive duration expected, found {within}")
    if lateness is not None and microseconds(lateness) < 0:
        raise UsageError(f"{kind}: lateness= expected not to be negative, found {lateness}")
    made = tuple(_part(each) for each in parts)
    for each in made:
        if isinstance(each, Pattern) and each.by is not None:
            raise UsageError(
                f"{kind}: by= belongs to the outermost pattern, found one on {each.label}"
            )
    late = None if lateness is None else microseconds(lateness)
    pattern = Pattern(kind=kind, parts=made, roles=tuple(roles), within=wait, by=by, lateness=late)
    _keys(pattern)
    _refuse_twins(pattern)
    return pattern


def _part(given: Source) -> Part | Pattern:
    if isinstance(given, Part | Pattern):
        return given
    if isinstance(given, tuple):
        source, where = given
        return part(source, where=where)
    return part(given)


def _refuse_twins(pattern: Pattern) -> None:
    """An event is of the first part that wants it, so a part that wants the same never gets any."""
    seen: list[tuple[str, tuple[str, ...], Any]] = []
    for leaf in pattern.leaves:
        same = (leaf.place, leaf.types, leaf.wanted)
        if same in seen:
            raise UsageError(
                f"{pattern.label}: {leaf.label} is in it twice; the second gets nothing: narrow them, or count()"
            )
        seen.append(same)


def _keys(pattern: Pattern) -> "list[Callable[[Event], str | None] | None]":
    """How each leaf's events tell their key. UsageError when only some can."""
    by = pattern.by
    labels = [leaf.label for leaf in pattern.leaves]
    named: dict[str, Key] = (
        dict(cast(Mapping[str, Key], by)) if isinstance(by, Mapping) else dict.fromkeys(labels, by)
    )
    if unknown := set(named) - set(labels):
        raise UsageError(
            f"by= names {', '.join(sorted(unknown))}; expected parts among {', '.join(labels)}"
        )
    given = [leaf.by or named.get(leaf.label) for leaf in pattern.leaves]
    if any(given) and pattern.is_daily:
        raise UsageError(
            f"{pattern.label}: absent(by=a time of day) is of no key, so it does not go together with by="
        )
    missing = [leaf.label for leaf, key in zip(pattern.leaves, given, strict=True) if key is None]
    if by is not None and missing:
        raise UsageError(f"by= says no key for {', '.join(missing)}")
    return [compile_key(key) for key in given]


# --------------------------------------------------------------------------- made into a machine


class Joined(msgspec.Struct, frozen=True):
    """A pattern as the router uses it."""

    leaves: tuple[Leaf, ...]
    machine: Machine
    label: str

    @property
    def places(self) -> set[str]:
        return {leaf.place for leaf in self.leaves}

    def hearing(self, place: str, event_type: str) -> list[int]:
        """The leaves that hear of such events at all."""
        return [
            n
            for n, leaf in enumerate(self.leaves)
            if leaf.place == place and type_accepted(leaf.types, event_type)
        ]


def event_time_us(event: Event, now: int) -> int:
    """When it happened: its own time, or its arrival if it has none, or one from the future."""
    if event.time is None or event.time.tzinfo is None:
        return now
    return min(to_us(event.time), now)


def compile_pattern(pattern: Pattern) -> Joined:
    """Compiles a pattern."""
    nodes: list[Node] = []
    leaves: list[tuple[Node, int]] = []
    _grow(pattern, 0, nodes, leaves)
    asked = zip(pattern.leaves, _keys(pattern), strict=True)
    made = tuple(
        Leaf(leaf.place, leaf.types, compile_filter(leaf.wanted), key, leaf.label)
        for leaf, key in asked
    )
    return Joined(made, Machine(nodes, leaves, _print(pattern)), pattern.kind)


def _grow(
    pattern: Pattern, lateness: int, nodes: list[Node], leaves: list[tuple[Node, int]]
) -> Node:
    late = lateness if pattern.lateness is None else pattern.lateness
    node = _node(pattern, late)
    nodes.append(node)
    for each, role in zip(pattern.parts, pattern.roles, strict=True):
        if isinstance(each, Pattern):
            inner = _grow(each, late, nodes, leaves)
            inner.parent, inner.role = node, role
        else:
            leaves.append((node, role))
    return node


def _node(pattern: Pattern, lateness: int) -> Node:
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
            return DailyNode(labels, lateness, _daily(pattern.at, pattern.tz))
        case _:
            return TimedNode(
                [labels[0], "", labels[-1], labels[-1]], lateness, pattern.within, absent=True
            )


def _daily(at: str, tz: str) -> Callable[[int], int]:
    """The next deadline after an instant."""
    try:
        wall = time_of_day.fromisoformat(at)
        zone: tzinfo = ZoneInfo(tz)
    except (ValueError, ZoneInfoNotFoundError) as error:
        raise UsageError(
            f'absent: expected by="06:00" or the like and tz= a time zone, found {at!r}, {tz!r}'
        ) from error
    if wall.tzinfo is not None:
        raise UsageError(f"absent: by= expected without a zone, which tz= says, found {at!r}")

    def following(now: int) -> int:
        day = to_datetime(now).astimezone(zone).date() - timedelta(days=1)
        while (due := to_us(datetime.combine(day, wall, zone).astimezone(UTC))) <= now:
            day += timedelta(days=1)
        return due

    return following


def _print(pattern: Pattern) -> str:
    """Tells whether what a store keeps is of this pattern as it is written today."""
    return digest(_said(pattern).encode(), size=8).hex()


def _said(pattern: "Part | Pattern") -> str:
    if isinstance(pattern, Part):
        where = pattern.wanted
        narrowed = (
            getattr(where, "__qualname__", type(where).__name__) if callable(where) else repr(where)
        )
        return f"{pattern.place} {pattern.types} {narrowed}"
    inner = ", ".join(_said(each) for each in pattern.parts)
    return f"{pattern.kind}({inner}; {pattern.roles} {pattern.within} {pattern.n} {pattern.at} {pattern.tz} {pattern.lateness})"
