"""What changes the ledger: `emit`, `retry`, `replay`, `redrive`, `cancel`, `pause`, `resume`."""

import asyncio
import secrets
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import click
import orjson

from eventflow.cli.client import Doors, Place, Refusal, doors, place_options, quoted
from eventflow.cli.dry_run import Asked, foreseen, told, would_start
from eventflow.cli.output import counted, note, say
from eventflow.cli.times import in_order, moment
from eventflow.core.errors import UsageError
from eventflow.dry_run.replay import LIMIT, MOST
from eventflow.events.event import Event

COMMANDS: list[click.Command] = []


def command(name: str) -> Any:
    """Registers a command of this file."""

    def register(function: Any) -> Any:
        made = click.command(name)(place_options(function))
        COMMANDS.append(made)
        return made

    return register


def _run(
    options: dict[str, Any], work: Callable[[Doors], Awaitable[Any]], *, records: bool = True
) -> Any:
    """`work` on the ledger that a command's options name; whether it `records` anything."""

    async def go() -> Any:
        async with doors(Place(options["store"], options["url"], options["app"])) as api:
            done = await work(api)
            if records and not api.live:
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
    given, number = (
        read_json_option(data, "--data"),
        secrets.token_hex(16) if ident is None else ident,
    )
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
@click.option(
    "--since",
    callback=moment,
    help="All events received from then on: 2026-01-31T08:00:00Z, or how long ago: 7d.",
)
@click.option("--until", callback=moment, help="… and before then.")
@click.option("--type", "event_type", help="… of this type.")
@click.option("--to", help="Only this flow or subscription.")
@click.option("--dry-run", is_flag=True, help="Tells what would start, starts nothing.")
@click.option(
    "--limit",
    type=click.IntRange(0, MOST),
    default=LIMIT,
    show_default=True,
    help="Runs that a dry run lists.",
)
def replay(event: str | None, since: str | None, until: str | None, event_type: str | None, to: str | None, dry_run: bool,
           limit: int, as_json: bool, **options: Any) -> None:  # fmt: skip
    """Matches recorded events once more and starts new runs: one EVENT, or all of a time."""
    if (event is None) == (since is None and until is None):
        raise UsageError("expected one EVENT, or --since and --until for many")
    in_order(since, until)
    if event is not None and event_type is not None:
        raise UsageError(
            "--type chooses among the events of --since and --until; leave it out for one EVENT"
        )
    if event is not None:
        _replay_one(event, to, dry_run, as_json, options)
    elif dry_run:
        place = Place(options["store"], options["url"], options["app"])
        answer = asyncio.run(foreseen(place, Asked(since, until, event_type, to, limit)))
        say(answer, as_json, told(answer))
    else:
        _replay_many(Asked(since, until, event_type, to, limit), as_json, options)


def _replay_one(
    event: str, to: str | None, dry_run: bool, as_json: bool, options: dict[str, Any]
) -> None:
    async def work(api: Doors) -> Any:
        api.need_flows("replay")
        return await api.post(f"/api/events/{quoted(event)}/replay", {"to": to, "dry_run": dry_run})

    done = _run(options, work, records=not dry_run)
    say(
        done,
        as_json,
        "\n".join([*_verdicts([done]), would_start([done]) if dry_run else _started([done])]),
    )


def _replay_many(asked: Asked, as_json: bool, options: dict[str, Any]) -> None:
    """One after the other, each for the subscriptions on its own trigger. What cannot be replayed is passed over, and told by
    its reasons; when that is all of it, it is the command's error."""

    async def work(api: Doors) -> list[Any]:
        api.need_flows("replay")
        done: list[Any] = []
        refused: list[Refusal] = []
        for ident in await _window(api, asked):
            try:
                done.append(
                    await api.post(
                        f"/api/events/{quoted(ident)}/replay", {"to": asked.to, "own": True}
                    )
                )
            except Refusal as refusal:
                if refusal.error != "refused":
                    raise
                refused.append(refusal)
        if refused and not done:
            raise refused[0]
        for why, events in Counter(map(str, refused)).items():
            note(f"passed over {events}: {why}")
        return done

    done = _run(options, work)
    say(done, as_json, "\n".join([*_verdicts(done), _started(done)]))


def _verdicts(done: list[Any]) -> list[str]:
    return [
        f"event {each['event']}  {said['subscription']}  {said['fate']}  {_what(said)}"
        for each in done
        for said in each["verdicts"]
    ]


def _what(said: dict[str, Any]) -> str:
    return said.get("run") or said.get("reason") or "would start"


def _started(done: list[Any]) -> str:
    started = sum(said["fate"] == "run" for each in done for said in each["verdicts"])
    return f"{counted(len(done), 'event')}, {counted(started, 'run')} started"


async def _window(api: Doors, asked: Asked) -> list[str]:
    """Ids of the events of a time, oldest first. Read to the end before the first replay, which adds none."""
    idents: list[str] = []
    after: str | None = None
    while True:
        page = await api.get(
            "/api/events", since=asked.since, until=asked.until, type=asked.type, limit=1000, after=after
        )  # fmt: skip
        idents += [row["id"] for row in page["events"]]
        after = page["next"]
        if after is None:
            return idents[::-1]


@command("redrive")
@click.argument("dead")
@click.option("--data", "-d", help="Mended data: JSON, @FILE or @-.")
@click.option(
    "--type", "event_type", help="With --data, for bytes that never were an event: its type."
)
def redrive(
    dead: str, data: str | None, event_type: str | None, as_json: bool, **options: Any
) -> None:
    """Tries a dead letter once more, as it stands or mended; `all` tries every open one."""
    mended = {"type": event_type} | (
        {"data": read_json_option(data, "--data")} if data is not None else {}
    )

    async def work(api: Doors) -> list[Any]:
        api.need_flows("redrive")
        idents = await _open_letters(api) if dead == "all" else [dead]
        return [
            await api.post(f"/api/dead/{quoted(str(ident))}/redrive", mended) for ident in idents
        ]

    done = _run(options, work)
    say(
        done if dead == "all" else done[0], as_json, "\n".join(_verdicts(done)) or "no dead letters"
    )


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
    done = _run(
        options, lambda api: api.post(f"/api/runs/{quoted(run)}/cancel", {"reason": reason})
    )
    say(
        done,
        as_json,
        f"run {done['id']} is {'asked to stop' if done['state'] == 'cancelling' else 'cancelled'}",
    )


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
