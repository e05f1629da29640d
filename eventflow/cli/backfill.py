"""`backfill`: runs a flow for the occurrences of a schedule that are past, a few at a time.

The server decides (web/backfill.py): an occurrence has one identity, so what ran for this flow does
not run again, and a command that was killed is gone on with by giving it again. Here is what a
person sees: the count before anything starts, the question, the progress, and how it all ended.
"""

import asyncio
import sys
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

import click

from eventflow.cli.client import (
    ApiClient,
    ApiError,
    LedgerLocation,
    Unreachable,
    ledger_options,
    open_api,
    quoted,
)
from eventflow.cli.output import note, write_result
from eventflow.core.clock import SystemClock
from eventflow.core.errors import UsageError

REQUEST_BATCH_SIZE = 100
"""Occurrences in one request."""
MAX_OCCURRENCES = 100_000
"""Occurrences in one backfill; a window with more is asked to be smaller."""
LIVE_STATES = ("pending", "running", "waiting")
PROGRESS_INTERVAL_SECONDS = 2.0
"""Seconds between two lines of progress."""


@click.command("backfill")
@click.argument("flow")
@click.option(
    "--trigger", required=True, help="The schedule, by its name; see `eventflow ls triggers`."
)
@click.option(
    "--from",
    "since",
    required=True,
    help="The first day or instant: 2026-01-01; without a zone, the schedule's own.",
)
@click.option("--to", "until", required=True, help="The end, itself not included.")
@click.option(
    "--limit",
    type=click.IntRange(1, 1000),
    default=4,
    show_default=True,
    help="Runs of it that are live at a time.",
)
@click.option("--again", metavar="LABEL", help="Also what ran before, once for each label.")
@click.option("--dry-run", is_flag=True, help="Tells what would start, starts nothing.")
@click.option("--yes", is_flag=True, help="Does not ask.")
@ledger_options
def backfill(flow: str, trigger: str, since: str, until: str, limit: int, again: str | None, dry_run: bool, yes: bool,
             as_json: bool, **options: Any) -> int:  # fmt: skip
    """Runs a flow for the past occurrences of a schedule: those that have no run of it yet."""

    async def work() -> int:
        async with open_api(
            LedgerLocation(options["store"], options["url"], options["app"])
        ) as api:
            api.require_flows("backfill")
            past = await _past_occurrences(api, trigger, since, until)
            job = _BackfillClient(api, trigger, flow, again)
            if dry_run:
                return await _dry_run(job, past, as_json)
            if not api.live:
                raise Unreachable(
                    f"no server has {api.address}, and backfill waits for its runs; start it, or use --dry-run"
                )
            note(
                f"{_many(len(past))} of {trigger}{_range_text(past)} for flow {flow}, at most {limit} runs at a time"
            )
            if past and not yes and not _confirmed():
                note("nothing was started")
                return 0
            return await _run_all(job, past, limit, as_json)

    return asyncio.run(work())


COMMANDS: list[click.Command] = [backfill]


def _many(occurrences: int) -> str:
    return f"{occurrences} occurrence{'' if occurrences == 1 else 's'}"


def _range_text(past: Sequence[str]) -> str:
    return f", {past[0]} to {past[-1]}," if past else ""


def _confirmed() -> bool:
    if not sys.stdin.isatty():
        raise UsageError("nobody is there to ask; give --yes to start, or --dry-run to look")
    return click.confirm("Start them?", err=True)


async def _past_occurrences(api: ApiClient, trigger: str, since: str, until: str) -> list[str]:
    """Every nominal time of the window that the schedule is through with."""
    found: list[str] = []
    start: str | None = since
    while start is not None:
        page = await api.get(
            f"/api/triggers/{quoted(trigger)}/occurrences", since=start, until=until
        )
        found += page["occurrences"]
        start = page["next"]
        if page["not_yet"] is not None:
            note(f"{page['not_yet']} and later are still the schedule's own to fire")
        if len(found) > MAX_OCCURRENCES:
            raise UsageError(
                f"more than {MAX_OCCURRENCES:,} occurrences in this window; take a smaller one"
            )
    return found


class _BackfillClient:
    """One backfill, as its requests see it."""

    def __init__(self, api: ApiClient, trigger: str, flow: str, again: str | None) -> None:
        self.api, self._path = api, f"/api/triggers/{quoted(trigger)}/backfill"
        self._asked = {"flow": flow, "again": again}

    async def post(self, at: Sequence[str], *, dry: bool = False) -> list[dict[str, Any]]:
        """Waits while the ledger is full."""
        while True:
            try:
                return (
                    await self.api.post(self._path, {**self._asked, "at": list(at), "dry_run": dry})
                )["occurrences"]
            except ApiError as refusal:
                if refusal.error != "overloaded":
                    raise
            await asyncio.sleep(1)

    async def state(self, run: str) -> str:
        return (await self.api.get(f"/api/runs/{quoted(run)}"))["state"]


