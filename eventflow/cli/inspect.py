"""The commands that read the ledger and change nothing: ls, show, explain, logs."""

import asyncio
import sys
from datetime import datetime
from typing import Any

import click
import orjson

from eventflow.cli.aliases import KindChoice
from eventflow.cli.client import ApiError, LedgerLocation, ledger_options, open_api, quoted
from eventflow.cli.output import coloured, fields_text, short_time, table, write_result
from eventflow.cli.times import check_order, parse_moment
from eventflow.core.errors import UsageError
from eventflow.logs.file import as_stream_line
from eventflow.logs.output import format_line, make_renderer
from eventflow.logs.redaction import escape_controls_by_line

COMMANDS: list[click.Command] = []

COLUMNS = {
    "runs": "id flow state attempts created_at finished_at subscription detail",
    "events": "id event_id trigger type received_at runs_started duplicates",
    "flows": "name subscriptions",
    "triggers": "name kind state paused events duplicates last_event_at gauges detail",
    "sinks": "name sink kind state waiting oldest_at sent rejected failures last_error",
    "dead-letters": "id event subscription at type reason",
}
"""The columns of `ls`, by kind."""

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
    as_json: bool,
    location: LedgerLocation,
    **filters: Any,
) -> None:
    """List runs, events, flows, triggers, sinks or dead letters.

    Without a kind, runs are listed. The newest come first.
    """
    given = {name: value for name, value in filters.items() if value is not None}
    for name in given:
        if (wanted := _FILTERED_KIND[name]) != kind:
            raise UsageError(f"--{name} filters {wanted}; leave it out, or: eventflow ls {wanted}")
    check_order(filters["since"], filters["until"])
    params = {"limit": limit, "after": after, **given}
    page = asyncio.run(_get(location, f"/api/{kind}", **params))
    detail = _trigger_detail if kind == "triggers" else _run_detail
    rows = [{**row, **detail(row)} for row in page[kind.replace("-", "_")]]
    empty = f"no {kind.replace('-', ' ')}"
    write_result(page, as_json, table(rows, COLUMNS[kind].split(), empty))


async def _get(location: LedgerLocation, path: str, **params: Any) -> dict[str, Any]:
    async with open_api(location) as api:
        return await api.get(path, **params)


def _run_detail(row: dict[str, Any]) -> dict[str, Any]:
    """The error of a failed run, else the reason of its state."""
    error = row.get("error")
    return {
        "detail": f"{error['type'].rpartition(':')[2]}: {error['message']}"
        if error
        else row.get("reason")
    }


def _trigger_detail(row: dict[str, Any]) -> dict[str, Any]:
    """A trigger's gauges, such as `lag_messages 12, lag_seconds 0.8`, and its current problem."""
    gauges = ", ".join(f"{name} {value:.15g}" for name, value in row["totals"].items())
    return {"gauges": gauges or None, "detail": row["condition"] or row["last_error"]}


# --------------------------------------------------------------------------- show


@command("show")
@click.argument("ident", metavar="ID")
@ledger_options
def show_command(ident: str, as_json: bool, location: LedgerLocation) -> None:
    """Show a run or an event.

    Of a run: its state, tasks with attempts and errors, parameters and result. The beginning or end
    of the ID is enough where only one matches.
    """
    kind, found = asyncio.run(_find_run_or_event(location, ident))
    write_result(found, as_json, run_text(found) if kind == "run" else event_text(found))


async def _find_run_or_event(location: LedgerLocation, ident: str) -> tuple[str, dict[str, Any]]:
    async with open_api(location) as api:
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


def run_text(run: dict[str, Any]) -> str:
    head = fields_text(
        [
            ("run", run["id"]),
            *((name, run[name]) for name in ("flow", "state", "reason")),
            *((name, run[name]) for name in ("event", "subscription", "parent")),
            ("ordering key", run["ordering_key"]),
            *((name, run[f"{name}_at"]) for name in ("created", "started", "finished")),
            ("due", run["due_at"] if run["state"] in ("pending", "waiting") else None),
            *((name, run[name]) for name in ("params", "result")),
        ]
    )
    parts = [head, _timeline(run)]
    if run["error"]:
        error = run["error"]
        message = escape_controls_by_line(error["message"])
        parts.append(f"{coloured('failed')}  {error['type']}: {message}")
        if error.get("traceback"):
            parts.append(escape_controls_by_line(error["traceback"]).rstrip())
    return "\n\n".join(part for part in parts if part)


