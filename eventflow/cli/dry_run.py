"""`eventflow replay --since … --dry-run`: the runs that recorded events would start, as text.

With `--app`, the app in that file is simulated on the ledger file, which a server may have open: a
change can be tried before it is deployed. Otherwise the server simulates the code that it runs.
Called by actions.py; the simulation is in the package eventflow/dry_run.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import click
import msgspec

from eventflow.cli.client import LedgerLocation, Unreachable, has_store, open_api, store_path
from eventflow.cli.output import plural, table, terminal_width
from eventflow.cli.target import load_app
from eventflow.cli.times import moment_text
from eventflow.core.clock import to_us
from eventflow.dry_run.replay import MAX_LIMIT, DryRunQuery, dry_run
from eventflow.events.event import parse_time
from eventflow.logs.redaction import escape_controls
from eventflow.store.read_only import open_read_only

MAX_EVENTS_NAMED = 5
"""The first events of a run, named in its row."""


class ReplayRequest(msgspec.Struct, frozen=True):
    """The options of `replay`; times in RFC 3339."""

    since: str | None
    until: str | None
    type: str | None
    to: str | None
    limit: int


async def simulate_replay(location: LedgerLocation, request: ReplayRequest) -> dict[str, Any]:
    """The answer, as `GET /api/dry-run` gives it."""
    if location.app is not None and location.url is None:
        return await _simulate_locally(location, location.app, request)
    async with open_api(location) as api:
        api.require_flows("a dry run")
        return await api.get("/api/dry-run", timeout=None, **msgspec.structs.asdict(request))


async def _simulate_locally(
    location: LedgerLocation, target: str, request: ReplayRequest
) -> dict[str, Any]:
    app = load_app(target)
    path = store_path(location, app)
    if not has_store(path):
        raise Unreachable(f"there is no store {path}; name another with --store")
    end = app.clock.now() + 1  # exclusive; an event of this microsecond is included
    query = DryRunQuery(
        until=end if request.until is None else min(end, to_us(parse_time(request.until))),
        since=None if request.since is None else to_us(parse_time(request.since)),
        type=request.type,
        to=request.to,
        limit=min(request.limit, MAX_LIMIT),
    )
    async with open_read_only(path, app.clock) as ledger:
        return await dry_run(ledger, app.subscriptions, app.triggers, query)


# --------------------------------------------------------------------------- as text


def dry_run_text(answer: Mapping[str, Any]) -> str:
    """Tables of simulated events and of runs, the reasons of the other events, and a summary."""
    parts = [
        table(
            [_event_row(each) for each in answer["simulated"]],
            ("event", "at", "trigger", "type", "subject", "summary"),
            "",
            width=terminal_width(),
        ),
        table(
            [_run_row(each) for each in answer["runs"]],
            ("run", "at", "subscription", "mode", "key", "events"),
            "",
            width=terminal_width(),
        ),
        "\n".join(line for each in answer["subscriptions"] for line in _subscription_lines(each)),
        "\n".join(_summary_lines(answer)),
    ]
    return "\n\n".join(part for part in parts if part)


def _event_row(event: Mapping[str, Any]) -> dict[str, Any]:
    return {**event, "event": event["id"], "at": moment_text(event["at"])}


def _run_row(run: Mapping[str, Any]) -> dict[str, Any]:
    named = ", ".join(run["events"][:MAX_EVENTS_NAMED])
    more = f" and {run['size'] - MAX_EVENTS_NAMED} more" if run["size"] > MAX_EVENTS_NAMED else ""
    least = "at least " if run["is_least"] else ""
    at = run["at"] and moment_text(run["at"])
    return {
        **run,
        "at": at,
        "run": str(run["number"]),
        "events": f"{least}{run['size']}: {named}{more}",
    }


def _subscription_lines(counts: Mapping[str, Any]) -> list[str]:
    """The runs and events of a subscription, and the reasons why events start no run."""
    name = click.style(counts["subscription"], bold=True)
    waiting = f", {counts['waiting']} still wait at the end" if counts["waiting"] else ""
    runs = plural(counts["runs"], "run")
    events = plural(counts["events"], "event")
    lines = [f"{name}: {runs} of {events}; {counts['received']} received{waiting}"]
    for each in sorted(counts["reasons"], key=lambda reason: -reason["events"]):
        reason = escape_controls(each["reason"])
        lines.append(f"  {each['events']} {each['outcome']}: {reason} (such as {each['first']})")
    return lines


def _summary_lines(answer: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for each in answer["triggers"]:
        simulated = plural(each["simulated"], "event")
        lines.append(
            f"{each['name']} would have sent {simulated}, in place of {each['recorded']} recorded"
        )
        lines += [f"  {note}" for note in each["notes"]]
    lines += _omitted_lines(answer)
    events = plural(answer["events"], "recorded event")
    runs = plural(answer["would_start"], "run")
    least = "at least " if answer["at_least"] else ""
    between = f"from {moment_text(answer['since'])} to {moment_text(answer['until'])}"
    lines.append(f"{events} {between}: {least}{runs} would start")
    return lines


def _omitted_lines(answer: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    if answer["past_retention"]:
        events = plural(answer["past_retention"], "event")
        lines.append(f"{events} past retention: the runs they would start are unknown")
    if answer["dead"]:
        lines.append(f"{plural(answer['dead'], 'dead letter')} left out; see eventflow redrive")
    if (listed := len(answer["runs"])) < answer["would_start"]:
        lines.append(f"the first {listed} runs are listed; use a shorter time or a larger --limit")
    return lines


def would_start_text(done: Sequence[Mapping[str, Any]]) -> str:
    """The summary of a dry run of one event."""
    verdicts = [verdict for each in done for verdict in each["verdicts"]]
    started = sum(verdict["outcome"] in ("run", "paused") for verdict in verdicts)
    return f"{plural(len(done), 'event')}, {plural(started, 'run')} would start"
