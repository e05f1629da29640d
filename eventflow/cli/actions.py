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

from eventflow.cli.client import (
    ApiClient,
    ApiError,
    LedgerLocation,
    ledger_options,
    open_api,
    quoted,
)
from eventflow.cli.dry_run import ReplayRequest, dry_run_text, simulate_replay, would_start_text
from eventflow.cli.output import note, plural, write_result
from eventflow.cli.times import check_order, parse_moment
from eventflow.core.errors import UsageError
from eventflow.dry_run.replay import DEFAULT_LIMIT, MAX_LIMIT
from eventflow.events.event import Event

COMMANDS: list[click.Command] = []


def command(name: str) -> Any:
    """Registers a command of this file."""

    def register(function: Any) -> Any:
        made = click.command(name)(ledger_options(function))
        COMMANDS.append(made)
        return made

    return register


def _call_api(
    options: dict[str, Any], work: Callable[[ApiClient], Awaitable[Any]], *, records: bool = True
) -> Any:
    """`work` on the ledger that a command's options name; whether it `records` anything."""

    async def call() -> Any:
        async with open_api(
            LedgerLocation(options["store"], options["url"], options["app"])
        ) as api:
            done = await work(api)
            if records and not api.live:
                note("no server is running; this is recorded, and goes on when one starts")
            return done

    return asyncio.run(call())


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

    async def work(api: ApiClient) -> Any:
        api.require_flows("emit")
        return await api.publish(event.to_json())

    receipt = _call_api(options, work)
    known = "known already, started nothing" if receipt["duplicate"] else "recorded"
    write_result(
        receipt, as_json, f"event {receipt['id']} {known}; eventflow explain {receipt['id']}"
    )


# --------------------------------------------------------------------------- again


@command("retry")
@click.argument("run")
@click.option("--fresh", is_flag=True, help="Forgets recorded values too.")
def retry(run: str, fresh: bool, as_json: bool, **options: Any) -> None:
    """Retry a failed, cancelled, paused, held or dead run: recorded values are kept, errors are
    not.
    """
    done = _call_api(
        options, lambda api: api.post(f"/api/runs/{quoted(run)}/retry", {"fresh": fresh})
    )
    write_result(done, as_json, f"run {done['id']} is pending again")


@command("replay")
@click.argument("event", required=False)
@click.option(
    "--since",
    callback=parse_moment,
    help="All events received from then on: 2026-01-31T08:00:00Z, or how long ago: 7d.",
)
@click.option("--until", callback=parse_moment, help="… and before then.")
@click.option("--type", "event_type", help="… of this type.")
@click.option("--to", help="Only this flow or subscription.")
@click.option("--dry-run", is_flag=True, help="Tells what would start, starts nothing.")
@click.option(
    "--limit",
    type=click.IntRange(0, MAX_LIMIT),
    default=DEFAULT_LIMIT,
    show_default=True,
    help="Runs that a dry run lists.",
)
def replay(event: str | None, since: str | None, until: str | None, event_type: str | None, to: str | None, dry_run: bool,
           limit: int, as_json: bool, **options: Any) -> None:  # fmt: skip
    """Matches recorded events once more and starts new runs: one EVENT, or all of a time."""
    if (event is None) == (since is None and until is None):
        raise UsageError("expected one EVENT, or --since and --until for many")
    check_order(since, until)
    if event is not None and event_type is not None:
        raise UsageError(
            "--type chooses among the events of --since and --until; leave it out for one EVENT"
        )
    if event is not None:
        _replay_one(event, to, dry_run, as_json, options)
    elif dry_run:
        place = LedgerLocation(options["store"], options["url"], options["app"])
        answer = asyncio.run(
            simulate_replay(place, ReplayRequest(since, until, event_type, to, limit))
        )
        write_result(answer, as_json, dry_run_text(answer))
    else:
        _replay_many(ReplayRequest(since, until, event_type, to, limit), as_json, options)


