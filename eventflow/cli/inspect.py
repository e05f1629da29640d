"""What looks and changes nothing: `ls`, `show`, `explain`, `logs`."""

import asyncio
import sys
from datetime import datetime
from typing import Any

import click
import orjson

from eventflow.cli.client import ApiError, LedgerLocation, ledger_options, open_api, quoted
from eventflow.cli.output import coloured, fields_text, short_time, table, write_result
from eventflow.cli.times import check_order, parse_moment
from eventflow.core.errors import UsageError
from eventflow.logs.file import flat
from eventflow.logs.output import renderer, show
from eventflow.logs.redaction import clean_lines

COMMANDS: list[click.Command] = []

COLUMNS = {
    "runs": (
        "id",
        "flow",
        "state",
        "attempts",
        "created_at",
        "finished_at",
        "subscription",
        "detail",
    ),
    "events": ("id", "event_id", "trigger", "type", "received_at", "runs_started", "duplicates"),
    "flows": ("name", "subscriptions"),
    "triggers": (
        "name",
        "kind",
        "state",
        "paused",
        "events",
        "duplicates",
        "last_event_at",
        "gauges",
        "detail",
    ),
    "outlets": (
        "name",
        "sink",
        "kind",
        "state",
        "waiting",
        "oldest_at",
        "sent",
        "refused",
        "failures",
        "last_error",
    ),
    "dead": ("id", "event", "subscription", "at", "type", "reason"),
}

_FILTERED_KIND = {
    "state": "runs", "flow": "runs", "event": "runs", "type": "events", "trigger": "events", "since": "events",
    "until": "events",
}  # fmt: skip
"""What an option of `ls` chooses among."""


def command(name: str) -> Any:
    """Registers a command of this file."""

    def register(function: Any) -> Any:
        made = click.command(name)(function)
        COMMANDS.append(made)
        return made

    return register


# --------------------------------------------------------------------------- ls


@command("ls")
@click.argument("kind", type=click.Choice(list(COLUMNS)), default="runs")
@click.option(
    "--state",
    help="Of runs: pending, running, waiting, paused, held, completed, failed, cancelled, dead.",
)
@click.option("--flow", help="Of runs.")
@click.option("--event", help="Of runs: those it started.")
@click.option("--type", help="Of events.")
@click.option("--trigger", help="Of events.")
@click.option(
    "--since",
    callback=parse_moment,
    help="Of events: 2026-01-31T08:00:00Z, or how long ago: 90s, 15m, 2h, 7d, 1w.",
)
@click.option("--until", callback=parse_moment, help="Of events; as --since.")
@click.option("--limit", "-n", default=20, show_default=True, type=click.IntRange(1, 1000))
@click.option("--after", help="The last id of the page before.")
@ledger_options
def ls(kind: str, limit: int, after: str | None, as_json: bool, **options: Any) -> None:
    """Lists runs (the default), events, flows, triggers, outlets or dead letters, newest first."""
    given = {name: options[name] for name in _FILTERED_KIND if options[name] is not None}
    for name in given:
        if _FILTERED_KIND[name] != kind:
            raise UsageError(
                f"--{name} chooses among {_FILTERED_KIND[name]}; leave it out, or: eventflow ls {_FILTERED_KIND[name]}"
            )
    check_order(options["since"], options["until"])
    page = asyncio.run(
        _fetch_page(_location(options), kind, {"limit": limit, "after": after, **given})
    )
    detail = _trigger_detail if kind == "triggers" else _run_detail
    rows = [{**row, **detail(row)} for row in page[kind]]
    write_result(
        page,
        as_json,
        table(rows, COLUMNS[kind], "no dead letters" if kind == "dead" else f"no {kind}"),
    )


def _location(options: dict[str, Any]) -> LedgerLocation:
    return LedgerLocation(options["store"], options["url"], options["app"])


async def _fetch_page(
    location: LedgerLocation, kind: str, params: dict[str, Any]
) -> dict[str, Any]:
    async with open_api(location) as api:
        return await api.get(f"/api/{kind}", **params)


def _run_detail(row: dict[str, Any]) -> dict[str, Any]:
    """Why a run is as it is."""
    error = row.get("error")
    return {
        "detail": f"{error['type'].rpartition(':')[2]}: {error['message']}"
        if error
        else row.get("reason")
    }


def _trigger_detail(row: dict[str, Any]) -> dict[str, Any]:
    """How its source fares: `lag_messages 12, lag_seconds 0.8`, and what keeps it from its work."""
    gauges = ", ".join(f"{name} {value:.15g}" for name, value in row["totals"].items())
    return {"gauges": gauges or None, "detail": row["condition"] or row["last_error"]}


