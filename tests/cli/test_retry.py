"""`eventflow retry`: waits that end now, runs that are repeated from a call, many runs at once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import wait_until
from tests.server_process import EventflowProcess, eventflow, serving, start

APP = """
import asyncio
from pathlib import Path
from eventflow import App, Retry, current_run, current_task, emit, flow, sleep, task

HERE = Path(__file__).parent

def note(text):
    with (HERE / "diary.txt").open("a") as diary:
        diary.write(text + "\\n")

@task(retries=Retry(attempts=3, delay=3600, jitter=False))
async def fetch(name: str) -> str:
    note(f"fetch {name}")
    if (HERE / "down").exists():
        raise ConnectionError("the warehouse is down")
    return name.upper()

@task(retries=Retry(attempts=3, delay=50, jitter=False))
async def call(name: str) -> str:
    note(f"call {name}")
    if (HERE / "down").exists():
        raise ConnectionError("the warehouse is down")
    return name.upper()

@task
async def first(at: str, number: float) -> str:
    note("first")
    return f"{at} {number}"

@task
async def second(value: str) -> str:
    note(f"second {current_task().idempotency_key}")
    while (HERE / "closed").exists():
        await asyncio.sleep(0.01)
    return value

@task
async def third(value: str) -> str:
    note("third")
    return value

@flow
async def fetching(name: str) -> str:
    return await fetch(name)

@flow
async def calling(name: str) -> str:
    return await call(name)

@flow
async def sleeping() -> None:
    await sleep(3600)

@flow
async def steps() -> str:
    run = current_run()
    value = await first(run.now.isoformat(), run.random.random())
    value = await second(value)
    await emit("steps.done", {"value": value})
    return await third(value)

@flow
async def notified(value: str) -> str:
    return value

app = App("shop")
for each in (fetching, calling, sleeping, steps):
    app.add(each)
app.on("steps.done", notified)
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EventflowProcess]:
    folder = tmp_path_factory.mktemp("retry")
    (folder / "shop.py").write_text(APP)
    with serving(folder) as served:
        yield served


def retry(shop: EventflowProcess, *args: str) -> str:
    done = eventflow(shop.folder, "retry", *args)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def state_of_call(shop: EventflowProcess, run: str) -> str:
    tasks: list[dict[str, Any]] = shop.get(f"/api/runs/{run}")["tasks"]
    return tasks[0]["state"] if tasks else ""


@pytest.mark.parametrize(
    ("flow", "state", "answer"),
    [
        ("fetching", "waiting", "is pending again, without waiting further"),
        ("calling", "running", "starts its waiting attempts now"),
    ],
)
def test_a_run_that_waits_for_its_next_attempt_starts_it_now(
    shop: EventflowProcess, flow: str, state: str, answer: str
):
    """The attempt starts at once, whether the run waits in the store or in memory; attempts are
    counted on.
    """
    down = shop.folder / "down"
    down.touch()
    run = shop.start(flow, name="a")
    wait_until(lambda: state_of_call(shop, run) == "retrying", "the first attempt has failed")
    shop.wait_for(run, state)
    down.unlink()
    assert answer in retry(shop, run)
    done = shop.wait_for(run, "completed")
    assert done["result"] == "A" and done["tasks"][0]["attempts"] == 2
    assert done["took"] < 45


def test_a_sleep_is_refused_with_its_reason(shop: EventflowProcess):
    """A sleep is the flow's own: nothing changes, exit code 2, and the answer has the reason."""
    run = shop.start("sleeping")
    shop.wait_for(run, "waiting")
    done = eventflow(shop.folder, "retry", run)
    assert done.returncode != 0 and "sleeps are not cut short" in done.stderr
    assert shop.get(f"/api/runs/{run}")["state"] == "waiting"


def test_a_run_is_repeated_from_a_call(shop: EventflowProcess):
    """A new run keeps the values before the call, with the time and the random numbers that they
    were made of; the call and what follows run again, under keys of their own; the event that it
    emits starts its own run.
    """
    diary_file = shop.folder / "diary.txt"
    lines_before = len(diary_file.read_text().splitlines()) if diary_file.exists() else 0
    old = shop.start("steps")
    result = shop.wait_for(old, "completed")["result"]
    text = retry(shop, old, "--from", "second")
    new = text.split()[1]
    assert text == f"run {new} repeats run {old} from second" and new != old
    done = shop.wait_for(new, "completed")
    assert done["result"] == result and done["unclaimed_entries"] == 0
    assert (done["repeats"], done["repeats_from"]) == (old, "second")
    diary = diary_file.read_text().splitlines()[lines_before:]
    assert diary.count("first") == 1 and diary.count("third") == 2
    assert len({line for line in diary if line.startswith("second")}) == 2
    wait_until(
        lambda: len(shop.get("/api/runs", flow="notified")["runs"]) >= 2, "both are notified"
    )
    shown = eventflow(shop.folder, "show", new).stdout
    assert f"{old} from second" in shown and "resumed" not in shown
    assert shop.get("/api/check") == {"wrong": []}


def test_a_repeated_run_survives_a_kill(tmp_path: Path):
    """`kill -9` in the middle of the repeated call: the next start continues the new run, without
    computing again what it kept.
    """
    (tmp_path / "shop.py").write_text(APP)
    first = start(tmp_path)
    old = first.start("steps")
    first.wait_for(old, "completed")
    (tmp_path / "closed").touch()
    new = first.post(f"/api/runs/{old}/retry", {"from": "second#0"}).json()["id"]
    diary = tmp_path / "diary.txt"
    wait_until(lambda: diary.read_text().count("second ") == 2, "the call runs")
    first.kill()
    (tmp_path / "closed").unlink()
    with serving(tmp_path) as second:
        done = second.wait_for(new, "completed")
        assert done["result"] == second.get(f"/api/runs/{old}")["result"]
        lines = diary.read_text().splitlines()
        assert lines.count("first") == 1 and lines.count("third") == 2
        assert second.get("/api/check") == {"wrong": []}


def test_what_fits_no_retry_is_refused(shop: EventflowProcess):
    """`--from` with --state, with --from-scratch, of an unknown call: nothing is recorded."""
    old = shop.start("steps")
    shop.wait_for(old, "completed")
    runs = shop.get("/api/counts")["runs"]
    for args, message in (
        ((old, "--from", "nothing"), "no call 'nothing'; say which call: first#0, second#0"),
        ((old, "--from", "first", "--from-scratch"), "leave out --from-scratch"),
        (("--state", "failed", "--from", "first"), "of one run"),
        ((old,), "--from CALL (API: from) repeats"),
    ):
        done = eventflow(shop.folder, "retry", *args)
        assert done.returncode != 0 and message in " ".join(done.stderr.split())
    assert shop.get("/api/counts")["runs"] == runs


def test_no_run_to_retry(shop: EventflowProcess):
    """Where no run has the state, that is what it says."""
    assert retry(shop, "--state", "dead") == "no run is dead"
