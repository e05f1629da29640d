"""Backfill: past occurrences of a schedule as events for one flow. The routes behind `eventflow
backfill`.

    GET  …/occurrences   the occurrences in a period
    POST …/backfill      records some of them for a flow and returns their verdicts

An occurrence has the same id as when the schedule fires it: for a flow that has a run of it nothing
starts; another flow gets a run. `rerun` adds a label to the id, and each label runs it once more.
Occurrences after the schedule's cursor are refused, since the schedule will fire them. api.py lists
these routes.
"""

import asyncio
from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import islice
from typing import Any, cast

import msgspec
import orjson
from starlette.requests import Request
from starlette.responses import Response

from eventflow.app import App
from eventflow.core.clock import to_datetime
from eventflow.core.errors import NotFound, UsageError
from eventflow.events.event import Event, Scheduled, format_id, parse_time
from eventflow.logs.log import get_logger
from eventflow.web import serializers
from eventflow.web.responses import ApiRoute, Json, caller, http_error, read_object

PAGE_SIZE = 1000
"""Occurrences in one response."""
MAX_OCCURRENCES = 100
"""In one backfill request."""
MAX_LABEL_LENGTH = 200
"""Characters of `rerun`."""

log = get_logger("eventflow.web")


class Backfill:
    """The handlers. `opened` returns the App."""

    def __init__(self, opened: Callable[[], App]) -> None:
        self._opened = opened
        # Two requests for one occurrence must not both find that it has no run yet.
        self._lock = asyncio.Lock()

    def table(self) -> list[ApiRoute]:
        return [
            ("GET", "/api/triggers/{name:path}/occurrences", self.occurrences),
            ("POST", "/api/triggers/{name:path}/backfill", self.backfill),
        ]

    async def occurrences(self, request: Request) -> Response:
        """`?since=&until=`: the nominal times in [since, until) up to the cursor, oldest first."""
        app = self._opened()
        schedule = _schedule(app, request.path_params["name"])
        since = _query_time(request, "since")
        until = _query_time(request, "until")
        past = await _last_settled(app, schedule)
        found = list(islice(schedule.occurrences(since, until), PAGE_SIZE + 1))
        page = [at for at in found[:PAGE_SIZE] if at <= past]
        more = len(found) > PAGE_SIZE and len(page) == PAGE_SIZE
        not_yet = None if more or len(page) == len(found) else found[len(page)]
        return Json(
            {
                "occurrences": [_format_time(at) for at in page],
                "next": _format_time(found[PAGE_SIZE]) if more else None,
                "not_yet": None if not_yet is None else _format_time(not_yet),
            }
        )

    async def backfill(self, request: Request) -> Response:
        """`{"flow", "at": [instant, …], "rerun": label, "dry_run": bool}`."""
        app = self._opened()
        params = await read_object(request, "flow", "at", "rerun", "again", "dry_run")
        schedule = _schedule(app, request.path_params["name"])
        dry = bool(params.get("dry_run", False))
        requested = _requested(schedule, params)
        names = _subscriptions(app, schedule.name, params.get("flow"))
        await _check_due(app, schedule, max(at for at, _ in requested))
        async with self._lock:
            rows = [
                await _ensure_deliveries(app, schedule.name, at, event, names, dry=dry)
                for at, event in requested
            ]
        if not dry:
            events = [row["ledger_id"] for row in rows]
            log.info(
                "api.action",
                action="backfill",
                by=caller(request),
                trigger=schedule.name,
                flow=params["flow"],
                events=events,
            )
        return Json(
            {"trigger": schedule.name, "flow": params["flow"], "dry_run": dry, "occurrences": rows},
            200 if dry else 202,
        )


# --------------------------------------------------------------------------- one occurrence


async def _ensure_deliveries(
    app: App, trigger: str, at: datetime, event: Event, names: Sequence[str], *, dry: bool
) -> dict[str, Any]:
    """Delivers an occurrence to these subscriptions unless it was delivered before; returns the
    verdicts of both.
    """
    known = await _ledger_row(app, trigger, event)
    verdicts: list[dict[str, Any]] = []
    for name in names:
        before = _recorded_verdicts(known, name)
        if before:
            verdicts += [{**each, "known": True} for each in before]
            continue
        arrival = app.runtime.router.route(
            trigger, event, ledger_id=known["id"] if known else None, only=name
        )
        if dry:
            runs = {run.id: {"state": run.state.label} for run in arrival.runs}
            verdicts += [
                {**serializers.verdict(each, runs), "known": False}
                for each in orjson.loads(arrival.verdicts)
            ]
            continue
        if known is None:
            await app.runtime.reactor.record(lambda arrival=arrival: [arrival], trigger)
        elif known["kept"]:
            await app.store.replay(known["id"], arrival)
        else:
            raise UsageError(
                f"{event.id} is past its retention, its body is gone;"
                " give a label with `rerun` to run it again"
            )
        known = await _ledger_row(app, trigger, event)
        verdicts += [{**each, "known": False} for each in _recorded_verdicts(known, name)]
    return {
        "at": _format_time(at),
        "ledger_id": format_id(known["id"]) if known else None,
        "verdicts": verdicts,
    }


