"""Faults a real server meets besides kill -9, named by their rows: poison, deaf bodies, blocked
loops, frozen processes, disks that fail or fill, a second process; and time that passes while
nobody lives.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.crash.lives import APP, DATA, EVENT, Lives, at_rest, settled_once
from tests.crash.syscalls import attach, can_trace
from tests.crash.victim import NoAnswer, Server

FREEZE_SECONDS = 3.0
SECONDS_WITHOUT_A_LIFE = 2.6
TRAFFIC_PACE = 0.05

# --------------------------------------------------------------------------- poison


@pytest.mark.parametrize("how", ["exit", "segv"])
def test_row_32_poison_is_quarantined_after_three_deaths_on_record_and_nobody_else(
    lives: Lives, how: str
):
    """A body kills its process each time. The first death is not on record; after three that are
    its run is dead, and says so. Runs beside it whose bodies last longer than the process never
    count as culprits, and complete.
    """
    server = lives.boot()
    for n in range(6):
        assert (
            server.send(f"slow-{n}", {"seconds": 1.0, "bodies": 1 + n // 3 * 3}, "patient")[0]
            == 202
        )
    assert server.send("bad", {"how": how}, "poison")[0] == 202
    crashes = 0
    while _dies(server):
        crashes += 1
        assert crashes <= 5
        server = lives.boot()
    assert crashes == 4
    (dead,) = server.get("/api/runs?state=dead")["runs"]
    assert dead["flow"] == "poison" and "crashed 3 times" in dead["reason"]
    wait_until(lambda: at_rest(server), "everything is at rest")
    assert {run["state"] for run in server.get("/api/runs?flow=patient")["runs"]} == {"completed"}
    counts = server.get("/api/counts")
    assert (counts["completed"], counts["dead"], counts["accepted"]) == (6, 1, 7)
    assert server.send("later", {"seconds": 0.0}, "patient")[0] == 202


def _dies(server: Server) -> bool:
    """Whether the process ends by itself before everything is done."""

    def is_over() -> bool:
        with suppress(NoAnswer):
            return server.process.poll() is not None or at_rest(server)
        return False

    wait_until(is_over, "it dies, or everything is done", within=60)
    return server.process.poll() is not None


# --------------------------------------------------------------------------- blocked bodies


def test_row_34_a_deaf_body_cannot_keep_the_process(lives: Lives):
    """SIGTERM with a body that swallows every cancel: exit 0 within grace + 5 s; the body runs
    again in the next life, with the same key and no failure counted.
    """
    server = lives.boot("deaf", "--grace", "1")
    server.send(EVENT, DATA, "stubborn")
    wait_until(lambda: "deaf" in lives.reached, "the body runs")
    began = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - began < 6.0
    server = lives.boot()
    settled_once(server, result=4)
    first, again = lives.bodies()
    assert first[:2] == again[:2]


def test_row_33_a_blocked_flow_loop_stops_neither_intake_nor_api(lives: Lives):
    """Flow code blocks its thread for good: webhooks are still acknowledged, the API answers, the
    log names the flow; kill -9 and everything that was acknowledged runs.
    """
    server = lives.boot("blocked")
    server.send("stuck", DATA, "blocking")
    wait_until(lambda: "blocked" in lives.reached, "the flow blocks")
    began = time.monotonic()
    for n in range(20):
        assert server.send(f"e-{n}", DATA, "steps")[0] == 202
    assert server.get("/api/counts")["pending"] == 21
    assert time.monotonic() - began < 2.0
    wait_until(lambda: "loop.blocked" in server.log_tail, "the watchdog says so")
    assert '"flow":"blocking"' in server.log_tail and "gates.py" in server.log_tail
    server = lives.boot()
    wait_until(lambda: at_rest(server), "everything is at rest")
    assert server.get("/api/counts")["completed"] == 41


def test_row_16_a_frozen_process_goes_on_where_it_was(lives: Lives):
    """SIGSTOP for 3 s and SIGCONT: nothing runs twice, what fell due meanwhile fires at once, a
    request that came then is answered, and no loop is blamed for the pause.
    """
    server = lives.boot()
    server.send("wait", {"how": "sleep", "seconds": 1.5}, "waits")
    server.send(EVENT, DATA, "steps")
    server.signal(signal.SIGSTOP)
    began = time.monotonic()
    sender = subprocess.Popen(
        [
            "python3",
            "-c",
            "import sys, urllib.request as u; print(u.urlopen(u.Request(sys.argv[1], "
            "b'{\"n\": 1}', "
            "{'content-type': 'application/json', 'webhook-id': 'meanwhile'})).status)",
            f"{server.url}/hooks/steps",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    time.sleep(FREEZE_SECONDS)
    server.signal(signal.SIGCONT)
    assert sender.communicate(timeout=10)[0].strip() == "202"
    wait_until(lambda: at_rest(server), "everything is at rest")
    assert time.monotonic() - began < 5.0
    settled_once(server)
    assert lives.ran() == {"first": 2, "second": 2, "mark": 1}
    assert "loop.blocked" not in server.log_tail


# --------------------------------------------------------------------------- the disk


@pytest.mark.skipif(not can_trace(), reason="strace is not here, or may not trace")
@pytest.mark.parametrize("call", ["fdatasync", "pwrite64"])
def test_p10_row_7_a_failing_disk_stops_the_server_within_a_second(lives: Lives, call: str):
    """fsync or write says EIO once: no 2xx for what was being committed, one line says why, exit 74
    within a second. After the restart the event is there or not, and never twice.
    """
    server = lives.boot()
    server.send("before", DATA, "steps")
    wait_until(lambda: at_rest(server), "everything is at rest")
    writer = json.loads((lives.folder / "threads").read_text())["eventflow-store"]
    where = [
        "-P",
        f"{server.store}-wal",
        "-o",
        os.devnull,
        "-e",
        f"trace={call}",
        "-e",
        f"inject={call}:error=EIO:when=1",
    ]
    tracer = attach(server, where, writer)
    began = time.monotonic()
    with suppress(NoAnswer):  # as good: no answer is no acknowledgement
        assert server.send(EVENT, DATA, "steps")[0] == 503
    assert server.wait() == 74
    assert (
        time.monotonic() - began < 1.5
    )  # the promise is 1 s; strace and a shared machine take theirs
    tracer.wait()
    assert server.log_tail.count('"event":"store.failed"') == 1
    server = lives.boot()
    assert server.send(EVENT, DATA, "steps")[0] in (200, 202)
    settled_once(server)
    assert lives.ran() == {"first": 2, "second": 2}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_p8_row_8_a_full_disk_pushes_back_and_intake_resumes(small_disk: Path):
    """Under the free-space floor webhooks are told 507 and when to come back, runs in flight
    finish, nothing acknowledged is lost; when there is space again they are taken, without a
    restart.
    """
    lives = Lives(small_disk)
    server = lives.boot(FLOOR=str(8 << 20))
    try:
        assert server.send("wait", {"how": "sleep", "seconds": 3.0}, "waits")[0] == 202
        hog = small_disk / "hog"
        disk = os.statvfs(small_disk)
        hog.write_bytes(b"x" * (disk.f_bavail * disk.f_frsize - (6 << 20)))
        wait_until(
            lambda: server.send("try", DATA, "steps")[0] == 507, "the disk is full for the server"
        )
        status, body, headers = server.send(EVENT, DATA, "steps")
        assert status == 507 and int(headers["retry-after"]) > 0 and "full" in body["detail"]
        run = server.get("/api/events/wait")["runs"][0]["id"]
        wait_until(
            lambda: server.get(f"/api/runs/{run}")["state"] == "completed",
            "the run in flight finishes",
        )
        hog.unlink()
        wait_until(
            lambda: server.send(EVENT, DATA, "steps")[0] in (200, 202), "intake resumes", within=10
        )
        settled_once(server)
        assert server.stop() == 0
    finally:
        lives.end()


# --------------------------------------------------------------------------- two of them


def test_row_11_a_second_process_is_refused_and_shown_by_whom(lives: Lives):
    """The second server on a store exits with 75 and names the first one's pid; the first does not
    notice.
    """
    server = lives.boot()
    second = Server(APP, lives.folder)
    assert not second.wait_ready()
    assert second.wait() == 75
    assert str(server.process.pid) in second.log_tail
    assert server.send(EVENT, DATA, "steps")[0] == 202
    settled_once(server)


def _linked(store: Path, make: Callable[[Path, Path], None]) -> Path:
    link = store.with_name(f"other-{store.name}")
    make(link, store)
    return link


def _without_lock(store: Path) -> Path:
    Path(f"{store}.lock").unlink()
    return store


NAMES: dict[str, Callable[[Path], Path]] = {
    "a symlink": lambda store: _linked(store, Path.symlink_to),
    "a hard link": lambda store: _linked(store, Path.hardlink_to),
    "its name, the lock file removed": _without_lock,
    "a symlinked folder": lambda store: _linked(store.parent, Path.symlink_to) / store.name,
}


@pytest.mark.parametrize("name", NAMES)
def test_row_11_a_second_server_is_refused_under_any_name(lives: Lives, name: str):
    """A second server that names the store in another way, or after its lock file is gone, exits
    with 75 and names the first one's pid. The first one serves on; after its kill -9 a server opens
    the store by its name, with every event.
    """
    server = lives.boot()
    assert server.send("before", {"seconds": 0.0}, "patient")[0] == 202
    second = Server(APP, lives.folder, store=NAMES[name](server.store))
    assert not second.wait_ready()
    assert second.wait() == 75
    assert str(server.process.pid) in second.log_tail
    assert server.send(EVENT, DATA, "steps")[0] == 202
    server = lives.boot()
    wait_until(lambda: at_rest(server), "everything is at rest")
    assert server.get("/api/counts")["completed"] == 3  # patient, steps and its child
    assert lives.ran()["first"] <= 2 * lives.boots


# --------------------------------------------------------------------------- files that vanish


def _remove_all(store: Path) -> None:
    for file in store.parent.glob(f"{store.name}*"):
        if file.is_file():
            file.unlink()


def _replace_by_backup(store: Path) -> None:
    shutil.copy(store, f"{store}.backup")
    os.replace(f"{store}.backup", store)


VANISHED: dict[str, Callable[[Path], object]] = {
    "overwritten": lambda store: store.write_bytes(b"SQLite format 3"),
    "removed": _remove_all,
    "moved": lambda store: store.rename(store.with_name("elsewhere.db")),
    "replaced by a backup": _replace_by_backup,
    "without its WAL": lambda store: Path(f"{store}-wal").unlink(),
}


@pytest.mark.parametrize("how", VANISHED)
@pytest.mark.parametrize("traffic", ["none", "the next request", "constant"])
def test_p10_a_server_whose_files_vanish_stops(lives: Lives, how: str, traffic: str):
    """The files of a running server are removed, moved, replaced or overwritten. It exits with 74,
    idle within about a second, and one line says which file. No request is acknowledged after the
    store's file is gone; if only the WAL is, every acknowledged event is there at the next start.
    """
    server = lives.boot()
    assert server.send("before", {"seconds": 0.0}, "patient")[0] == 202
    wait_until(lambda: at_rest(server), "everything is at rest")
    acknowledged = ["before"]
    VANISHED[how](server.store)
    began = time.monotonic()
    for n in range({"none": 0, "the next request": 1, "constant": 10_000}[traffic]):
        try:
            status = server.send(f"after-{n}", {"seconds": 0.0}, "patient")[0]
        except NoAnswer:
            break
        if status != 202:
            assert status == 503
            break
        acknowledged.append(f"after-{n}")
    assert server.wait(10) == 74
    assert time.monotonic() - began < 3.0  # the promise is 1 s to the stop of acknowledgements
    assert server.log_tail.count('"event":"store.failed"') == 1
    expected = "was overwritten" if how == "overwritten" else "removed, moved or replaced"
    assert expected in server.log_tail
    if how == "without its WAL":
        server = lives.boot()
        for ident in acknowledged:
            assert server.get(f"/api/events/{ident}")["id"]
    else:
        assert acknowledged == ["before"]


# --------------------------------------------------------------------------- P6: time survives


WAITS = {
    "sleep": ("waits", {"how": "sleep", "seconds": 2.5}),
    "retry": ("waits", {"how": "retry", "seconds": 0}),
    "timeout": ("waits", {"how": "timeout", "seconds": 2.5}),
    "run-timeout": ("bounded", {}),
}
"""What waits 2.5 s, in each of the four ways."""


def _seconds(instant: str) -> float:
    return datetime.fromisoformat(instant).timestamp()


def _ended(server: Server, ident: str) -> tuple[float, str]:
    """Seconds from a run's start to its end, and its state."""
    (run,) = server.get(f"/api/events/{ident}")["runs"]
    return _seconds(run["finished_at"]) - _seconds(run["started_at"]), run["state"]


