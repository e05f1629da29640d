"""Past events through the subscriptions as they are now, in memory: which runs they would have started.

foresight.py feeds a `Rehearsal` the events of a time, oldest first. What decides is what decides live: the `Router` matches,
its patterns are moved on by the same machines at the instants they are due, windows fill and close by the same `Gather`. Only
the rows are missing: what is open is kept in dicts here, as if the app had begun at the first instant with nothing open. Nobody
knows how long the runs would have taken, so of modes that wait for their end the count is a least.
"""

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from typing import Any

import msgspec
import orjson

from eventflow.core.clock import SystemClock
from eventflow.events.event import Event
from eventflow.routing.filters import condition
from eventflow.routing.pattern_machine import NEVER
from eventflow.routing.router import Router
from eventflow.routing.subscriptions import Subscription
from eventflow.runs.run import Ids, Run
from eventflow.store.protocol import Arrival, Fact, Gather

FIRST_SIMULATED_ID = 1 << 62
"""Ids from here on are of events that no ledger has: one in use is milliseconds << 20, less until the year 2109."""

MAX_LISTED_EVENTS = 100
"""Events that a run names; it counts all."""

MAX_REASONS = 20
"""Reasons that a tally tells apart; what comes with others is counted under `OTHER`."""
OTHER = "other reasons"


class SimulatedRun(msgspec.Struct):
    """A run that would have started, and when. `events`: the first of them; `size`: all. `is_least`: the first of several,
    perhaps, for only that one run at a time would have been begun is known."""

    number: int
    subscription: str
    flow: str
    mode: str
    key: str | None
    at: int
    size: int
    events: list[int]
    is_least: bool = False


class SubscriptionCounts(msgspec.Struct):
    """What became of the events that a subscription heard of: `events` are in runs, `waiting` in a pattern at the end.

    `reasons` of the others, each with how many and the first of them.
    """

    subscription: str
    heard: int = 0
    runs: int = 0
    events: int = 0
    filtered: int = 0
    invalid: int = 0
    lapsed: int = 0
    waiting: int = 0
    reasons: dict[tuple[str, str], list[int]] = {}

    def note(self, fate: str, reason: str, event: int) -> None:
        setattr(self, fate, getattr(self, fate) + 1)
        if (fate, reason) not in self.reasons and len(self.reasons) >= MAX_REASONS:
            reason = OTHER
        self.reasons.setdefault((fate, reason), [0, event])[0] += 1


class _Strand(msgspec.Struct):
    """A pattern's state for one key. `queued`: when it is looked at next."""

    state: Any = None
    due: int = NEVER
    queued: int = NEVER


class _Window(msgspec.Struct):
    """A run that has not begun, and that events may join."""

    run: SimulatedRun
    gather: Gather
    opened: int
    due: int

    def is_open(self, now: int) -> bool:
        return self.run.size < self.gather.size and (not self.gather.wait or self.due > now)


class _Then(SystemClock):
    """The time it was."""

    def __init__(self) -> None:
        self.at = 0

    def now(self) -> int:
        return self.at


