"""kill -9, or the end by a signal, beside user code that exits, never ends or forks: the next
process finds a run with an outcome, a free port and a free store.
"""

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.server_process import EventflowProcess, serving

APP = """
import asyncio, atexit, multiprocessing, os, subprocess, sys, threading, time
from contextlib import asynccontextmanager
from pathlib import Path

from eventflow import App, Event, flow, sleep, task
from triggers import Webhook

HERE = Path(__file__).parent
HOW = os.environ.get("HOW", "")

CANCELS = {"cancels all tasks": (), "cancels the HTTP server": ("http",)}

def note(text):
    with (HERE / "diary.txt").open("a") as diary:
        diary.write(text + "\\n")

def raise_it(kind):
    note(f"raises {kind}")
    if kind == "exit":
        sys.exit(3)
    raise {"interrupt": KeyboardInterrupt, "generator": GeneratorExit}[kind]

def endless():
    (HERE / "begun").touch()
    while True:
        try:
            time.sleep(0.02)
        except BaseException:
            pass

async def endless_too():
    (HERE / "begun").touch()
    while True:
        try:
            await asyncio.sleep(0.02)
        except BaseException:
            pass

# ---------------------------------------------------------------- code that exits

def hook(value, *more):
    raise_it(value if isinstance(value, str) else str(value))

@task
async def body(kind: str) -> None:
    raise_it(kind)

@task
def plain(kind: str) -> None:
    raise_it(kind)

@task
async def helper(kind: str) -> None:
    async def one():
        raise_it(kind)
    await asyncio.gather(one(), asyncio.sleep(0.05))

@task
async def thread(kind: str) -> None:
    await asyncio.to_thread(raise_it, kind)

@task(on_success=hook)
async def hooked(kind: str) -> str:
    return kind

@task
async def pause() -> None:
    note("pause")
    while not (HERE / "go").exists():
        await asyncio.sleep(0.01)

TASKS = {each.name: each for each in (body, plain, helper, thread, hooked)}

@flow
async def exits(where: str, kind: str) -> str:
    if where == "flow, caught":
        try:
            await body(kind)
        except Exception as error:
            caught = type(error).__name__
        await pause()
        return caught
    if where == "flow":
        raise_it(kind)
    await TASKS[where](kind)
    await pause()
    return "returned"

def picky(event):
    if kind := event.data.get("filter"):
        raise_it(kind)
    return True

@flow
async def hears(event: Event) -> str:
    return event.id

class Exits:
    name = "exits"

    async def listen(self, intake):
        if HOW in ("exit", "interrupt", "generator"):
            raise_it(HOW)
        if HOW == "a listener":
            await endless_too()
        if HOW in CANCELS:
            while not any(each.get_name() == "http" for each in asyncio.all_tasks()):
                await asyncio.sleep(0.01)
            for each in asyncio.all_tasks():
                if each.get_name() in CANCELS[HOW] or not CANCELS[HOW]:
                    each.cancel()
        await asyncio.sleep(3600)

# ---------------------------------------------------------------- code that never ends

@task
async def hog(how: str) -> None:
    if how == "a pool's thread":
        await asyncio.to_thread(endless)
    if how == "a thread":
        threading.Thread(target=endless).start()
    if how == "a process":
        multiprocessing.get_context("fork").Process(target=endless).start()
    if how == "a blocked loop":
        endless()
    if how == "a finalizer":
        class Stubborn:
            def __del__(self):
                endless()
        asyncio.current_task().stubborn = Stubborn()
        (HERE / "begun").touch()
    await asyncio.sleep(3600)

def endless_hook(*values):
    endless()

async def endless_async_hook(*values):
    await endless_too()

@task(on_success=endless_hook)
async def with_hook() -> None:
    pass

@task(on_success=endless_async_hook)
async def with_async_hook() -> None:
    pass

@flow
async def hogs(how: str) -> None:
    if how == "a hook":
        await with_hook()
    elif how == "an async hook":
        await with_async_hook()
    elif how == "a flow":
        endless()
    else:
        await hog(how)
    await sleep(30)

@asynccontextmanager
async def lifespan():
    if HOW == "at exit":
        atexit.register(endless)
    yield
    if HOW == "a lifespan":
        await endless_too()
    if HOW == "a blocking lifespan" or HOW in CANCELS:
        endless()

# ---------------------------------------------------------------- forks

def child_that_stays():
    (HERE / f"child-{os.getpid()}").touch()
    while not (HERE / "end").exists():
        time.sleep(0.02)
    os._exit(0)

@task
async def forks(how: str) -> int:
    if how == "os.fork":
        child = os.fork()
        if not child:
            child_that_stays()
    elif how == "multiprocessing":
        process = multiprocessing.get_context("fork").Process(target=child_that_stays)
        process.start()
        child = process.pid
    else:
        code = (
            "import os, sys, time, pathlib\\n"
            "here = pathlib.Path(sys.argv[1])\\n"
            "(here / f'child-{os.getpid()}').touch()\\n"
            "while not (here / 'end').exists(): time.sleep(0.02)\\n"
        )
        child = subprocess.Popen([sys.executable, "-c", code, str(HERE)], close_fds=False).pid
    while not (HERE / f"child-{child}").exists():
        await asyncio.sleep(0.01)
    return child

@task
def forks_in_thread(how: str) -> int:
    return asyncio.run(forks.fn(how))

@flow
async def forking(how: str, thread: bool) -> int:
    child = await (forks_in_thread if thread else forks)(how)
    note(f"child {child}")
    await sleep(3600)
    return child

# ---------------------------------------------------------------- limits

@task
async def work(depth: int) -> None:
    note(f"work {depth}")

@flow(concurrency=1)
async def calls_itself(depth: int) -> int:
    await work(depth)
    if depth:
        await calls_itself(depth - 1)
    else:
        await pause()
    await work(depth + 100)
    return depth

@task
async def add(a: int, b: int) -> int:
    return a + b

@flow
async def adds(a: int, b: int) -> int:
    return await add(a, b)

app = App("kills", threads=2, lifespan=lifespan)
for each in (exits, hogs, forking, calls_itself, adds):
    app.add(each)
app.on(Webhook("/orders", verify="none", id="id", name="orders"), hears, where=picky)
app.on(Exits(), hears)
"""