def _replay_one(
    event: str, to: str | None, dry_run: bool, as_json: bool, options: dict[str, Any]
) -> None:
    async def work(api: ApiClient) -> Any:
        api.require_flows("replay")
        return await api.post(f"/api/events/{quoted(event)}/replay", {"to": to, "dry_run": dry_run})

    done = _call_api(options, work, records=not dry_run)
    write_result(
        done,
        as_json,
        "\n".join(
            [
                *_verdict_lines([done]),
                would_start_text([done]) if dry_run else _started_text([done]),
            ]
        ),
    )


def _replay_many(request: ReplayRequest, as_json: bool, options: dict[str, Any]) -> None:
    """One after the other, each for the subscriptions on its own trigger. What cannot be replayed
    is passed over, and told by its reasons; when that is all of it, it is the command's error.
    """

    async def work(api: ApiClient) -> list[Any]:
        api.require_flows("replay")
        done: list[Any] = []
        refused: list[ApiError] = []
        for ident in await _events_between(api, request):
            try:
                done.append(
                    await api.post(
                        f"/api/events/{quoted(ident)}/replay", {"to": request.to, "own": True}
                    )
                )
            except ApiError as error:
                if error.error != "refused":
                    raise
                refused.append(error)
        if refused and not done:
            raise refused[0]
        for why, events in Counter(map(str, refused)).items():
            note(f"passed over {events}: {why}")
        return done

    done = _call_api(options, work)
    write_result(done, as_json, "\n".join([*_verdict_lines(done), _started_text(done)]))


def _verdict_lines(done: list[Any]) -> list[str]:
    return [
        f"event {each['event']}  {said['subscription']}  {said['fate']}  {_verdict_detail(said)}"
        for each in done
        for said in each["verdicts"]
    ]


def _verdict_detail(verdict: dict[str, Any]) -> str:
    return verdict.get("run") or verdict.get("reason") or "would start"


def _started_text(done: list[Any]) -> str:
    started = sum(said["fate"] == "run" for each in done for said in each["verdicts"])
    return f"{plural(len(done), 'event')}, {plural(started, 'run')} started"


async def _events_between(api: ApiClient, request: ReplayRequest) -> list[str]:
    """Ids of the events of a time, oldest first. Read to the end before the first replay, which
    adds none.
    """
    idents: list[str] = []
    after: str | None = None
    while True:
        page = await api.get(
            "/api/events", since=request.since, until=request.until, type=request.type, limit=1000, after=after
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
    dead_letter: str, data: str | None, event_type: str | None, as_json: bool, **options: Any
) -> None:
    """Tries a dead letter once more, as it stands or mended; `all` tries every open one."""
    corrected = {"type": event_type} | (
        {"data": read_json_option(data, "--data")} if data is not None else {}
    )

    async def work(api: ApiClient) -> list[Any]:
        api.require_flows("redrive")
        idents = await _open_dead_letters(api) if dead_letter == "all" else [dead_letter]
        return [
            await api.post(f"/api/dead/{quoted(str(ident))}/redrive", corrected) for ident in idents
        ]

    done = _call_api(options, work)
    write_result(
        done if dead_letter == "all" else done[0],
        as_json,
        "\n".join(_verdict_lines(done)) or "no dead letters",
    )


async def _open_dead_letters(api: ApiClient) -> list[int]:
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
    done = _call_api(
        options, lambda api: api.post(f"/api/runs/{quoted(run)}/cancel", {"reason": reason})
    )
    write_result(
        done,
        as_json,
        f"run {done['id']} is {'asked to stop' if done['state'] == 'cancelling' else 'cancelled'}",
    )


@command("pause")
@click.argument("trigger")
def pause(trigger: str, as_json: bool, **options: Any) -> None:
    """Pause a trigger: its events are recorded, their runs wait for `resume`."""
    done = _call_api(options, lambda api: api.post(f"/api/triggers/{quoted(trigger)}/pause"))
    write_result(done, as_json, f"trigger {done['name']} is paused: events are recorded, runs wait")


@command("resume")
@click.argument("trigger")
def resume(trigger: str, as_json: bool, **options: Any) -> None:
    """Resumes a trigger; the runs that waited go on."""
    done = _call_api(options, lambda api: api.post(f"/api/triggers/{quoted(trigger)}/resume"))
    write_result(done, as_json, f"trigger {done['name']} goes on")
