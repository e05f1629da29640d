"""The commands that read the ledger and change nothing: ls, status, show, explain, logs."""

import asyncio
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import click
import orjson

from eventflow.cli.aliases import KindChoice
from eventflow.cli.client import (
    ApiClient,
    ApiError,
    LedgerLocation,
    ledger_options,
    open_api,
    quoted,
)
from eventflow.cli.output import (
    fields_text,
    note,
    table,
    terminal_width,
    write_result,
    write_text,
)
from eventflow.cli.run_text import event_text, last_part, run_text
from eventflow.cli.times import age_text, check_order, parse_moment, zone_name
from eventflow.core.clock import SECOND, duration_text, to_datetime
from eventflow.core.declarations import nearest
from eventflow.core.errors import UsageError
from eventflow.logs.file import as_stream_line
from eventflow.logs.output import format_line, make_style

COMMANDS: list[click.Command] = []

COLUMNS = {
    "runs": "id flow state started took about detail",
    "events": "id received trigger type subject event_id runs duplicates",
    "flows": "name subscriptions",
    "triggers": "name kind state since_start duplicates last_event gauges detail",
    "sinks": "name sink kind state waiting oldest sent rejected failures last_error",
    "dead-letters": "id ledger_id at subscription type reason",
}
"""The columns of `ls`, by kind; those without a value are left out."""

_API_NAMES = {"dead-letters": "dead"}
"""The route and the JSON field of a kind, where they differ from its name."""

_FILTERED_KIND = {
    "state": "runs",
    "flow": "runs",
    "event": "runs",
    "type": "events",
    "trigger": "events",
    "since": "events",
    "until": "events",
}
"""By option of `ls`, the kind that it filters."""


def command(name: str) -> Any:
    """Register a command of this file."""

    def register(function: Any) -> Any:
        made = click.command(name)(function)
        COMMANDS.append(made)
        return made

    return register


# --------------------------------------------------------------------------- ls


@command("ls")
@click.argument("kind", type=KindChoice(list(COLUMNS)), default="runs")
@click.option(
    "--state",
    help="Only runs in this state: pending, running, waiting, paused, held, completed, failed, "
    "cancelled, dead.",
)
@click.option("--failed", is_flag=True, help="The same as --state failed.")
@click.option("--flow", help="Only runs of this flow.")
@click.option("--event", help="Only runs that this event started.")
@click.option("--type", help="Only events of this type.")
@click.option("--trigger", help="Only events of this trigger.")
@click.option(
    "--since",
    callback=parse_moment,
    help="Only events since then: 2026-01-31T08:00:00Z, or an age: 90s, 15m, 2h, 7d, 1w.",
)
@click.option("--until", callback=parse_moment, help="Only events before then; as --since.")
@click.option(
    "--limit",
    "-n",
    default=20,
    show_default=True,
    type=click.IntRange(1, 1000),
    help="List at most this many.",
)
@click.option("--after", help="Continue after this id, the last of the previous page.")
@ledger_options
def ls(
    kind: str,
    limit: int,
    after: str | None,
    failed: bool,
    as_json: bool,
    location: LedgerLocation,
    **filters: Any,
) -> None:
    """List runs, events, flows, triggers, sinks or dead letters.

    Without a kind, runs are listed. The newest come first.
    """
    if failed and filters["state"] not in (None, "failed"):
        raise UsageError("--failed is --state failed; give one of them")
    filters["state"] = "failed" if failed else filters["state"]
    given = {name: value for name, value in filters.items() if value is not None}
    for name in given:
        if (wanted := _FILTERED_KIND[name]) != kind:
            raise UsageError(f"--{name} filters {wanted}; leave it out, or: eventflow ls {wanted}")
    check_order(filters["since"], filters["until"])
    params = {"limit": limit, "after": after, **given}
    page = asyncio.run(_get(location, f"/api/{kind}", **params))
    shown = _SHOWN.get(kind, dict)
    rows = [shown(row) for row in page[kind.replace("-", "_")]]
    empty = "" if rows else asyncio.run(_nothing_listed(location, kind, given))
    text = table(rows, COLUMNS[kind].split(), empty, width=terminal_width())
    write_result(page, as_json, text)


async def _get(location: LedgerLocation, path: str, **params: Any) -> dict[str, Any]:
    async with open_api(location) as api:
        return await api.get(path, **params)


