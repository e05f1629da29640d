"""The handlers of the JSON API, by resource: events, runs, dead letters, triggers and sinks, the
ledger.

api.py makes routes of their tables. Each handler reads the request, calls the store, the App or
actions.py, and answers with what serializers.py makes of the rows. A 2xx for an event or a run
follows its record (P1). Lists are newest first, at most MAX_ROWS rows, `{"KIND": [...], "next": id
to give as after= for the next page, or null}`.
"""

import asyncio
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from eventflow.app import App
from eventflow.core.errors import NotFound, StoreCorrupt
from eventflow.events.cloudevents import BATCH, is_cloudevent, media_type, parse_cloudevents
from eventflow.events.event import Receipt
from eventflow.logs.store import LogStore
from eventflow.runs.run import State, format_id, parse_id
from eventflow.web import actions, serializers
from eventflow.web.responses import (
    MAX_BATCH_BYTES,
    MAX_BODY_BYTES,
    ApiRoute,
    Json,
    caller,
    check_query,
    error_json,
    http_error,
    instant,
    read_body,
    read_object,
    whole_number,
)

FULL_WAIT_SECONDS = 2.0
"""For which a POST waits while the ledger is full, before it is answered 503 (P8)."""
MAX_ROWS = 1000


class EventHandlers:
    """`opened` returns the App, or raises HttpError while it is closed; the same for all classes
    here.
    """

    def __init__(self, opened: Callable[[], App]) -> None:
        self._opened = opened

    def table(self) -> list[ApiRoute]:
        return [
            ("POST", "/api/events", self.post_events),
            ("GET", "/api/events", self.events),
            ("POST", "/api/events/{id:path}/replay", self.replay),
            ("GET", "/api/events/{id:path}", self.event),
        ]

    async def post_events(self, request: Request) -> Response:
        """CloudEvents: binary, structured, batch (all or none)."""
        headers = {name.lower(): value for name, value in request.headers.items()}
        if not is_cloudevent(headers):
            expected = (
                "ce-* headers, application/cloudevents+json or application/cloudevents-batch+json"
            )
            raise http_error(
                415, "unsupported_type", f"expected a CloudEvent: {expected}", close_connection=True
            )
        batch = media_type(headers) == BATCH
        body = await read_body(request, MAX_BATCH_BYTES if batch else MAX_BODY_BYTES)
        try:
            events = parse_cloudevents(headers, body)
        except ValueError as error:
            raise http_error(400, "unreadable", str(error)) from None
        app = self._opened()
        receipts = await app.accept(*events, max_wait=FULL_WAIT_SECONDS) if events else []
        return _receipts_response(receipts, batch)

    async def events(self, request: Request) -> Response:
        check_query(request, "trigger", "type", "since", "until", "limit", "after")
        query = request.query_params
        rows = await self._opened().store.events(
            trigger=query.get("trigger"),
            type=query.get("type"),
            since=instant(request, "since"),
            until=instant(request, "until"),
            limit=_limit(request),
            after=_after(request),
        )
        return Json(_page("events", [serializers.event(row) for row in rows], _limit(request)))

    async def event(self, request: Request) -> Response:
        row = await self._opened().store.event(request.path_params["id"])
        return Json(serializers.event_details(row))

    async def replay(self, request: Request) -> Response:
        """`{"to": subscription or flow, "own": bool, "dry_run": bool}`, all optional."""
        params = await read_object(request, "to", "own", "dry_run")
        dry = bool(params.get("dry_run", False))
        number, verdicts = await actions.replay(
            self._opened(),
            request.path_params["id"],
            _text(params, "to"),
            dry=dry,
            own=bool(params.get("own", False)),
            by=caller(request),
        )
        serialize = serializers.simulated_verdict if dry else serializers.new_verdict
        return Json(
            {
                "ledger_id": format_id(number),
                "dry_run": dry,
                "verdicts": [serialize(each) for each in verdicts],
            },
            200 if dry else 202,
        )


