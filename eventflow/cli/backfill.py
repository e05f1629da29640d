"""`eventflow backfill`: runs a flow for past occurrences of a schedule, a few at a time.

The server decides what to start (web/backfill.py). An occurrence has one identity, so it is not run
twice for a flow, and a backfill that was interrupted continues when the command is repeated. This
file prints the number of occurrences, asks for confirmation, limits the live runs, and reports
progress and results.
"""

import asyncio
import sys
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

import click

from eventflow.cli.aliases import Option
from eventflow.cli.client import (
    ApiClient,
    ApiError,
    LedgerLocation,
    Unreachable,
    ledger_options,
    open_api,
    quoted,
)
from eventflow.cli.output import note, plural, write_result
from eventflow.cli.progress import stderr_progress
from eventflow.core.errors import UsageError

REQUEST_BATCH_SIZE = 100
"""Occurrences in one request."""
MAX_OCCURRENCES = 100_000
"""Occurrences in one backfill; a larger window is a usage error."""
LIVE_STATES = ("pending", "running", "waiting")
NOT_COMPLETED = ("failed", "dead", "cancelled", "paused", "held", "invalid")
"""States and verdicts that make the exit code 1."""


@click.command("backfill")
@click.argument("flow")
@click.option(
    "--trigger", required=True, help="The name of the schedule; see `eventflow ls triggers`."
)
@click.option(
    "--from",
    "since",
    required=True,
    help="First day or instant: 2026-01-01; without a zone, in the schedule's.",
)
@click.option("--to", "until", required=True, help="End of the window, not included.")
@click.option(
    "--limit",
    type=click.IntRange(1, 1000),
    default=4,
    show_default=True,
    help="Keep at most this many runs live at a time.",
)
@click.option(
    "--rerun",
    cls=Option,
    old_names=["--again"],
    metavar="LABEL",
    help="Also run occurrences that ran before, once for each label.",
)
@click.option("--dry-run", is_flag=True, help="Show what would start; start nothing.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@ledger_options
def backfill(
    flow: str,
    trigger: str,
    since: str,
    until: str,
    limit: int,
    rerun: str | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    location: LedgerLocation,
) -> int:
    """Run a flow for past occurrences of a schedule.

    Occurrences that have a run of this flow are skipped. Needs a server, except for --dry-run.
    """

    async def work() -> int:
        async with open_api(location) as api:
            api.require_flows("backfill")
            past = await _past_occurrences(api, trigger, since, until)
            job = _BackfillClient(api, trigger, flow, rerun)
            if dry_run:
                return await _dry_run(job, past, as_json)
            if not api.live:
                raise Unreachable(
                    f"no server has {api.address}, and backfill waits for its runs; "
                    "start it, or use --dry-run"
                )
            note(
                f"{plural(len(past), 'occurrence')} of {trigger}{_range_text(past)} "
                f"for flow {flow}, at most {limit} runs at a time"
            )
            if past and not yes and not _confirmed():
                note("nothing was started")
                return 0
            return await _run_all(job, past, limit, as_json)

    return asyncio.run(work())


COMMANDS: list[click.Command] = [backfill]


def _range_text(past: Sequence[str]) -> str:
    return f", {past[0]} to {past[-1]}," if past else ""


def _confirmed() -> bool:
    if not sys.stdin.isatty():
        raise UsageError("stdin is no terminal; give --yes to start them, or --dry-run to list")
    return click.confirm("Start them?", err=True)


async def _past_occurrences(api: ApiClient, trigger: str, since: str, until: str) -> list[str]:
    """The nominal times in the window that the schedule has passed, oldest first."""
    found: list[str] = []
    start: str | None = since
    while start is not None:
        page = await api.get(
            f"/api/triggers/{quoted(trigger)}/occurrences", since=start, until=until
        )
        found += page["occurrences"]
        start = page["next"]
        if page["not_yet"] is not None:
            note(f"{page['not_yet']} and later are for the schedule to fire")
        if len(found) > MAX_OCCURRENCES:
            raise UsageError(
                f"more than {MAX_OCCURRENCES:,} occurrences in this window; use a smaller one"
            )
    return found


class _BackfillClient:
    """The requests of one backfill."""

    def __init__(self, api: ApiClient, trigger: str, flow: str, label: str | None) -> None:
        self._api = api
        self._path = f"/api/triggers/{quoted(trigger)}/backfill"
        self._body = {"flow": flow, "rerun": label}

    async def post(self, at: Sequence[str], *, dry_run: bool = False) -> list[dict[str, Any]]:
        """The verdicts on the occurrences `at`. Waits while the ledger is full."""
        body = {**self._body, "at": list(at), "dry_run": dry_run}
        while True:
            try:
                return (await self._api.post(self._path, body))["occurrences"]
            except ApiError as error:
                if error.error != "overloaded":
                    raise
            await asyncio.sleep(1)

    async def state(self, run: str) -> str:
        return (await self._api.get(f"/api/runs/{quoted(run)}"))["state"]


async def _dry_run(job: _BackfillClient, past: Sequence[str], as_json: bool) -> int:
    """Print what would start, for --dry-run. The exit code."""
    rows = [
        row
        for first in range(0, len(past), REQUEST_BATCH_SIZE)
        for row in await job.post(past[first : first + REQUEST_BATCH_SIZE], dry_run=True)
    ]
    lines = [
        f"{row['at']}  {_verdict_text(verdict)}" for row in rows for verdict in row["verdicts"]
    ]
    count = sum(_is_new_run(verdict) for row in rows for verdict in row["verdicts"])
    lines.append(f"{plural(len(rows), 'occurrence')}, {count} runs would start")
    write_result({"occurrences": rows, "would_start": count}, as_json, "\n".join(lines))
    return 0


def _is_new_run(verdict: Mapping[str, Any]) -> bool:
    return not verdict["known"] and verdict["outcome"] in ("run", "batched")


def _verdict_text(verdict: Mapping[str, Any]) -> str:
    if not verdict["known"]:
        return (
            "would start"
            if _is_new_run(verdict)
            else f"would not start: {verdict['outcome']}, {verdict.get('reason')}"
        )
    return (
        f"known: {verdict['state']}, run {verdict['run']}"
        if "run" in verdict
        else f"known: {verdict['outcome']}"
    )


async def _run_all(job: _BackfillClient, past: Sequence[str], limit: int, as_json: bool) -> int:
    """Start the occurrences in order, with at most `limit` live runs, and wait for all of them.

    The exit code: 1 when a run did not complete.
    """
    done = _Counts(len(past))
    left = deque(past)
    live = set[str]()
    runs_per_occurrence = limit  # unknown until the first answer
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
    done.close()
    write_result(done.summary, as_json, done.text)
    return 1 if done.not_completed else 0


class _Counts:
    """Counts started, known and ended runs. `not_completed`: the ids of runs that did not complete,
    "" for an occurrence without a run.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._bar = stderr_progress("backfilling", total)
        self._started = 0
        self._known = 0
        self._states: Counter[str] = Counter()
        self.not_completed: list[str] = []

    def add(self, rows: Sequence[Mapping[str, Any]]) -> set[str]:
        """Count an answer of the API. The live runs in it, including those of an interrupted
        backfill.
        """
        live: set[str] = set()
        for verdict in (verdict for row in rows for verdict in row["verdicts"]):
            self._known += verdict["known"]
            self._started += _is_new_run(verdict)
            if "run" not in verdict:
                self.record_end("", verdict["outcome"])
            elif verdict["state"] in LIVE_STATES:
                live.add(verdict["run"])
            else:
                self.record_end(verdict["run"], verdict["state"])
        return live

    def record_end(self, run: str, state: str) -> None:
        self._states[state] += 1
        if state in NOT_COMPLETED:
            self.not_completed.append(run)

    def report(self, live: int, left: int) -> None:
        ended = self._ended or "none ended yet"
        self._bar.move_to(self._total - left - live, f"{live} live; {ended}")

    def close(self) -> None:
        self._bar.close()

    @property
    def _ended(self) -> str:
        return ", ".join(f"{number} {state}" for state, number in sorted(self._states.items()))

    @property
    def summary(self) -> dict[str, Any]:
        return {
            "occurrences": self._total,
            "started": self._started,
            "known": self._known,
            "states": dict(self._states),
            "not_completed": [run for run in self.not_completed if run],
        }

    @property
    def text(self) -> str:
        runs = f"{self._started} runs started, {self._known} known before"
        summary = f"{plural(self._total, 'occurrence')}: {runs}; {self._ended or 'none'}"
        shown = [f"eventflow show {run}" for run in self.not_completed[:10] if run]
        return "\n".join([summary, *shown])
