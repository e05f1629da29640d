"""The API's own description, OpenAPI 3.1, for `/openapi.json` (behind the token, as everything else).

One table, read by people in docs/reference and by the test that compares it with the routes.
"""

from typing import Any

from starlette.routing import Route

from eventflow.web.served import Served

TABLE: tuple[tuple[str, str, str, str], ...] = (
    ("get", "/healthz", "The process lives.", "200"),
    ("get", "/readyz", "It takes events.", "200 503"),
    ("get", "/metrics", "Prometheus' text format.", "200"),
    ("get", "/openapi.json", "This.", "200"),
    (
        "post",
        "/api/events",
        "Records CloudEvents: binary, structured or batch.",
        "200 202 400 409 413 415 503 507",
    ),
    (
        "get",
        "/api/events",
        "Events, newest first: trigger, type, since, until, limit, after.",
        "200 400",
    ),
    (
        "get",
        "/api/events/{id}",
        "One event with its verdicts, runs, dead letters and body.",
        "200 404",
    ),
    (
        "post",
        "/api/events/{id}/replay",
        "Matches it once more: {to, own, dry_run}.",
        "200 202 404 409",
    ),
    (
        "get",
        "/api/foresight",
        "Which runs a time's events would start: since, until, type, to, limit.",
        "200 400 409",
    ),
    (
        "post",
        "/api/runs",
        "Starts a run: {flow, params, idempotency_key}.",
        "200 202 400 404 409 503 507",
    ),
    (
        "get",
        "/api/runs",
        "Runs, newest first: event, flow, state, parent, limit, after.",
        "200 400",
    ),
    ("get", "/api/runs/{id}", "One run with its tasks, result and error.", "200 404"),
    ("get", "/api/runs/{id}/logs", "What it logged: after, limit.", "200 404"),
    (
        "post",
        "/api/runs/{id}/retry",
        "Lets a failed, cancelled, held or dead run go again: {fresh}.",
        "202 404 409",
    ),
    ("post", "/api/runs/{id}/cancel", "Ends a run: {reason}.", "202 404 409"),
    ("get", "/api/dead", "Open dead letters, newest first: limit, after.", "200"),
    ("get", "/api/dead/{id}", "One dead letter with its bytes.", "200 404"),
    (
        "post",
        "/api/dead/{id}/redrive",
        "Tries it once more: as it stands, {data}, or {event}.",
        "202 404 409",
    ),
    ("get", "/api/flows", "The flows and their subscriptions.", "200"),
    ("get", "/api/triggers", "The triggers and how they fare.", "200"),
    ("get", "/api/outlets", "What is sent to sinks, and what waits to be.", "200"),
    ("post", "/api/triggers/{name}/pause", "Records its events, holds their runs.", "200 404"),
    ("post", "/api/triggers/{name}/resume", "Lets held runs go on.", "200 404"),
    (
        "get",
        "/api/triggers/{name}/occurrences",
        "Past occurrences of a schedule, oldest first: since, until.",
        "200 400 404 409",
    ),
    (
        "post",
        "/api/triggers/{name}/backfill",
        "Runs past occurrences for a flow: {flow, at, again, dry_run}.",
        "200 202 400 404 409",
    ),
    ("get", "/api/counts", "The sum of all deliveries.", "200"),
    ("get", "/api/check", "What does not hold in the ledger; reads all of it.", "200"),
    (
        "post",
        "/api/backup",
        "A consistent copy to a new file on the server's disk: {path}.",
        "200 400 409",
    ),
)


def describe_api(app: Served) -> dict[str, Any]:
    paths: dict[str, dict[str, Any]] = {}
    for method, path, summary, answers in TABLE:
        paths.setdefault(path, {})[method] = _operation(path, summary, answers.split())
    for trigger in app.triggers:
        for route in getattr(trigger, "routes", ()):
            if isinstance(route, Route):
                operation = _operation(
                    route.path,
                    f"Events of {trigger.name}.",
                    ["200", "202", "400", "401", "409", "503"],
                )
                paths[route.path] = {"post": {**operation, "security": []}}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"eventflow: {app.name}", "version": "1"},
        "paths": paths,
        "security": [{"token": []}],
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "Error": {
                    "type": "object",
                    "required": ["error", "detail"],
                    "properties": {"error": {"type": "string"}, "detail": {"type": "string"}},
                }
            },
        },
    }


def _operation(path: str, summary: str, answers: list[str]) -> dict[str, Any]:
    wrong = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    responses = {
        status: {"description": "well"}
        if status < "300"
        else {"description": "not well", "content": wrong}
        for status in answers
    }
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    if names:
        operation["parameters"] = [
            {"name": n, "in": "path", "required": True, "schema": {"type": "string"}} for n in names
        ]
    if path in ("/healthz", "/readyz"):
        operation["security"] = []
    return operation
