"""The doors over HTTP: the triggers' own routes, and the JSON API under `/api`.

    request ─► Guard (auth.py) ─► a handler here ─► App / store / actions.py ─► serializers.py ─► JSON

`App.asgi()` and server.py call `make_asgi`. A 2xx for an event or a run follows its record (P1). Lists are newest first, at
most 1,000 rows, `{"KIND": [...], "next": id to give as after= for the next page, or null}`. Errors are `{"error", "detail"}`.
"""

import asyncio
import os
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any, TypeVar, cast

import msgspec
import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from eventflow.core.errors import StoreFull
from eventflow.events.cloudevents import BATCH, is_cloudevent, media_type, parse_cloudevents
from eventflow.events.event import Receipt
from eventflow.logs.store import LogStore
from eventflow.runs.run import State, parse_id, show_id
from eventflow.store.key_files import secret_beside
from eventflow.web import actions, serializers
from eventflow.web.auth import Guard
from eventflow.web.backfill import Backfill
from eventflow.web.dry_run import Foresee
from eventflow.web.metrics import render
from eventflow.web.openapi import describe_api
from eventflow.web.responses import (
    MAX_BATCH,
    MAX_BODY,
    Json,
    answering,
    crashed,
    instant,
    problem,
    read_body,
    read_object,
    refuse,
    unavailable,
    whole_number,
)
from eventflow.web.served import Served

T = TypeVar("T")

FULL_PATIENCE = 2.0
"""Seconds a POST waits for a full ledger before it is told to come back (P8)."""
MOST_ROWS = 1000


def make_asgi(
    app: Served,
    *,
    auth: bool = True,
    allowed_hosts: Collection[str] = (),
    open_metrics: bool = False,
    manage: bool = True,
    draining: Callable[[], bool] = lambda: False,
) -> ASGIApp:
    """The ASGI app of an App.

    `auth=False` asks for no token. `allowed_hosts`: names besides the loopback ones under which it is reached. `manage`: the
    lifespan opens and closes the App; otherwise whoever serves it does. `draining` says that a stop was asked for.
    """
    hooks: list[BaseRoute] = [
        route for trigger in app.triggers for route in getattr(trigger, "routes", ())
    ]
    door = Api(app, draining)
    inner = Starlette(
        routes=[*hooks, *door.routes()],
        exception_handlers={404: _unknown, 405: _wrong_method, Exception: crashed},
        lifespan=door.lifespan if manage else None,
    )
    inner.router.redirect_slashes = False
    return Guard(
        inner,
        routes=hooks,
        token=door.token if auth else lambda: None,
        hosts=allowed_hosts,
        open_paths=("/metrics",) if open_metrics else (),
        draining=door.is_draining,
        clock=app.clock.monotonic,
    )


async def _unknown(request: Request, _error: Exception) -> Response:
    return problem(
        404, "not_found", f"nothing is at {request.url.path}; /openapi.json lists what there is"
    )


async def _wrong_method(request: Request, error: Exception) -> Response:
    headers = error.headers if isinstance(error, HTTPException) else None
    detail = f"{request.url.path} does not take {request.method}"
    return problem(405, "method_not_allowed", detail, allow=(headers or {}).get("Allow", ""))


