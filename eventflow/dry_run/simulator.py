"""Simulates past events against the current subscriptions, in memory: which runs would start.

replay.py passes a `DryRunSimulator` the events of a period, oldest first. Every decision is made by
the code that makes it live: the `Router` matches, the same state machines advance patterns at the
instants when they are due, the same `BatchPolicy` fills and closes windows. Open windows and
patterns are in dicts, as if the app had started at the first instant with nothing open.

How long runs take is unknown, so for modes that wait for the end of a run the count is a lower
bound. A temporary real store was considered and rejected: its windows close when a worker takes
their runs, so it would need a simulated worker, and it would write every event a second time.
"""

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from typing import Any

import msgspec
import orjson

from eventflow.core.clock import SystemClock
from eventflow.events.event import Event
from eventflow.routing.filters import condition_of
from eventflow.routing.pattern_machine import NEVER
from eventflow.routing.router import Router
from eventflow.routing.subscriptions import Subscription
from eventflow.runs.run import Ids, Run
from eventflow.store.protocol import Arrival, BatchPolicy, PatternEvent

FIRST_SIMULATED_ID = 1 << 62
"""Smallest id of a simulated event. Ids in a ledger, milliseconds << 20, are less until 2109."""

MAX_LISTED_EVENTS = 100
"""Events listed per run; all are counted."""

MAX_REASONS = 20
"""Distinct reasons per subscription; events with further ones are counted under `OTHER`."""
OTHER = "other reasons"


class SimulatedRun(msgspec.Struct):
    """A run that would have started at `at` (microseconds).

    `events`: the ids of its first events; `size`: how many it has in all. `is_least`: more runs may
    have started instead of this one, since they would have executed one at a time.
    """

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
    """The deliveries to one subscription, by outcome.

    Of the `received` events, `events` are in runs and `waiting` are open in a pattern at the end;
    the others were `filtered`, `invalid` or `expired`. `reasons` maps (outcome, reason) to
    [number of events, id of the first].
    """

    subscription: str
    received: int = 0
    runs: int = 0
    events: int = 0
    filtered: int = 0
    invalid: int = 0
    expired: int = 0
    waiting: int = 0
    reasons: dict[tuple[str, str], list[int]] = {}

    def add(self, outcome: str, reason: str, event: int) -> None:
        """Count an event that is in no run: `outcome` names the field."""
        setattr(self, outcome, getattr(self, outcome) + 1)
        if (outcome, reason) not in self.reasons and len(self.reasons) >= MAX_REASONS:
            reason = OTHER
        self.reasons.setdefault((outcome, reason), [0, event])[0] += 1


class _PatternInstance(msgspec.Struct):
    """A pattern's state for one key. `next_check`: its earliest entry in the queue."""

    state: Any = None
    due: int = NEVER
    next_check: int = NEVER


class _Window(msgspec.Struct):
    """A run that has not started and may take more events."""

    run: SimulatedRun
    batch_policy: BatchPolicy
    opened: int
    due: int

    def is_open(self, now: int) -> bool:
        policy = self.batch_policy
        return self.run.size < policy.size and (not policy.wait or self.due > now)


class _SimulatedClock(SystemClock):
    """A clock that reads the simulated instant."""

    def __init__(self) -> None:
        self.at: int = 0

    def now(self) -> int:
        return self.at


