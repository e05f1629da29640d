"""The dry run of a time: its events are read from the ledger, and told by a `Rehearsal` what they would have started.

`eventflow replay --since … --dry-run` calls `foresee`, in a server (web/foresee.py) or beside one (cli/foreseeing.py: the
changed program, over a file that a server may have open). Triggers that make events by rules of their own (`Foreseeing`:
thresholds of drift) are asked which they would have made instead of those on record. The ledger is read in pages and nothing is
written; memory holds a page, what is open, and the runs that are shown.
"""

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
from eventflow.logs.log import timestamp
from eventflow.routing.pattern_runner import ABSENT_TYPE
from eventflow.routing.subscriptions import Subscription

PAGE_EVENTS = 200
"""Events read at a time: a few milliseconds of matching between two looks at the loop."""

DEFAULT_LIMIT = 1000
MAX_LIMIT = 10_000
"""Runs, and events of triggers' own making, that an answer lists if nothing is said, and at most."""


class DryRunQuery(msgspec.Struct, frozen=True):
    """Which time, [since, until) in microseconds, of which events (`type`), for which flow or subscription (`to`)."""

    until: int
    since: int | None = None
    type: str | None = None
    to: str | None = None
    limit: int = DEFAULT_LIMIT


class Ledger(Protocol):
    """What is read: a part of the store's verbs."""

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
    """The runs that would have started, as JSON. UsageError when `to` names nothing."""
    wanted = [each for each in subscriptions if query.to in (None, each.name, each.flow.name)]
    if query.to is not None and not wanted:
        known = ", ".join(sorted({each.name for each in subscriptions})) or "none"
        raise UsageError(f"no subscription or flow {query.to!r}; there are: {known}")
    places = {
        place
        for each in wanted
        for place in ((each.trigger,) if each.pattern is None else each.pattern.places)
    }
    asked = [each for each in triggers if isinstance(each, Simulatable) and each.name in places]
    view = _DryRun(ledger, wanted, asked, query)
    await view.read(sorted(places))
    return view.told()


