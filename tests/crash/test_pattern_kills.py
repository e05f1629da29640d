"""kill -9 in the middle of patterns: what was open is open in the next life, and no event is lost
or counted twice.
"""

import random
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import httpx2

from eventflow.store.audit import audit
from tests.conftest import wait_until
from tests.server_process import EventflowProcess, serving

APP = """
from eventflow import App, Event, absent, all_of, count
from eventflow import flow

@flow
async def pair(events: list[Event]) -> list[str]:
    return sorted(event.id for event in events)

@flow
async def late(events: list[Event]) -> list[str]:
    return [event.id for event in events]

app = App("kills")
app.on(all_of("left", "right", within=3600, by="k"), pair, name="pairs")
app.on(count("left", 4, within=3600), pair, name="fours")
app.on(absent("answer", 2, after="question", by="k"), late, name="silences")
"""

PAIRS, LIVES = 60, 6


def test_p6_p9_row_1_patterns_survive_kill_9(tmp_path: Path):
    """Each pair is one run, each four is one run, each question without an answer is one run,
    whatever was killed when.
    """
    (tmp_path / "kills.py").write_text(APP)
    draw = random.Random(7)
    left = [(f"{side}-{n}", side, n) for n in range(PAIRS) for side in ("left", "right")]
    left += [(f"question-{n}", "question", n) for n in range(6)] + [
        (f"answer-{n}", "answer", n) for n in range(3)
    ]
    draw.shuffle(left)
    left.sort(key=lambda each: each[1] == "answer")  # an answer comes after its question
    for life in range(LIVES + 1):
        with serving(tmp_path, file="kills.py") as server:
            if life < LIVES:
                killer = threading.Timer(draw.uniform(0.02, 0.08), server.process.kill)
                killer.start()
                left = _send(server, left)
                killer.join()
                continue
            assert _send(server, left) == []
            wait_until(lambda: server.get("/api/counts")["pending"] == 0, "nothing is open")
            _prove(server)


def _send(
    server: EventflowProcess, events: list[tuple[str, str, int]]
) -> list[tuple[str, str, int]]:
    """Sends events one by one; returns those that were not acknowledged, and two that were:
    duplicates.
    """
    for at, (ident, kind, key) in enumerate(events):
        try:
            event = {
                "specversion": "1.0",
                "id": ident,
                "source": "/kills",
                "type": kind,
                "data": {"k": key},
            }
            answer = server.post(
                "/api/events", event, **{"content-type": "application/cloudevents+json"}
            )
            assert answer.status_code in (200, 202), answer.text
        except httpx2.TransportError:
            return events[max(at - 2, 0) :]
    return []


def _prove(server: EventflowProcess) -> None:
    runs = server.get("/api/runs", limit=1000)["runs"]
    by_name: dict[str, list[int]] = {}
    for run in runs:
        assert run["state"] == "completed", run
        by_name.setdefault(run["subscription"], []).append(run["events"])
    assert by_name.get("pairs") == [2] * PAIRS
    assert by_name.get("fours") == [4] * (PAIRS // 4)
    assert sum(by_name["silences"]) == len(by_name["silences"]) >= 3
    counts = server.get("/api/counts")
    assert counts["events"] == 2 * PAIRS + 9 and counts["accepted"] == 3 * PAIRS + 9
    server.process.kill()
    server.process.wait()
    with closing(sqlite3.connect(server.store)) as connection:
        assert audit(connection) == []