async def _nothing_listed(location: LedgerLocation, kind: str, given: dict[str, Any]) -> str:
    """The line for an empty list: its filters, and which flow or trigger was probably meant."""
    shown = kind.replace("-", " ")
    if not given:
        return f"no {shown}"
    filters = " ".join(f"--{name} {value}" for name, value in given.items())
    for name in given.keys() & {"flow", "trigger"}:
        with suppress(ApiError, UsageError):  # the program is not known here
            declared = (await _get(location, f"/api/{name}s"))[f"{name}s"]
            names = [each["name"] for each in declared]
            if given[name] not in names:
                meant = nearest(given[name], names)
                hint = f"did you mean {meant!r}?" if meant else f"it has {', '.join(names)}"
                return f"no {shown} with {filters}; the app has no {name} {given[name]!r}: {hint}"
    return f"no {shown} with {filters}"


def _run_row(run: dict[str, Any]) -> dict[str, Any]:
    """`detail`: the error of a failed run, else the reason of its state."""
    error = run.get("error")
    return {
        **run,
        "started": age_text(run["started_at"] or run["created_at"]),
        "took": duration_text(run["took"]),
        "detail": f"{last_part(error['type'])}: {error['message']}"
        if error
        else _state_detail(run),
    }


def _state_detail(run: dict[str, Any]) -> str | None:
    """The reason for the state, or when the run is due; both if it waits for a retry."""
    reason = run["reason"]
    due = age_text(run["due_at"]) if run["state"] in ("pending", "waiting") else None
    if due is None or not due.startswith("in "):
        return reason
    return f"due {due}" if reason is None else f"retry {due}; {reason}"


def _event_row(event: dict[str, Any]) -> dict[str, Any]:
    return {
        **event,
        "received": age_text(event["received_at"]),
        "runs": event["runs_started"],
        "duplicates": event["duplicates"] or None,
    }


def _flow_row(flow: dict[str, Any]) -> dict[str, Any]:
    return {**flow, "subscriptions": ", ".join(flow["subscriptions"]) or None}


def _trigger_row(trigger: dict[str, Any]) -> dict[str, Any]:
    """With its gauges, such as `lag_messages 12, next in 30 s`, and its current problem."""
    gauges = ", ".join(
        gauge_text(name, value)
        for name, value in trigger["totals"].items()
        if value or name.startswith("lag")
    )
    return {
        **trigger,
        "state": "paused" if trigger["paused"] else trigger["state"],
        "since_start": trigger["events"],
        "duplicates": trigger["duplicates"] or None,
        "last_event": age_text(trigger["last_event_at"]),
        "gauges": gauges or None,
        "detail": trigger["condition"] or trigger["last_error"],
    }


def gauge_text(name: str, value: float) -> str:
    """`lag_seconds 0.8`; `next in 30 s` for an instant."""
    of_what = name.removesuffix("_timestamp_seconds")
    if of_what == name:
        return f"{name} {value:.15g}"
    return f"{of_what} {age_text(to_datetime(int(value * SECOND)).isoformat())}"


def _sink_row(sink: dict[str, Any]) -> dict[str, Any]:
    return {**sink, "oldest": age_text(sink["oldest_at"])}


def _dead_letter_row(letter: dict[str, Any]) -> dict[str, Any]:
    return {**letter, "at": age_text(letter["at"]), "subscription": letter["subscription"] or None}


_SHOWN: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "runs": _run_row,
    "events": _event_row,
    "flows": _flow_row,
    "triggers": _trigger_row,
    "sinks": _sink_row,
    "dead-letters": _dead_letter_row,
}


# --------------------------------------------------------------------------- status


@command("status")
@ledger_options
def status(as_json: bool, location: LedgerLocation) -> None:
    """Show whether runs are executed, and what is left to do."""
    found = asyncio.run(_status(location))
    write_result(found, as_json, fields_text(_status_fields(found), terminal_width()))


async def _status(location: LedgerLocation) -> dict[str, Any]:
    async with open_api(location) as api:
        found = await api.get("/api/status")
        listed: dict[str, Any] = await api.get("/api/triggers") if api.live else {"triggers": []}
    return {**found, "server": api.live, **listed}


def _status_fields(found: dict[str, Any]) -> list[tuple[str, Any]]:
    """Rows for what is not zero or not healthy, and always for the runs and the deliveries."""
    counts = found["counts"]
    deliveries = ", ".join(
        f"{counts[name]:,} {name}"
        for name in ("pending", "completed", "failed", "cancelled", "dead")
    )
    executed = found["reason"] or "yes" if found["server"] else "no server is running"
    fields: list[tuple[str, Any]] = [("runs executed", executed)]
    if found["server"]:
        fields.append(("runs", ", ".join(f"{n:,} {where}" for where, n in _load(found["runs"]))))
    fields.append(("deliveries", deliveries))
    if threads := found["threads_left_behind"]:
        spare = found["spare_threads"]
        fields.append(("threads", f"{threads} left behind by timed-out bodies, {spare} spare"))
    for trigger in found["triggers"]:
        row = _trigger_row(trigger)
        if row["state"] != "listening" or row["detail"]:
            detail = f": {row['detail']}" if row["detail"] else ""
            fields.append((row["name"], f"{row['state']}{detail}"))
    return fields


