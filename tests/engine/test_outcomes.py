"""The log line of an outcome: it has the ids of the run's other lines, and no replay tag."""

import asyncio
import io
import json
from datetime import datetime, timedelta
from typing import Any

import pytest

from eventflow import App, flow, sleep, task
from eventflow.core.clock import to_datetime
from eventflow.logs.capture import configure
from eventflow.runs.run import format_id
from eventflow.testing import VirtualClock, running
from tests.conftest import eventually

pytestmark = pytest.mark.anyio


@task
async def step() -> int:
    return 1


@flow
async def good() -> int:
    return await step()


@flow
async def bad() -> None:
    raise ValueError("no")


@flow
async def stuck() -> None:
    await step()
    await asyncio.get_running_loop().create_future()


@flow
async def long() -> None:
    await step()
    await sleep(3600)


ENDS = {"good": "run.completed", "bad": "run.failed", "stuck": "run.held", "long": "run.suspended"}


async def test_the_line_of_an_outcome_has_the_runs_ids_and_no_replay_tag() -> None:
    """However a claim ends, its line names run, flow and event, and is not tagged as a replay."""
    stream = io.BytesIO()
    with configure(stream=stream, pretty=False) as logs:
        async with running(App("ends", clock=VirtualClock())) as app:
            runs = {each.name: await app.start(each) for each in (good, bad, stuck, long)}

            def outcome_lines() -> dict[str, dict[str, object]]:
                logs.flush()
                lines = map(json.loads, stream.getvalue().splitlines())
                return {line["flow"]: line for line in lines if line["event"] in ENDS.values()}

            await eventually(
                lambda: outcome_lines().keys() == ENDS.keys(), "each of them has a line"
            )
            for name, line in outcome_lines().items():
                assert line["event"] == ENDS[name]
                assert (
                    line["run"] == format_id(runs[name].number)
                    and line["ledger_id"]
                    and "replay" not in line
                )


async def test_a_wait_is_logged_with_an_instant_and_its_end_without_noise() -> None:
    """`run.suspended` says until when, as an instant with its zone; `run.resumed` of a run that no
    crash has interrupted does not speak of suspects.
    """
    stream = io.BytesIO()
    clock = VirtualClock()
    with configure(stream=stream, pretty=False) as logs:
        async with running(App("ends", clock=clock)) as app:

            def lines(event: str) -> list[dict[str, Any]]:
                logs.flush()
                found = map(json.loads, stream.getvalue().splitlines())
                return [line for line in found if line["event"] == event]

            began = to_datetime(clock.now())
            run = await app.start(long)
            await eventually(lambda: lines("run.suspended"), "the run waits")
            (suspended,) = lines("run.suspended")
            assert datetime.fromisoformat(suspended["until"]) >= began + timedelta(hours=1)
            await clock.advance(3601)
            await run.result()
            (resumed,) = lines("run.resumed")
            assert "suspect" not in resumed
