"""`replay --since … --dry-run`: which runs the events of a time would have started, and how that is told.

With `--app` it is the program in that file that is asked, on the ledger as it lies on the disk, whether a server has it open or
not: so a change is tried before it is deployed. Otherwise the server answers, with the code it runs. doing.py calls this.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import click
import msgspec

from eventflow.cli.client import Place, Unreachable, doors, has_store, store_path
from eventflow.cli.output import counted, short_time, table
from eventflow.cli.target import load_app
from eventflow.core.clock import to_us
from eventflow.dry_run.replay import MOST, Question, foresee
from eventflow.events.event import parse_time
from eventflow.logs.redaction import clean
from eventflow.store.read_only import beside

NAMED = 5
"""Events of a run that a line names."""


class Asked(msgspec.Struct, frozen=True):
    """What the command was given; times in RFC 3339."""

    since: str | None
    until: str | None
    type: str | None
    to: str | None
    limit: int


async def foreseen(place: Place, asked: Asked) -> dict[str, Any]:
    """The answer, as `GET /api/foresight` gives it."""
    if place.app is not None and place.url is None:
        return await _here(place, place.app, asked)
    async with doors(place) as api:
        api.need_flows("a dry run")
        return await api.get("/api/foresight", patience=None, **msgspec.structs.asdict(asked))


async def _here(place: Place, target: str, asked: Asked) -> dict[str, Any]:
    app = load_app(target)
    path = store_path(place, app)
    if not has_store(path):
        raise Unreachable(f"there is no store {path}; name another with --store")
    end = app.clock.now() + 1  # itself not included, but what has just come is
    question = Question(
        until=end if asked.until is None else min(end, to_us(parse_time(asked.until))),
        since=None if asked.since is None else to_us(parse_time(asked.since)),
        type=asked.type, to=asked.to, limit=min(asked.limit, MOST),
    )  # fmt: skip
    async with beside(path, app.clock) as ledger:
        return await foresee(ledger, app.subscriptions, app.triggers, question)


# --------------------------------------------------------------------------- told to a person


def told(answer: Mapping[str, Any]) -> str:
    """The runs, what triggers would have sent, what became of the other events, and the sum."""
    parts = [
        table(
            [_made(each) for each in answer["foretold"]],
            ("event", "at", "trigger", "type", "subject", "said"),
            "",
        ),
        table(
            [_run(each) for each in answer["runs"]],
            ("run", "at", "subscription", "mode", "key", "events"),
            "",
        ),
        "\n".join(line for each in answer["subscriptions"] for line in _tally(each)),
        "\n".join(_sum(answer)),
    ]
    return "\n\n".join(part for part in parts if part)


def _made(event: Mapping[str, Any]) -> dict[str, Any]:
    return {**event, "event": event["id"]}


def _run(run: Mapping[str, Any]) -> dict[str, Any]:
    named = ", ".join(run["events"][:NAMED])
    more = f" and {run['size'] - NAMED} more" if run["size"] > NAMED else ""
    least = "at least " if run["is_least"] else ""
    return {**run, "run": str(run["number"]), "events": f"{least}{run['size']}: {named}{more}"}


def _tally(tally: Mapping[str, Any]) -> list[str]:
    """A subscription: how many runs of how many events, and why the others are in none."""
    name = click.style(tally["subscription"], bold=True)
    waits = f", {tally['waiting']} still wait at the end" if tally["waiting"] else ""
    runs, events = counted(tally["runs"], "run"), counted(tally["events"], "event")
    lines = [f"{name}: {runs} of {events}; it heard of {tally['heard']}{waits}"]
    for each in sorted(tally["reasons"], key=lambda reason: -reason["events"]):
        lines.append(
            f"  {each['events']} {each['fate']}: {clean(each['reason'])} (such as {each['first']})"
        )
    return lines


def _sum(answer: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for each in answer["triggers"]:
        foretold = counted(each["foretold"], "event")
        lines.append(
            f"{each['name']} would have sent {foretold}, in place of {each['on_record']} on record"
        )
        lines += [f"  {note}" for note in each["notes"]]
    lines += _left_out(answer)
    looked, runs = (
        counted(answer["events"], "recorded event"),
        counted(answer["would_start"], "run"),
    )
    least = "at least " if answer["at_least"] else ""
    between = f"from {short_time(answer['since'])} to {short_time(answer['until'])}"
    lines.append(f"{looked} {between}: {least}{runs} would start")
    return lines


def _left_out(answer: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    if answer["past_retention"]:
        lines.append(
            f"{counted(answer['past_retention'], 'event')} past retention: what they would have started is not known"
        )
    if answer["dead"]:
        lines.append(f"{answer['dead']} dead letters are no events; they start nothing")
    if (listed := len(answer["runs"])) < answer["would_start"]:
        lines.append(
            f"the first {listed} runs are listed; take a smaller time, or a larger --limit"
        )
    return lines


def would_start(done: Sequence[Mapping[str, Any]]) -> str:
    """The sum of a dry run of one event."""
    verdicts = [said for each in done for said in each["verdicts"]]
    started = sum(said["fate"] in ("run", "held") for said in verdicts)
    return f"{counted(len(done), 'event')}, {counted(started, 'run')} would start"
