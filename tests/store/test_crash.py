"""Storage that fails under way: kill -9 at any moment, a disk that returns errors, a disk that fills up. All of it real."""

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


def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())


def arrival(n):
    now = clock.now()
    ident = ids.next(now)
    run = Run(id=ids.next(now), flow="f", created_at=now, due_at=now, event=ident)
    name = f"{life}-{n}"
    return Arrival(id=ident, trigger="t", key=hashlib.sha256(name.encode()).digest()[:16], digest=b"12345678", event_id=name,
                   source="/s", type="x", body=body, verdicts=b"[]", received_at=now, counts={"pending": 1}, runs=[run])


class Worker:
    def __init__(self):
        self.loop = asyncio.get_running_loop()

    def reserve(self, run):
        return run.id % 4 != 0

    def release(self, runs):
        pass

    def receive_runs(self, runs, more, cancels):
        for run in runs:
            if run.id % 8 == 1:
                continue
            entry = Entry(call_key="a#1", kind=Kind.VALUE, attempt=1, codec="json", value=b"1")
            store.post(Append(run.id, run.token, [entry]), lambda reply: None, self.loop)
            store.post(Settle(run.id, run.token, Completed(b"1")), lambda reply, run=run: self.settled(run, reply), self.loop)

    def settled(self, run, reply):
        if isinstance(reply, Settled):
            say("settled", run.id)


async def caller(numbers):
    for n in numbers:
        say("trying", f"{life}-{n}")
        await store.record([arrival(n)], trigger="t", cursor={life: n})
        say("acked", f"{life}-{n}")


async def main():
    store.attach_worker(Worker())
    store.on_failure(lambda error: say("failure", type(error).__name__))
    say("ready", store._writer.last.batch)
    numbers = iter(range(10**9))
    try:
        await asyncio.gather(*[caller(numbers) for _ in range(5)])
    except StoreError as error:
        say("raised", type(error).__name__, error.exit_code)
    try:
        await store.record([arrival(-1)])
    except StoreError as error:
        say("again", type(error).__name__)
    try:
        say("reads", len(await store.events()))
    except StoreError as error:
        say("reads", error)
    store.close()
    say("closed")


