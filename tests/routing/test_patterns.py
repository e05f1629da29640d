"""The state machine of patterns against an oracle that evaluates a whole history by brute force.

`PATTERN_HISTORIES=2000 pytest tests/routing/test_patterns.py` checks 2000 histories per pattern; CI
checks 200.
"""

import os
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import combinations, product
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eventflow import Event, UsageError
from eventflow.core.clock import to_datetime, to_us
from eventflow.routing.pattern_machine import Machine, PatternItem, PatternState
from eventflow.routing.patterns import (
    Pattern,
    absent,
    all_of,
    any_of,
    compile_pattern,
    count,
    event_time_us,
    part,
    sequence,
)
from eventflow.testing import MemoryTrigger

HISTORIES = int(os.environ.get("PATTERN_HISTORIES", "200"))
S = 1_000_000


# --------------------------------------------------------------------------- the oracle


class Given(NamedTuple):
    """An item that a part gives its pattern. `order`: time, then rank; timers precede arrivals."""

    order: tuple[int, ...]
    role: int
    item: PatternItem


class Expected(NamedTuple):
    """The result that the oracle expects for a history."""

    matches: list[Given]
    expired: list[int]


class Oracle:
    """Evaluates a pattern as its guide defines it, on a whole history."""

    def __init__(self, arrivals: list[tuple[int, PatternItem]]) -> None:
        self._arrivals = arrivals
        self._part: int = -1
        self._node: int = -1
        self.expired: list[int] = []

    def matches(self, pattern: Pattern, lateness: int = 0) -> list[Given]:
        self._node += 1
        node = self._node
        late = lateness if pattern.lateness is None else pattern.lateness
        given: list[Given] = []
        for each, role in zip(pattern.parts, pattern.roles, strict=True):
            if isinstance(each, Pattern):
                given += [Given(order, role, item) for order, _, item in self.matches(each, late)]
            else:
                self._part += 1
                part_number = self._part
                given += [
                    Given((item.at, 1, n), role, item)
                    for n, (to, item) in enumerate(self._arrivals)
                    if to == part_number
                ]
        given.sort(key=lambda each: each.order)
        rule = {"any_of": self._any, "all_of": self._pooled, "count": self._pooled}.get(
            pattern.kind, self._timed
        )
        return sorted(rule(pattern, late, given, node), key=lambda each: each.order)

    def _any(self, pattern: Pattern, late: int, given: list[Given], node: int) -> list[Given]:
        return given

    def _pooled(self, pattern: Pattern, late: int, given: list[Given], node: int) -> list[Given]:
        """all_of and count: every choice of open items is tried, the earliest is taken."""
        free: list[Given] = []
        found: list[Given] = []
        for new in given:
            there = [old for old in free if old.item.at + pattern.within + late + 1 > new.item.at]
            fits = [
                chosen
                for chosen in self._choices(pattern, there, new)
                if _span(chosen) <= pattern.within
            ]
            if not fits:
                free.append(new)
                continue
            best = min(
                fits,
                key=lambda chosen: (
                    min(each.item for each in chosen),
                    [each.item for each in chosen],
                ),
            )
            free = [old for old in free if not any(old is each for each in best)]
            found.append(_match(new.order, best, max(each.item.time for each in best), new.item.at))
        self.expired += [event for old in free for event in old.item.events]
        return found

    def _choices(self, pattern: Pattern, there: list[Given], new: Given) -> Iterator[list[Given]]:
        if pattern.kind == "count":
            for others in combinations(there, pattern.n - 1):
                yield sorted([*others, new], key=lambda each: each.item)
        else:
            parts = [
                [new] if role == new.role else [old for old in there if old.role == role]
                for role in pattern.roles
            ]
            yield from ([*chosen] for chosen in product(*parts))

    def _timed(self, pattern: Pattern, late: int, given: list[Given], node: int) -> list[Given]:
        """sequence and absent: items in the order in which they are processed; the outcome of each
        opening is looked up in the items after it.
        """
        within = pattern.within
        taken = sorted((_Processed(each, late, node) for each in given), key=lambda each: each.key)
        used: set[int] = set()
        found: list[Given] = []
        openings: list[tuple[int, _Processed]] = []

        def outcome(n: int, opening: _Processed, before: int) -> "tuple[str, _Processed | None]":
            """The outcome of an opening, before item number `before` is processed."""
            clock = taken[before].at if before < len(taken) else 1 << 62
            for other in taken[n + 1 : before]:
                if opening.at + within + 1 <= other.at:
                    break
                if other.role in (2, 3) and (passed := other.item.time - opening.item.time) >= 0:
                    if passed <= within:
                        return "ended", other
                    if pattern.kind == "absent" and passed:
                        return "over", other
            return ("up" if opening.at + within + 1 <= clock else "open"), None

        for n, each in enumerate(taken):
            now_open = [
                (m, o) for m, o in openings if m not in used and outcome(m, o, n)[0] == "open"
            ]
            if each.role == 0:
                openings.append((n, each))
            elif each.role == 1:
                fits = [
                    (o.item, m, o)
                    for m, o in now_open
                    if 0 <= each.item.time - o.item.time <= within
                ]
                if not fits:
                    self.expired += each.item.events
                    continue
                _, m, o = min(fits, key=lambda one: one[0])
                used.add(m)
                found.append(_match(each.order, [o.given, each.given], each.item.time, each.at))
            elif each.role == 2:
                self.expired += each.item.events
            elif any(0 < o.item.time - each.item.time <= within for _, o in now_open):
                self.expired += each.item.events
                taken[n] = each.silent()
            else:
                openings.append((n, each))
        for m, o in openings:
            if m in used:
                continue
            ending, by = outcome(m, o, len(taken))
            if pattern.kind == "sequence" or ending == "ended":
                self.expired += o.item.events
            else:
                up = o.at + within + 1
                order, at = ((up, 0, node, 0), up) if by is None else (by.order, by.at)
                found.append(_match(order, [o.given], o.item.time + within, at))
        return found