KINDS = ("exit", "interrupt", "generator")


def serve(folder: Path, *options: str, seed: int = 1, how: str = ""):
    (folder / "kills.py").write_text(APP)
    env = {"PYTHONHASHSEED": str(seed), "HOW": how}
    return serving(folder, *options, file="kills.py", env=env)


def goes_on(served: EventflowProcess) -> bool:
    return served.wait_for(served.start("adds", a=1, b=2), "completed")["result"] == 3


@pytest.mark.parametrize("kind", KINDS)
def test_what_user_code_raised_stays_its_runs_outcome_over_kill_9(
    tmp_path: Path, kind: str
) -> None:
    """`sys.exit()`, KeyboardInterrupt and GeneratorExit in a flow, a body, a helper task, a thread,
    a hook, a filter and a listener: after kill -9 each run has, or gets, the outcome that it had,
    and nothing that has raised is called again by the next process.
    """
    outcomes: dict[str, str] = {}
    runs: dict[str, str] = {}
    with serve(tmp_path, how=kind) as served:
        for where in ("flow", "body", "plain", "helper", "thread", "hooked", "flow, caught"):
            runs[where] = served.start("exits", where=where, kind=kind)
        for where, run in runs.items():
            if where not in ("hooked", "flow, caught"):
                outcomes[where] = served.wait_for(run, "failed")["error"]["type"]
        assert served.send("bad", {"id": "bad", "filter": kind})[0] in (202, 400, 422, 500)
        assert served.send("good", {"id": "good"})[0] == 202
        wait_until(lambda: served.diary.count("pause") == 2, "two runs wait in their next body")
        raised = [line for line in served.diary if line.startswith("raises")]
        served.kill()
    (tmp_path / "go").touch()
    with serve(tmp_path, seed=2) as served:
        for where, error in outcomes.items():
            found = served.get(f"/api/runs/{runs[where]}")
            assert (found["state"], found["error"]["type"]) == ("failed", error), where
        assert served.wait_for(runs["hooked"], "completed", "failed")["result"] == "returned"
        caught = served.wait_for(runs["flow, caught"], "completed", "failed")
        assert caught["result"] == "TaskFailed", caught
        assert [line for line in served.diary if line.startswith("raises")] == raised
        wait_until(lambda: served.get("/api/counts")["pending"] == 0, "everything is at rest")
        assert goes_on(served)
        assert served.client.get("/readyz").status_code == 200


ENDLESS = (
    "a pool's thread",
    "a thread",
    "a process",
    "a finalizer",
    "a hook",
    "an async hook",
    "a flow",
    "a blocked loop",
    "a listener",
    "a lifespan",
    "a blocking lifespan",
    "at exit",
)


