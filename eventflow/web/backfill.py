"""Occurrences of a schedule that are past, as events for one flow: the routes behind `eventflow backfill`.

    GET  …/occurrences   which there are in a window
    POST …/backfill      records some of them for a flow, and says which runs they have

An occurrence keeps the id that it has when the schedule fires it: for a flow that it was fired for, or backfilled for before,
nothing starts; for another flow it gets a further run. `again` adds a label to the id: each label runs it once more.
Only what the schedule is through with is taken: what comes after its cursor is its own to fire. api.py lists these routes.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from itertools import islice
from typing import Any, cast

import msgspec
import orjson
from starlette.requests import Request
from starlette.responses import Response

from eventflow.core.clock import to_datetime
from eventflow.core.errors import NotFound, UsageError
from eventflow.events.event import Event, Scheduled, parse_time, show_id
from eventflow.logs.log import get_logger
from eventflow.web import serializers
from eventflow.web.responses import Json, read_object, refuse
from eventflow.web.served import Served

MOST = 1000
"""Occurrences in one page of a list."""
AT_ONCE = 100
"""Occurrences in one request to backfill."""

LONGEST_LABEL = 200

log = get_logger("eventflow.web")


class Backfill:
    """The handlers, over the App that `opened` returns."""

    def __init__(self, opened: Callable[[], Served]) -> None:
        self._opened = opened
        self._turn = (
            asyncio.Lock()
        )  # two requests for one occurrence must not both find that it has no run yet

    def table(self) -> list[tuple[str, str, Callable[[Request], Awaitable[Response]]]]:
        return [
            ("GET", "/api/triggers/{name:path}/occurrences", self.occurrences),
            ("POST", "/api/triggers/{name:path}/backfill", self.backfill),
        ]

    async def occurrences(self, request: Request) -> Response:
        """`?since=&until=`: the nominal times in [since, until), oldest first, as far as they are past."""
        app = self._opened()
        schedule = _schedule(app, request.path_params["name"])
        since, until = _moment(request, "since"), _moment(request, "until")
        past = await _past(app, schedule)
        found = list(islice(schedule.occurrences(since, until), MOST + 1))
        taken = [at for at in found[:MOST] if at <= past]
        more = len(found) > MOST and len(taken) == MOST
        return Json({
            "occurrences": [_shown(at) for at in taken],
            "next": _shown(found[MOST]) if more else None,
            "not_yet": None if more or len(taken) == len(found) else _shown(found[len(taken)]),
        })  # fmt: skip

    async def backfill(self, request: Request) -> Response:
        """`{"flow", "at": [instant, …], "again": label, "dry_run": bool}`."""
        app, asked = self._opened(), await read_object(request)
        schedule = _schedule(app, request.path_params["name"])
        dry, wanted = bool(asked.get("dry_run", False)), _wanted(schedule, asked)
        names = _subscriptions(app, schedule.name, asked.get("flow"))
        await _check_due(app, schedule, max(at for at, _ in wanted))
        async with self._turn:
            rows = [
                await _fill(app, schedule.name, at, event, names, dry=dry) for at, event in wanted
            ]
        if not dry:
            events = [row["event"] for row in rows]
            log.info(
                "operator.acted",
                verb="backfill",
                by=_by(request),
                trigger=schedule.name,
                flow=asked["flow"],
                events=events,
            )
        return Json(
            {"trigger": schedule.name, "flow": asked["flow"], "dry_run": dry, "occurrences": rows},
            200 if dry else 202,
        )


# --------------------------------------------------------------------------- one occurrence


async def _fill(
    app: Served, trigger: str, at: datetime, event: Event, names: Sequence[str], *, dry: bool
) -> dict[str, Any]:
    """Sees to it that an occurrence has its deliveries; says what became of each, and which were there before."""
    known = await _known(app, trigger, event)
    told: list[dict[str, Any]] = []
    for name in names:
        before = _said(known, name)
        if before:
            told += [{**said, "known": True} for said in before]
            continue
        arrival = app.house.router.arrive(
            trigger, event, ledger_id=known["id"] if known else None, only=name
        )
        if dry:
            runs = {run.id: {"state": run.state.word} for run in arrival.runs}
            told += [
                {**serializers.verdict(said, runs), "known": False}
                for said in orjson.loads(arrival.verdicts)
            ]
            continue
        if known is None:
            await app.house.reactor.record([arrival], trigger)
        elif known["kept"]:
            await app.store.replay(known["id"], arrival)
        else:
            raise UsageError(
                f"{event.id} is past its retention, its body is gone; give a label with `again` to run it anew"
            )
        known = await _known(app, trigger, event)
        told += [{**said, "known": False} for said in _said(known, name)]
    return {"at": _shown(at), "event": show_id(known["id"]) if known else None, "verdicts": told}


def _said(known: dict[str, Any] | None, subscription: str) -> list[dict[str, Any]]:
    """What is on record about an occurrence and a subscription."""
    if known is None:
        return []
    runs = {run["id"]: run for run in known["runs"]}
    return [
        serializers.verdict(said, runs) for said in known["verdicts"] if said[0] == subscription
    ]


async def _known(app: Served, trigger: str, event: Event) -> dict[str, Any] | None:
    """The occurrence's row in the ledger, if it is there."""
    try:
        row = await app.store.event(event.id)
    except NotFound:
        return None
    return row if row["trigger"] == trigger else None


