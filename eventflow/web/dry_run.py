"""`GET /api/dry-run`: which runs past events would start with the current code; starts none.

The server side of `eventflow replay --since … --dry-run`, one request for the whole period. It
parses the query, calls dry_run/replay.py (imported by the first request) and stops when the client
disconnects. api.py lists the route.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from eventflow.app import App
from eventflow.events.event import Json as JsonValue
from eventflow.web.responses import ApiRoute, Json, check_query, instant, whole_number


class DryRun:
    """The handler. `opened` returns the App."""

    def __init__(self, opened: Callable[[], App]) -> None:
        self._opened = opened

    def table(self) -> list[ApiRoute]:
        return [("GET", "/api/dry-run", self.dry_run)]

    async def dry_run(self, request: Request) -> Response:
        """`?since=&until=&type=&to=&limit=`, all optional."""
        from eventflow.dry_run.replay import DEFAULT_LIMIT, MAX_LIMIT, DryRunQuery, dry_run

        check_query(request, "since", "until", "type", "to", "limit")
        app = self._opened()
        params = request.query_params
        end = app.clock.now() + 1  # exclusive: includes an event that was received just now
        query = DryRunQuery(
            until=min(instant(request, "until") or end, end),
            since=instant(request, "since"),
            type=params.get("type"),
            to=params.get("to"),
            limit=min(whole_number(request, "limit", DEFAULT_LIMIT), MAX_LIMIT),
        )
        ledger = _RequestLedger(app, request)
        return Json(await dry_run(ledger, app.subscriptions, app.triggers, query))


class _RequestLedger:
    """The ledger, readable while the client is connected; then ClientDisconnect."""

    def __init__(self, app: App, request: Request) -> None:
        self._store = app.store
        self._request = request

    async def past(
        self,
        *,
        triggers: Sequence[str],
        type: str | None,
        since: int,
        until: int,
        after: int,
        limit: int,
    ) -> tuple[list[dict[str, Any]], int | None]:
        if await self._request.is_disconnected():
            raise ClientDisconnect
        return await self._store.past(
            triggers=triggers, type=type, since=since, until=until, after=after, limit=limit
        )

    async def cursor(self, trigger: str) -> Mapping[str, JsonValue]:
        return await self._store.cursor(trigger)
