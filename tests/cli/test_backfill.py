"""`eventflow backfill` over a running server: what it says before it starts, each occurrence once,
kills in between.
"""

import json
import os
import pty
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import DEADLINE, wait_until
from tests.server_process import EventflowProcess, command, environment, eventflow, serving

APP = """
import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from eventflow import App
from eventflow import flow, task
from triggers import Cron, Every, Webhook

DIARY = Path(__file__).with_name("diary.txt")

def note(text):
    with DIARY.open("a") as diary:
        diary.write(text + "\\n")

@task
async def work(day: str) -> str:
    note(f"begin {day}")
    await asyncio.sleep(0.15)
    note(f"end {day}")
    return day

@flow
async def report(local_time: str) -> str:
    return await work(local_time[:10])

@flow
async def fragile(scheduled_at: datetime) -> None:
    if scheduled_at.day == 3:
        raise ValueError("the third is bad")

@flow
async def hourly(scheduled_at: datetime) -> None:
    note(f"hourly {scheduled_at:%H}")

@flow
async def later(scheduled_at: datetime) -> None:
    note(f"later {scheduled_at:%H}")

app = App("reports")
daily = Cron("0 6 * * *", tz="Europe/Berlin", name="daily")
app.on(daily, report)
app.on(daily, fragile)
since = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=2)
hours = Every(hours=1, name="hours", misfire="all", start=since)
app.on(hours, hourly)
if Path(__file__).with_name("new").exists():
    app.on(hours, later)
app.on(Webhook("/orders", verify="none", id="id"), report)
"""
MAY = ("--trigger", "daily", "--from", "2026-05-01", "--to", "2026-05-16")


@pytest.fixture
def reports(tmp_path: Path) -> Iterator[EventflowProcess]:
    (tmp_path / "reports.py").write_text(APP)
    with serving(tmp_path, file="reports.py") as served:
        yield served


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EventflowProcess]:
    """One server for all tests that start nothing."""
    folder = tmp_path_factory.mktemp("idle")
    (folder / "reports.py").write_text(APP)
    with serving(folder, file="reports.py") as served:
        yield served
        assert days(served) == []


def backfill(served: EventflowProcess, flow: str, *args: str) -> tuple[int, Any, str]:
    """Exit code, what --json printed, and stderr."""
    done = eventflow(served.folder, "backfill", flow, *args, "--json")
    return done.returncode, json.loads(done.stdout) if done.stdout else None, done.stderr


def days(served: EventflowProcess) -> list[str]:
    """The days that the body of `report` ended for, in order."""
    return [line.removeprefix("end ") for line in served.diary if line.startswith("end ")]


def most_at_once(served: EventflowProcess) -> int:
    now = most = 0
    for line in served.diary:
        now += line.startswith("begin ")
        now -= line.startswith("end ")
        most = max(most, now)
    return most


EACH = [f"2026-05-{day:02}" for day in range(1, 16)]


def sound(served: EventflowProcess) -> None:
    assert served.get("/api/check") == {"wrong": []}
    counts = served.get("/api/counts")
    assert counts["accepted"] == sum(
        counts[name]
        for name in ("completed", "failed", "dead", "cancelled", "suppressed", "pending")
    )


# --------------------------------------------------------------------------- each once


def test_it_runs_each_occurrence_once_and_few_at_a_time(reports: EventflowProcess):
    """Every occurrence of the window gets one run, at most --limit at a time, in order of their
    times; given again, the command starts nothing. The count is printed before anything starts.
    """
    code, answer, errors = backfill(reports, "report", *MAY, "--limit", "3", "--yes")
    assert code == 0 and answer["states"] == {"completed": 15}
    assert (answer["occurrences"], answer["started"], answer["known"]) == (15, 15, 0)
    assert errors.startswith(
        "eventflow: 15 occurrences of daily, 2026-05-01T04:00:00Z to 2026-05-15T04:00:00Z, "
        "for flow report"
    )
    assert sorted(days(reports)) == EACH and most_at_once(reports) <= 3
    code, answer, _ = backfill(reports, "report", *MAY, "--yes")
    assert code == 0 and (answer["started"], answer["known"], answer["states"]) == (
        0,
        15,
        {"completed": 15},
    )
    assert sorted(days(reports)) == EACH
    (event,) = reports.get("/api/events", limit=1)["events"]
    assert event["event_id"] == "daily@2026-05-15T04:00:00Z"
    assert reports.get(f"/api/events/{event['id']}")["event"]["backfill"] is True
    sound(reports)