# --------------------------------------------------------------------------- what a request asks


def _schedule(app: Served, name: str) -> Scheduled:
    for trigger in app.triggers:
        if trigger.name == name:
            if isinstance(trigger, Scheduled):
                return trigger
            raise UsageError(
                f"trigger {name!r} is no schedule: what it will send is not known beforehand; replay its events"
            )
    raise NotFound("trigger", name)


async def _past(app: Served, schedule: Scheduled) -> datetime:
    """The last instant that is the backfill's, not the schedule's: its cursor, or now when it has never listened."""
    return schedule.settled(await app.store.cursor(schedule.name)) or to_datetime(app.clock.now())


async def _check_due(app: Served, schedule: Scheduled, latest: datetime) -> None:
    past = await _past(app, schedule)
    if latest > past:
        raise UsageError(
            f"{_shown(latest)} is still the schedule's own to fire: it is through with what is up to {_shown(past)}"
        )
    if schedule.name in await app.store.paused():
        raise UsageError(
            f"trigger {schedule.name!r} is paused, so its runs would be held; resume it first"
        )


def _subscriptions(app: Served, trigger: str, flow: Any) -> list[str]:
    if not isinstance(flow, str) or not flow:
        raise refuse(400, "invalid", "flow: expected the name of a flow")
    found = [
        each.name
        for each in app.subscriptions
        if each.trigger == trigger and each.flow.name == app.flow(flow).name
    ]
    if not found:
        hear = (
            ", ".join(
                sorted({each.flow.name for each in app.subscriptions if each.trigger == trigger})
            )
            or "none"
        )
        raise UsageError(
            f"flow {flow!r} has no subscription on trigger {trigger!r}; flows that have: {hear}"
        )
    return found


def _wanted(schedule: Scheduled, asked: dict[str, Any]) -> list[tuple[datetime, Event]]:
    """The occurrences asked for, with their events."""
    at, label = asked.get("at"), asked.get("again")
    if not isinstance(at, list) or not 1 <= len(cast(list[Any], at)) <= AT_ONCE:
        raise refuse(400, "invalid", f"at: expected a list of 1 to {AT_ONCE} instants")
    if label is not None and not (isinstance(label, str) and 0 < len(label) <= LONGEST_LABEL):
        raise refuse(
            400,
            "invalid",
            f"again: expected a label of 1 to {LONGEST_LABEL} characters, such as a date",
        )
    try:
        found = [
            (moment := parse_time(each), schedule.occurrence(moment))
            for each in cast(list[Any], at)
        ]
    except (ValueError, TypeError) as error:
        raise refuse(400, "invalid", f"at: {error}") from None
    return (
        [(at, msgspec.structs.replace(event, id=f"{event.id}#{label}")) for at, event in found]
        if label
        else found
    )


def _moment(request: Request, name: str) -> datetime:
    text = request.query_params.get(name, "")
    try:
        return datetime.fromisoformat(text.replace(" ", "+"))
    except ValueError:
        raise refuse(
            400,
            "invalid",
            f"{name}: expected a date or an instant such as 2026-01-31, found {text!r}",
        ) from None


def _shown(at: datetime) -> str:
    return at.isoformat().replace("+00:00", "Z")


def _by(request: Request) -> str:
    return f"{request.client.host if request.client else 'here'} {request.headers.get('user-agent', '')[:80]}".strip()