class DryRunSimulator:
    """A period, simulated from its start on.

    `limit`: runs to list in `runs`; `started` counts all. Call `begin`, then `receive` for each
    event in order of time, then `advance_to` the end of the period.
    """

    def __init__(self, subscriptions: Iterable[Subscription], limit: int) -> None:
        self._clock = _SimulatedClock()
        self._router = Router(subscriptions, Ids(FIRST_SIMULATED_ID), self._clock)
        self._limit: int = limit
        # by subscription and join key
        self._patterns: dict[tuple[str, str], _PatternInstance] = {}
        self._queue: list[tuple[int, str, str]] = []  # heap of (due, subscription, join key)
        # by subscription and ordering key
        self._windows: dict[tuple[str, str], _Window] = {}
        self._cleanup_size: int = 1024  # windows; beyond it closed ones are dropped
        self.counts = {
            each.name: SubscriptionCounts(each.name) for each in self._router.subscriptions
        }
        self.runs: list[SimulatedRun] = []
        self.started: int = 0
        self.is_least: bool = False  # whether `started` is a lower bound
        self.absences: list[tuple[str, int, Event]] = []
        """Absences that matched: (subscription, id of its event, event). The caller clears it."""

    def begin(self, at: int) -> None:
        """Start the period at `at`, with nothing open."""
        self._clock.at = at
        for name in self._router.patterns.time_driven():
            self._advance_pattern(name, "")

    def advance_to(self, at: int) -> None:
        """Let time pass until `at`: patterns that are due by then advance, in order of due time."""
        while self._queue and self._queue[0][0] <= at:
            due, name, key = heappop(self._queue)
            instance = self._patterns.get((name, key))
            if instance is None or instance.next_check != due:
                continue
            instance.next_check = NEVER
            if instance.due <= due:
                self._clock.at = max(self._clock.at, due)
                self._advance_pattern(name, key)
            else:
                self._enqueue(instance, name, key)
        self._clock.at = max(self._clock.at, at)

    def receive(self, trigger: str, event: Event, at: int, ident: int | None = None) -> int:
        """Process an event of `trigger`. Returns its id: `ident`, or a simulated one if None."""
        self.advance_to(at)
        arrival = self._router.route(trigger, event, ledger_id=ident)
        for name, outcome, detail in orjson.loads(arrival.verdicts):
            self.counts[name].received += 1
            if outcome == "filtered":
                self.counts[name].add(outcome, condition_of(detail), arrival.id)
            elif outcome == "invalid":
                self.counts[name].add(outcome, detail, arrival.id)
        self._start_runs(arrival)
        for each in arrival.pattern_events:
            self.counts[each.subscription].waiting += 1
            self._advance_pattern(each.subscription, each.key, each, arrival.id, len(arrival.body))
        return arrival.id

    # ------------------------------------------------------------------------- patterns

    def _advance_pattern(
        self,
        name: str,
        key: str,
        pattern_event: PatternEvent | None = None,
        event: int = 0,
        size: int = 0,
    ) -> None:
        instance = self._patterns.setdefault((name, key), _PatternInstance())
        update = self._router.patterns.advance(
            name, key, instance.state, self._clock.at, pattern_event, event, size
        )
        if update is None:
            return
        instance.state = update.state
        instance.due = update.due
        if update.state is None:
            del self._patterns[name, key]
        else:
            self._enqueue(instance, name, key)
        counts = self.counts[name]
        for expired, reason in update.expired:
            counts.add("expired", reason, expired)
        counts.waiting -= len(update.expired) + sum(len(match.events) for match in update.matches)
        for match in update.matches:
            self._add_to_run(match.run, match.batch_policy, match.events, key or None)
        for absence in update.absences:
            self.absences.append((name, absence.id, Event.from_recorded(absence.body)))
            self._start_runs(absence)

    def _enqueue(self, instance: _PatternInstance, name: str, key: str) -> None:
        """Queue the next check. A check that comes before the due time queues the next one."""
        if instance.due < instance.next_check:
            instance.next_check = instance.due
            heappush(self._queue, (instance.due, name, key))

    # ------------------------------------------------------------------------- runs and windows

    def _start_runs(self, arrival: Arrival) -> None:
        for run in arrival.runs:
            policy = arrival.batch_policies.get(run.id)
            self._add_to_run(run, policy, [arrival.id], run.ordering_key)

    def _add_to_run(
        self, run: Run, batch_policy: BatchPolicy | None, events: Sequence[int], key: str | None
    ) -> None:
        """Add events to the open window, or start a run of their own."""
        counts = self.counts[run.subscription]
        counts.events += len(events)
        name = (run.subscription, run.ordering_key or "")
        now = self._clock.at
        window = None if batch_policy is None else self._windows.get(name)
        if window is not None and window.is_open(now):
            for event in events:
                self._extend(window, event, now)
            return
        self.started += 1
        counts.runs += 1
        made = SimulatedRun(
            self.started, run.subscription, run.flow, run.mode or "each", key, run.due_at, 0, []
        )
        if len(self.runs) < self._limit:
            self.runs.append(made)
        made.size = len(events)
        made.events = list(events[:MAX_LISTED_EVENTS])
        if batch_policy is not None:
            if not batch_policy.wait:
                made.is_least = batch_policy.size > 1
                self.is_least = made.is_least
                made.key = None if run.ordering_key == run.subscription else key
            self._windows[name] = _Window(made, batch_policy, now, run.due_at)
            self._drop_closed_windows(now)

    def _extend(self, window: _Window, event: int, now: int) -> None:
        made = window.run
        made.size += 1
        if len(made.events) < MAX_LISTED_EVENTS:
            made.events.append(event)
        window.due = window.batch_policy.due(made.size, window.opened, window.due, now)
        if window.batch_policy.wait:
            made.at = window.due or now

    def _drop_closed_windows(self, now: int) -> None:
        """Free the memory of closed windows once their number has doubled."""
        if len(self._windows) > self._cleanup_size:
            self._windows = {
                name: window for name, window in self._windows.items() if window.is_open(now)
            }
            self._cleanup_size = max(1024, 2 * len(self._windows))