class Api:
    """The handlers, over one App."""

    def __init__(self, app: Served, draining: Callable[[], bool]) -> None:
        self.app, self._asked_to_stop = app, draining
        self._token: str | None = None
        self._nobody = secrets.token_urlsafe(32)  # before the App is open nobody is known

    def routes(self) -> list[BaseRoute]:
        table: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
            ("GET", "/healthz", self.healthz),
            ("GET", "/readyz", self.readyz),
            ("GET", "/metrics", self.metrics),
            ("GET", "/openapi.json", self.openapi),
            ("POST", "/api/events", self.post_events),
            ("GET", "/api/events", self.events),
            ("POST", "/api/events/{id:path}/replay", self.replay),
            ("GET", "/api/events/{id:path}", self.event),
            ("POST", "/api/runs", self.post_run),
            ("GET", "/api/runs", self.runs),
            ("GET", "/api/runs/{id}", self.run),
            ("GET", "/api/runs/{id}/logs", self.logs),
            ("POST", "/api/runs/{id}/retry", self.retry),
            ("POST", "/api/runs/{id}/cancel", self.cancel),
            ("GET", "/api/dead", self.dead),
            ("GET", "/api/dead/{id}", self.dead_letter),
            ("POST", "/api/dead/{id}/redrive", self.redrive),
            ("GET", "/api/flows", self.flows),
            ("GET", "/api/triggers", self.triggers),
            ("POST", "/api/triggers/{name:path}/pause", self.pause),
            ("POST", "/api/triggers/{name:path}/resume", self.resume),
            *Backfill(self._open).table(),
            *Foresee(self._open).table(),
            ("GET", "/api/outlets", self.outlets),
            ("GET", "/api/counts", self.counts),
            ("GET", "/api/check", self.check),
            ("POST", "/api/backup", self.backup),
        ]
        by_path: dict[str, dict[str, Callable[[Request], Awaitable[Response]]]] = {}
        for method, path, handler in table:
            by_path.setdefault(path, {})[method] = answering(handler)
        return [
            Route(path, _switch(methods), methods=list(methods))
            for path, methods in by_path.items()
        ]

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncGenerator[None]:
        """Opens the App, and the file that keeps what its runs log; on the server's own loop."""
        logs = LogStore(f"{store_path(self.app)}.logs.db", clock=self.app.clock)
        logs.open()
        try:
            await self.app.open(sink=logs)
            try:
                yield
            finally:
                await self.app.close()
        finally:
            await asyncio.to_thread(logs.close)

    def token(self) -> str | None:
        """Read, or made, once: the store's folder is there when the App is open."""
        if self._token is None and self.app.is_open:
            self._token = secret_beside(self.app.store.path, "token")
        return self._token or self._nobody

    def is_draining(self) -> bool:
        return self._asked_to_stop() or (self.app.is_open and self.app.house.reactor.draining)

    # ----------------------------------------------------------------- is it well

    async def healthz(self, _: Request) -> Response:
        """The process lives; says nothing of its store."""
        return Json({"ok": True})

    async def readyz(self, _: Request) -> Response:
        """It takes events: open, not draining, its store well and not full."""
        if self.is_draining():
            return unavailable("draining")
        app = self.app
        if not app.is_open:
            return unavailable("starting")
        if app.store.failed is not None:
            return unavailable("the store failed")
        full = app.store.room()
        held = {"worker": app.house.worker.held_back} if app.house.worker.held_back else {}
        return Json({"ready": True, **held}) if full is None else unavailable(str(full))

    async def metrics(self, request: Request) -> Response:
        body, media = await render(self._open())
        return Response(body, media_type=media)

    async def openapi(self, _: Request) -> Response:
        return Json(describe_api(self.app))

    def _open(self) -> Served:
        if not self.app.is_open:
            raise refuse(503, "unavailable", "the app is not open", retry_after="1")
        return self.app

    # ----------------------------------------------------------------- events

    async def post_events(self, request: Request) -> Response:
        """CloudEvents: binary, structured, batch (all or none)."""
        headers = {name.lower(): value for name, value in request.headers.items()}
        if not is_cloudevent(headers):
            expected = (
                "ce-* headers, application/cloudevents+json or application/cloudevents-batch+json"
            )
            raise refuse(
                415, "unsupported_type", f"expected a CloudEvent: {expected}", hang_up=True
            )
        batch = media_type(headers) == BATCH
        body = await read_body(request, MAX_BATCH if batch else MAX_BODY)
        try:
            events = parse_cloudevents(headers, body)
        except ValueError as error:
            raise refuse(400, "unreadable", str(error)) from None
        found: Any = await patiently(lambda: self._open().accept(*events)) if events else []
        receipts = cast(list[Receipt], found if isinstance(found, list) else [found])
        return _receipted(receipts, batch)

    async def events(self, request: Request) -> Response:
        asked = request.query_params
        rows = await self._open().store.events(
            trigger=asked.get("trigger"), type=asked.get("type"), since=instant(request, "since"),
            until=instant(request, "until"), limit=_limit(request), after=_after(request),
        )  # fmt: skip
        return Json(_page("events", [serializers.event(row) for row in rows], _limit(request)))

    async def event(self, request: Request) -> Response:
        return Json(
            serializers.event_whole(await self._open().store.event(request.path_params["id"]))
        )

    async def replay(self, request: Request) -> Response:
        """`{"to": subscription or flow, "own": bool, "dry_run": bool}`, all optional."""
        asked = await read_object(request)
        dry, own = bool(asked.get("dry_run", False)), bool(asked.get("own", False))
        ident, to = request.path_params["id"], _text(asked, "to")
        number, verdicts = await actions.replay(
            self._open(), ident, to, dry=dry, own=own, by=_by(request)
        )
        said = [
            (serializers.foreseen_verdict if dry else serializers.new_verdict)(each)
            for each in verdicts
        ]
        return Json(
            {"event": show_id(number), "dry_run": dry, "verdicts": said}, 200 if dry else 202
        )

    # ----------------------------------------------------------------- runs

    async def post_run(self, request: Request) -> Response:
        app = self._open()
        asked = await read_object(request)
        name, params, key = (
            _text(asked, "flow"),
            asked.get("params", {}),
            _text(asked, "idempotency_key"),
        )
        if not name:
            raise refuse(400, "invalid", "flow: expected the name of a flow, found none")
        if not isinstance(params, dict):
            raise refuse(400, "invalid", "params: expected a JSON object")
        flow, body = app.flow(name), orjson.dumps(params)
        run = await patiently(lambda: app.start_with(flow, body, key))
        return Json(
            {"id": run.id, "flow": name, "duplicate": run.duplicate}, 200 if run.duplicate else 202
        )

    async def runs(self, request: Request) -> Response:
        app, asked = self._open(), request.query_params
        store, event, parent = app.store, asked.get("event"), asked.get("parent")
        rows = await store.runs(
            event=(await store.event(event))["id"] if event else None,
            parent=(await store.run(parent))["id"] if parent else None,
            flow=asked.get("flow"), state=_state(asked.get("state")), limit=_limit(request), after=_after(request),
        )  # fmt: skip
        return Json(
            _page(
                "runs",
                [serializers.run(row, app.house.worker.held_back) for row in rows],
                _limit(request),
            )
        )

    async def run(self, request: Request) -> Response:
        app = self._open()
        row = await app.store.run(request.path_params["id"])
        journal = await app.store.load(row["id"])
        return Json(await asyncio.to_thread(serializers.run_whole, row, journal, app.blobs.fetch))

    async def logs(self, request: Request) -> Response:
        """`?after=SEQ&limit=N`: lines in order; `settled` says that no more will come."""
        row = await self._open().store.run(request.path_params["id"])
        sink = self.app.house.sink
        after, limit = whole_number(request, "after", 0), _limit(request)
        lines = await sink.read(row["id"], after, limit) if isinstance(sink, LogStore) else []
        settled = not State[row["state"].upper()].live
        return Json(
            {
                "run": show_id(row["id"]),
                "settled": settled,
                "lines": [serializers.line(line) for line in lines],
            }
        )

    async def retry(self, request: Request) -> Response:
        """`{"fresh": true}` drops what was recorded; by default values stay, errors are forgiven."""
        asked = await read_object(request)
        fresh = bool(asked.get("fresh", False))
        number = await actions.retry(
            self._open(), request.path_params["id"], fresh=fresh, by=_by(request)
        )
        return Json({"id": show_id(number), "state": "pending"}, 202)

    async def cancel(self, request: Request) -> Response:
        asked = await read_object(request)
        reason = _text(asked, "reason") or "cancelled by an operator"
        number, before = await actions.cancel(
            self._open(), request.path_params["id"], reason, by=_by(request)
        )
        state = "cancelling" if before is State.RUNNING else "cancelled"
        return Json({"id": show_id(number), "state": state, "was": before.word}, 202)

    # ----------------------------------------------------------------- dead letters

    async def dead(self, request: Request) -> Response:
        rows = await self._open().store.dead(
            limit=_limit(request), after=whole_number(request, "after", None)
        )
        return Json(_page("dead", [serializers.dead(row) for row in rows], _limit(request)))

    async def dead_letter(self, request: Request) -> Response:
        row = await self._open().store.dead_letter(request.path_params["id"])
        return Json(
            {
                **serializers.dead(row),
                "body": serializers.body(row["body"]),
                "headers": serializers.body(row["headers"]),
            }
        )

    async def redrive(self, request: Request) -> Response:
        mended = await read_object(request)
        receipt, verdicts = await actions.redrive(
            self._open(), request.path_params["id"], mended, by=_by(request)
        )
        return Json(
            {
                "event": receipt.shown,
                "verdicts": [serializers.new_verdict(each) for each in verdicts],
            },
            202,
        )

    # ----------------------------------------------------------------- flows, triggers, counts

    async def flows(self, _: Request) -> Response:
        app = self._open()
        heard = {
            name: [each.name for each in app.subscriptions if each.flow.name == name]
            for name in app.flows
        }
        return Json(
            {
                "flows": [
                    {"name": name, "subscriptions": subs} for name, subs in sorted(heard.items())
                ]
            }
        )

    async def triggers(self, _: Request) -> Response:
        app = self._open()
        paused = await app.store.paused()
        facts = {
            name: msgspec.structs.asdict(each) for name, each in app.house.reactor.health.items()
        }
        rows = [
            serializers.health(name, {**fact, "paused": name in paused})
            for name, fact in facts.items()
        ]
        own = {trigger.name: serializers.source(trigger) for trigger in app.triggers}
        return Json({"triggers": [{**row, **own[row["name"]]} for row in rows]})

    async def outlets(self, _: Request) -> Response:
        app = self._open()
        return Json(
            {
                "outlets": serializers.outlets(
                    app.house.relay.health, await app.store.outbox_depths()
                )
            }
        )

    async def pause(self, request: Request) -> Response:
        return await self._hold(request, True)

    async def resume(self, request: Request) -> Response:
        return await self._hold(request, False)

    async def _hold(self, request: Request, paused: bool) -> Response:
        name = request.path_params["name"]
        await actions.pause(self._open(), name, paused, by=_by(request))
        return Json({"name": name, "paused": paused})

    async def counts(self, _: Request) -> Response:
        return Json(await self._open().store.counts())

    async def check(self, _: Request) -> Response:
        """Everything that does not hold in the ledger; takes as long as reading all of it."""
        return Json({"wrong": await self._open().store.check()})

    async def backup(self, request: Request) -> Response:
        """`{"path": …}`: a consistent copy to a new file on the server's own disk."""
        path = _text(await read_object(request), "path")
        if not path or not os.path.isabs(path):
            raise refuse(
                400, "invalid", "path: expected the absolute path of a file that does not exist"
            )
        await self._open().store.backup(path)
        return Json({"path": path})