@pytest.mark.parametrize("how", ENDLESS)
def test_row_34_the_process_is_gone_by_grace_and_5_s(tmp_path: Path, how: str) -> None:
    """SIGTERM beside each kind of code that never ends: the process is gone by grace + 5 s, its
    port and store are free, and the next one works.
    """
    with serve(tmp_path, "--grace", "0.5", how=how) as served:
        if how not in ("a listener", "a lifespan", "a blocking lifespan", "at exit"):
            served.start("hogs", how=how)
        if how not in ("a lifespan", "a blocking lifespan", "at exit"):
            wait_until((tmp_path / "begun").exists, "it runs")
        port = int(served.url.rpartition(":")[2])
        began = time.monotonic()
        served.stop()
        assert time.monotonic() - began < 5.5
    _is_free(port)
    with serve(tmp_path, "--grace", "0.5", seed=2) as served:
        assert served.client.get("/readyz").status_code == 200


@pytest.mark.parametrize("how", ["cancels all tasks", "cancels the HTTP server"])
def test_row_34_a_server_whose_tasks_are_cancelled_ends(tmp_path: Path, how: str) -> None:
    """If user code cancels tasks of the server's loop and the lifespan never ends, the process ends
    at once with exit code 70 and the reason, so that a supervisor starts it again.
    """
    (tmp_path / "kills.py").write_text(APP)
    server = EventflowProcess(tmp_path, "kills.py", env={"HOW": how})
    try:
        assert server.wait() == 70, server.log_tail
        assert '"server.failed"' in server.log
    finally:
        server.kill()


@pytest.mark.parametrize("how", ["", "a lifespan", "a blocking lifespan"])
def test_row_34_a_start_that_fails_is_gone_by_grace_and_5_s(tmp_path: Path, how: str) -> None:
    """A server that fails to start after it has opened its app (its token cannot be read) ends by
    grace + 5 s with an error, whatever its lifespan does.
    """
    (tmp_path / "kills.py").write_text(APP)
    (tmp_path / ".eventflow" / "kills.db.token").mkdir(parents=True)
    server = EventflowProcess(tmp_path, "kills.py", "--grace", "0.5", env={"HOW": how})
    try:
        wait_until(lambda: "trigger.started" in server.log, "the app is open")
        began = time.monotonic()
        assert not server.wait_ready()
        assert server.wait() not in (0, -signal.SIGKILL), server.log_tail
        assert time.monotonic() - began < 5.5
        assert "kills.db.token" in server.log
    finally:
        server.kill()


@pytest.mark.parametrize("thread", [False, True], ids=["loop", "thread"])
@pytest.mark.parametrize("how", ["os.fork", "multiprocessing", "subprocess"])
def test_children_of_a_killed_server_hold_nothing(tmp_path: Path, how: str, thread: bool) -> None:
    """A server is killed while a child of a body lives on: its port, its lock and its store are
    free for the next server, which resumes the run and starts no second child.
    """
    child = 0
    try:
        with serve(tmp_path) as served:
            run = served.start("forking", how=how, thread=thread)
            wait_until(lambda: len(served.diary) == 1, "the child is there")
            child = int(served.diary[0].split()[1])
            port = int(served.url.rpartition(":")[2])
            served.kill()
        assert Path(f"/proc/{child}").exists()
        with serve(tmp_path, "--port", str(port), seed=2) as served:
            assert goes_on(served)
            # The run sleeps again, or its value was not recorded yet when the kill came.
            wait_until(
                lambda: served.get(f"/api/runs/{run}")["state"] in ("waiting", "running"), "it goes"
            )
            assert served.stop() == 0
    finally:
        (tmp_path / "end").touch()
        if child:
            os.kill(child, signal.SIGKILL)


def _is_free(port: int) -> None:
    with socket.socket() as fresh:
        fresh.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        fresh.bind(("127.0.0.1", port))
        fresh.listen()


def test_a_flow_that_calls_itself_at_its_limit_goes_on_after_kill_9(tmp_path: Path) -> None:
    """`concurrency=1` and a chain of runs that wait for their children: after kill -9 the deepest
    one gets the place, not a parent of it, and nothing recorded runs again.
    """
    with serve(tmp_path) as served:
        run = served.start("calls_itself", depth=4)
        wait_until(lambda: "pause" in served.diary, "the deepest run is in its body")
        served.kill()
    (tmp_path / "go").touch()
    with serve(tmp_path, seed=2) as served:
        began = time.monotonic()
        assert served.wait_for(run, "completed", "failed")["result"] == 4
        assert time.monotonic() - began < 15.0  # and not a minute a level
        worked = [line for line in served.diary if line.startswith("work")]
        assert sorted(worked) == sorted(set(worked)) and len(worked) == 10