def _load(runs: dict[str, int]) -> list[tuple[str, int]]:
    return [(name.replace("_", " "), number) for name, number in runs.items()]


# --------------------------------------------------------------------------- show


@command("show")
@click.argument("ident", metavar="[ID]", required=False)
@ledger_options
def show_command(ident: str | None, as_json: bool, location: LedgerLocation) -> None:
    """Show a run or an event; without an ID, the last run.

    Of a run: its state, parameters, calls with times and errors, and result. The beginning or end
    of the ID is enough where only one matches. Of an event: the same as `explain`.
    """
    kind, found = asyncio.run(_find_run_or_event(location, ident))
    width = terminal_width()
    text = run_text(found, width) if kind == "run" else event_text(found, width)
    write_result(found, as_json, text)


async def _last_run(api: ApiClient) -> str:
    runs = (await api.get("/api/runs", limit=1))["runs"]
    if not runs:
        raise ApiError(404, "not_found", "there are no runs yet")
    return str(runs[0]["id"])


async def _find_run_or_event(
    location: LedgerLocation, ident: str | None
) -> tuple[str, dict[str, Any]]:
    async with open_api(location) as api:
        if ident is None:
            ident = await _last_run(api)
        try:
            return "run", await api.get(f"/api/runs/{quoted(ident)}")
        except ApiError as error:
            if error.error != "not_found":
                raise
        try:
            return "event", await api.get(f"/api/events/{quoted(ident)}")
        except ApiError as error:
            if error.error != "not_found":
                raise
            raise ApiError(
                404,
                "not_found",
                f"no run or event matches {ident!r}; `eventflow ls` lists what there is",
            ) from None


# --------------------------------------------------------------------------- explain


@command("explain")
@click.argument("event")
@ledger_options
def explain(event: str, as_json: bool, location: LedgerLocation) -> None:
    """Show the verdict on an event for every subscription.

    A verdict is: run started, filtered (with the condition), invalid (with the reason), paused and
    so on. EVENT is the id in the ledger or the sender's, or the event's subject, such as the name
    of a file or a Kafka key.
    """
    found = asyncio.run(_get(location, f"/api/events/{quoted(event)}"))
    write_result(found, as_json, event_text(found, terminal_width()))


# --------------------------------------------------------------------------- logs


@command("logs")
@click.argument("run", required=False)
@click.option(
    "--follow",
    "-f",
    is_flag=True,
    help="Continue until the run has ended; then its state is printed to stderr.",
)
@ledger_options
def logs(run: str | None, follow: bool, as_json: bool, location: LedgerLocation) -> None:
    """Print what a run's flow and tasks logged and printed; without RUN, of the last run.

    With --json, print one JSON object per line.
    """
    asyncio.run(_print_logs(location, run, follow, as_json))


async def _print_logs(
    location: LedgerLocation, run: str | None, follow: bool, as_json: bool
) -> None:
    style = make_style(sys.stdout)
    names_zone = sys.stdout.isatty() and not as_json
    after = 0
    async with open_api(location) as api:
        waits = follow and api.live  # without a server nothing more will come
        run = await _last_run(api) if run is None else run
        while True:
            page = await api.get(f"/api/runs/{quoted(run)}/logs", after=after, limit=1000)
            if names_zone and page["lines"]:
                note(f"times in {zone_name()}")
                names_zone = False
            for line in page["lines"]:
                after = line["seq"]
                if as_json:
                    click.echo(orjson.dumps(_log_record(line)).decode())
                else:
                    write_text(format_line(_log_record(line), style))
            if not page["lines"] and (page["settled"] or not waits):
                if not after:
                    note(f"run {page['run']} logged nothing")
                if follow:
                    state = (await api.get(f"/api/runs/{quoted(page['run'])}"))["state"]
                    alone = "" if api.live else ", and no server is running"
                    note(f"run {page['run']} is {state}{alone}; eventflow show {page['run']}")
                return
            if not page["lines"]:
                await asyncio.sleep(0.3)


def _log_record(line: dict[str, Any]) -> dict[str, Any]:
    """A stored line in the form of the log stream."""
    record = as_stream_line({**line, "at": 0})
    return {**record, "timestamp": line["at"]}