asyncio.run(main())
"""


class Victim:
    """A process that records and settles as fast as it can, and says each thing once it is acknowledged."""

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
        self.said: list[list[str]] = []

    def lines(self) -> Iterator[list[str]]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.endswith("\n"):
                self.said.append(line.split())
                yield self.said[-1]

    def all(self, word: str) -> list[str]:
        return [words[1] for words in self.said if words[0] == word]

    def end(self) -> str:
        """Reads to the end, and returns what it said on stderr."""
        for _ in self.lines():
            pass
        assert self.process.stderr is not None and self.process.stdout is not None
        complaint = self.process.stderr.read()
        self.process.wait()
        self.process.stderr.close()
        self.process.stdout.close()
        return complaint


def opened(path: str) -> SqliteStore:
    store = SqliteStore(path, clock=SystemClock(), ballast=0, free_floor=0)
    store.open()
    return store


async def names(store: SqliteStore) -> set[str]:
    return {row["event_id"] for row in await store.events(limit=1_000_000)}


def test_p1_row_1_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path):
    """Thirty lives, each killed after a random number of acks, the recovery included: every ack is in the ledger, once, its
    cursor with it, every settle too, and the sums hold."""
    draw = random.Random(11)
    path = str(tmp_path / "a.db")
    acked: set[str] = set()
    tried: set[str] = set()
    settled: set[int] = set()
    batch = 0
    for life in range(30):
        victim = Victim(path, str(life))
        patience = draw.randrange(0, 400) if life % 5 else 0
        for n, _ in enumerate(victim.lines()):
            if n >= patience:
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


def test_row_2_a_kill_in_recovery_is_recovered_from(tmp_path: Path):
    """Processes killed while they open, again and again, change nothing but the epoch: deaths rise only by journaled starts."""
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
    code = "import sys\nfrom eventflow.core.clock import SystemClock\nfrom eventflow.store.sqlite import SqliteStore\n"
    code += "print(1, flush=True)\nSqliteStore(sys.argv[1], clock=SystemClock()).open()\nprint(2, flush=True)\nsys.stdin.read()"
    draw = random.Random(3)
    for _ in range(8):
        opener = subprocess.Popen(
            [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert opener.stdout is not None and opener.stdin is not None
        opener.stdout.readline()
        time.sleep(draw.random() * 0.03)  # not a wait: a moment to die at
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


def stopped(victim: Victim) -> None:
    """P10: who waited was told, nothing later was acknowledged, readers still read, the process could go on and close."""
    complaint = victim.end()
    words = [words[0] for words in victim.said]
    assert ["raised", "StoreFailed", "74"] in victim.said, (victim.said[-5:], complaint)
    assert ["failure", "StoreFailed"] in victim.said and ["again", "StoreFailed"] in victim.said
    after = words[words.index("raised") :]
    assert "acked" not in after and "settled" not in after
    assert victim.said[-1] == ["closed"] and int(victim.all("reads")[0]) > 0


def sound_after(path: str, victim: Victim) -> None:
    """Present or absent, never twice, and nothing acknowledged is missing."""
    store = opened(path)
    found = asyncio.run(names(store))
    assert set(victim.all("acked")) <= found <= set(victim.all("trying"))
    assert asyncio.run(store.check()) == []
    store.close()


def test_p10_row_7_a_write_error_stops_acknowledging(tmp_path: Path):
    """The file may not grow any further: the commit fails, and that is the end of acknowledgements."""
    path = str(tmp_path / "a.db")
    limit = "import os, resource as r, sys; r.setrlimit(r.RLIMIT_FSIZE, (3 << 20,) * 2); os.execv(sys.argv[1], sys.argv[1:])"
    victim = Victim(path, "0", sys.executable, "-c", limit)
    stopped(victim)
    sound_after(path, victim)


def can_trace() -> bool:
    strace = shutil.which("strace")
    return (
        strace is not None
        and subprocess.run([strace, "-o", "/dev/null", "true"], capture_output=True).returncode == 0
    )


@pytest.mark.skipif(not can_trace(), reason="strace is not here, or may not trace")
@pytest.mark.parametrize("when", [40, 41, 42])
def test_p10_row_7_an_fsync_error_stops_acknowledging(tmp_path: Path, when: int):
    """fsync says EIO once: what it was for is unknown and never acknowledged; after reopening it is there or not, once."""
    path = str(tmp_path / "a.db")
    inject = f"inject=fdatasync,fsync:error=EIO:when={when}"
    victim = Victim(path, "0", "strace", "-f", "-o", os.devnull, "-e", inject)
    stopped(victim)
    sound_after(path, victim)


@pytest.mark.skipif(not can_trace(), reason="strace is not here, or may not trace")
def test_p1_every_commit_is_synced(tmp_path: Path):
    """FULL means what it says: five callers share a commit at most, and each commit has an fdatasync of its own."""
    log = tmp_path / "strace"
    victim = Victim(
        str(tmp_path / "a.db"), "0", "strace", "-f", "-o", str(log), "-e", "trace=fdatasync"
    )
    for _ in victim.lines():
        if len(victim.said) > 400:
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
    """The first ENOSPC costs the ballast, nothing else; only the next one stops the store, with every ack in the file."""
    path = str(small_disk / "a.db")
    victim = Victim(path, "0", ballast=2 << 20)
    for words in victim.lines():
        if words[0] == "ready":
            assert os.path.exists(f"{path}.ballast")
        if words[0] == "failure":
            assert not os.path.exists(f"{path}.ballast")
    stopped(victim)
    copy = small_disk.parent / "copy.db"
    for name in ("", "-wal", ".hwm"):
        if os.path.exists(f"{path}{name}"):
            shutil.copy(f"{path}{name}", f"{copy}{name}")
    sound_after(str(copy), victim)


def test_row_8_the_floor_keeps_the_disk_from_filling(small_disk: Path):
    """A caller that asks `room` never sees the disk full: it is told to slow down first, and welcome when space returns."""
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
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    told = json.loads(said.splitlines()[-1])
    assert told["n"] > 100 and told["disk"] and told["failed"] == "None"