class RunHandlers:
    def __init__(self, opened: Callable[[], App]) -> None:
        self._opened = opened

    def table(self) -> list[ApiRoute]:
        return [
            ("POST", "/api/runs", self.post_run),
            ("GET", "/api/runs", self.runs),
            ("GET", "/api/runs/{id}", self.run),
            ("GET", "/api/runs/{id}/logs", self.logs),
            ("POST", "/api/runs/{id}/retry", self.retry),
            ("POST", "/api/runs/{id}/cancel", self.cancel),
        ]

    async def post_run(self, request: Request) -> Response:
        """`{"flow", "params", "idempotency_key"}`."""
        app = self._opened()
        fields = await read_object(request, "flow", "params", "idempotency_key")
        name = _text(fields, "flow")
        key = _text(fields, "idempotency_key")
        params = fields.get("params", {})
        if not name:
            raise http_error(400, "invalid", "flow: expected the name of a flow, found none")
        if not isinstance(params, dict):
            raise http_error(400, "invalid", "params: expected a JSON object")
        number, duplicate = await app.runtime.start_run(
            app.flow(name), orjson.dumps(params), key, max_wait=FULL_WAIT_SECONDS
        )
        return Json(
            {"id": format_id(number), "flow": name, "duplicate": duplicate},
            200 if duplicate else 202,
        )

    async def runs(self, request: Request) -> Response:
        check_query(request, "flow", "state", "event", "parent", "limit", "after")
        app = self._opened()
        query = request.query_params
        store = app.store
        event = query.get("event")
        parent = query.get("parent")
        rows = await store.runs(
            event=(await store.event(event))["id"] if event else None,
            parent=(await store.run(parent))["id"] if parent else None,
            flow=query.get("flow"),
            state=_state(query.get("state")),
            limit=_limit(request),
            after=_after(request),
        )
        pause_reason = app.runtime.worker.pause_reason
        return Json(
            _page("runs", [serializers.run(row, pause_reason) for row in rows], _limit(request))
        )

    async def run(self, request: Request) -> Response:
        app = self._opened()
        row = await app.store.run(request.path_params["id"])
        journal = await app.store.load(row["id"])
        details = partial(
            serializers.run_details,
            row,
            journal,
            app.runtime.blobs.fetch,
            event_body=await _event_body(app, row["event"]),
            running=app.runtime.worker.running_calls(row["id"]),
            now=app.clock.now(),
        )
        return Json(await asyncio.to_thread(details))

    async def logs(self, request: Request) -> Response:
        """`?after=SEQ&limit=N`: lines in order; `settled`: no more lines will follow."""
        app = self._opened()
        row = await app.store.run(request.path_params["id"])
        check_query(request, "after", "limit")
        sink = app.runtime.logs
        after = whole_number(request, "after", 0)
        limit = _limit(request)
        lines = await sink.read(row["id"], after, limit) if isinstance(sink, LogStore) else []
        return Json(
            {
                "run": format_id(row["id"]),
                "settled": not State[row["state"].upper()].is_live,
                "lines": [serializers.log_line(line) for line in lines],
            }
        )

    async def retry(self, request: Request) -> Response:
        """`{"from_scratch": true}` (or `fresh`) drops recorded values, not only errors;
        `{"from": CALL}` starts a new run.
        """
        fields = await read_object(request, "from_scratch", "fresh", "from")
        from_scratch = bool(fields.get("from_scratch", fields.get("fresh", False)))
        ident = request.path_params["id"]
        if call := _text(fields, "from"):
            if from_scratch:
                raise http_error(
                    400, "invalid", "from: expected without from_scratch, which keeps nothing"
                )
            old, new = await actions.retry_from(self._opened(), ident, call, by=caller(request))
            return Json({"id": format_id(new), "state": "pending", "repeats": format_id(old)}, 202)
        number, before, now = await actions.retry(
            self._opened(), ident, from_scratch=from_scratch, by=caller(request)
        )
        return Json({"id": format_id(number), "state": now.label, "was": before.label}, 202)

    async def cancel(self, request: Request) -> Response:
        """`{"reason"}`, optional."""
        fields = await read_object(request, "reason")
        reason = _text(fields, "reason") or "cancelled by an operator"
        app = self._opened()
        number, before = await actions.cancel(
            app, request.path_params["id"], reason, by=caller(request)
        )
        is_over = (await app.store.run(number))["state"] == State.CANCELLED.label
        state = "cancelled" if is_over else "cancelling"
        return Json({"id": format_id(number), "state": state, "was": before.label}, 202)


