"""Storage failures, all of them real: kill -9 at any moment, a disk that returns errors, a full
disk.
"""

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eventflow.core.clock import SystemClock
from eventflow.store.sqlite import SqliteStore

WORK = """
import asyncio, hashlib, os, resource, sys
from eventflow.core.clock import SystemClock
from eventflow.core.errors import StoreError
from eventflow.runs.journal import Entry, Kind
from eventflow.runs.run import Completed, Ids, Run
from eventflow.store.protocol import Append, Arrival, Settle, Settled
from eventflow.store.sqlite import SqliteStore

path, life, options = sys.argv[1], sys.argv[2], eval(sys.argv[3])
clock = SystemClock()
store = SqliteStore(path, clock=clock, **options)
os.write(1, b"pid %d\\n" % os.getpid())
store.open()
ids = Ids(store.last_id)
body = b"x" * 500


def write(*fields):
    os.write(1, (" ".join(map(str, fields)) + "\\n").encode())


def arrival(n):
    now = clock.now()
    ident = ids.next(now)
    run = Run(id=ids.next(now), flow="f", created_at=now, due_at=now, event=ident)
    name = f"{life}-{n}"
    key = hashlib.sha256(name.encode()).digest()[:16]
    return Arrival(
        id=ident, trigger="t", key=key, digest=b"12345678", event_id=name, source="/s", type="x",
        body=body, verdicts=b"[]", received_at=now, counts={"pending": 1}, runs=[run],
    )


class Worker:
    def __init__(self):
        self.loop = asyncio.get_running_loop()

    def reserve(self, runs):
        return [run for run in runs if run.id % 4 != 0]

    def release(self, runs):
        pass

    def receive_runs(self, runs, more, cancels):
        for run in runs:
            if run.id % 8 == 1:
                continue
            entry = Entry(call_key="a#1", kind=Kind.VALUE, attempt=1, codec="json", value=b"1")
            store.post(Append(run.id, run.token, [entry]), lambda reply: None, self.loop)
            settle = Settle(run.id, run.token, Completed(b"1"))
            store.post(settle, lambda reply, run=run: self.settled(run, reply), self.loop)

    def settled(self, run, reply):
        if isinstance(reply, Settled):
            write("settled", run.id)


async def caller(numbers):
    for n in numbers:
        write("trying", f"{life}-{n}")
        await store.record([arrival(n)], trigger="t", cursor={life: n})
        write("acked", f"{life}-{n}")


async def main():
    store.attach_worker(Worker())
    store.on_failure(lambda error: write("failure", type(error).__name__))
    write("ready", store._writer.last.batch)
    numbers = iter(range(10**9))
    try:
        await asyncio.gather(*[caller(numbers) for _ in range(5)])
    except StoreError as error:
        write("raised", type(error).__name__, error.exit_code)
    try:
        await store.record([arrival(-1)])
    except StoreError as error:
        write("again", type(error).__name__)
    try:
        write("reads", len(await store.events()))
    except StoreError as error:
        write("reads", error)
    store.close()
    write("closed")


asyncio.run(main())
"""


class Victim:
    """A process that records and settles as fast as it can, and writes a line for each
    acknowledgement.
    """

    def __init__(self, path: str, life: str, *before: str, **options: Any) -> None:
        command = [
            *before,
            sys.executable,
            "-c",
            WORK,
            path,
            life,
            repr({"ballast": 0, "free_floor": 0, **options}),
        ]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.output: list[list[str]] = []

    def lines(self) -> Iterator[list[str]]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.endswith("\n"):
                self.output.append(line.split())
                yield self.output[-1]

    def all(self, name: str) -> list[str]:
        return [fields[1] for fields in self.output if fields[0] == name]

    def end(self) -> str:
        """Read its output to the end, and return its stderr."""
        for _ in self.lines():
            pass
        assert self.process.stderr is not None and self.process.stdout is not None
        stderr = self.process.stderr.read()
        self.process.wait()
        self.process.stderr.close()
        self.process.stdout.close()
        return stderr


