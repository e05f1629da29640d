"""The commands that change the ledger: emit, retry, replay, redrive, cancel, pause, resume.

Each sends requests to the API that client.py opens and prints the answer. A dry run of many events
is in dry_run.py.
"""

import asyncio
import secrets
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import click
import msgspec

from eventflow.cli.aliases import Option
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
from eventflow.cli.progress import with_progress
from eventflow.cli.times import check_order, parse_moment
from eventflow.core.errors import UsageError
from eventflow.dry_run.replay import DEFAULT_LIMIT, MAX_LIMIT
from eventflow.events.event import Event
from eventflow.events.strict_json import read_json

COMMANDS: list[click.Command] = []

RETRYABLE_STATES = ("failed", "cancelled", "paused", "held", "dead")


def command(name: str) -> Any:
    """Register a command of this file."""

    def register(function: Any) -> Any:
        made = click.command(name)(function)
        COMMANDS.append(made)
        return made

    return register


def _call_api(
    location: LedgerLocation,
    work: Callable[[ApiClient], Awaitable[Any]],
    *,
    records: bool = True,
) -> Any:
    """The result of `work`. `records`: it changes the ledger, so a missing server is noted."""

    async def call() -> Any:
        async with open_api(location) as api:
            done = await work(api)
            if records and not api.live:
                note("no server is running; this is recorded and takes effect when one starts")
            return done

    return asyncio.run(call())


def read_json_option(text: str | None, option: str) -> Any:
    """The JSON of an option: text, `@FILE`, or `@-` for stdin. UsageError when it is not JSON."""
    if text is None:
        return None
    try:
        return read_json(_read(text))
    except OSError as error:
        raise UsageError(f"{option}: {error.strerror}: {error.filename}") from None
    except ValueError as error:
        raise UsageError(f"{option}: expected JSON, or @FILE with JSON in it: {error}") from None


def _read(text: str) -> bytes:
    if text == "@-":
        return sys.stdin.buffer.read()
    if text.startswith("@"):
        return Path(text[1:]).read_bytes()
    return text.encode(errors="surrogateescape")


# --------------------------------------------------------------------------- events


@command("emit")
@click.argument("event_type", metavar="TYPE")
@click.option("--data", "-d", help="The event's data: JSON, @FILE, or @- for stdin.")
@click.option("--id", "ident", help="The event's id; a second event with it starts nothing.")
@click.option("--subject", help="The CloudEvents subject.")
@click.option("--source", default="/cli", show_default=True, help="The CloudEvents source.")
@ledger_options
def emit(
    event_type: str,
    data: str | None,
    ident: str | None,
    subject: str | None,
    source: str,
    as_json: bool,
    location: LedgerLocation,
) -> None:
    """Record an event for the subscriptions to its type."""
    event = Event(
        id=secrets.token_hex(16) if ident is None else ident,
        source=source,
        type=event_type,
        data=read_json_option(data, "--data"),
        subject=subject,
    )

    async def work(api: ApiClient) -> Any:
        api.require_flows("emit")
        receipt = await api.publish(event.to_json())
        return receipt, await api.get(f"/api/events/{receipt['id']}")

    receipt, recorded = _call_api(location, work)
    known = (
        "known already, started nothing"
        if receipt["duplicate"]
        else f"recorded: {_what_started(recorded)}"
    )
    write_result(
        receipt, as_json, f"event {receipt['id']} {known}; eventflow explain {receipt['id']}"
    )


def _what_started(event: Mapping[str, Any]) -> str:
    """`starts events/handle, run 1m8p…`, or why nothing starts; for each subscription."""
    parts = [
        f"starts {each['subscription']}, run {each['run']}"
        if "run" in each
        else f"{each['subscription']}: {each['outcome']}, {each['reason']}"
        for each in event["verdicts"]
    ]
    return "; ".join(parts) or f"starts nothing, no subscription accepts {event['type']}"


# --------------------------------------------------------------------------- repeat


@command("retry")
@click.argument("run", required=False)
@click.option(
    "--state",
    type=click.Choice(RETRYABLE_STATES),
    help="Without RUN: all runs in this state.",
)
@click.option("--flow", help="With --state: only runs of this flow.")
@click.option("--dry-run", is_flag=True, help="With --state: say how many; retry none.")
@click.option(
    "--from-scratch",
    cls=Option,
    old_names=["--fresh"],
    is_flag=True,
    help="Discard the recorded values too.",
)
@click.option(
    "--from",
    "call",
    metavar="CALL",
    help="Repeat a run that has ended from this call, as a new run.",
)
@ledger_options
def retry(
    run: str | None,
    as_json: bool,
    location: LedgerLocation,
    **options: Any,
) -> None:
    """Retry failed, cancelled, paused, held or dead runs; end a wait.

    Recorded values are kept and not computed again; recorded errors are dropped. Give one RUN, or
    --state for all runs that are in that state when the command starts. If RUN waits for its next
    attempt, that attempt starts now.

    With --from CALL, a new run repeats a RUN that has ended: it keeps the values from before CALL
    and executes CALL and all later calls. `eventflow show` prints the calls of a run.
    """
    request = _RetryRequest(**options)
    if (run is None) == (request.state is None):
        raise UsageError("expected one RUN, or --state for many, such as --state failed --flow F")
    if run is None:
        if request.call is not None:
            raise UsageError("--from names a call of one run: eventflow retry RUN --from CALL")
        _retry_many(request, as_json, location)
        return
    if request.flow or request.dry_run:
        raise UsageError("--flow and --dry-run are for --state; leave them out for one RUN")
    if request.call is not None and request.from_scratch:
        raise UsageError("--from keeps the values before the call; leave out --from-scratch")
    body = {"from_scratch": True} if request.from_scratch else {"from": request.call}
    done = _call_api(location, lambda api: api.post(f"/api/runs/{quoted(run)}/retry", body))
    write_result(done, as_json, _retried_text(done, request.call))


