"""`eventflow serve` beside user code that exits, never ends, forks, or takes every thread: other
runs go on, or the process says why not and ends.
"""

import os
import signal
import socket
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx2
import pytest

from eventflow.server.watchdog import CHECK_INTERVAL_SECONDS
from tests.conftest import wait_until
from tests.server_process import EventflowProcess, eventflow, serving

APP = """
import asyncio, os, signal, sys, time
from pathlib import Path
from eventflow import App, flow, task

HERE = Path(__file__).parent

def raise_it(kind):
    if kind == "exit":
        sys.exit(3)
    raise {"interrupt": KeyboardInterrupt, "generator": GeneratorExit, "base": BaseException}[kind]

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
    await asyncio.gather(one(), asyncio.sleep(0.1))

@task
async def forgotten(kind: str) -> None:
    async def one():
        raise_it(kind)
    task = asyncio.create_task(one())
    await asyncio.sleep(0.1)
    await task

@task
async def callback(kind: str) -> str:
    asyncio.get_running_loop().call_soon(raise_it, kind)
    await asyncio.sleep(0.1)
    return "returned"

TASKS = {each.name: each for each in (body, plain, helper, forgotten, callback)}

@flow
async def leaves(where: str, kind: str) -> str:
    if where == "flow":
        raise_it(kind)
    return await TASKS[where](kind)

@task
async def add(a: int, b: int) -> int:
    return a + b

@flow
async def adds(a: int, b: int) -> int:
    return await add(a, b)

@task
async def swallow() -> None:
    (HERE / "swallowing").touch()
    while True:
        try:
            await asyncio.sleep(0.01)
        except BaseException:
            pass

@task
async def spin() -> None:
    (HERE / "swallowing").touch()
    while True:
        try:
            await asyncio.sleep(0)
        except BaseException:
            pass

@task
def spin_in_thread() -> None:
    (HERE / "swallowing").touch()
    while True:
        try:
            time.sleep(0.01)
        except BaseException:
            pass

STUBBORN = {each.name: each for each in (swallow, spin, spin_in_thread)}

@flow
async def stubborn(which: str) -> None:
    if which == "flow":
        (HERE / "swallowing").touch()
        while True:
            try:
                await asyncio.sleep(1)
            except BaseException:
                pass
    if which == "helper":
        await has_helper()
    await STUBBORN[which]()

@task
async def has_helper() -> None:
    await asyncio.gather(swallow.fn(), swallow.fn())

@task
async def block() -> None:
    (HERE / "blocking").touch()
    while not (HERE / "unblock").exists():
        time.sleep(0.01)

@flow
async def blocks() -> None:
    await block()

@task(timeout=0.2)
def never_returns() -> None:
    while not (HERE / "release").exists():
        time.sleep(0.02)

@flow
async def outlived() -> None:
    await never_returns()

@task
def quick() -> str:
    return "quick"

@flow
async def plain_flow() -> str:
    return await quick()

@task
async def forks(how: str) -> int:
    child = os.fork()
    if child:
        return child
    import logging
    try:
        for n in range(50):
            print("from the child", n)
            logging.getLogger("child").warning("line %d", n)
        (HERE / f"child-{os.getpid()}").touch()
        time.sleep(60)
    finally:
        os._exit(0)

@flow
async def forking(how: str) -> int:
    return await forks(how)

app = App("hangs", threads=2)
for each in (leaves, adds, stubborn, blocks, outlived, plain_flow, forking):
    app.add(each)
"""


FROZEN_SECONDS = 12


def serve(folder: Path, *options: str):
    (folder / "hangs.py").write_text(APP)
    return serving(folder, *options, file="hangs.py")


@pytest.mark.parametrize("kind", ["exit", "interrupt", "generator", "base"])
def test_no_base_exception_of_user_code_ends_a_loop(tmp_path: Path, kind: str) -> None:
    """Whatever a flow, a body, or a helper task or callback of one raises, its run has an outcome,
    and other runs go on.
    """
    with serve(tmp_path) as served:
        for where in ("body", "plain", "helper", "forgotten", "callback", "flow"):
            run = served.start("leaves", where=where, kind=kind)
            found = served.wait_for(run, "completed", "failed", "cancelled")
            assert found["state"] == ("completed" if where == "callback" else "failed"), (
                where,
                found,
            )
            after = served.wait_for(served.start("adds", a=1, b=2), "completed")
            assert after["result"] == 3
        assert served.client.get("/readyz").status_code == 200
        assert served.stop() == 0