class _DryRun:
    """One question on its way to its answer."""

    def __init__(
        self,
        ledger: Ledger,
        wanted: Sequence[Subscription],
        triggers: Sequence[Simulatable],
        question: DryRunQuery,
    ) -> None:
        self._ledger, self._triggers, self._question = ledger, triggers, question
        self._rehearsal = DryRunSimulator(wanted, question.limit)
        self._sights: dict[str, Simulation] = {}
        self._began: int | None = None
        self._looked = self._gone = self._dead = 0
        self._foretold: list[dict[str, Any]] = []
        self._counts: dict[str, list[int]] = {}
        self._labels: dict[int, str] = {}

    async def read(self, places: Sequence[str]) -> None:
        question, after, more = self._question, 0, True
        kind = (
            None if self._triggers else question.type
        )  # what a trigger makes its events of is of any type
        await self._look_ahead()
        while more:
            rows, last = await self._ledger.past(
                triggers=places, type=kind, since=question.since or 0, until=question.until, after=after, limit=PAGE_EVENTS
            )  # fmt: skip
            for row in rows:
                await self._take(row)
            after, more = last or after, last is not None
        await self._pass_to(question.until)
        self._rehearsal.pass_to(question.until)
        self._note_silences()

    async def _look_ahead(self) -> None:
        first, until = self._question.since, to_datetime(self._question.until)
        since = None if first is None else to_datetime(first)
        for trigger in self._triggers:
            self._sights[trigger.name] = trigger.simulate(
                await self._ledger.cursor(trigger.name), since, until
            )
            self._counts[trigger.name] = [0, 0]
        if first is not None:
            self._begin(first)

    def _begin(self, at: int) -> None:
        self._began = at
        self._rehearsal.begin(at)

    async def _take(self, row: Mapping[str, Any]) -> None:
        """One event of the ledger."""
        trigger, at = row["trigger"], row["received_at"]
        self._looked += 1
        if row["body"] is None:
            self._gone += 1
            return
        if any(
            name == "" for name, *_ in row["verdicts"]
        ):  # nobody was asked: it is no event, or one too deep
            self._dead += 1
            return
        event = Event.from_recorded(row["body"])
        await self._pass_to(at, trigger, event)
        sight = self._sights.get(trigger)
        if sight is not None and sight.replaces(event, to_datetime(at)):
            self._counts[trigger][0] += 1
        elif self._wants(event) and not (
            event.type == ABSENT_TYPE and event.source == "/patterns"
        ):  # those are told anew
            self._rehearsal.hear(trigger, event, at, row["id"])
            self._note_silences()

    def _wants(self, event: Event) -> bool:
        return self._question.type in (None, event.type)

    # ------------------------------------------------------------------------- what triggers would have made

    async def _pass_to(
        self, at: int, trigger: str | None = None, event: Event | None = None
    ) -> None:
        """What the triggers would have sent by then, in the order of time; one of them then recorded an event."""
        when = to_datetime(at)
        told: list[tuple[SimulatedEvent, str]] = []
        for name, sight in self._sights.items():
            own = (
                event
                if name == trigger and event is not None and not sight.replaces(event, when)
                else None
            )
            told += [(each, name) for each in await sight.advance(when, own)]
        told.sort(key=lambda pair: pair[0].at)
        if self._began is None:
            self._begin(to_us(told[0][0].at) if told else at)
        for each, name in told:
            self._counts[name][1] += 1
            if self._wants(each.event):
                ident = self._rehearsal.hear(name, each.event, to_us(each.at))
                self._note_silences()
                self._foretell(name, ident, to_us(each.at), each.event, each.summary)

    def _note_silences(self) -> None:
        silences = self._rehearsal.silences
        for name, ident, event in silences:
            due = to_us(event.time) if event.time is not None else 0
            self._foretell(name, ident, due, event, "did not come by then")
        silences.clear()

    def _foretell(self, trigger: str, ident: int, at: int, event: Event, said: str) -> None:
        if len(self._foretold) >= self._question.limit:
            return
        label = self._labels[ident] = f"foretold-{len(self._foretold) + 1}"
        self._foretold.append({
            "id": label, "trigger": trigger, "at": timestamp(at), "type": event.type, "subject": event.subject, "said": said,
            "event": orjson.loads(event.to_json()),
        })  # fmt: skip

    # ------------------------------------------------------------------------- the answer

    def told(self) -> dict[str, Any]:
        question, rehearsal = self._question, self._rehearsal
        return {
            "since": timestamp(self._began or 0),
            "until": timestamp(question.until),
            "type": question.type,
            "to": question.to,
            "events": self._looked,
            "past_retention": self._gone,
            "dead": self._dead,
            "would_start": rehearsal.started,
            "at_least": rehearsal.is_least,
            "runs": [self._run(each) for each in rehearsal.runs],
            "subscriptions": [self._tally(each) for each in rehearsal.tallies.values()],
            "foretold": self._foretold,
            "triggers": [
                {
                    "name": name,
                    "on_record": self._counts[name][0],
                    "foretold": self._counts[name][1],
                    "notes": list(sight.notes),
                }
                for name, sight in self._sights.items()
            ],
        }

    def _run(self, run: SimulatedRun) -> dict[str, Any]:
        shown = cast(dict[str, Any], msgspec.to_builtins(run))
        return {
            **shown,
            "at": timestamp(run.at),
            "events": [self._label(each) for each in sorted(run.events)],
        }

    def _tally(self, tally: SubscriptionCounts) -> dict[str, Any]:
        reasons = [
            {"fate": fate, "reason": reason, "events": count, "first": self._label(first)}
            for (fate, reason), (count, first) in tally.reasons.items()
        ]
        return {**msgspec.structs.asdict(tally), "reasons": reasons}

    def _label(self, ident: int) -> str:
        return (
            format_id(ident) if ident < FIRST_SIMULATED_ID else self._labels.get(ident, "foretold")
        )