class _RetryRequest(msgspec.Struct):
    """The options of `eventflow retry`."""

    state: str | None
    flow: str | None
    dry_run: bool
    from_scratch: bool
    call: str | None


def _retried_text(done: dict[str, Any], call: str | None) -> str:
    if call is not None:
        return f"run {done['id']} repeats run {done['repeats']} from {call}"
    if done["was"] == "running":
        return f"run {done['id']} starts its waiting attempts now"
    waited = ", without waiting further" if done["was"] == "waiting" else ""
    return f"run {done['id']} is pending again{waited}"


def _retry_many(request: _RetryRequest, as_json: bool, location: LedgerLocation) -> None:
    """Retry run after run, oldest first. One that cannot be retried is skipped and counted."""
    assert request.state is not None
    state = request.state
    flow = request.flow
    dry_run = request.dry_run
    body = {"from_scratch": request.from_scratch}

    async def work(api: ApiClient) -> dict[str, Any]:
        idents = await _runs_in_state(api, state, flow)
        refused: Counter[str] = Counter()
        retried: list[str] = []
        for ident in () if dry_run else with_progress("retrying", idents):
            try:
                await api.post(f"/api/runs/{quoted(ident)}/retry", body)
                retried.append(ident)
            except ApiError as error:
                if error.error not in ("refused", "not_found", "conflict"):
                    raise
                refused[str(error).replace(ident, "it")] += 1
        for why, runs in refused.items():
            note(f"skipped {runs}: {why}")
        return {"matched": len(idents), "retried": retried}

    done = _call_api(location, work, records=not dry_run)
    if not done["matched"]:
        write_result(done, as_json, f"no run is {state}")
        return
    matched = plural(done["matched"], f"{state} run")
    summary = f"{matched} would be retried" if dry_run else f"{len(done['retried'])} of {matched} "
    write_result(done, as_json, summary if dry_run else f"{summary}retried")


async def _runs_in_state(api: ApiClient, state: str, flow: str | None) -> list[str]:
    """Ids of the runs that are in this state now, oldest first."""
    idents: list[str] = []
    after: str | None = None
    while True:
        page = await api.get("/api/runs", state=state, flow=flow, limit=1000, after=after)
        idents += [row["id"] for row in page["runs"]]
        after = page["next"]
        if after is None:
            return idents[::-1]


@command("replay")
@click.argument("event", required=False)
@click.option(
    "--since",
    callback=parse_moment,
    help="All events received since then: 2026-01-31T08:00:00Z, or an age such as 7d.",
)
@click.option("--until", callback=parse_moment, help="Only events received before then.")
@click.option("--type", help="Only events of this type.")
@click.option("--to", help="Start only this flow or subscription.")
@click.option("--dry-run", is_flag=True, help="Show what would start; start nothing.")
@click.option(
    "--limit",
    type=click.IntRange(0, MAX_LIMIT),
    default=DEFAULT_LIMIT,
    show_default=True,
    help="List at most this many runs in a dry run.",
)
@ledger_options
def replay(
    event: str | None, dry_run: bool, as_json: bool, location: LedgerLocation, **options: Any
) -> None:
    """Match recorded events again and start new runs.

    Give one EVENT, or --since and --until for all events of a time. `eventflow reprocess` is the
    same command.
    """
    request = ReplayRequest(**options)
    if (event is None) == (request.since is None and request.until is None):
        raise UsageError("expected one EVENT, or --since and --until for many")
    check_order(request.since, request.until)
    if event is not None and request.type is not None:
        raise UsageError(
            "--type chooses among the events of --since and --until; leave it out for one EVENT"
        )
    if event is not None:
        _replay_one(event, request.to, dry_run, as_json, location)
    elif dry_run:
        answer = asyncio.run(simulate_replay(location, request))
        write_result(answer, as_json, dry_run_text(answer))
    else:
        _replay_many(request, as_json, location)


def _replay_one(
    event: str, to: str | None, dry_run: bool, as_json: bool, location: LedgerLocation
) -> None:
    async def work(api: ApiClient) -> Any:
        api.require_flows("replay")
        return await api.post(f"/api/events/{quoted(event)}/replay", {"to": to, "dry_run": dry_run})

    done = _call_api(location, work, records=not dry_run)
    summary = would_start_text([done]) if dry_run else _started_text([done])
    write_result(done, as_json, "\n".join([*_verdict_lines([done]), summary]))