def test_a_body_that_exits_does_so_in_no_later_process(tmp_path: Path) -> None:
    """The outcome of a run whose body called `sys.exit()` survives kill -9: no restart repeats
    it.
    """
    with serve(tmp_path) as served:
        run = served.start("leaves", where="body", kind="exit")
        error = served.wait_for(run, "failed")["error"]
        assert "SystemExit" in str(error)
        served.kill()
    with serve(tmp_path) as served:
        assert served.get(f"/api/runs/{run}")["state"] == "failed"
        assert served.wait_for(served.start("adds", a=1, b=2), "completed")["result"] == 3


@pytest.mark.parametrize("which", ["swallow", "spin", "spin_in_thread", "helper", "flow"])
def test_row_34_sigterm_with_code_that_catches_everything(tmp_path: Path, which: str) -> None:
    """The process is gone by grace + 5 s, with exit code 0, and does not hang while it exits."""
    with serve(tmp_path, "--grace", "0.5") as served:
        served.start("stubborn", which=which)
        wait_until((tmp_path / "swallowing").exists, "it runs")
        begun = time.monotonic()
        assert served.stop() == 0
        assert time.monotonic() - begun < 5.5


def test_a_loop_that_stands_still_makes_the_process_unready_and_ends_it(tmp_path: Path) -> None:
    """`/readyz` says what blocks; after the stall timeout the exit code is 70. The next process
    executes the other runs.
    """
    with serve(tmp_path, "--stall-timeout", "13") as served:
        served.start("blocks")
        wait_until((tmp_path / "blocking").exists, "the loop is blocked")
        run = served.start("adds", a=1, b=2)  # intake goes on
        wait_until(lambda: served.client.get("/readyz").status_code == 503, "it is not ready")
        assert "hangs.py" in served.client.get("/readyz").text
        assert served.wait() == 70
        assert '"server.failed"' in served.log and "flows loop is blocked" in served.log
    (tmp_path / "unblock").touch()
    with serve(tmp_path) as served:
        assert served.wait_for(run, "completed")["result"] == 3


def test_a_loop_that_turns_again_makes_the_process_ready_again(tmp_path: Path) -> None:
    """A flow that blocks for less than the stall timeout costs readiness for that time only."""
    with serve(tmp_path) as served:
        run = served.start("blocks")
        wait_until(lambda: served.client.get("/readyz").status_code == 503, "it is not ready")
        (tmp_path / "unblock").touch()
        served.wait_for(run, "completed")
        wait_until(lambda: served.client.get("/readyz").status_code == 200, "it is ready again")


@pytest.mark.parametrize("what", ["loop", "threads", "store"])
def test_time_in_which_the_process_was_stopped_does_not_count(tmp_path: Path, what: str) -> None:
    """SIGSTOP for longer than the stall timeout, while a body blocks its loop, bodies have all
    threads, or a commit waits for its file: after SIGCONT no fault is reported, and work continues.
    """
    with serve(tmp_path, "--stall-timeout", f"{FROZEN_SECONDS - 1}", "--grace", "0.5") as served:
        run = ""
        if what == "loop":
            run = served.start("blocks")
            wait_until(lambda: '"loop.blocked"' in served.log, "it is blocked for a second")
        if what == "threads":
            for _ in range(10):
                served.wait_for(served.start("outlived"), "failed")
            run = served.start("plain_flow")
            wait_until(
                lambda: (
                    [each["state"] for each in served.get(f"/api/runs/{run}")["tasks"]]
                    == ["queued"]
                ),
                "its body waits for a thread",
            )
            seen = time.monotonic() + 4 * CHECK_INTERVAL_SECONDS
            wait_until(lambda: time.monotonic() > seen, "the watchdog has looked")
        with (
            ThreadPoolExecutor(1) as pool,
            closing(sqlite3.connect(served.store, isolation_level=None)) as other,
        ):
            if what == "store":
                other.execute("BEGIN IMMEDIATE")
                begun = {"flow": "adds", "params": {"a": 1, "b": 2}}
                token = {"authorization": f"Bearer {served.token}"}
                waits = pool.submit(
                    httpx2.post, f"{served.url}/api/runs", json=begun, headers=token, timeout=60
                )
                for _ in range(3):  # later requests are answered: this one is being recorded
                    assert served.client.get("/readyz").status_code == 200
                assert not waits.done()
            served.signal(signal.SIGSTOP)
            time.sleep(FROZEN_SECONDS)
            served.signal(signal.SIGCONT)
        (tmp_path / "unblock").touch()
        (tmp_path / "release").touch()
        if run:
            served.wait_for(run, "completed")
        assert served.wait_for(served.start("adds", a=1, b=2), "completed")["result"] == 3
        assert served.client.get("/readyz").status_code == 200
        assert served.stop() == 0
        assert '"server.failed"' not in served.log
        blocked = [line for line in served.log.splitlines() if '"loop.blocked"' in line]
        assert not [line for line in blocked if '"level":"error"' in line], blocked