def test_progress_is_not_written_to_a_pipe(reports: EventflowProcess):
    """Where stderr is no terminal, nothing is written while it runs."""
    code, answer, errors = backfill(reports, "report", *MAY, "--limit", "1", "--yes")
    assert code == 0 and answer["started"] == 15 and most_at_once(reports) == 1
    assert len(errors.splitlines()) == 1 and "15 occurrences" in errors


def test_a_dry_run_reports_and_starts_nothing(idle: EventflowProcess):
    """--dry-run lists the occurrences with what would become of each, and records nothing."""
    done = eventflow(idle.folder, "backfill", "report", *MAY, "--dry-run")
    assert done.returncode == 0
    assert done.stdout.splitlines()[0] == "2026-05-01T04:00:00Z  would start"
    assert done.stdout.splitlines()[-1] == "15 occurrences, 15 runs would start"
    assert not [event for event in idle.get("/api/events")["events"] if event["trigger"] == "daily"]


def test_without_a_terminal_it_wants_yes(idle: EventflowProcess):
    """When nobody can be asked, it says how many there are, and that --yes is missing; nothing
    starts.
    """
    code, _, errors = backfill(idle, "report", *MAY)
    assert code == 2 and "15 occurrences" in errors and "--yes" in errors
    assert days(idle) == []


@pytest.mark.parametrize(("answer", "started"), [(b"n\n", 0), (b"y\n", 15)])
def test_it_asks(reports: EventflowProcess, answer: bytes, started: int):
    """On a terminal it asks after saying how many there are: no starts nothing, yes starts all."""
    ours, theirs = pty.openpty()
    try:
        asking = command("backfill", "report", *MAY, "--limit", "15")
        process = subprocess.Popen(
            asking,
            cwd=reports.folder,
            env=environment(),
            stdin=theirs,
            stderr=subprocess.PIPE,
            text=True,
        )
        os.write(ours, answer)
        _, errors = process.communicate(timeout=60)
    finally:
        os.close(ours)
        os.close(theirs)
    assert process.returncode == 0
    assert "15 occurrences" in errors and re.search(r"Start them\? \[y/N\]", errors)
    assert len(days(reports)) == started


# --------------------------------------------------------------------------- kills