def opened(path: str) -> SqliteStore:
    store = SqliteStore(path, clock=SystemClock(), ballast=0, free_floor=0)
    store.open()
    return store


async def names(store: SqliteStore) -> set[str]:
    return {row["event_id"] for row in await store.events(limit=1_000_000)}


def test_p1_row_1_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path):
    """Thirty processes are killed after a random number of acks, some during recovery: every
    acknowledged event is in the ledger once, with its cursor and each settled run, and the sums are
    right.
    """
    rng = random.Random(11)
    path = str(tmp_path / "a.db")
    acked: set[str] = set()
    tried: set[str] = set()
    settled: set[int] = set()
    batch = 0
    for life in range(30):
        victim = Victim(path, str(life))
        line_limit = rng.randrange(0, 400) if life % 5 else 0
        for n, _ in enumerate(victim.lines()):
            if n >= line_limit:
                break
        victim.process.kill()
        assert victim.end() == ""
        acked.update(victim.all("acked"))
        tried.update(victim.all("trying"))
        settled.update(map(int, victim.all("settled")))
        for started in map(int, victim.all("ready")):
            assert started > batch
            batch = started
    store = opened(path)
    found = asyncio.run(names(store))
    assert acked <= found <= tried and len(acked) > 100
    assert asyncio.run(store.check()) == []
    for ident in settled:
        assert asyncio.run(store.run(ident))["state"] == "completed"
    for life, last in _last_acked(acked).items():
        reached = asyncio.run(store.cursor("t"))[life]
        assert isinstance(reached, int) and reached >= last - 5
    assert store._writer is not None and store._writer.last.batch > batch
    store.close()


def _last_acked(acked: set[str]) -> dict[str, int]:
    last: dict[str, int] = {}
    for name in acked:
        life, n = name.split("-")
        last[life] = max(last.get(life, 0), int(n))
    return last