# --------------------------------------------------------------------------- show


@command("show")
@click.argument("ident", metavar="ID")
@ledger_options
def show_command(ident: str, as_json: bool, **options: Any) -> None:
    """Shows a run (or an event): its state, its tasks with attempts and errors, its result. A part
    of the ID serves.
    """
    kind, found = asyncio.run(_find_run_or_event(_location(options), ident))
    write_result(found, as_json, run_text(found) if kind == "run" else event_text(found))


async def _find_run_or_event(location: LedgerLocation, ident: str) -> tuple[str, dict[str, Any]]:
    async with open_api(location) as api:
        try:
            return "run", await api.get(f"/api/runs/{quoted(ident)}")
        except ApiError as refusal:
            if refusal.error != "not_found":
                raise
        try:
            return "event", await api.get(f"/api/events/{quoted(ident)}")
        except ApiError as refusal:
            if refusal.error != "not_found":
                raise
            raise ApiError(
                404,
                "not_found",
                f"no run or event matches {ident!r}; `eventflow ls` lists what there is",
            ) from None


def run_text(run: dict[str, Any]) -> str:
    head = fields_text(
        [
            ("run", run["id"]), ("flow", run["flow"]), ("state", run["state"]), ("reason", run["reason"]),
            ("event", run["event"]), ("subscription", run["subscription"]), ("parent", run["parent"]), ("lane", run["lane"]),
            ("created", run["created_at"]), ("started", run["started_at"]), ("finished", run["finished_at"]),
            ("due", run["due_at"] if run["state"] in ("pending", "waiting") else None),
            ("params", run["params"]), ("result", run["result"]),
        ]
    )  # fmt: skip
    parts = [head, _timeline(run)]
    if run["error"]:
        error = run["error"]
        parts.append(f"{coloured('failed')}  {error['type']}: {clean_lines(error['message'])}")
        if error.get("traceback"):
            parts.append(clean_lines(error["traceback"]).rstrip())
    return "\n\n".join(part for part in parts if part)


def _timeline(run: dict[str, Any]) -> str:
    rows = [
        {
            "task": call["claim"],
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
    """Between the first and the last entry of a call."""
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
def explain(event: str, as_json: bool, **options: Any) -> None:
    """Tells what became of an event, for every subscription: run started, filtered and why,
    invalid, paused. By our id or the sender's.
    """
    found = asyncio.run(_fetch_event(_location(options), event))
    write_result(found, as_json, event_text(found))


async def _fetch_event(location: LedgerLocation, ident: str) -> dict[str, Any]:
    async with open_api(location) as api:
        return await api.get(f"/api/events/{quoted(ident)}")


def event_text(event: dict[str, Any]) -> str:
    head = fields_text(
        [
            ("event", event["id"]), ("sender's id", event["event_id"]), ("type", event["type"]), ("source", event["source"]),
            ("subject", event["subject"]), ("trigger", event["trigger"]), ("received", event["received_at"]),
            ("duplicates", _duplicates(event)), ("conflicts", event["conflicts"] or None),
        ]
    )  # fmt: skip
    rows = [
        {
            "subscription": said["subscription"] or "(the event itself)",
            "verdict": "run started" if said["fate"] == "run" else said["fate"],
            "run": said.get("run"),
            "state": said.get("state"),
            "why": said.get("reason"),
        }
        for said in event["verdicts"]
    ]
    columns = ("subscription", "verdict", "run", "state", "why")
    return f"{head}\n\n{table(rows, columns, 'no subscription hears of events of this type')}"


def _duplicates(event: dict[str, Any]) -> str | None:
    if not event["duplicates"]:
        return None
    return f"{event['duplicates']}, last {short_time(event['last_duplicate_at'])}; they started nothing"


# --------------------------------------------------------------------------- logs


@command("logs")
@click.argument("run")
@click.option("--follow", "-f", is_flag=True, help="Goes on until the run has ended.")
@ledger_options
def logs(run: str, follow: bool, as_json: bool, **options: Any) -> None:
    """What a run's flow and tasks logged and printed; with --json one JSON line each."""
    asyncio.run(_print_logs(_location(options), run, follow, as_json))


async def _print_logs(location: LedgerLocation, run: str, follow: bool, as_json: bool) -> None:
    console = renderer(colors=None if sys.stdout.isatty() else False)
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
                    else show(_log_record(line), console)
                )
            if not page["lines"] and (page["settled"] or not follow):
                return
            if not page["lines"]:
                await asyncio.sleep(0.3)


def _log_record(line: dict[str, Any]) -> dict[str, Any]:
    """A stored line in the shape it had on the stream."""
    record = flat({**line, "at": 0})
    return {**record, "timestamp": line["at"]}
