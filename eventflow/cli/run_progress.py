"""The bar of `eventflow run`: how many calls of the run have ended, of how many.

A flow does not say how many calls it will make. The last completed run of the same flow does: its
number is the total, so that `run --watch`, which repeats a run after each edit, knows the time
left. Without one, and beyond its number, the calls are counted. Called by run.py.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from eventflow.app import App
from eventflow.cli.client import ApiClient
from eventflow.cli.progress import stderr_progress
from eventflow.logs.progress import Progress, log_progress
from eventflow.runs.journal import Journal
from eventflow.runs.run import Outcome, State

REDRAW_SECONDS = 0.2
UNIT = " calls"
NOT_ENDED = ("started", "queued", "running", "retrying")
"""States of a call in the API."""


async def outcome_with_progress(app: App, run: int, flow: str) -> Outcome:
    """How a run of this process ended; meanwhile a bar stands below the log lines."""
    waiting = asyncio.ensure_future(app.runtime.outcome(run))
    with log_progress(f"running {flow}", await _calls_of_last_run(app, flow), UNIT) as progress:
        timeout = REDRAW_SECONDS if progress.is_shown else None
        ended = 0
        while not (await asyncio.wait([waiting], timeout=timeout))[0]:
            # A run that waits for long leaves memory.
            if (execution := app.runtime.worker.executions.get(run)) is not None:
                ended = execution.ended_calls
            _show(progress, ended)
    return await waiting


async def _calls_of_last_run(app: App, flow: str) -> int | None:
    before = await app.store.runs(flow=flow, state=State.COMPLETED, limit=1)
    return len(Journal(await app.store.load(before[0]["id"])).finals) if before else None


async def server_progress(api: ApiClient, flow: str) -> Progress:
    """The bar of a run that a server executes; give it to `show_calls`."""
    before = (await api.get("/api/runs", flow=flow, state="completed", limit=1))["runs"]
    last = await api.get(f"/api/runs/{before[0]['id']}") if before else {"tasks": ()}
    return stderr_progress(f"running {flow}", len(last["tasks"]) or None, UNIT)


def show_calls(progress: Progress, calls: Sequence[Mapping[str, Any]]) -> None:
    """`calls`: as in the API's answer about a run."""
    _show(progress, sum(call["state"] not in NOT_ENDED for call in calls))


def _show(progress: Progress, ended: int) -> None:
    has_time_left = ended and progress.total and ended <= progress.total
    progress.move_to(ended, "" if has_time_left else f"{int(progress.seconds)} s")
