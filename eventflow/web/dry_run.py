"""`GET /api/foresight`: which runs the events of a time would start with the code as it is now; starts none.

One request for the whole time, behind `eventflow replay --since … --dry-run`. foresight.py does it; here is what a request
asks, and that nobody goes on for a client who has left. api.py lists the route.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from eventflow.dry_run.replay import LIMIT, MOST, Question, foresee
from eventflow.events.event import Json as JsonValue
from eventflow.web.responses import Json, instant, whole_number
from eventflow.web.served import Served


class Foresee:
    """The handler, over the App that `opened` returns."""

    def __init__(self, opened: Callable[[], Served]) -> None:
        self._opened = opened

    def table(self) -> list[tuple[str, str, Callable[[Request], Awaitable[Response]]]]:
        return [("GET", "/api/foresight", self.foresight)]

    async def foresight(self, request: Request) -> Response:
        """`?since=&until=&type=&to=&limit=`, all optional."""
        app, asked = self._opened(), request.query_params
        end = app.clock.now() + 1  # itself not included, but what has just come is
        question = Question(
            until=min(instant(request, "until") or end, end), since=instant(request, "since"), type=asked.get("type"),
            to=asked.get("to"), limit=min(whole_number(request, "limit", LIMIT), MOST),
        )  # fmt: skip
        return Json(await foresee(_Asked(app, request), app.subscriptions, app.triggers, question))


class _Asked:
    """The ledger, for as long as somebody waits for the answer."""

    def __init__(self, app: Served, request: Request) -> None:
        self._store, self._request = app.store, request

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