def _replay_many(request: ReplayRequest, as_json: bool, location: LedgerLocation) -> None:
    """Replay event after event, each for the subscriptions to its own trigger.

    Events that cannot be replayed are skipped and counted by reason. When all are, the first one's
    error is raised.
    """

    async def work(api: ApiClient) -> list[Any]:
        api.require_flows("replay")
        done: list[Any] = []
        refused: list[ApiError] = []
        idents = await _events_between(api, request)
        for ident in with_progress("replaying", idents):
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
            note(f"skipped {events}: {why}")
        return done

    done = _call_api(location, work)
    write_result(done, as_json, "\n".join([*_verdict_lines(done), _started_text(done)]))


def _verdict_lines(done: list[Any]) -> list[str]:
    return [
        f"event {each['ledger_id']}  {verdict['subscription']}  {verdict['outcome']}  "
        f"{_verdict_detail(verdict)}"
        for each in done
        for verdict in each["verdicts"]
    ]


def _verdict_detail(verdict: dict[str, Any]) -> str:
    return verdict.get("run") or verdict.get("reason") or "would start"


def _started_text(done: list[Any]) -> str:
    started = sum(verdict["outcome"] == "run" for each in done for verdict in each["verdicts"])
    return f"{plural(len(done), 'event')}, {plural(started, 'run')} started"


async def _events_between(api: ApiClient, request: ReplayRequest) -> list[str]:
    """Ids of the events of a time, oldest first."""
    idents: list[str] = []
    after: str | None = None
    while True:
        page = await api.get(
            "/api/events",
            since=request.since,
            until=request.until,
            type=request.type,
            limit=1000,
            after=after,
        )
        idents += [row["id"] for row in page["events"]]
        after = page["next"]
        if after is None:
            return idents[::-1]


@command("redrive")
@click.argument("dead_letter")
@click.option("--data", "-d", help="Use this data instead: JSON, @FILE, or @- for stdin.")
@click.option(
    "--type", "event_type", help="With --data, the event's type, for bytes that are no event."
)
@ledger_options
def redrive(
    dead_letter: str,
    data: str | None,
    event_type: str | None,
    as_json: bool,
    location: LedgerLocation,
) -> None:
    """Process a dead letter again, as it is or corrected.

    DEAD_LETTER is its number in `eventflow ls dead-letters`, or `all` for every open one.
    """
    corrected = {"type": event_type} | (
        {"data": read_json_option(data, "--data")} if data is not None else {}
    )

    async def work(api: ApiClient) -> list[Any]:
        api.require_flows("redrive")
        idents = await _open_dead_letters(api) if dead_letter == "all" else [dead_letter]
        return [
            await api.post(f"/api/dead-letters/{quoted(str(ident))}/redrive", corrected)
            for ident in with_progress("redriving", idents)
        ]

    done = _call_api(location, work)
    write_result(
        done if dead_letter == "all" else done[0],
        as_json,
        "\n".join(_verdict_lines(done)) or "no dead letters",
    )


async def _open_dead_letters(api: ApiClient) -> list[int]:
    found: list[int] = []
    after: int | None = None
    while True:
        page = await api.get("/api/dead-letters", limit=1000, after=after)
        found += [row["id"] for row in page["dead_letters"]]
        after = page["next"]
        if after is None:
            return found[::-1]


# --------------------------------------------------------------------------- stop


@command("cancel")
@click.argument("run")
@click.option("--reason", "-m", help="Record this reason with the run.")
@ledger_options
def cancel(run: str, reason: str | None, as_json: bool, location: LedgerLocation) -> None:
    """Cancel a run.

    The flow of a run that has begun gets a CancelledError, also in a sleep; its `finally` blocks
    run for the flow's grace. A second cancel ends a run that is not running, without clean-up.
    """
    done = _call_api(
        location, lambda api: api.post(f"/api/runs/{quoted(run)}/cancel", {"reason": reason})
    )
    write_result(
        done,
        as_json,
        f"run {done['id']} is {'asked to stop' if done['state'] == 'cancelling' else 'cancelled'}",
    )


@command("pause")
@click.argument("trigger")
@ledger_options
def pause(trigger: str, as_json: bool, location: LedgerLocation) -> None:
    """Pause a trigger: record its events, but start no runs.

    Its runs are paused until `eventflow resume TRIGGER`.
    """
    done = _call_api(location, lambda api: api.post(f"/api/triggers/{quoted(trigger)}/pause"))
    write_result(done, as_json, f"trigger {done['name']} is paused: events are recorded, runs wait")


@command("resume")
@click.argument("trigger")
@ledger_options
def resume(trigger: str, as_json: bool, location: LedgerLocation) -> None:
    """Resume a trigger; its paused runs become pending."""
    done = _call_api(location, lambda api: api.post(f"/api/triggers/{quoted(trigger)}/resume"))
    write_result(done, as_json, f"trigger {done['name']} is resumed")
