"""What changes the ledger: `emit`, `retry`, `replay`, `redrive`, `cancel`, `pause`, `resume`."""

import asyncio
import secrets
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import click
import orjson

from eventflow.cli.client import Doors, Place, doors, place_options, quoted
from eventflow.cli.words import note, say
from eventflow.errors import UsageError
from eventflow.event import Event

COMMANDS: list[click.Command] = []


def command(name: str) -> Any:
    """Registers a command of this file."""

    def register(function: Any) -> Any:
        made = click.command(name)(place_options(function))
        COMMANDS.append(made)
        return made

    return register


def _run(options: dict[str, Any], work: Callable[[Doors], Awaitable[Any]]) -> Any:
    """`work` on the ledger that a command's options name."""

    async def go() -> Any:
        async with doors(Place(options["store"], options["url"], options["app"])) as api:
            done = await work(api)
            if not api.live:
                note("no server is running; this is recorded, and goes on when one starts")
            return done

    return asyncio.run(go())


def read_json_option(text: str | None, option: str) -> Any:
    """JSON given as text, as `@file`, or as `@-` for stdin."""
    if text is None:
        return None
    try:
        return orjson.loads(_read(text))
    except OSError as error:
        raise UsageError(f"{option}: {error.strerror}: {error.filename}") from None
    except ValueError as error:
        raise UsageError(f"{option}: expected JSON, or @FILE with JSON in it: {error}") from None


def _read(text: str) -> str:
    if text == "@-":
        return sys.stdin.read()
    return Path(text[1:]).read_text() if text.startswith("@") else text


# --------------------------------------------------------------------------- in


@command("emit")
@click.argument("event_type", metavar="TYPE")
@click.option("--data", "-d", help="JSON, @FILE, or @- for stdin.")
@click.option("--id", "ident", help="With the same id twice, the second starts nothing.")
@click.option("--subject")
@click.option("--source", default="/cli", show_default=True)
def emit(event_type: str, data: str | None, ident: str | None, subject: str | None, source: str, as_json: bool,
         **options: Any) -> None:  # fmt: skip
    """Records an event for the subscriptions on its type."""
    given, number = read_json_option(data, "--data"), ident or secrets.token_hex(16)
    event = Event(id=number, source=source, type=event_type, data=given, subject=subject)

    async def work(api: Doors) -> Any:
        api.need_flows("emit")
        return await api.publish(event.to_json())

    receipt = _run(options, work)
    known = "known already, started nothing" if receipt["duplicate"] else "recorded"
    say(receipt, as_json, f"event {receipt['id']} {known}; eventflow explain {receipt['id']}")


# --------------------------------------------------------------------------- again


@command("retry")
@click.argument("run")
@click.option("--fresh", is_flag=True, help="Forgets recorded values too.")
def retry(run: str, fresh: bool, as_json: bool, **options: Any) -> None:
    """Lets a failed, cancelled, held or dead run go on: recorded values are kept, errors are not."""
    done = _run(options, lambda api: api.post(f"/api/runs/{quoted(run)}/retry", {"fresh": fresh}))
    say(done, as_json, f"run {done['id']} is pending again")


@command("replay")
@click.argument("event", required=False)
@click.option("--since", help="All events received from then on: 2026-01-31T08:00:00Z.")
@click.option("--until", help="… and before then.")
@click.option("--type", "event_type", help="… of this type.")
@click.option("--to", help="Only this flow or subscription.")
@click.option("--dry-run", is_flag=True, help="Tells what would start, starts nothing.")
def replay(event: str | None, since: str | None, until: str | None, event_type: str | None, to: str | None, dry_run: bool,
           as_json: bool, **options: Any) -> None:  # fmt: skip
    """Matches recorded events once more and starts new runs: one EVENT, or all of a time."""
    if (event is None) == (since is None and until is None):
        raise UsageError("expected one EVENT, or --since and --until for many")

    async def work(api: Doors) -> list[Any]:
        api.need_flows("replay")
        idents = [event] if event is not None else await _window(api, since, until, event_type)
        return [await api.post(f"/api/events/{quoted(ident)}/replay", {"to": to, "dry_run": dry_run}) for ident in idents]

    done = _run(options, work)
    lines = [
        f"event {each['event']}  {said['subscription']}  {said['fate']}  {said.get('run') or said.get('reason')}"
        for each in done
        for said in each["verdicts"]
    ]
    if dry_run:
        lines += _windows(done)
    else:
        started = sum(said["fate"] == "run" for each in done for said in each["verdicts"])
        lines.append(f"{len(done)} events, {started} runs started")
    say(done[0] if event is not None else done, as_json, "\n".join(lines))


