"""Schedules in separate processes: killed before and after firing and at any moment, stopped,
and under another clock.
"""

import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests import wall_clock
from tests.conftest import wait_until
from tests.crash.victim import Server

SUSPEND_SECONDS = 4

APP = """
import os, threading
from datetime import datetime
from pathlib import Path
from eventflow import App, Event
from eventflow import flow
from triggers import At, Cron, Every

def gate(name):
    if name == os.environ.get("GATE"):
        Path("reached").write_text(name)
        threading.Event().wait()

def before(event: Event) -> bool:
    gate("before")
    return True

@flow
async def tick(scheduled_at: datetime) -> str:
    gate("after")
    return scheduled_at.isoformat()

app = App("ticks")
match os.environ["SCHEDULE"]:
    case "once":
        # with start=, a slow boot does not miss it
        moment = datetime.fromisoformat(os.environ["AT"])
        app.on(At(moment, name="once", start=moment), tick, where=before)
    case "all":
        app.on(Every(seconds=1, name="seconds", misfire="all", limit=1000), tick)
    case "last":
        app.on(Every(seconds=1, name="seconds", grace=0.9), tick)
    case "night":
        since = datetime.fromisoformat("2026-10-24T23:59:00Z")
        night = Cron("*/30 * * * *", tz="Europe/Berlin", name="night", misfire="all", start=since)
        app.on(night, tick)
        app.on(Every(seconds=1, name="probe" + os.environ["BOOT"]), tick)
"""


