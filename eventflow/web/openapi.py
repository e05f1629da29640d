"""The description of the API, OpenAPI 3.1, for `/openapi.json` (behind the token, as everything).

One table: method, path, summary, statuses. docs/reference/http.md has the same rows, and tests
compare both with the routes.
"""

from typing import Any

from starlette.routing import Route

from eventflow.app import App

OPERATIONS: tuple[tuple[str, str, str, str], ...] = (
    ("get", "/healthz", "The process is alive.", "200"),
    ("get", "/readyz", "Events are accepted.", "200 503"),
    ("get", "/metrics", "Metrics in Prometheus' text format.", "200"),
    ("get", "/openapi.json", "The API in OpenAPI 3.1.", "200"),
    (
        "post",
        "/api/events",
        "Record CloudEvents: binary, structured or batch.",
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
        "Match an event again and start new runs: {to, own, dry_run}.",
        "200 202 404 409",
    ),
    (
        "get",
        "/api/dry-run",
        "Runs that past events would start: since, until, type, to, limit.",
        "200 400 409",
    ),
    (
        "post",
        "/api/runs",
        "Start a run: {flow, params, idempotency_key}.",
        "200 202 400 404 409 503 507",
    ),
    (
        "get",
        "/api/runs",
        "Runs, newest first: event, flow, state, parent, limit, after.",
        "200 400",
    ),
    ("get", "/api/runs/{id}", "One run with its tasks, result and error.", "200 404"),
    ("get", "/api/runs/{id}/logs", "The log lines of a run: after, limit.", "200 404"),
    (
        "post",
        "/api/runs/{id}/retry",
        "Retry a run, start its waiting attempts now, or repeat it: {from_scratch, from}.",
        "202 400 404 409",
    ),
    ("post", "/api/runs/{id}/cancel", "Cancel a run: {reason}.", "202 404 409"),
    ("get", "/api/dead-letters", "Open dead letters, newest first: limit, after.", "200"),
    ("get", "/api/dead-letters/{id}", "One dead letter with its bytes.", "200 404"),
    (
        "post",
        "/api/dead-letters/{id}/redrive",
        "Process a dead letter again: as recorded, {data}, or {event}.",
        "202 404 409",
    ),
    ("get", "/api/dead", "The same as /api/dead-letters.", "200"),
    ("get", "/api/dead/{id}", "The same as /api/dead-letters/{id}.", "200 404"),
    (
        "post",
        "/api/dead/{id}/redrive",
        "The same as /api/dead-letters/{id}/redrive.",
        "202 404 409",
    ),
    ("get", "/api/flows", "The flows and their subscriptions.", "200"),
    ("get", "/api/triggers", "The triggers and their health.", "200"),
    ("get", "/api/sinks", "The sink subscriptions, their health and backlog.", "200"),
    (
        "post",
        "/api/triggers/{name}/pause",
        "Pause a trigger: events are recorded, their runs paused.",
        "200 404",
    ),
    ("post", "/api/triggers/{name}/resume", "Resume a trigger and its paused runs.", "200 404"),
    (
        "get",
        "/api/triggers/{name}/occurrences",
        "Past occurrences of a schedule, oldest first: since, until.",
        "200 400 404 409",
    ),
    (
        "post",
        "/api/triggers/{name}/backfill",
        "Run past occurrences for a flow: {flow, at, rerun, dry_run}.",
        "200 202 400 404 409",
    ),
    ("get", "/api/counts", "Deliveries by state.", "200"),
    ("get", "/api/status", "Whether runs are executed, and what is left to do.", "200"),
    ("get", "/api/check", "Violated invariants of the ledger; reads all of it.", "200"),
    (
        "post",
        "/api/backup",
        "A consistent copy to a new file on the server's disk: {path}.",
        "200 400 409",
    ),
)


def describe_api(app: App) -> dict[str, Any]:
    paths: dict[str, dict[str, Any]] = {}
    for method, path, summary, answers in OPERATIONS:
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
        status: {"description": "success"}
        if status < "300"
        else {"description": "error", "content": wrong}
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