def _all_wait(server: Server, lives: Lives) -> bool:
    """Whether WAITS are on their way, and the failure before the retry is on record: until then its
    body may run again.
    """
    (run,) = server.get("/api/events/retry")["runs"]
    tasks = server.get(f"/api/runs/{run['id']}")["tasks"]
    return lives.ran()["forever"] == 2 and [each["state"] for each in tasks] == ["retrying"]


def test_p6_sleep_retry_and_timeouts_keep_their_time_over_kills(lives: Lives):
    """A sleep, a retry's delay, a block's timeout and a run's timeout of 2.5 s each, killed twice
    on the way: each fires at its first due time, not before it and not anew; the retry is attempt
    2.
    """
    server = lives.boot()
    for ident, (flow, data) in WAITS.items():
        assert server.send(ident, data, flow)[0] == 202
    wait_until(lambda: _all_wait(server, lives), "all four wait")
    server = lives.boot()
    server = lives.boot()
    wait_until(lambda: at_rest(server), "everything is at rest")
    for ident in WAITS:
        lasted, state = _ended(server, ident)
        assert 2.4 <= lasted < 4.5, f"{ident} lasted {lasted:.2f} s"
        assert state == ("failed" if ident == "run-timeout" else "completed")
    tries = [(attempt, boot) for key, attempt, boot in lives.bodies() if "fails_once" in key]
    assert tries[0] == (1, 1) and {attempt for attempt, _ in tries[1:]} == {2}