def _recorded_verdicts(known: dict[str, Any] | None, subscription: str) -> list[dict[str, Any]]:
    """The recorded verdicts of an occurrence for one subscription."""
    if known is None:
        return []
    runs = {run["id"]: run for run in known["runs"]}
    return [
        serializers.verdict(each, runs) for each in known["verdicts"] if each[0] == subscription
    ]


async def _ledger_row(app: App, trigger: str, event: Event) -> dict[str, Any] | None:
    """The occurrence's row in the ledger, if it is there."""
    try:
        row = await app.store.event(event.id)
    except NotFound:
        return None
    return row if row["trigger"] == trigger else None


# --------------------------------------------------------------------------- request parameters


def _schedule(app: App, name: str) -> Scheduled:
    for trigger in app.triggers:
        if trigger.name == name:
            if isinstance(trigger, Scheduled):
                return trigger
            raise UsageError(
                f"trigger {name!r} is no schedule: its events are not known in advance;"
                " replay its events"
            )
    raise NotFound("trigger", name)


async def _last_settled(app: App, schedule: Scheduled) -> datetime:
    """The last instant to backfill: the schedule's cursor, or now if it never listened."""
    return schedule.settled(await app.store.cursor(schedule.name)) or to_datetime(app.clock.now())


async def _check_due(app: App, schedule: Scheduled, latest: datetime) -> None:
    past = await _last_settled(app, schedule)
    if latest > past:
        raise UsageError(
            f"{_format_time(latest)} will be fired by the schedule itself,"
            f" which has fired everything up to {_format_time(past)}"
        )
    if schedule.name in await app.store.paused_triggers():
        raise UsageError(
            f"trigger {schedule.name!r} is paused, so its runs would be paused too; resume it first"
        )


def _subscriptions(app: App, trigger: str, flow: Any) -> list[str]:
    if not isinstance(flow, str) or not flow:
        raise http_error(400, "invalid", "flow: expected the name of a flow")
    found = [
        each.name
        for each in app.subscriptions
        if each.trigger == trigger and each.flow.name == app.flow(flow).name
    ]
    if not found:
        flows = sorted({each.flow.name for each in app.subscriptions if each.trigger == trigger})
        raise UsageError(
            f"flow {flow!r} has no subscription on trigger {trigger!r};"
            f" flows that have: {', '.join(flows) or 'none'}"
        )
    return found


def _requested(schedule: Scheduled, params: dict[str, Any]) -> list[tuple[datetime, Event]]:
    """The requested occurrences with their events. `again`: the former name of `rerun`."""
    at = params.get("at")
    label = params.get("rerun", params.get("again"))
    if not isinstance(at, list) or not 1 <= len(cast(list[Any], at)) <= MAX_OCCURRENCES:
        raise http_error(400, "invalid", f"at: expected a list of 1 to {MAX_OCCURRENCES} instants")
    if label is not None and not (isinstance(label, str) and 0 < len(label) <= MAX_LABEL_LENGTH):
        raise http_error(
            400,
            "invalid",
            f"rerun: expected a label of 1 to {MAX_LABEL_LENGTH} characters, such as a date",
        )
    try:
        found = [
            (nominal := parse_time(each), schedule.occurrence(nominal))
            for each in cast(list[Any], at)
        ]
    except (ValueError, TypeError) as error:
        raise http_error(400, "invalid", f"at: {error}") from None
    return (
        [(at, msgspec.structs.replace(event, id=f"{event.id}#{label}")) for at, event in found]
        if label
        else found
    )


def _query_time(request: Request, name: str) -> datetime:
    text = request.query_params.get(name, "")
    try:
        return datetime.fromisoformat(text.replace(" ", "+"))
    except ValueError:
        raise http_error(
            400,
            "invalid",
            f"{name}: expected a date or an instant such as 2026-01-31, found {text!r}",
        ) from None


def _format_time(at: datetime) -> str:
    return at.isoformat().replace("+00:00", "Z")