class DeadLetterHandlers:
    def __init__(self, opened: Callable[[], App]) -> None:
        self._opened = opened

    def table(self) -> list[ApiRoute]:
        return [
            ("GET", "/api/dead-letters", self.dead_letters),
            ("GET", "/api/dead-letters/{id}", self.dead_letter),
            ("POST", "/api/dead-letters/{id}/redrive", self.redrive),
            ("GET", "/api/dead", self.dead),
            ("GET", "/api/dead/{id}", self.dead_letter),
            ("POST", "/api/dead/{id}/redrive", self.redrive),
        ]

    async def dead_letters(self, request: Request) -> Response:
        return await self._list(request, "dead_letters")

    async def dead(self, request: Request) -> Response:
        """The same list under the key of the older path."""
        return await self._list(request, "dead")

    async def _list(self, request: Request, kind: str) -> Response:
        check_query(request, "limit", "after")
        rows = await self._opened().store.dead_letters(
            limit=_limit(request), after=whole_number(request, "after", None)
        )
        return Json(_page(kind, [serializers.dead_letter(row) for row in rows], _limit(request)))

    async def dead_letter(self, request: Request) -> Response:
        row = await self._opened().store.dead_letter(request.path_params["id"])
        return Json(
            {
                **serializers.dead_letter(row),
                "body": serializers.body(row["body"]),
                "headers": serializers.body(row["headers"]),
            }
        )

    async def redrive(self, request: Request) -> Response:
        """`{}`: as recorded; `{"data", "type"}`: corrected; `{"event"}`: a whole CloudEvent."""
        correction = await read_object(request, "data", "type", "event")
        receipt, verdicts = await actions.redrive(
            self._opened(), request.path_params["id"], correction, by=caller(request)
        )
        return Json(
            {
                "ledger_id": receipt.id_text,
                "verdicts": [serializers.new_verdict(each) for each in verdicts],
            },
            202,
        )


class TriggerHandlers:
    """Flows, triggers and sinks."""

    def __init__(self, opened: Callable[[], App]) -> None:
        self._opened = opened

    def table(self) -> list[ApiRoute]:
        return [
            ("GET", "/api/flows", self.flows),
            ("GET", "/api/triggers", self.triggers),
            ("POST", "/api/triggers/{name:path}/pause", self.pause),
            ("POST", "/api/triggers/{name:path}/resume", self.resume),
            ("GET", "/api/sinks", self.sinks),
        ]

    async def flows(self, _: Request) -> Response:
        app = self._opened()
        rows = [
            {
                "name": name,
                "subscriptions": [
                    each.name for each in app.subscriptions if each.flow.name == name
                ],
            }
            for name in sorted(app.flows)
        ]
        return Json({"flows": rows})

    async def triggers(self, _: Request) -> Response:
        app = self._opened()
        paused = await app.store.paused_triggers()
        triggers = {trigger.name: trigger for trigger in app.triggers}
        rows = [
            serializers.trigger(triggers[name], health, paused=name in paused)
            for name, health in app.runtime.reactor.health.items()
        ]
        return Json({"triggers": rows})

    async def sinks(self, _: Request) -> Response:
        return Json({"sinks": await self._sinks()})

    async def sinks_by_old_name(self, _: Request) -> Response:
        """The same list under the key of the older path."""
        return Json({"outlets": await self._sinks()})

    async def _sinks(self) -> list[dict[str, Any]]:
        app = self._opened()
        return serializers.sinks(app.runtime.relay.health, await app.store.outbox_depths())

    async def pause(self, request: Request) -> Response:
        return await self._set_paused(request, True)

    async def resume(self, request: Request) -> Response:
        return await self._set_paused(request, False)

    async def _set_paused(self, request: Request, paused: bool) -> Response:
        name = request.path_params["name"]
        await actions.pause(self._opened(), name, paused, by=caller(request))
        return Json({"name": name, "paused": paused})