class DryRunSimulator:
    """One time, from its beginning on. `limit`: runs that are kept to be shown; all are counted."""

    def __init__(self, subscriptions: Iterable[Subscription], limit: int) -> None:
        self._clock = _Then()
        self._router = Router(subscriptions, Ids(FIRST_SIMULATED_ID), self._clock)
        self._limit = limit
        self._strands: dict[tuple[str, str], _Strand] = {}
        self._queue: list[tuple[int, str, str]] = []
        self._windows: dict[tuple[str, str], _Window] = {}
        self._many = 1024
        self.tallies = {
            each.name: SubscriptionCounts(each.name) for each in self._router.subscriptions
        }
        self.runs: list[SimulatedRun] = []
        self.started = 0
        self.is_least = False
        self.silences: list[tuple[str, int, Event]] = []
        """For each pattern that matched what did not come: its subscription, the id of the event made of it, and that."""

    def begin(self, at: int) -> None:
        self._clock.at = at
        for name in self._router.armed():
            self._weave(name, "")

    def pass_to(self, at: int) -> None:
        """Lets time go by: what patterns wait for happens, in the order it is due."""
        while self._queue and self._queue[0][0] <= at:
            due, name, key = heappop(self._queue)
            strand = self._strands.get((name, key))
            if strand is None or strand.queued != due:
                continue
            strand.queued = NEVER
            if strand.due <= due:
                self._clock.at = max(self._clock.at, due)
                self._weave(name, key)
            else:
                self._enqueue(strand, name, key)
        self._clock.at = max(self._clock.at, at)

    def hear(self, trigger: str, event: Event, at: int, ident: int | None = None) -> int:
        """An event comes. Returns its id: the ledger's, or one of its own if that has none."""
        self.pass_to(at)
        arrival = self._router.route(trigger, event, ledger_id=ident)
        for name, fate, detail in orjson.loads(arrival.verdicts):
            self.tallies[name].heard += 1
            if fate in ("filtered", "invalid"):
                self.tallies[name].note(
                    fate, condition(detail) if fate == "filtered" else detail, arrival.id
                )
        self._start(arrival)
        for fact in arrival.facts:
            self.tallies[fact.subscription].waiting += 1
            self._weave(fact.subscription, fact.key, fact, arrival.id, len(arrival.body))
        return arrival.id

    # ------------------------------------------------------------------------- patterns

    def _weave(
        self, name: str, key: str, fact: Fact | None = None, event: int = 0, size: int = 0
    ) -> None:
        strand = self._strands.setdefault((name, key), _Strand())
        woven = self._router.weave(name, key, strand.state, self._clock.at, fact, event, size)
        if woven is None:
            return
        strand.state, strand.due = woven.state, woven.due
        if woven.state is None:
            del self._strands[name, key]
        else:
            self._enqueue(strand, name, key)
        tally = self.tallies[name]
        for lapsed, reason in woven.lapsed:
            tally.note("lapsed", reason, lapsed)
        tally.waiting -= len(woven.lapsed) + sum(len(match.events) for match in woven.matches)
        for match in woven.matches:
            self._place(match.run, match.gather, match.events, key or None)
        for silence in woven.silences:
            self.silences.append((name, silence.id, Event.from_recorded(silence.body)))
            self._start(silence)

    def _enqueue(self, strand: _Strand, name: str, key: str) -> None:
        """Once per strand, for it is looked at again if it is due later by then."""
        if strand.due < strand.queued:
            strand.queued = strand.due
            heappush(self._queue, (strand.due, name, key))

    # ------------------------------------------------------------------------- runs and their windows

    def _start(self, arrival: Arrival) -> None:
        for run in arrival.runs:
            self._place(run, arrival.gathers.get(run.id), [arrival.id], run.lane)

    def _place(
        self, run: Run, gather: Gather | None, events: Sequence[int], key: str | None
    ) -> None:
        """A run of its own, or events for the one that is open."""
        tally = self.tallies[run.subscription]
        tally.events += len(events)
        name, now = (run.subscription, run.lane or ""), self._clock.at
        window = None if gather is None else self._windows.get(name)
        if window is not None and window.is_open(now):
            for event in events:
                self._join(window, event, now)
            return
        self.started += 1
        tally.runs += 1
        made = SimulatedRun(
            self.started, run.subscription, run.flow, run.mode or "each", key, run.due_at, 0, []
        )
        if len(self.runs) < self._limit:
            self.runs.append(made)
        made.size, made.events = len(events), list(events[:MAX_LISTED_EVENTS])
        if gather is not None:
            if not gather.wait:
                made.is_least = self.is_least = gather.size > 1
                made.key = None if run.lane == run.subscription else key
            self._windows[name] = _Window(made, gather, now, run.due_at)
            self._forget(now)

    def _join(self, window: _Window, event: int, now: int) -> None:
        made = window.run
        made.size += 1
        if len(made.events) < MAX_LISTED_EVENTS:
            made.events.append(event)
        window.due = window.gather.due(made.size, window.opened, window.due, now)
        if window.gather.wait:
            made.at = window.due or now

    def _forget(self, now: int) -> None:
        """Windows that are over go, now and then."""
        if len(self._windows) > self._many:
            self._windows = {
                name: window for name, window in self._windows.items() if window.is_open(now)
            }
            self._many = max(1024, 2 * len(self._windows))