def test_plain_bodies_that_outlive_their_timeout_are_replaced_then_counted(tmp_path: Path) -> None:
    """Spare threads take the place of those that do not return, up to a bound; beyond it the
    process is unready and says why, until they return.
    """
    with serve(tmp_path, "--grace", "0.5") as served:
        for _ in range(8):  # the pool has 2 threads and 8 spare ones
            served.wait_for(served.start("outlived"), "failed")
        wait_until(
            lambda: served.log.count('"task.thread_left_behind"') == 8, "each has its warning"
        )
        assert served.wait_for(served.start("plain_flow"), "completed")["result"] == "quick"
        assert served.client.get("/readyz").status_code == 200
        served.wait_for(served.start("outlived"), "failed")
        answer = served.client.get("/readyz")
        assert answer.status_code == 503 and "9 plain task bodies continue" in answer.text
        (tmp_path / "release").touch()
        wait_until(lambda: served.client.get("/readyz").status_code == 200, "it is ready again")
        assert served.wait_for(served.start("plain_flow"), "completed")["result"] == "quick"


@pytest.mark.parametrize("command", ["run", "task"])
def test_one_run_ends_although_a_thread_of_it_does_not(tmp_path: Path, command: str) -> None:
    """`eventflow run` and `eventflow task` end with their error while the body's thread goes on."""
    (tmp_path / "hangs.py").write_text(APP)
    target = {"run": "hangs.py:outlived", "task": "hangs.py:never_returns"}[command]
    ended = eventflow(tmp_path, command, target, timeout=30)
    assert ended.returncode == 1, ended.stderr
    assert "timeout" in ended.stderr


def test_a_forked_child_ends_by_sigterm_and_keeps_nothing(tmp_path: Path) -> None:
    """A child of a body logs without deadlock, ends by SIGTERM, and keeps neither the port nor the
    store's lock after the server is killed.
    """
    with serve(tmp_path) as served:
        children = [
            served.wait_for(served.start("forking", how="fork"), "completed")["result"]
            for _ in range(3)
        ]
        for child in children:
            wait_until((tmp_path / f"child-{child}").exists, "the child has logged")
        port = int(served.url.rpartition(":")[2])
        served.kill()
        with socket.socket() as fresh:
            fresh.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            fresh.bind(("127.0.0.1", port))  # no child listens there
            fresh.listen()
        with serve(tmp_path) as again:  # no child holds the lock
            assert again.wait_for(again.start("adds", a=1, b=2), "completed")["result"] == 3
        for child in children:
            os.kill(child, signal.SIGTERM)
            wait_until(lambda child=child: not _is_alive(child), "the child ends by SIGTERM")


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_dead_thread_ends_the_process(tmp_path: Path) -> None:
    """The end of the flow loop's thread, whatever its cause, is exit code 70 with the reason."""
    (tmp_path / "dies.py").write_text(
        "import asyncio\n"
        "from eventflow import App, flow, task\n"
        "@task\n"
        "async def stops() -> None:\n"
        "    asyncio.get_running_loop().stop()\n"
        "    await asyncio.sleep(60)\n"
        "@flow\n"
        "async def ends() -> None:\n"
        "    await stops()\n"
        "app = App('dies')\n"
        "app.add(ends)\n"
    )
    served = EventflowProcess(tmp_path, "dies.py")
    try:
        assert served.wait_ready()
        served.start("ends")
        assert served.wait() == 70
        assert "the thread of the flow loop has ended" in served.log
    finally:
        served.kill()


KILLER = """
import asyncio, ctypes, threading
from eventflow import App, flow, task

@task
async def exit_in(name: str) -> None:
    (thread,) = [each for each in threading.enumerate() if each.name == name]
    exit = ctypes.py_object(SystemExit)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), exit)

@task
async def works() -> None:
    print("a line")
    await asyncio.sleep(0.01)

@flow
async def ends(name: str) -> None:
    await exit_in(name)
    while True:
        await works()

app = App("dies")
app.add(ends)
"""


@pytest.mark.parametrize(
    ("thread", "code", "reason"),
    [
        ("eventflow-store", 74, "SystemExit"),
        ("eventflow-log-output", 70, "the thread of the log has ended"),
        ("eventflow-log-store", 70, "the thread of the log store has ended"),
        ("eventflow-watchdog", 70, "the watchdog has ended"),
    ],
)
def test_a_dead_thread_ends_the_process_whichever_it_is(
    tmp_path: Path, thread: str, code: int, reason: str
) -> None:
    """An error that reaches a thread of ours ends the process with the reason."""
    (tmp_path / "dies.py").write_text(KILLER)
    served = EventflowProcess(tmp_path, "dies.py")
    try:
        assert served.wait_ready()
        served.start("ends", name=thread)
        assert served.wait() == code
        assert reason in served.log
    finally:
        served.kill()