async def _dry_run(job: _BackfillClient, past: Sequence[str], as_json: bool) -> int:
    """--dry-run."""
    rows = [
        row
        for first in range(0, len(past), REQUEST_BATCH_SIZE)
        for row in await job.post(past[first : first + REQUEST_BATCH_SIZE], dry=True)
    ]
    lines = [f"{row['at']}  {_verdict_text(said)}" for row in rows for said in row["verdicts"]]
    would = sum(
        not said["known"] and said["fate"] in ("run", "joined")
        for row in rows
        for said in row["verdicts"]
    )
    lines.append(f"{_many(len(rows))}, {would} runs would start")
    write_result({"occurrences": rows, "would_start": would}, as_json, "\n".join(lines))
    return 0


def _verdict_text(verdict: Mapping[str, Any]) -> str:
    if not verdict["known"]:
        return (
            "would start"
            if verdict["fate"] in ("run", "joined")
            else f"would not start: {verdict['fate']}, {verdict.get('reason')}"
        )
    return (
        f"known: {verdict['state']}, run {verdict['run']}"
        if "run" in verdict
        else f"known: {verdict['fate']}"
    )


async def _run_all(job: _BackfillClient, past: Sequence[str], limit: int, as_json: bool) -> int:
    """Keeps at most `limit` runs alive, in the order of the occurrences, until all have ended. 1
    when one did not complete.
    """
    done = _Progress(len(past))
    left, live, runs_per_occurrence = (
        deque(past),
        set[str](),
        limit,
    )  # how many runs an occurrence makes shows with the first
    while left or live:
        while left and (len(live) + runs_per_occurrence <= limit or not live):
            count = max(
                1, min(len(left), REQUEST_BATCH_SIZE, (limit - len(live)) // runs_per_occurrence)
            )
            rows = await job.post([left.popleft() for _ in range(count)])
            runs_per_occurrence = max(1, *(len(row["verdicts"]) for row in rows))
            live |= done.add(rows)
            done.report(len(live), len(left))
        done.report(len(live), len(left))
        for run in sorted(live):
            if (state := await job.state(run)) not in LIVE_STATES:
                live.discard(run)
                done.record_end(run, state)
        if live:
            await asyncio.sleep(0.2)
    write_result(done.summary, as_json, done.text)
    return 1 if done.bad else 0


class _Progress:
    """What became of it so far."""

    def __init__(self, total: int) -> None:
        self._total, self._clock = total, SystemClock()
        self._reported_at = self._clock.monotonic()
        self._started = self._known = 0
        self._states: Counter[str] = Counter()
        self.bad: list[str] = []

    def add(self, rows: Sequence[Mapping[str, Any]]) -> set[str]:
        """Takes in an answer; returns the runs that are alive, those known before too: a killed
        command may have left some.
        """
        alive: set[str] = set()
        for said in (said for row in rows for said in row["verdicts"]):
            self._known += said["known"]
            self._started += not said["known"] and said["fate"] in ("run", "joined")
            if "run" not in said:
                self.record_end("", said["fate"])
            elif said["state"] in LIVE_STATES:
                alive.add(said["run"])
            else:
                self.record_end(said["run"], said["state"])
        return alive

    def record_end(self, run: str, state: str) -> None:
        self._states[state] += 1
        if state in ("failed", "dead", "cancelled", "held", "invalid"):
            self.bad.append(run)

    def report(self, live: int, left: int) -> None:
        now = self._clock.monotonic()
        if now - self._reported_at >= PROGRESS_INTERVAL_SECONDS:
            self._reported_at = now
            note(
                f"{self._total - left} of {self._total} begun, {live} live; {self._ended or 'none ended yet'}"
            )

    @property
    def _ended(self) -> str:
        return ", ".join(f"{number} {state}" for state, number in sorted(self._states.items()))

    @property
    def summary(self) -> dict[str, Any]:
        return {
            "occurrences": self._total, "started": self._started, "known": self._known, "states": dict(self._states),
            "not_completed": [run for run in self.bad if run],
        }  # fmt: skip

    @property
    def text(self) -> str:
        lines = [
            f"{_many(self._total)}: {self._started} runs started, {self._known} known before; {self._ended or 'none'}"
        ]
        return "\n".join([*lines, *(f"eventflow show {run}" for run in self.bad[:10] if run)])