class _Processed:
    """An item with the time at which it is processed: `lateness` after it happened, or on
    arrival.
    """

    def __init__(self, given: Given, late: int, node: int) -> None:
        self.given = given
        self.item = given.item
        self.role = given.role
        self.at = max(given.item.at, given.item.time + late)
        at_once = self.at == given.item.at
        self.key = (self.at, 1, given.order) if at_once else (self.at, 0, given.item)
        self.order = given.order if at_once else (self.at, 0, node, 1)

    def silent(self) -> "_Processed":
        self.role = -1
        return self


def _span(chosen: list[Given]) -> int:
    return max(each.item.time for each in chosen) - min(each.item.time for each in chosen)


def _match(order: tuple[int, ...], chosen: list[Given], time: int, at: int) -> Given:
    return Given(
        order,
        0,
        PatternItem(
            time, at, tuple(sorted(event for each in chosen for event in each.item.events))
        ),
    )


# --------------------------------------------------------------------------- histories


class Sent(NamedTuple):
    """One event of a history: its part, when it happened, how late it arrives."""

    part_number: int
    time: int
    late: int
    twice: bool


def histories(part_count: int, *, most: int) -> st.SearchStrategy[list[Sent]]:
    """Events of few seconds and parts, so that windows meet, overlap, and miss by little; some are
    late, some are sent twice.
    """
    late = st.one_of(st.just(0), st.integers(0, 3), st.integers(0, 15))
    sent = st.builds(Sent, st.integers(0, part_count - 1), st.integers(0, 30), late, st.booleans())
    return st.lists(sent, max_size=most)


