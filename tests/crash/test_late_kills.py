"""kill -9 while runs become late: one event for each `after`, before the kill
or in the next life.
"""

import random
import sqlite3
import threading
from collections import Counter
from contextlib import closing
from pathlib import Path

import httpx2

from eventflow.store.audit import audit
from tests.conftest import wait_until
from tests.server_process import EventflowProcess, serving

APP = """
import eventflow
from eventflow import App
from eventflow import flow
from triggers import RunState

@flow
async def train(n: int) -> int:
    await eventflow.sleep(100_000)
    return n

@flow
async def alert(run: str, after: float) -> str:
    return f"{run} {after}"

app = App("kills")
app.add(train)
app.on(RunState("train", "late", after=0.2), alert, name="soon")
app.on(RunState("tra*", "late", after=0.6), alert, name="later")
"""

RUNS, LIVES = 40, 6


def test_p2_p6_row_1_late_runs_survive_kill_9(tmp_path: Path):
    """Whatever was killed when, each run has one event for 0.2 s and one for 0.6 s,
    with one run of its own.
    """
    (tmp_path / "kills.py").write_text(APP)
    draw = random.Random(11)
    started: set[str] = set()
    for life in range(LIVES + 1):
        with serving(tmp_path, file="kills.py") as server:
            if life == LIVES:
                _prove(server, started)
                continue
            killer = threading.Timer(draw.uniform(0.15, 1.0), server.process.kill)
            killer.start()
            started |= _start(server)
            killer.join()


def _start(server: EventflowProcess) -> set[str]:
    """Starts runs until they are enough, or the server is gone; returns those that were
    acknowledged.
    """
    found: set[str] = set()
    try:
        for n in range(RUNS):
            found.add(server.start("train", n=n))
    except httpx2.TransportError:
        pass
    return found


def _prove(server: EventflowProcess, started: set[str]) -> None:
    lived = {run["id"] for run in server.get("/api/runs", flow="train", limit=1000)["runs"]}
    assert started and started <= lived
    expected_alerts = 2 * len(lived)
    wait_until(lambda: _ended(server) >= expected_alerts, f"{expected_alerts} alerts have run")
    events = server.get("/api/events", type="eventflow.run.late", limit=1000)["events"]
    assert Counter(event["subject"] for event in events) == dict.fromkeys(lived, 2)
    assert {event["duplicates"] for event in events} == {0}
    alerts = server.get("/api/runs", flow="alert", limit=1000)["runs"]
    assert Counter(run["subscription"] for run in alerts) == {
        "soon": len(lived),
        "later": len(lived),
    }
    server.process.kill()
    server.process.wait()
    with closing(sqlite3.connect(server.store)) as connection:
        assert audit(connection) == []


def _ended(server: EventflowProcess) -> int:
    return len(server.get("/api/runs", flow="alert", state="completed", limit=1000)["runs"])