def test_row_2_a_kill_during_recovery_changes_nothing(tmp_path: Path):
    """Processes killed while they open the store change nothing but the epoch: only journaled
    starts count as crashes.
    """
    path = str(tmp_path / "a.db")
    victim = Victim(path, "0")
    for n, _ in enumerate(victim.lines()):
        if n > 100:
            break
    victim.process.kill()
    victim.end()
    before = opened(path)
    counts = asyncio.run(before.counts())
    before.close()
    code = """
import sys
from eventflow.core.clock import SystemClock
from eventflow.store.sqlite import SqliteStore
print(1, flush=True)
SqliteStore(sys.argv[1], clock=SystemClock()).open()
print(2, flush=True)
sys.stdin.read()
"""
    rng = random.Random(3)
    for _ in range(8):
        opener = subprocess.Popen(
            [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert opener.stdout is not None and opener.stdin is not None
        opener.stdout.readline()
        time.sleep(rng.random() * 0.03)  # not a wait: the moment of the kill
        opener.kill()
        opener.wait()
        opener.stdout.close()
        opener.stdin.close()
    store = opened(path)
    assert asyncio.run(store.counts()) == counts
    assert asyncio.run(store.check()) == []
    assert all(row["crash_count"] == 0 for row in asyncio.run(store.runs(limit=1000)))
    store.close()


# --------------------------------------------------------------------------- errors from the disk


def assert_stopped(victim: Victim) -> None:
    """P10: waiting callers got the error, nothing later was acknowledged, readers still read, and
    the store closed.
    """
    stderr = victim.end()
    names = [fields[0] for fields in victim.output]
    assert ["raised", "StoreFailed", "74"] in victim.output, (victim.output[-5:], stderr)
    assert ["failure", "StoreFailed"] in victim.output and ["again", "StoreFailed"] in victim.output
    after = names[names.index("raised") :]
    assert "acked" not in after and "settled" not in after
    assert victim.output[-1] == ["closed"] and int(victim.all("reads")[0]) > 0


def assert_recovered(path: str, victim: Victim) -> None:
    """Each event is present once or absent, and no acknowledged one is missing."""
    store = opened(path)
    found = asyncio.run(names(store))
    assert set(victim.all("acked")) <= found <= set(victim.all("trying"))
    assert asyncio.run(store.check()) == []
    store.close()


def test_p10_row_7_a_write_error_stops_acknowledging(tmp_path: Path):
    """The file cannot grow any more: the commit fails, and nothing is acknowledged after it."""
    path = str(tmp_path / "a.db")
    limit = (
        "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20,) * 2); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    victim = Victim(path, "0", sys.executable, "-c", limit)
    assert_stopped(victim)
    assert_recovered(path, victim)


def can_trace() -> bool:
    strace = shutil.which("strace")
    return (
        strace is not None
        and subprocess.run([strace, "-o", "/dev/null", "true"], capture_output=True).returncode == 0
    )


@pytest.mark.skipif(not can_trace(), reason="strace is missing, or may not trace")
@pytest.mark.parametrize("when", [40, 41, 42])
def test_p10_row_7_an_fsync_error_stops_acknowledging(tmp_path: Path, when: int):
    """fsync returns EIO once: that commit is unknown and never acknowledged; a reopened store has
    it once or not at all.
    """
    path = str(tmp_path / "a.db")
    inject = f"inject=fdatasync,fsync:error=EIO:when={when}"
    victim = Victim(path, "0", "strace", "-f", "-o", os.devnull, "-e", inject)
    assert_stopped(victim)
    assert_recovered(path, victim)


@pytest.mark.skipif(not can_trace(), reason="strace is missing, or may not trace")
def test_p1_every_commit_is_synced(tmp_path: Path):
    """With FULL each commit has its own fdatasync, and at most five callers share a commit."""
    log = tmp_path / "strace"
    victim = Victim(
        str(tmp_path / "a.db"), "0", "strace", "-f", "-o", str(log), "-e", "trace=fdatasync"
    )
    for _ in victim.lines():
        if len(victim.output) > 400:
            break
    os.kill(int(victim.all("pid")[0]), signal.SIGKILL)
    victim.end()
    acked = len(victim.all("acked"))
    assert acked > 50 and log.read_text().count("fdatasync(") >= acked / 5


def can_mount(folder: Path) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    return os.getuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    if not can_mount(folder):
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_row_8_a_full_disk_releases_the_ballast_before_it_fails(small_disk: Path):
    """The first ENOSPC releases the ballast; only the next one stops the store, with every
    acknowledged event in the file.
    """
    path = str(small_disk / "a.db")
    victim = Victim(path, "0", ballast=2 << 20)
    for name, *_ in victim.lines():
        if name == "ready":
            assert os.path.exists(f"{path}.ballast")
        if name == "failure":
            assert not os.path.exists(f"{path}.ballast")
    assert_stopped(victim)
    copy = small_disk.parent / "copy.db"
    for name in ("", "-wal", ".hwm"):
        if os.path.exists(f"{path}{name}"):
            shutil.copy(f"{path}{name}", f"{copy}{name}")
    assert_recovered(str(copy), victim)


def test_row_8_the_floor_keeps_the_disk_from_filling(small_disk: Path):
    """A caller that checks `capacity` never fills the disk: it is refused at the floor, and
    accepted when space is free again.
    """
    path, hog = str(small_disk / "a.db"), str(small_disk / "hog")
    code = f"""
import asyncio, json, os, sys
sys.argv = ["", {path!r}, "0", "{{'ballast': 0, 'free_floor': {4 << 20}}}"]
source = {WORK!r}.split("async def main")[0]
exec(source)


async def main():
    n = 0
    with open({hog!r}, "wb") as other:
        other.write(b"x" * (3 << 20))
    while store.capacity() is None:
        clock_tick()
        await store.record([arrival(n)])
        n += 1
    print(json.dumps({{"n": n, "disk": store.capacity().disk, "failed": str(store.failed)}}))
    os.unlink({hog!r})
    clock_tick()
    assert store.capacity() is None
    await store.record([arrival(n)])
    store.close()


def clock_tick():
    store._space._checked_at -= 1


asyncio.run(main())
"""
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    result = json.loads(output.splitlines()[-1])
    assert result["n"] > 100 and result["disk"] and result["failed"] == "None"
