"""Clocks and random numbers in the body of a flow are found before a replay reads them."""

import asyncio
import datetime
import datetime as dt
import random
import time
import uuid
from pathlib import Path
from random import randint
from time import time as clock
from typing import Any

import pytest

from eventflow import current_run, flow, sleep, task
from eventflow.sdk.replay_hazards import find_hazards
from tests.conftest import wait_until
from tests.server_process import EventflowProcess

HERE = Path(__file__).name


@flow
async def by_module() -> Any:
    today = datetime.date.today()  # noqa: DTZ011
    return dt.datetime.now(), today, time.time(), uuid.uuid4()  # noqa: DTZ005


@flow
async def by_name() -> Any:
    return randint(1, 2), clock(), random.random()


@flow
async def nested() -> Any:
    later = [random.choice([1, 2]) for _ in range(3)]
    return sorted(later, key=lambda _: random.random())


@task
async def draw() -> float:
    return random.random()


@flow
async def replays() -> Any:
    run = current_run()
    generator = random.Random(7)
    await sleep(1)
    await asyncio.sleep(0)
    started = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    spent = time.monotonic()
    return run.now - started, run.random.random(), await draw(), generator.random(), spent


@flow
async def silenced() -> Any:
    return time.time()  # replay: ok


@pytest.mark.parametrize(
    ("tested", "names"),
    [
        (
            by_module,
            ["datetime.datetime.now", "datetime.date.today", "time.time", "uuid.uuid4"],
        ),
        (by_name, ["random.randint", "time.time", "random.random"]),
        (nested, ["random.choice", "random.random"]),
        (replays, []),
        (silenced, []),
    ],
)
def test_what_differs_in_a_replay_is_found(tested: Any, names: list[str]):
    """Each call of a clock or of random numbers is found, with its line, however it was imported;
    calls that replay, those in tasks and silenced lines are not reported.
    """
    found = find_hazards(tested.fn)
    assert sorted(each.name for each in found) == sorted(names)
    assert all(HERE in each.at for each in found)


def test_dev_warns_of_it(tmp_path: Path):
    """`eventflow dev` names the flow, the line and what to write."""

    class Dev(EventflowProcess):
        command_name = "dev"

    (tmp_path / "app.py").write_text(
        "import time\nfrom eventflow import App, flow\n\n@flow\nasync def act() -> float:\n"
        "    return time.time()\n\napp = App('shop')\napp.add(act)\n"
    )
    server = Dev(tmp_path, "app.py")
    try:
        wait_until(lambda: "flow.hazard_found" in server.log, "the warning is logged")
        (line,) = [each for each in server.log.splitlines() if "flow.hazard_found" in each]
        assert "app.py:6" in line and "current_run().now" in line
    finally:
        server.stop()
        server.kill()