def store_path(app: Served) -> str:
    """Where the store of an App that is not open yet will be."""
    return app.url.partition(":///")[2]


def _switch(
    methods: dict[str, Callable[[Request], Awaitable[Response]]],
) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        return await methods["GET" if request.method == "HEAD" else request.method](request)

    return handle


async def patiently(record: Callable[[], Awaitable[T]]) -> T:
    """`record`, again and again for two seconds while the ledger is full."""
    loop = asyncio.get_running_loop()
    deadline, pause = loop.time() + FULL_PATIENCE, 0.05
    while True:
        try:
            return await record()
        except StoreFull:
            if loop.time() + pause > deadline:
                raise
        await asyncio.sleep(pause)
        pause *= 1.5


def _receipted(receipts: list[Receipt], batch: bool) -> Response:
    conflicts = [receipt.event_id for receipt in receipts if receipt.conflict]
    if conflicts:
        ids = ", ".join(conflicts[:3])
        return problem(
            409, "conflict", f"{ids}: already received with other content; the first one stands"
        )
    rows = [
        {"id": one.shown, "event_id": one.event_id, "duplicate": one.duplicate} for one in receipts
    ]
    known = bool(receipts) and all(receipt.duplicate for receipt in receipts)
    return Json(rows if batch else rows[0], 200 if known else 202)


# --------------------------------------------------------------------------- what a request asks


def _by(request: Request) -> str:
    """Who asks, as far as one token can tell: the address, and the program."""
    address = request.client.host if request.client else "here"
    return f"{address} {request.headers.get('user-agent', '')[:80]}".strip()


def _page(kind: str, rows: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    return {kind: rows, "next": rows[-1]["id"] if len(rows) == limit else None}


def _limit(request: Request) -> int:
    return min(max(1, whole_number(request, "limit", 50)), MOST_ROWS)


def _after(request: Request) -> int | None:
    text = request.query_params.get("after")
    if text is None:
        return None
    number = parse_id(text)
    if number is None:
        raise refuse(400, "invalid", f"after: expected an id of 13 letters, found {text!r}")
    return number


def _state(word: str | None) -> State | None:
    if word is None:
        return None
    if word.upper() not in State.__members__:
        raise refuse(
            400,
            "invalid",
            f"state: expected one of {', '.join(each.word for each in State)}, found {word!r}",
        )
    return State[word.upper()]


def _text(asked: dict[str, Any], name: str) -> str | None:
    value = asked.get(name)
    if value is not None and not isinstance(value, str):
        raise refuse(400, "invalid", f"{name}: expected a string")
    return value