def test_killed_and_given_again_each_runs_once(reports: EventflowProcess):
    """kill -9 of the command in the middle, then of the server: given again, it goes on, and every
    occurrence has run once.
    """
    args = command("backfill", "report", *MAY, "--limit", "2", "--yes")
    first = subprocess.Popen(
        args,
        cwd=reports.folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: len(days(reports)) >= 3, "three are done")
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = subprocess.Popen(
        args,
        cwd=reports.folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    wait_until(lambda: len(days(reports)) >= 8, "eight are done")
    reports.signal(signal.SIGKILL)
    reports.wait()
    _, errors = second.communicate(timeout=DEADLINE)
    assert second.returncode == 4 and b"no server answers" in errors
    with serving(reports.folder, file="reports.py") as served:
        code, answer, _ = backfill(served, "report", *MAY, "--limit", "2", "--yes")
        assert code == 0 and answer["states"] == {"completed": 15} and answer["known"] >= 8
        runs = served.get("/api/runs", flow="report", limit=1000)["runs"]
        assert len(runs) == 15 and len({run["ledger_id"] for run in runs}) == 15
        ended = Counter(
            days(served)
        )  # a body that the kill fell into, between its end and the record of it, may repeat
        assert set(ended) == set(EACH) and sum(ended.values()) <= 15 + 2
        sound(served)


# --------------------------------------------------------------------------- what ran before


def test_what_the_schedule_fired_does_not_run_again(reports: EventflowProcess):
    """Occurrences that the schedule fired for a flow count as run; a flow that came later gets runs
    for all of them, on the same events; a label runs them once more, each label once.
    """
    wait_until(
        lambda: len([line for line in reports.diary if line.startswith("hourly")]) >= 3,
        "three hours were caught up",
    )
    fired = reports.get("/api/events", trigger="hours", limit=10)["events"]
    first = datetime.fromisoformat(min(event["event_id"] for event in fired).partition("@")[2])
    since, until = (f"{first + timedelta(hours=hours):%Y-%m-%dT%H:%M}" for hours in (-3, 2))
    window = ("--trigger", "hours", "--from", since, "--to", until, "--yes")
    code, answer, _ = backfill(reports, "hourly", *window)
    assert code == 0 and (answer["started"], answer["known"]) == (3, 2)
    (reports.folder / "new").touch()
    assert reports.stop() == 0
    with serving(reports.folder, file="reports.py") as served:
        assert backfill(served, "later", *window)[1]["started"] == 5
        assert backfill(served, "later", *window)[1]["started"] == 0
        assert backfill(served, "hourly", *window)[1]["started"] == 0
        again = [backfill(served, "later", *window, "--rerun", "corrected")[1] for _ in range(2)]
        assert [(answer["started"], answer["known"]) for answer in again] == [(5, 0), (0, 5)]
        assert len([line for line in served.diary if line.startswith("later")]) == 10
        assert set(
            Counter(line for line in served.diary if line.startswith("hourly")).values()
        ) == {1}
        runs = served.get("/api/runs", flow="later", limit=100)["runs"]
        assert len({run["ledger_id"] for run in runs}) == 10
        sound(served)


def test_a_failed_run_is_reported(reports: EventflowProcess):
    """When a run does not complete, the exit code is 1, and the command that shows it is
    printed.
    """
    args = ("--trigger", "daily", "--from", "2026-05-01", "--to", "2026-05-05", "--yes")
    done = eventflow(reports.folder, "backfill", "fragile", *args)
    assert done.returncode == 1
    first, show = done.stdout.splitlines()
    assert first == "4 occurrences: 4 runs started, 0 known before; 3 completed, 1 failed"
    assert reports.get(f"/api/runs/{show.split()[-1]}")["error"]["message"] == "the third is bad"


# --------------------------------------------------------------------------- what cannot be


def test_what_is_to_come_is_the_schedules_own(idle: EventflowProcess):
    """Occurrences that the schedule has not come to are left to it, which is reported; asked for by
    name they are refused.
    """
    tomorrow = datetime.now(UTC) + timedelta(days=3)
    since = f"{datetime.now(UTC) - timedelta(days=2):%Y-%m-%d}"
    done = eventflow(
        idle.folder,
        "backfill",
        "report",
        "--trigger",
        "daily",
        "--from",
        since,
        "--to",
        f"{tomorrow:%Y-%m-%d}",
        "--dry-run",
    )
    assert done.returncode == 0 and "for the schedule to fire" in done.stderr
    assert re.search(r"^[23] occurrences", done.stdout.splitlines()[-1])
    coming = datetime.fromisoformat(re.findall(r"(\S+) and later", done.stderr)[0])
    answer = idle.post(
        "/api/triggers/daily/backfill", {"flow": "report", "at": [coming.isoformat()]}
    )
    assert answer.status_code == 409 and "by the schedule itself" in answer.json()["detail"]


def test_a_paused_schedule_is_not_backfilled(reports: EventflowProcess):
    """Runs of a paused trigger would be paused, so it is refused until the trigger is resumed."""
    assert eventflow(reports.folder, "pause", "daily").returncode == 0
    code, _, errors = backfill(reports, "report", *MAY, "--yes")
    assert code == 2 and "paused" in errors
    assert eventflow(reports.folder, "resume", "daily").returncode == 0
    assert backfill(reports, "report", *MAY, "--yes", "--limit", "15")[0] == 0


@pytest.mark.parametrize(
    ("args", "code", "errors"),
    [
        (("nope", *MAY), 5, "no flow matches 'nope'"),
        (("report", "--trigger", "nope", *MAY[2:]), 5, "no trigger matches 'nope'"),
        (("hourly", *MAY), 2, "flows that have: fragile, report"),
        (("report", "--trigger", "webhook:/orders", *MAY[2:]), 2, "is no schedule"),
        (
            ("report", "--trigger", "daily", "--from", "yesterday", "--to", "2026-05-02"),
            2,
            "expected a date",
        ),
        (("report", *MAY, "--limit", "0"), 2, "limit"),
        (("report", *MAY[:4]), 2, "--to"),
    ],
)
def test_mistakes_are_reported(
    idle: EventflowProcess, args: tuple[str, ...], code: int, errors: str
):
    """What does not fit is one line on stderr and its exit code; nothing starts."""
    if "webhook:/orders" in args:
        (name,) = [
            row["name"] for row in idle.get("/api/triggers")["triggers"] if row["kind"] == "Webhook"
        ]
        args = tuple(name if each == "webhook:/orders" else each for each in args)
    found, _, error = backfill(idle, *args, "--yes")
    assert found == code and errors in error
    assert days(idle) == []


def test_without_a_server_it_only_looks(reports: EventflowProcess):
    """With no server --dry-run works on the store itself, given the app; to run something it needs
    one.
    """
    assert reports.stop() == 0
    looked = eventflow(
        reports.folder, "backfill", "report", *MAY, "--dry-run", "--app", "reports.py"
    )
    assert (
        looked.returncode == 0
        and looked.stdout.splitlines()[-1] == "15 occurrences, 15 runs would start"
    )
    for more in (("--app", "reports.py"), ()):
        refused = eventflow(reports.folder, "backfill", "report", *MAY, "--yes", *more)
        assert refused.returncode == 4 and "no server" in refused.stderr


def test_the_api_explains_what_is_wrong_with_a_request(reports: EventflowProcess):
    """`POST …/backfill` refuses instants that are no occurrences, none, too many, and no label;
    bounds are required.
    """
    path = "/api/triggers/daily/backfill"
    for body, errors in (
        ({"flow": "report", "at": ["2026-05-01T05:00:00Z"]}, "no occurrence"),
        ({"flow": "report", "at": ["2026-05-01"]}, "time zone"),
        ({"flow": "report", "at": [7]}, "at:"),
        ({"flow": "report", "at": []}, "1 to 100"),
        ({"flow": "report", "at": ["2026-05-01T04:00:00Z"] * 101}, "1 to 100"),
        ({"flow": "report", "at": ["2026-05-01T04:00:00Z"], "again": ""}, "label"),
        ({"flow": "report", "at": ["2026-05-01T04:00:00Z"], "again": "x" * 201}, "label"),
        ({"at": ["2026-05-01T04:00:00Z"]}, "flow:"),
    ):
        answer = reports.post(path, body)
        assert answer.status_code == 400 and errors in answer.json()["detail"], answer.text
    assert (
        reports.client.get(
            "/api/triggers/daily/occurrences", params={"since": "2026-05-01"}
        ).status_code
        == 400
    )
    twice = reports.post(path, {"flow": "report", "at": ["2026-05-01T04:00:00Z"] * 2})
    assert [row["verdicts"][0]["known"] for row in twice.json()["occurrences"]] == [False, True]


def test_a_long_window_comes_in_pages(idle: EventflowProcess):
    """A window of more than a thousand occurrences is listed whole, each once."""
    window = ("--trigger", "daily", "--from", "2020-01-01", "--to", "2026-01-01", "--dry-run")
    _, answer, _ = backfill(idle, "report", *window)
    assert len({row["at"] for row in answer["occurrences"]}) == len(answer["occurrences"]) == 2192