class LedgerHandlers:
    def __init__(self, opened: Callable[[], App]) -> None:
        self._opened = opened

    def table(self) -> list[ApiRoute]:
        return [
            ("GET", "/api/counts", self.counts),
            ("GET", "/api/status", self.status),
            ("GET", "/api/check", self.check),
            ("POST", "/api/backup", self.backup),
        ]

    async def counts(self, _: Request) -> Response:
        return Json(await self._opened().store.counts())

    async def status(self, _: Request) -> Response:
        """What a person asks first: whether runs are executed, and what is left to do."""
        app = self._opened()
        worker = app.runtime.worker
        reason = app.runtime.unready_reason or worker.pause_reason
        return Json(
            {
                "working": not reason,
                "reason": reason or None,
                "runs": worker.load,
                "threads_left_behind": worker.threads.left_behind,
                "spare_threads": max(0, worker.threads.max_spare - worker.threads.left_behind),
                "counts": await app.store.counts(),
            }
        )

    async def check(self, _: Request) -> Response:
        """Every invariant of the ledger that does not hold; takes as long as reading all of it."""
        return Json({"wrong": await self._opened().store.check()})

    async def backup(self, request: Request) -> Response:
        """`{"path"}`: a consistent copy to a new file on the server's own disk."""
        path = _text(await read_object(request, "path"), "path")
        if not path or not os.path.isabs(path):
            raise http_error(
                400, "invalid", "path: expected the absolute path of a file that does not exist"
            )
        await self._opened().store.backup(path)
        return Json({"path": path})


async def _event_body(app: App, ident: int | None) -> bytes | None:
    """The stored event of a run, if it is still there and can be read."""
    if ident is None:
        return None
    try:
        return (await app.store.event(ident))["body"]
    except (NotFound, StoreCorrupt):
        return None


# --------------------------------------------------------------------------- responses


def _receipts_response(receipts: list[Receipt], batch: bool) -> Response:
    conflicts = [receipt.event_id for receipt in receipts if receipt.conflict]
    if conflicts:
        ids = ", ".join(conflicts[:3])
        return error_json(
            409, "conflict", f"{ids}: already received with other content; the first event stays"
        )
    rows = [
        {"id": each.id_text, "event_id": each.event_id, "duplicate": each.duplicate}
        for each in receipts
    ]
    known = bool(receipts) and all(receipt.duplicate for receipt in receipts)
    return Json(rows if batch else rows[0], 200 if known else 202)


def _page(kind: str, rows: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    return {kind: rows, "next": rows[-1]["id"] if len(rows) == limit else None}


# --------------------------------------------------------------------------- parameters


def _limit(request: Request) -> int:
    return min(max(1, whole_number(request, "limit", 50)), MAX_ROWS)


def _after(request: Request) -> int | None:
    text = request.query_params.get("after")
    if text is None:
        return None
    number = parse_id(text)
    if number is None:
        raise http_error(400, "invalid", f"after: expected an id of 13 letters, found {text!r}")
    return number


def _state(name: str | None) -> State | None:
    if name is None:
        return None
    if name.upper() not in State.__members__:
        known = ", ".join(each.label for each in State)
        raise http_error(400, "invalid", f"state: expected one of {known}, found {name!r}")
    return State[name.upper()]


def _text(fields: dict[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise http_error(400, "invalid", f"{name}: expected a string")
    return value
