"""kill -9 between a cancel and the end of its run: the run is cleaned up once, in whatever process,
and ends as cancelled.
"""

from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.server_process import EventflowProcess, eventflow, start

APP = """
import asyncio
from contextlib import suppress
from pathlib import Path

from eventflow import App, emit, flow, sleep, task

HERE = Path(__file__).parent

def note(text):
    with (HERE / "diary.txt").open("a") as diary:
        diary.write(text + "\\n")

@task
async def reserve(words: set[str]) -> set[str]:
    note("reserve")
    return words

@task
async def release(what: set[str]) -> None:
    note("release")
    while not (HERE / "go").exists():
        await asyncio.sleep(0.01)
    note("released")

@task
async def rest() -> None:
    note("rest")
    await asyncio.sleep(3600)

@task
async def later() -> None:
    note("later")

@flow
async def naps(seconds: float) -> None:
    try:
        await sleep(seconds)
    finally:
        note("the child unwinds")

@flow
async def swallows() -> str:
    await reserve({"x"})
    with suppress(BaseException):
        await rest()
    await later()
    await emit("later")
    return "swallowed"

@flow
async def saga(how: str) -> None:
    what = await reserve({f"word-{n}" for n in range(20)})
    try:
        match how:
            case "a short sleep":
                await sleep(50)
            case "a long sleep":
                await sleep(86_400)
            case "a body":
                await rest()
            case "a block":
                async with asyncio.timeout(86_400):
                    await asyncio.Event().wait()
            case "children":
                await asyncio.gather(naps(86_400), naps(50))
    except Exception as error:
        note(f"compensates for {error!r}")
        raise
    finally:
        await release(what)

app = App("cancels")
app.add(saga, naps, swallows)
"""

OUT_OF_MEMORY = ("a long sleep", "a block")


def life(folder: Path, seed: int) -> EventflowProcess:
    (folder / "cancels.py").write_text(APP)
    options = ("--store", f"sqlite:///{folder}/store.db")
    return start(folder, *options, file="cancels.py", env={"PYTHONHASHSEED": str(seed)})


def begun(server: EventflowProcess, how: str) -> str:
    """A run that waits for what `how` says."""
    run = server.start("saga", how=how)
    if how in OUT_OF_MEMORY:
        server.wait_for(run, "waiting")
    elif how == "a body":
        wait_until(lambda: "rest" in server.diary, "its body runs")
    else:
        children = 2 if how == "children" else 0
        wait_until(lambda: len(calls_of(server)) == children, "its children are there")
        wait_until(lambda: "reserve" in server.diary, "it has begun")
        wait_until(lambda: _has_value(server, run, "reserve"), "which is recorded")
    return run


def _has_value(server: EventflowProcess, run: str, task: str) -> bool:
    """Whether the journal has the value of a task: until then a kill repeats its body."""
    calls = server.get(f"/api/runs/{run}")["tasks"]
    return any(each["name"] == task and each["state"] == "completed" for each in calls)


def calls_of(server: EventflowProcess) -> list[str]:
    return [each["id"] for each in server.get("/api/runs")["runs"] if each["flow"] == "naps"]


@pytest.mark.parametrize("how", ["a short sleep", "a body", *OUT_OF_MEMORY, "children"])
def test_p4_a_cancelled_run_cleans_up_over_kill_9(tmp_path: Path, how: str) -> None:
    """Killed in the middle of the clean-up, it goes on with it in a process of another hash seed:
    nothing recorded runs again, no error of a child reaches the parent, the reason stays.
    """
    server = life(tmp_path, 1)
    try:
        run = begun(server, how)
        answer = server.post(f"/api/runs/{run}/cancel", {"reason": "enough"})
        assert (answer.status_code, answer.json()["state"]) == (202, "cancelling")
        wait_until(lambda: "release" in server.diary, "it cleans up")
        server.kill()
        (tmp_path / "go").touch()
        server = life(tmp_path, 2)
        found = server.wait_for(run, "cancelled", "failed", "held", "completed")
        assert (found["state"], found["reason"]) == ("cancelled", "enough"), found
        for child in calls_of(server):
            server.wait_for(child, "cancelled")
        assert server.diary.count("reserve") == 1
        assert (server.diary.count("release"), server.diary.count("released")) == (2, 1)
        assert not [line for line in server.diary if line.startswith("compensates")]
    finally:
        server.kill()


@pytest.mark.parametrize("how", ["a long sleep", "a short sleep", "a body"])
def test_a_run_cancelled_while_no_server_runs_cleans_up(tmp_path: Path, how: str) -> None:
    """`eventflow cancel` on the store of a killed server: the next server lets the run clean up."""
    server = life(tmp_path, 1)
    try:
        run = begun(server, how)
        server.kill()
        store = f"sqlite:///{tmp_path}/store.db"
        done = eventflow(tmp_path, "cancel", run, "-m", "enough", "--store", store)
        assert done.returncode == 0 and "asked to stop" in done.stdout, done
        (tmp_path / "go").touch()
        server = life(tmp_path, 2)
        found = server.wait_for(run, "cancelled", "failed", "held", "completed")
        assert (found["state"], found["reason"]) == ("cancelled", "enough"), found
        assert server.diary.count("reserve") == server.diary.count("released") == 1
    finally:
        server.kill()


def test_a_swallowed_cancel_starts_nothing_after_kill_9(tmp_path: Path) -> None:
    """A flow that takes no notice of its cancel, killed right after the request: no later process
    starts its next call.
    """
    server = life(tmp_path, 1)
    try:
        run = server.start("swallows")
        wait_until(lambda: "rest" in server.diary, "its body runs")
        assert server.post(f"/api/runs/{run}/cancel", {"reason": "enough"}).status_code == 202
        server.kill()
        server = life(tmp_path, 2)
        assert server.wait_for(run, "cancelled", "failed", "completed")["state"] == "cancelled"
        assert "later" not in server.diary
        assert server.get("/api/events")["events"][0]["type"] != "later"
    finally:
        server.kill()