class Ticks:
    """A folder with the app and its store, and the server of the moment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "ticks.py").write_text(APP)
        self.server: Server | None = None
        self._boots = 0

    def boot(self, schedule: str, **env: str) -> Server:
        """A new process on the same store; one that still runs is killed first."""
        self.kill()
        self._boots += 1
        (self.folder / "reached").unlink(missing_ok=True)
        self.server = Server(
            self.folder / "ticks.py",
            self.folder,
            env={"SCHEDULE": schedule, "BOOT": str(self._boots), **env},
        )
        if not self.server.wait_ready():
            self.server.kill()
            pytest.fail(self.server.log_tail)
        return self.server

    def kill(self) -> None:
        if self.server is not None:
            self.server.kill()
            self.server = None

    @property
    def reached(self) -> bool:
        return (self.folder / "reached").exists()


@pytest.fixture
def ticks(tmp_path: Path) -> Iterator[Ticks]:
    made = Ticks(tmp_path)
    yield made
    made.kill()


def events(server: Server, trigger: str) -> list[dict[str, Any]]:
    """What a schedule fired, oldest first."""
    return server.get(f"/api/events?trigger={trigger}&limit=1000")["events"][::-1]


def runs(server: Server) -> list[dict[str, Any]]:
    return server.get("/api/runs?limit=1000")["runs"]


def extensions(server: Server, event: dict[str, Any]) -> dict[str, Any]:
    return server.get(f"/api/events/{event['id']}")["event"]


@pytest.mark.parametrize("gate", ["before", "after"])
def test_t5_a_kill_just_before_or_after_firing_leaves_one_run(ticks: Ticks, gate: str):
    """T5: killed with the occurrence come but not recorded, or recorded and its run begun: after
    the restart there is one event and one run, completed, with the nominal time.
    """
    moment = datetime.now(UTC) + timedelta(seconds=4)
    ticks.boot("once", AT=moment.isoformat(), GATE=gate)
    wait_until(lambda: ticks.reached, f"it waits {gate} firing")
    for _ in range(2):
        server = ticks.boot("once", AT=moment.isoformat())
        wait_until(
            lambda: [run["state"] for run in runs(server)] == ["completed"],  # noqa: B023
            "the run is completed",
        )
        (event,) = events(server, "once")
        assert event["event_id"] == f"once@{moment.isoformat().replace('+00:00', 'Z')}"
        assert server.get("/api/counts")["runs"] == 1
    (run,) = runs(server)  # pyright: ignore[reportPossiblyUnboundVariable]
    assert server.get(f"/api/runs/{run['id']}")["result"] == moment.isoformat()


def test_t5_killed_at_any_moment_every_occurrence_has_one_run(ticks: Ticks):
    """T5: a schedule of seconds, killed eight times at random moments: each second from the first
    to the last was fired once, and its run completed once.
    """
    draw = random.Random(20261122)
    for _ in range(8):
        ticks.boot("all")
        time.sleep(draw.uniform(0.2, 1.6))  # a moment of no meaning to kill at, not a wait
    server = ticks.boot("all")
    wait_until(lambda: len(events(server, "seconds")) >= 5, "it continues")
    wait_until(
        lambda: {run["state"] for run in runs(server)} == {"completed"},
        "all its runs are completed",
    )
    fired = [
        datetime.fromisoformat(event["event_id"].partition("@")[2])
        for event in events(server, "seconds")
    ]
    assert fired == [fired[0] + timedelta(seconds=k) for k in range(len(fired))]
    begun = Counter(run["ledger_id"] for run in runs(server))
    assert set(begun.values()) == {1}
    assert server.get("/api/counts")["conflicts"] == 0


def test_t9_after_a_suspend_it_fires_by_its_policy(ticks: Ticks):
    """T9: stopped for four seconds, a schedule of seconds fires the newest soon after it is let go
    on, as a catch-up or in its time, and counts those it skipped.
    """
    server = ticks.boot("last")
    wait_until(lambda: events(server, "seconds"), "it fires")
    stopped = datetime.now(UTC)
    server.signal(signal.SIGSTOP)
    time.sleep(SUSPEND_SECONDS)
    server.signal(signal.SIGCONT)
    resumed = datetime.now(UTC)

    def skipped() -> list[dict[str, Any]]:
        fired = [extensions(server, event) for event in events(server, "seconds")]
        since = stopped + timedelta(seconds=3)
        return [
            each
            for each in fired
            if each.get("skipped", 0) >= 2 and datetime.fromisoformat(each["time"]) > since
        ]

    wait_until(skipped, "an event says how many were skipped")
    first = skipped()[0]
    assert datetime.fromisoformat(first["time"]) - resumed < timedelta(seconds=30)
    assert datetime.fromisoformat(first["data"]["scheduled_at"]) > resumed - timedelta(seconds=2)


@wall_clock.needs_faketime
def test_t2_t8_a_night_under_another_clock(ticks: Ticks):
    """T2, T8 in real processes whose clock is another: the night with two 02:00s fires both, what
    passed between two boots once as a catch-up, and a boot with the clock set back by an hour fires
    nothing again.
    """

    def ids(server: Server) -> list[str]:
        return [event["event_id"] for event in events(server, "night")]

    server = ticks.boot("night", **wall_clock.starting_at("@2026-10-24 23:59:57"))
    wait_until(lambda: ids(server) == ["night@2026-10-25T00:00:00Z"], "the first 02:00 has fired")
    server = ticks.boot("night", **wall_clock.starting_at("@2026-10-25 00:59:57"))
    both = [f"night@2026-10-25T{utc}Z" for utc in ("00:00:00", "00:30:00", "01:00:00")]
    wait_until(lambda: ids(server) == both, "02:30, late, and the second 02:00 have fired")
    fired = [extensions(server, event) for event in events(server, "night")]
    assert [each["data"]["local_time"][11:] for each in fired] == [
        "02:00:00+02:00",
        "02:30:00+02:00",
        "02:00:00+01:00",
    ]
    assert [each.get("catchup", False) for each in fired] == [False, True, False]
    server = ticks.boot("night", **wall_clock.starting_at("@2026-10-24 23:59:57"))
    wait_until(lambda: len(events(server, "probe3")) >= 6, "the clock has passed 00:00 again")
    assert ids(server) == both and server.get("/api/counts")["duplicates"] == 0