def arrivals(history: list[Sent]) -> list[tuple[int, PatternItem]]:
    """The history in order of arrival, numbered as the ledger does; a repeated event is one
    event.
    """
    ordered = sorted(history, key=lambda sent: sent.time + sent.late)
    return [
        (sent.part_number, PatternItem(sent.time * S, (sent.time + sent.late) * S, (n,)))
        for n, sent in enumerate(ordered, 1)
    ]


class SimulatedLife:
    """A machine in use: its state is encoded at restarts, dropped when nothing is open, and
    advanced at odd times.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.state: PatternState | None = None
        self.matches: list[PatternItem] = []
        self.expired: list[int] = []
        self.known: set[int] = set()

    def advance(
        self, now: int, part_number: int | None = None, item: PatternItem | None = None
    ) -> None:
        state = self.machine.initial_state(now) if self.state is None else self.state
        step = self.machine.advance(state, now, part_number, item)
        self.matches += step.matches
        self.expired += [event for event, reason in step.expired if reason]
        self.state = state if self.machine.is_open(state) else None
        accounted = sorted(
            [
                *self.expired,
                *(event for match in self.matches for event in match.events),
                *self.open,
            ]
        )
        assert accounted == sorted(self.known | set(item.events if item else ())), (
            "an event is lost, or is twice"
        )
        assert self.machine.due(state) > now

    @property
    def open(self) -> list[int]:
        return [] if self.state is None else self.machine.events(self.state)

    def receive(self, part_number: int, item: PatternItem, twice: bool) -> None:
        for _ in range(1 + twice):
            if not self.known.issuperset(item.events):  # as the ledger does
                self.advance(item.at, part_number, item)
                self.known.update(item.events)

    def restart(self) -> None:
        if self.state is not None:
            self.state = self.machine.decode(self.machine.encode(self.state))


PATTERNS: dict[str, Callable[[float, float], Pattern]] = {
    "all_of": lambda within, late: all_of("a", "b", within=within, lateness=late),
    "all_of three": lambda within, late: all_of("a", "b", "c", within=within, lateness=late),
    "any_of": lambda within, late: any_of("a", "b"),
    "count": lambda within, late: count("a", 3, within=within, lateness=late),
    "count of one": lambda within, late: count("a", 1, within=within, lateness=late),
    "sequence": lambda within, late: sequence("a", then="b", within=within, lateness=late),
    "sequence unless": lambda within, late: sequence(
        "a", then="b", unless="c", within=within, lateness=late
    ),
    "absent": lambda within, late: absent("a", within, lateness=late),
    "absent after": lambda within, late: absent("a", within, after="b", lateness=late),
    "count of any": lambda within, late: count(any_of("a", "b"), 3, within=within, lateness=late),
    "all of count and b": lambda within, late: all_of(
        count("a", 2, within=within), "b", within=within + 3, lateness=late
    ),
    "three in a row": lambda within, late: sequence(
        sequence("a", then="b", within=within), then="c", within=within, lateness=late
    ),
    "absence between": lambda within, late: sequence(
        "a",
        then=absent("b", 4, after="c"),
        unless=count("d", 2, within=5, lateness=1),
        within=within + 6,
        lateness=late,
    ),
    "all absent": lambda within, late: all_of(
        absent("a", within, lateness=late), absent("b", within + 1), within=10, lateness=late
    ),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_matches_are_those_of_the_oracle(name: str) -> None:
    """Late, repeated and disordered events, restarts at any time, late timers: the matches are the
    same, and all other events expire.
    """
    make = PATTERNS[name]
    part_count = len(make(5, 0).flat_parts)

    @settings(
        max_examples=HISTORIES,
        deadline=None,
        suppress_health_check=(HealthCheck.too_slow, HealthCheck.data_too_large),
    )
    @given(
        st.data(), histories(part_count, most=14), st.integers(1, 10), st.sampled_from([0, 0, 2, 5])
    )
    def check(data: st.DataObject, history: list[Sent], within: int, late: int) -> None:
        pattern = make(within, late)
        arrived = arrivals(history)
        twice = [sent.twice for sent in sorted(history, key=lambda sent: sent.time + sent.late)]
        life = SimulatedLife(compile_pattern(pattern).machine)
        for (part_number, item), again in zip(arrived, twice, strict=True):
            if data.draw(st.booleans(), "restart"):
                life.restart()
            if data.draw(st.booleans(), "advanced before") and life.state is not None:
                life.advance(max(item.at - data.draw(st.integers(0, 3)) * S, 0))
            life.receive(part_number, item, again)
        life.restart()
        life.advance(1000 * S)
        oracle = Oracle(arrived)
        expected = [each.item for each in oracle.matches(pattern)]
        assert [(match.time, match.at, match.events) for match in life.matches] == [
            (match.time, match.at, match.events) for match in expected
        ]
        assert sorted(life.expired) == sorted(oracle.expired)
        assert life.state is None

    check()


# --------------------------------------------------------------------------- without the oracle


def at(text: str) -> int:
    return to_us(datetime.fromisoformat(text))


def missed_deadlines(
    pattern: Pattern, start: str, *arrived: str, until: str, advanced: bool = True
) -> list[str]:
    """The deadlines missed when events come at these times; advanced each hour, or only at the
    end.
    """
    life = SimulatedLife(compile_pattern(pattern).machine)
    now = at(start)
    end = at(until)
    life.advance(now)
    for n, moment in enumerate(sorted(map(at, arrived)), 1):
        while advanced and now < moment - 3600 * S:
            now += 3600 * S
            life.advance(now)
        life.receive(0, PatternItem(moment, moment, (n,)), twice=False)
    while advanced and (now := now + 3600 * S) < end:
        life.advance(now)
    life.restart()
    life.advance(end)
    return [to_datetime(match.time).isoformat(" ", "minutes") for match in life.matches]


def test_a_daily_deadline_is_missed_once_a_day() -> None:
    """absent(by=): a match each local day at that time if no event arrived since the day before,
    also over a change of clocks.
    """
    pattern = absent("file.landed", by="06:00", tz="Europe/Berlin")
    missed = missed_deadlines(
        pattern,
        "2030-03-29T12:00Z",
        "2030-03-30T04:59Z",
        "2030-04-01T04:00Z",
        until="2030-04-03T12:00Z",
    )
    assert missed == ["2030-03-31 04:00+00:00", "2030-04-02 04:00+00:00", "2030-04-03 04:00+00:00"]


def test_of_deadlines_that_passed_while_stopped_only_the_last_matches() -> None:
    """After ten days without a process, only the last deadline matches, at once."""
    pattern = absent("file.landed", by="06:00")
    missed = missed_deadlines(
        pattern, "2030-03-01T12:00Z", until="2030-03-11T12:00Z", advanced=False
    )
    assert missed == ["2030-03-11 06:00+00:00"]


def test_event_time_is_the_senders_unless_in_the_future() -> None:
    """The event time is that of the event; without one, or with one in the future, it is the
    arrival.
    """
    now = at("2030-01-01T00:00Z")
    for given_time, expected in (
        (None, now),
        ("2029-12-31T23:00Z", now - 3600 * S),
        ("2031-01-01T00:00Z", now),
    ):
        time = None if given_time is None else datetime.fromisoformat(given_time)
        assert event_time_us(Event(id="1", source="/s", type="t", time=time), now) == expected


def test_reasons_name_the_missing_part() -> None:
    """The reason of an event that matched nothing names the part that was missing, or arrived
    first.
    """

    def reasons(pattern: Pattern, *arrived: tuple[int, int]) -> dict[int, str]:
        machine = compile_pattern(pattern).machine
        state = machine.initial_state(0)
        expired = {}
        for n, (part_number, second) in enumerate(arrived):
            expired.update(
                machine.advance(
                    state, second * S, part_number, PatternItem(second * S, second * S, (n,))
                ).expired
            )
        return {**expired, **dict(machine.advance(state, 1000 * S).expired)}

    assert reasons(all_of("a", "b", "c", within=10), (0, 0), (2, 1)) == {
        0: "all_of: not each of a, b, c within 10 s",
        1: "all_of: not each of a, b, c within 10 s",
    }
    assert reasons(count("a", 3, within=60), (0, 0))[0] == "count: fewer than 3 a within 60 s"
    unless = sequence("a", then="b", unless="c", within=10)
    assert reasons(unless, (1, 0), (0, 1), (2, 3), (2, 4), (0, 5)) == {
        0: "sequence: no a within 10 s before it",
        1: "sequence: c came 2 s after it",
        2: "sequence: c ended 1 that waited",
        3: "sequence: nothing waited when c came",
        4: "sequence: no b within 10 s after it",
    }
    assert reasons(absent("beat", 10), (0, 0), (0, 4))[0] == "absent: beat came 4 s after it"


def test_open_items_are_bounded() -> None:
    """At most ten thousand items wait per key and part; the oldest expire, with a reason."""
    machine = compile_pattern(all_of("a", "b", within=3600)).machine
    state = machine.initial_state(0)
    expired = [machine.advance(state, n, 0, PatternItem(n, n, (n,))).expired for n in range(10_003)]
    assert len(machine.events(state)) == 10_000
    assert [each for step in expired for each in step] == [
        (n, "a: more than 10,000 wait") for n in range(3)
    ]


def test_parts_and_keys() -> None:
    """A part is a trigger, a type, a pair with a filter, or a pattern; `by` is one path for all
    parts or one for each by name.
    """
    orders = MemoryTrigger("orders")
    paid = "payment.*"
    pattern = all_of(
        (orders, {"total": [{"numeric": [">", 5]}]}),
        paid,
        within=5,
        by={"orders": "id", paid: "order.id"},
    )
    made = compile_pattern(pattern)
    assert pattern.triggers == [orders] and made.trigger_names == {"orders", "events"}
    assert [
        made.parts_for(trigger, "payment.made") for trigger in ("orders", "events", "else")
    ] == [
        [0],
        [1],
        [],
    ]
    event = Event(id="1", source="/s", type="payment.made", data={"order": {"id": 7}})
    (key,) = [part.key for part in made.parts if part.trigger_name == "events"]
    assert key is not None and key(event) == "7"


def test_invalid_patterns_are_rejected_at_once() -> None:
    """An invalid pattern raises when it is made, naming what was expected."""
    for make, message in (
        (lambda: all_of("a", within=5), "two parts or more"),
        (lambda: all_of("a", "a", within=5), "occurs twice"),
        (lambda: all_of("a", "b", within=0), "positive duration"),
        (any_of, "expected parts"),
        (lambda: count("a", 0, within=5), "n expected from 1"),
        (lambda: absent("a"), "for_="),
        (lambda: absent("a", by="six"), 'by="06:00"'),
        (lambda: absent("a", by="06:00", tz="Mars/Base"), "tz="),
        (lambda: all_of("a", "b", within=5, by={"a": "id"}), "no key for b"),
        (lambda: all_of("a", "b", within=5, by={"c": "id", "a": "id", "b": "id"}), "by= names c"),
        (lambda: all_of("a", count("b", 2, within=5, by="id"), within=5), "outermost"),
        (lambda: all_of("a", "b", within=5, lateness=-1), "negative"),
        (lambda: any_of("a", absent("b", by="06:00"), by="id"), "has no join key"),
        (lambda: part(5), "a trigger, an event type"),  # type: ignore[arg-type]
        (lambda: part("a", where={"x": [{"bogus": 1}]}), "bogus"),
    ):
        with pytest.raises(UsageError, match=message):
            make()