def test_p6_what_fell_due_while_nobody_lived_fires_at_once(lives: Lives):
    """The same four, and the process is dead when they fall due: they fire with the next start,
    each once.
    """
    server = lives.boot()
    for ident, (flow, data) in WAITS.items():
        server.send(ident, data, flow)
    wait_until(lambda: _all_wait(server, lives), "all four wait")
    lives.end()
    time.sleep(SECONDS_WITHOUT_A_LIFE)
    server = lives.boot()
    began = time.monotonic()
    wait_until(lambda: at_rest(server), "everything is at rest")
    assert time.monotonic() - began < 2.0
    assert lives.ran()["mark"] == 3
    assert _ended(server, "run-timeout")[1] == "failed"


def test_p6_a_window_outlives_kills_and_closes_on_time(lives: Lives):
    """Constant traffic into a Debounce of 1.5 s, at most 5 s, and two kills on the way: its run
    begins 5 s after the first event, with every event that was acknowledged by then.
    """
    server, acknowledged, n = lives.boot(), list[int](), 0
    began = time.monotonic()
    while (passed := time.monotonic() - began) < 6.5:
        if lives.boots <= passed // 2 < 3:
            server = lives.boot()
        if server.send(f"b-{n}", {"n": n}, "bursts")[0] == 202:
            acknowledged.append(n)
        n += 1
        time.sleep(TRAFFIC_PACE)
    wait_until(lambda: at_rest(server), "everything is at rest")
    first, *later = sorted(server.get("/api/runs?flow=burst")["runs"], key=lambda run: run["id"])
    lasted = _seconds(first["started_at"]) - _seconds(first["created_at"])
    assert 5.0 <= lasted < 6.5, lasted
    results = [server.get(f"/api/runs/{run['id']}")["result"] for run in (first, *later)]
    assert [n for result in results for n in result] == acknowledged
    assert len(results[0]) > len(acknowledged) // 2 and lives.boots == 3


def test_p6_a_day_long_sleep_is_due_at_the_same_instant_after_a_kill(lives: Lives):
    """A day's sleep leaves memory; after kill -9 it is due when it was, to the microsecond."""
    server = lives.boot()
    server.send(EVENT, {"how": "sleep", "seconds": 86400}, "waits")

    def run() -> dict[str, str]:
        return server.get(f"/api/events/{EVENT}")["runs"][0]

    wait_until(lambda: run()["state"] == "waiting", "the run waits")
    before = run()
    assert _seconds(before["due_at"]) - _seconds(before["created_at"]) == pytest.approx(
        86400, abs=2
    )
    server = lives.boot()
    server = lives.boot()
    assert run() == before
