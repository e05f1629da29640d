"""`eventflow run`: one run of a flow, and its result on stdout.

A server that has the app's store executes the run; otherwise the store is opened and the run
executed in this process. Called by serve.py.
"""

import asyncio
import secrets
import sys
from pathlib import Path
from typing import Any, cast

import click
import msgspec
import orjson

from eventflow.app import App, RunHandle
from eventflow.cli.client import (
    ApiError,
    LedgerLocation,
    Unreachable,
    open_api,
    running_server,
    store_path,
)
from eventflow.cli.output import fail, note
from eventflow.cli.run_progress import outcome_with_progress, server_progress, show_calls
from eventflow.cli.target import note_other_store
from eventflow.core.errors import BindingError, UsageError
from eventflow.events.event import Event
from eventflow.logs.capture import configure
from eventflow.logs.store import LogStore
from eventflow.routing.binding import Binder
from eventflow.runs.run import Cancelled, Completed, Failed, NeedsAttention
from eventflow.sdk.flow import Flow
from eventflow.serialization.errors import raised_at

POLL_INTERVAL_SECONDS = 0.2
"""Interval between two queries of a run that a server executes."""


class RunRequest(msgspec.Struct):
    """The arguments of `eventflow run`: either parameters or an event is given."""

    flow: Flow[..., Any]
    app: App | None
    target: str
    params: dict[str, Any] | None
    event: Any
    store: str | None = None
    idempotency_key: str | None = None


async def run_flow(request: RunRequest, as_json: bool) -> int:
    """Run the flow and print its result. The exit code."""
    bind(
        request.flow.fn,
        request.flow.name,
        request.params,
        _event(request.event) if request.params is None else None,
    )
    app = request.app or App(Path(request.target.partition(":")[0]).stem)
    app.add(request.flow)
    path = store_path(LedgerLocation(request.store), app)
    note_other_store(request.target, path)
    server = await running_server(path)
    if server is not None:
        return await _run_on_server(request, path, server, as_json)
    return await _run_locally(request, app, path, as_json)


def bind(
    fn: Any,
    name: str,
    params: dict[str, Any] | None,
    event: Event | None = None,
    *,
    noun: str = "flow",
) -> dict[str, Any]:
    """The arguments of `fn`; UsageError when the parameters or the event do not fit."""
    binder = Binder(fn, name)
    try:
        if params is None and event is not None:
            return binder.bind_event(event)
        return binder.bind_params(params or {}, event)
    except BindingError as error:
        raise UsageError(
            f"{noun} {name!r} cannot bind parameter {error.field!r}: {error.reason}"
        ) from None


def _event(given: Any) -> Event:
    if isinstance(given, dict) and "specversion" in given:
        try:
            return Event.from_dict(cast(dict[str, Any], given))
        except ValueError as error:
            raise UsageError(f"--event: {error}") from None
    return Event(
        id=secrets.token_hex(16), source="/cli", type="eventflow.run.requested", data=given
    )


# --------------------------------------------------------------------------- in this process


async def _run_locally(request: RunRequest, app: App, path: str, as_json: bool) -> int:
    logs = LogStore(f"{path}.logs.db", clock=app.clock)
    logs.open()
    with configure(stream=sys.stderr, pretty=False if as_json else None, level="info"):
        try:
            await app.open(store=f"sqlite:///{path}", own_loop=True, listen=False, logs=logs)
            try:
                return await _print_outcome(
                    app, await _start(request, app), request.flow.name, as_json
                )
            finally:
                await app.close(5.0)
        finally:
            await asyncio.to_thread(logs.close)


async def _start(request: RunRequest, app: App) -> RunHandle[Any]:
    pending = (await app.store.counts())["pending"]
    if pending:
        note(f"{pending} deliveries of this store were pending; they run here too")
    if request.params is not None:
        number, duplicate = await app.runtime.start_run(
            request.flow, orjson.dumps(request.params), request.idempotency_key
        )
        return RunHandle(app, number, request.flow, duplicate)
    arrival = app.runtime.router.route_to_flow(request.flow, _event(request.event))
    (receipt,) = await app.runtime.reactor.record(lambda: [arrival], "api")
    runs = await app.store.runs(event=receipt.ledger_id, limit=1)
    return RunHandle(app, runs[0]["id"], request.flow, receipt.duplicate)


async def _print_outcome(app: App, run: RunHandle[Any], flow: str, as_json: bool) -> int:
    """Wait for the run and print its result as the flow's codec encoded it. The exit code."""
    note(f"run {run.id}")
    outcome = await outcome_with_progress(app, run.number, flow)
    match outcome:
        case Completed():
            fetch = app.runtime.blobs.fetch
            return _print((await asyncio.to_thread(fetch, outcome.codec, outcome.value))[1])
        case Failed():
            return _report_failure(run.id, orjson.loads(outcome.error), as_json)
        case Cancelled() | NeedsAttention():
            return _report_failure(
                run.id, {"type": type(outcome).__name__.lower(), "message": outcome.reason}, as_json
            )
        case _:
            return _report_failure(
                run.id,
                {"type": "interrupted", "message": "continues at the next start"},
                as_json,
            )


def _report_failure(run: str, error: dict[str, Any], as_json: bool) -> int:
    at = raised_at(error)
    message = f"{error['type'].rpartition(':')[2]}: {error['message']}{f' ({at})' if at else ''}"
    fail("run_failed", f"run {run}: {message}; eventflow show {run}", as_json)
    return 1


def _print(data: bytes) -> int:
    """Print the result of a completed run. The exit code: a closed stdout changes nothing, a full
    disk is an I/O error.
    """
    try:
        click.echo(data.decode("utf-8", "backslashreplace"))
    except BrokenPipeError:
        pass
    except OSError as error:
        note(f"the run completed, but its result cannot be written to stdout: {error.strerror}")
        return 74
    return 0


# --------------------------------------------------------------------------- on a server


async def _run_on_server(request: RunRequest, path: str, url: str, as_json: bool) -> int:
    if request.params is None:
        raise UsageError(
            f"the server at {url} has this store; "
            "post the event to it, or give --store sqlite:///OTHER.db"
        )
    note(f"the server at {url} has the store and runs this")
    async with open_api(LedgerLocation(store=f"sqlite:///{path}")) as api:
        body = {
            "flow": request.flow.name,
            "params": request.params,
            "idempotency_key": request.idempotency_key,
        }
        try:
            started = await api.post("/api/runs", body)
        except ApiError as refusal:
            if refusal.error == "not_found":
                raise UsageError(
                    f"the server does not know the flow {request.flow.name!r}: it serves other code"
                ) from None
            raise
        note(f"run {started['id']}")
        with await server_progress(api, request.flow.name) as progress:
            while True:
                try:
                    run = await api.get(f"/api/runs/{started['id']}")
                except Unreachable:
                    raise Unreachable(
                        f"the server at {url} stopped; run {started['id']} is recorded and "
                        "continues when one starts"
                    ) from None
                if run["state"] not in ("pending", "running", "waiting"):
                    break
                show_calls(progress, run["tasks"])
                await asyncio.sleep(POLL_INTERVAL_SECONDS)
    if run["state"] == "completed":
        return _print(orjson.dumps(run["result"]))
    error = run["error"] or {"type": run["state"], "message": run["reason"] or "no reason is known"}
    return _report_failure(started["id"], error, as_json)
