"""Dry run over recorded events: which runs they would start with the subscriptions as they are now.

`eventflow replay --since … --dry-run` calls `dry_run`, in the server (web/dry_run.py) or in the
command line's own process (cli/dry_run.py: changed code, on a ledger file that a server may have
open). The events are read from the ledger in pages and passed to a `DryRunSimulator`. A trigger
that derives its events from others (`Simulatable`: drift monitors) computes the events that it
would have sent, which replace the recorded ones.

Nothing is written. Memory holds one page of events, the open windows and patterns, and the runs
that are listed.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

import msgspec
import orjson

from eventflow.core.clock import to_datetime, to_us
from eventflow.core.errors import UsageError
from eventflow.dry_run.simulator import (
    FIRST_SIMULATED_ID,
    DryRunSimulator,
    SimulatedRun,
    SubscriptionCounts,
)
from eventflow.events.event import (
    Event,
    Json,
    Simulatable,
    SimulatedEvent,
    Simulation,
    Trigger,
    format_id,
)
from eventflow.logs.log import format_timestamp
from eventflow.routing.pattern_runner import ABSENT_TYPE
from eventflow.routing.subscriptions import Subscription

PAGE_EVENTS = 200
"""Events per page. The event loop runs between two pages, after a few milliseconds of matching."""

DEFAULT_LIMIT = 1000
MAX_LIMIT = 10_000
"""Listed runs, and listed simulated events, per dry run."""


class DryRunQuery(msgspec.Struct, frozen=True):
    """The events of [since, until), in microseconds; `since` None: from the first one.

    `type` selects events, `to` a subscription or flow by its name. `limit`: runs and simulated
    events that the result lists; all are counted.
    """

    until: int
    since: int | None = None
    type: str | None = None
    to: str | None = None
    limit: int = DEFAULT_LIMIT


class Ledger(Protocol):
    """The read methods of a store that a dry run needs. See store/queries.py."""

    async def past(
        self,
        *,
        triggers: Sequence[str],
        type: str | None,
        since: int,
        until: int,
        after: int,
        limit: int,
    ) -> tuple[list[dict[str, Any]], int | None]: ...

    async def cursor(self, trigger: str) -> Mapping[str, Json]: ...


async def dry_run(
    ledger: Ledger,
    subscriptions: Sequence[Subscription],
    triggers: Iterable[Trigger],
    query: DryRunQuery,
) -> dict[str, Any]:
    """The runs that would have started, as a JSON object (docs/reference/http.md).

    Raises UsageError when `to` names no subscription and no flow.
    """
    wanted = [each for each in subscriptions if query.to in (None, each.name, each.flow.name)]
    if query.to is not None and not wanted:
        known = ", ".join(sorted({each.name for each in subscriptions})) or "none"
        raise UsageError(f"no subscription or flow {query.to!r}; there are: {known}")
    trigger_names: set[str] = set()
    for each in wanted:
        trigger_names |= {each.trigger} if each.pattern is None else each.pattern.trigger_names
    simulatable = [
        each for each in triggers if isinstance(each, Simulatable) and each.name in trigger_names
    ]
    run = _DryRun(ledger, wanted, simulatable, query)
    await run.read(sorted(trigger_names))
    return run.to_json()


class _DryRun:
    """One dry run in progress."""

    def __init__(
        self,
        ledger: Ledger,
        wanted: Sequence[Subscription],
        triggers: Sequence[Simulatable],
        query: DryRunQuery,
    ) -> None:
        self._ledger: Ledger = ledger
        self._triggers: Sequence[Simulatable] = triggers
        self._query: DryRunQuery = query
        self._simulator = DryRunSimulator(wanted, query.limit)
        self._simulations: dict[str, Simulation] = {}  # by trigger name
        self._start: int | None = None  # the first instant; None: not known yet
        self._event_count: int = 0
        self._past_retention: int = 0
        self._dead_letter_count: int = 0
        self._simulated: list[dict[str, Any]] = []  # the listed simulated events, as JSON
        self._replaced: Counter[str] = Counter()  # by trigger name: recorded events left out
        self._sent: Counter[str] = Counter()  # by trigger name: simulated events
        self._labels: dict[int, str] = {}  # by id: the names of listed simulated events

    async def read(self, trigger_names: Sequence[str]) -> None:
        """Read the ledger and simulate all events of these triggers."""
        query = self._query
        after = 0
        more = True
        # A simulatable trigger may derive its events from events of any type.
        event_type = None if self._triggers else query.type
        await self._start_simulations()
        while more:
            rows, last = await self._ledger.past(
                triggers=trigger_names,
                type=event_type,
                since=query.since or 0,
                until=query.until,
                after=after,
                limit=PAGE_EVENTS,
            )
            for row in rows:
                await self._replay_event(row)
            after = last or after
            more = last is not None
        await self._advance_to(query.until)
        self._simulator.advance_to(query.until)
        self._add_absences()

    async def _start_simulations(self) -> None:
        first = self._query.since
        until = to_datetime(self._query.until)
        since = None if first is None else to_datetime(first)
        for trigger in self._triggers:
            self._simulations[trigger.name] = trigger.simulate(
                await self._ledger.cursor(trigger.name), since, until
            )
        if first is not None:
            self._begin(first)

    def _begin(self, at: int) -> None:
        self._start = at
        self._simulator.begin(at)

    async def _replay_event(self, row: Mapping[str, Any]) -> None:
        """One event of the ledger."""
        trigger = row["trigger"]
        at = row["received_at"]
        self._event_count += 1
        if row["body"] is None:
            self._past_retention += 1
            return
        if any(name == "" for name, *_ in row["verdicts"]):  # a dead letter of no subscription
            self._dead_letter_count += 1
            return
        event = Event.from_recorded(row["body"])
        await self._advance_to(at, trigger, event)
        simulation = self._simulations.get(trigger)
        is_absence = event.type == ABSENT_TYPE and event.source == "/patterns"
        if simulation is not None and simulation.replaces(event, to_datetime(at)):
            self._replaced[trigger] += 1
        elif self._wants(event) and not is_absence:  # absences are simulated
            self._simulator.receive(trigger, event, at, row["id"])
            self._add_absences()

    def _wants(self, event: Event) -> bool:
        return self._query.type in (None, event.type)

    # ------------------------------------------------------------------------- simulated events

    async def _advance_to(
        self, at: int, trigger: str | None = None, event: Event | None = None
    ) -> None:
        """Simulate what the triggers would have sent by `at`, in order of time.

        `event` of `trigger` was recorded at that instant.
        """
        when = to_datetime(at)
        sent: list[tuple[SimulatedEvent, str]] = []
        for name, simulation in self._simulations.items():
            is_input = (
                name == trigger and event is not None and not simulation.replaces(event, when)
            )
            sent += [
                (each, name) for each in await simulation.advance(when, event if is_input else None)
            ]
        sent.sort(key=lambda pair: pair[0].at)
        if self._start is None:
            self._begin(to_us(sent[0][0].at) if sent else at)
        for each, name in sent:
            self._sent[name] += 1
            if self._wants(each.event):
                ident = self._simulator.receive(name, each.event, to_us(each.at))
                self._add_absences()
                self._add_simulated(name, ident, to_us(each.at), each.event, each.summary)

    def _add_absences(self) -> None:
        absences = self._simulator.absences
        for name, ident, event in absences:
            due = to_us(event.time) if event.time is not None else 0
            self._add_simulated(name, ident, due, event, "did not come by then")
        absences.clear()

    def _add_simulated(self, trigger: str, ident: int, at: int, event: Event, summary: str) -> None:
        if len(self._simulated) >= self._query.limit:
            return
        label = self._labels[ident] = f"simulated-{len(self._simulated) + 1}"
        self._simulated.append(
            {
                "id": label,
                "trigger": trigger,
                "at": format_timestamp(at),
                "type": event.type,
                "subject": event.subject,
                "summary": summary,
                "event": orjson.loads(event.to_json()),
            }
        )

    # ------------------------------------------------------------------------- the result

    def to_json(self) -> dict[str, Any]:
        """The result, after `read`."""
        query = self._query
        simulator = self._simulator
        return {
            "since": format_timestamp(self._start or 0),
            "until": format_timestamp(query.until),
            "type": query.type,
            "to": query.to,
            "events": self._event_count,
            "past_retention": self._past_retention,
            "dead": self._dead_letter_count,
            "would_start": simulator.started,
            "at_least": simulator.is_least,
            "runs": [self._run_json(each) for each in simulator.runs],
            "subscriptions": [self._counts_json(each) for each in simulator.counts.values()],
            "simulated": self._simulated,
            "triggers": [
                {
                    "name": name,
                    "recorded": self._replaced[name],
                    "simulated": self._sent[name],
                    "notes": list(simulation.notes),
                }
                for name, simulation in self._simulations.items()
            ],
        }

    def _run_json(self, run: SimulatedRun) -> dict[str, Any]:
        fields = cast(dict[str, Any], msgspec.to_builtins(run))
        return {
            **fields,
            "at": format_timestamp(run.at),
            "events": [self._label(each) for each in sorted(run.events)],
        }

    def _counts_json(self, counts: SubscriptionCounts) -> dict[str, Any]:
        reasons = [
            {"outcome": outcome, "reason": reason, "events": count, "first": self._label(first)}
            for (outcome, reason), (count, first) in counts.reasons.items()
        ]
        return {**msgspec.structs.asdict(counts), "reasons": reasons}

    def _label(self, ident: int) -> str:
        """The id of a recorded event, or the name of a simulated one."""
        if ident < FIRST_SIMULATED_ID:
            return format_id(ident)
        return self._labels.get(ident, "simulated")