def _windows(done: list[Any]) -> list[str]:
    """What would start: each event a run of its own, or one of those that its window makes of several, by their times."""
    runs = 0
    open_: dict[tuple[str, str | None], dict[str, int]] = {}
    lines: list[str] = []
    for said in (said for each in done for said in each["verdicts"] if said["fate"] in ("run", "held")):
        window = said.get("window")
        if window is None:
            runs += 1
            continue
        now, key = window["at"], (said["subscription"], window["lane"])
        known = open_.get(key)
        if known is None or now >= known["due"] or known["count"] >= window["size"]:
            runs += 1
            known = open_[key] = {"opened": now, "due": now + window["wait"], "count": 0, "run": runs, "line": len(lines)}
            if not window["wait"]:
                known["due"] = sys.maxsize  # one at a time: nobody knows how long its runs would take
            lines.append("")
        elif window["renewed"]:
            known["due"] = min(now + window["wait"], known["opened"] + window["longest"])
        known["count"] += 1
        lines[known["line"]] = f"run {known['run']}  {key[0]}  {window['mode']} of {known['count']} events"
    unsure = "at least " if any(known["due"] == sys.maxsize for known in open_.values()) else ""
    return [*lines, f"{len(done)} events, {unsure}{runs} runs would start"]


async def _window(api: Doors, since: str | None, until: str | None, event_type: str | None) -> list[str]:
    """Ids of the events of a time, oldest first. Read to the end before the first replay, which adds none."""
    idents: list[str] = []
    after: str | None = None
    while True:
        page = await api.get("/api/events", since=since, until=until, type=event_type, limit=1000, after=after)
        idents += [row["id"] for row in page["events"]]
        after = page["next"]
        if after is None:
            return idents[::-1]


@command("redrive")
@click.argument("dead")
@click.option("--data", "-d", help="Mended data: JSON, @FILE or @-.")
@click.option("--type", "event_type", help="With --data, for bytes that never were an event: its type.")
def redrive(dead: str, data: str | None, event_type: str | None, as_json: bool, **options: Any) -> None:
    """Tries a dead letter once more, as it stands or mended; `all` tries every open one."""
    mended = {"type": event_type} | ({"data": read_json_option(data, "--data")} if data is not None else {})

    async def work(api: Doors) -> list[Any]:
        api.need_flows("redrive")
        idents = await _open_letters(api) if dead == "all" else [dead]
        return [await api.post(f"/api/dead/{quoted(str(ident))}/redrive", mended) for ident in idents]

    done = _run(options, work)
    lines = [
        f"event {each['event']}  {said['subscription']}  {said['fate']}  {said.get('run') or said.get('reason')}"
        for each in done
        for said in each["verdicts"]
    ]
    say(done if dead == "all" else done[0], as_json, "\n".join(lines) or "no dead letters")


async def _open_letters(api: Doors) -> list[int]:
    found: list[int] = []
    after: int | None = None
    while True:
        page = await api.get("/api/dead", limit=1000, after=after)
        found += [row["id"] for row in page["dead"]]
        after = page["next"]
        if after is None:
            return found[::-1]


# --------------------------------------------------------------------------- stop


@command("cancel")
@click.argument("run")
@click.option("--reason", "-m")
def cancel(run: str, reason: str | None, as_json: bool, **options: Any) -> None:
    """Ends a run; one that is running is asked to stop, its `finally` blocks still work."""
    done = _run(options, lambda api: api.post(f"/api/runs/{quoted(run)}/cancel", {"reason": reason}))
    say(done, as_json, f"run {done['id']} is {'asked to stop' if done['state'] == 'cancelling' else 'cancelled'}")


@command("pause")
@click.argument("trigger")
def pause(trigger: str, as_json: bool, **options: Any) -> None:
    """Pauses a trigger: its events are recorded, their runs held, until `resume`."""
    done = _run(options, lambda api: api.post(f"/api/triggers/{quoted(trigger)}/pause"))
    say(done, as_json, f"trigger {done['name']} is paused: events are recorded, runs wait")


@command("resume")
@click.argument("trigger")
def resume(trigger: str, as_json: bool, **options: Any) -> None:
    """Resumes a trigger; the runs that waited go on."""
    done = _run(options, lambda api: api.post(f"/api/triggers/{quoted(trigger)}/resume"))
    say(done, as_json, f"trigger {done['name']} goes on")
