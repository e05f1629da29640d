"""kill -9 while runs fail and wait for the retries of their flow: during the wait, around the
commit that begins it, and when they become due.
"""

import random
import sqlite3
import threading
from collections import defaultdict
from contextlib import closing
from pathlib import Path

import httpx2

from eventflow.runs.journal import RETRY_NOTE, Kind
from eventflow.runs.run import format_id
from eventflow.store.audit import audit
from tests.conftest import wait_until
from tests.server_process import EventflowProcess, serving

APP = """
import asyncio
import os
import time

from eventflow import App, Retry, current_task, flow, task

def leave_trace(what):
    me = current_task()
    line = f"{what} {me.run_id} {me.attempt} {time.time_ns() // 1000}\\n"
    fd = os.open("effects", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, line.encode())
    os.close(fd)

@task
async def reserve(n: int) -> str:
    leave_trace("reserve")
    return f"r{n}"

@task
async def charge(n: int) -> int:
    leave_trace("charge")
    await asyncio.sleep(n % 7 / 100)
    if current_task().attempt < 3:
        raise ConnectionError("the bank is down")
    return current_task().attempt

@flow
async def pay(n: int) -> int:
    return await charge(n)

@flow(retries=Retry(attempts=3, delay=0.4, jitter=False))
async def order(n: int) -> str:
    what = await reserve(n)
    paid = await (pay(n) if n % 2 else charge(n))
    return f"{what} paid by attempt {paid}"

app = App("kills", ballast=0, free_floor=0)
app.add(order, pay)
"""

RUNS = 30
LIVES = 8


def test_p4_p6_row_1_retries_of_a_flow_survive_kill_9(tmp_path: Path):
    """Whenever the process is killed, each run fails twice, is never executed again before the
    recorded time, and completes with its third attempt; values that it and its child recorded are
    kept.
    """
    (tmp_path / "kills.py").write_text(APP)
    draw = random.Random(7)
    started: dict[str, int] = {}
    for life in range(LIVES + 1):
        with serving(tmp_path, file="kills.py") as server:
            if life == LIVES:
                _prove(server, started)
                server.process.kill()
                server.process.wait()
                _prove_times(tmp_path, server.store)
                continue
            killer = threading.Timer(draw.uniform(0.1, 0.9), server.process.kill)
            killer.start()
            _start(server, started, upto=RUNS * (life + 1) // LIVES)
            killer.join()


def _start(server: EventflowProcess, started: dict[str, int], upto: int) -> None:
    """Starts runs until there are `upto`, or the server is gone."""
    try:
        for n in range(len(started), upto):
            started[server.start("order", n=n)] = n
    except httpx2.TransportError:
        pass


def _prove(server: EventflowProcess, started: dict[str, int]) -> None:
    def ended() -> bool:
        return server.get("/api/counts")["pending"] == 0

    wait_until(ended, "everything is at rest")
    assert started
    for run, n in started.items():
        whole = server.get(f"/api/runs/{run}")
        assert (whole["state"], whole["result"]) == ("completed", f"r{n} paid by attempt 3"), whole
        assert [each["message"] for each in whole["failed_attempts"]] == ["the bank is down"] * 2
        assert whole["retry"] is None


def _prove_times(folder: Path, store: Path) -> None:
    bodies: defaultdict[str, list[tuple[str, int]]] = defaultdict(list)
    for line in (folder / "effects").read_text().splitlines():
        what, run, _, at = line.split()
        bodies[run].append((what, int(at)))
    with closing(sqlite3.connect(store)) as connection:
        assert audit(connection) == []
        notes = connection.execute(
            "SELECT run, at, due_at FROM journal WHERE call_key = ? AND due_at IS NOT NULL "
            "AND run NOT IN (SELECT id FROM runs WHERE parent NOT NULL)",  # they follow it
            (RETRY_NOTE,),
        ).fetchall()
        children = connection.execute("SELECT parent, id FROM runs WHERE parent NOT NULL")
        child = dict(children)
        recorded = dict(
            connection.execute(
                "SELECT run, at FROM journal WHERE kind = ? AND call_key LIKE 'reserve%'",
                (int(Kind.VALUE),),
            ).fetchall()
        )
    assert len(notes) == 2 * len(recorded)
    for run, at, due_at in notes:
        family = [format_id(run), *([format_id(child[run])] if run in child else [])]
        early = [each for one in family for each in bodies[one] if at < each[1] < due_at]
        assert not early, f"run {family} was due at {due_at} and began earlier: {early}"
    for run, at in recorded.items():
        late = [each for each in bodies[format_id(run)] if each[0] == "reserve" and each[1] > at]
        assert not late, "a recorded value is computed again"