def _timeline(run: dict[str, Any]) -> str:
    rows = [
        {
            "task": call["call_key"],
            "state": call["state"],
            "attempts": call["attempts"] or None,
            "at": call["at"],
            "took": _elapsed(call["first_at"], call["at"]) if call["attempts"] > 1 else None,
            "next_at": call["next_at"],
            "error": _last_error(call),
        }
        for call in run["tasks"]
    ]
    return (
        table(rows, ("task", "state", "attempts", "at", "took", "next_at", "error"), "")
        if rows
        else ""
    )


def _elapsed(first: str, last: str) -> str:
    """The time between the first and the last journal entry of a call."""
    return f"{(datetime.fromisoformat(last) - datetime.fromisoformat(first)).total_seconds():.3f}s"


def _last_error(call: dict[str, Any]) -> str | None:
    if not call["errors"]:
        return None
    error = call["errors"][-1]
    return f"{error.get('type', '').rpartition(':')[2]}: {error.get('message', '')}"


# --------------------------------------------------------------------------- explain


@command("explain")
@click.argument("event")
@ledger_options
def explain(event: str, as_json: bool, location: LedgerLocation) -> None:
    """Show the verdict on an event for every subscription.

    A verdict is: run started, filtered (with the condition), invalid (with the reason), paused and
    so on. EVENT is the id in the ledger or the sender's.
    """
    found = asyncio.run(_get(location, f"/api/events/{quoted(event)}"))
    write_result(found, as_json, event_text(found))


def event_text(event: dict[str, Any]) -> str:
    head = fields_text(
        [
            ("event", event["id"]),
            ("sender's id", event["event_id"]),
            *((name, event[name]) for name in ("type", "source", "subject", "trigger")),
            ("received", event["received_at"]),
            ("duplicates", _duplicates(event)),
            ("conflicts", event["conflicts"] or None),
        ]
    )
    rows = [
        {
            "subscription": verdict["subscription"] or "(the event itself)",
            "verdict": "run started" if verdict["outcome"] == "run" else verdict["outcome"],
            "run": verdict.get("run"),
            "state": verdict.get("state"),
            "why": verdict.get("reason"),
        }
        for verdict in event["verdicts"]
    ]
    columns = ("subscription", "verdict", "run", "state", "why")
    return f"{head}\n\n{table(rows, columns, 'no subscription accepts events of this type')}"


def _duplicates(event: dict[str, Any]) -> str | None:
    if not event["duplicates"]:
        return None
    last = short_time(event["last_duplicate_at"])
    return f"{event['duplicates']}, last {last}; they started nothing"


# --------------------------------------------------------------------------- logs


@command("logs")
@click.argument("run")
@click.option("--follow", "-f", is_flag=True, help="Continue until the run has ended.")
@ledger_options
def logs(run: str, follow: bool, as_json: bool, location: LedgerLocation) -> None:
    """Print what a run's flow and tasks logged and printed.

    With --json, print one JSON object per line.
    """
    asyncio.run(_print_logs(location, run, follow, as_json))


async def _print_logs(location: LedgerLocation, run: str, follow: bool, as_json: bool) -> None:
    console = make_renderer(colors=None if sys.stdout.isatty() else False)
    after = 0
    async with open_api(location) as api:
        follow = follow and api.live  # without a server nothing more will come
        while True:
            page = await api.get(f"/api/runs/{quoted(run)}/logs", after=after, limit=1000)
            for line in page["lines"]:
                after = line["seq"]
                click.echo(
                    orjson.dumps(_log_record(line)).decode()
                    if as_json
                    else format_line(_log_record(line), console)
                )
            if not page["lines"] and (page["settled"] or not follow):
                return
            if not page["lines"]:
                await asyncio.sleep(0.3)


def _log_record(line: dict[str, Any]) -> dict[str, Any]:
    """A stored line in the form of the log stream."""
    record = as_stream_line({**line, "at": 0})
    return {**record, "timestamp": line["at"]}
