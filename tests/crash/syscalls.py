"""Every durable system call of a fixed scenario, listed and then killed at: the moments that random
kills hardly ever hit.

    python -m tests.crash.syscalls            all of them, and what they were

The scenario is twelve events and what a server does with them, in four phases, each traced on its
own:

    first start   an empty folder, until it is ready
    serve         the store's writer thread alone, while twelve events are taken and worked off
    restart       a folder in which a kill left the twelve half done, until they are done
    stop          SIGTERM at rest: the last checkpoint

strace counts calls per thread and, told a path, per path; so a call is named by (phase, file, call,
ordinal), and `strace --inject` sends SIGKILL as that call is entered. When two threads write one
file, the first that gets that far is meant: the phase `serve` has one thread, so that no call of
the writer hides behind another's. test_syscalls.py runs an even sample.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.conftest import wait_until
from tests.crash.invariants import SenderLog, check
from tests.crash.victim import HERE, Client, NoAnswer, Server

EVENTS = 12
PHASES = ("first start", "serve", "restart", "stop")
CALLS = "fsync,fdatasync,pwrite64,write,rename,unlink,ftruncate,fallocate,openat"
TRIES = 3
POLL_SECONDS = 0.02
"""Scenarios in which a call may come: how many there are depends on how commits group."""
NOT_THE_STORE = ("effects", "serve.log", "threads", "trace")
_LINE = re.compile(r"^(\d*) *(\w+)\((.*)$")
_PATH = re.compile(r'[<"]([^<>"]*/store\.db[^<>"]*)[>"]')


class Point(NamedTuple):
    """One system call to be killed at. `path` is the file's name in the folder; empty in the phase
    `serve`, and of a rename.
    """

    phase: str
    path: str
    call: str
    ordinal: int


def can_trace() -> bool:
    strace = shutil.which("strace")
    return (
        strace is not None
        and subprocess.run(
            [strace, "-qq", "-o", os.devnull, "true"], capture_output=True
        ).returncode
        == 0
    )


# --------------------------------------------------------------------------- the scenario


class Scenario:
    """One pass over the scenario in a folder of its own, traced in one phase."""

    def __init__(self, folder: Path, phase: str) -> None:
        self.folder = folder
        self.phase = phase
        self.sent = {f"event-{n}": n for n in range(EVENTS)}
        self.acked: dict[str, str] = {}
        self._boot = 0

    def boot(self, before: Sequence[str] = ()) -> Server:
        self._boot += 1
        return Server(
            HERE / "app.py",
            self.folder,
            self._boot,
            before=before,
            env={"CRASH_THREADS": str(self.folder / "threads")},
        )

    def run(self, trace: Sequence[str]) -> bool:
        """Up to the end of the phase or of the process; True: the process was killed on the way."""
        traced = ["strace", "-D", "-f", "-y", "-s", "0", "-qq", *trace]
        server = self.boot(traced if self.phase in ("first start", "restart") else ())
        tracer = None
        try:
            if not server.wait_ready():
                return True
            if self.phase == "serve":
                tracer = attach(
                    server,
                    trace,
                    json.loads((self.folder / "threads").read_text())["eventflow-store"],
                )
            if self.phase in ("serve", "stop"):
                self.send(server)
            if not _rest(server):
                return True
            if self.phase == "stop":
                tracer = attach(server, ["-f", *trace], server.process.pid)
            return server.stop() != 0
        finally:
            server.kill()
            if tracer is not None:
                tracer.wait()

    def send(self, server: Server) -> None:
        """Everything once, each event on a connection of its own at the same time, until the server
        is gone.
        """
        with ThreadPoolExecutor(EVENTS) as senders:
            list(senders.map(lambda ident: self._send_one(server, ident), self.sent))

    def _send_one(self, server: Server, ident: str) -> None:
        client = Client()
        try:
            status, body, _ = client.post(
                server.url, "/hooks/orders", {"n": self.sent[ident]}, {"webhook-id": ident}
            )
        except NoAnswer:
            return
        finally:
            client.close()
        assert status in (200, 202), (status, body)
        assert self.acked.setdefault(ident, body["id"]) == body["id"]

    def finish(self) -> list[str]:
        """The sender sends again what it sent, everything comes to rest, and invariants.py
        looks.
        """
        server = self.boot()
        try:
            if not server.wait_ready():
                return [f"not ready after the kill: {server.log_tail}"]
            self.send(server)
            if not _rest(server):
                return [f"gone, or not at rest after the kill: {server.log_tail}"]
            if (code := server.stop()) != 0:
                return [f"exit code {code}"]
        finally:
            server.kill()
        return check(self.folder, SenderLog(self.sent, self.acked))[0]


def attach(server: Server, trace: Sequence[str], number: int) -> subprocess.Popen[bytes]:
    """strace on a running server: on the thread with this number alone, or with `-f` on the
    process; attached on return.
    """
    tracer = subprocess.Popen(["strace", "-qq", "-y", "-s", "0", *trace, "-p", str(number)])
    threads = Path(f"/proc/{server.process.pid}/task")
    meant = list(threads.iterdir()) if number == server.process.pid else [threads / str(number)]
    wait_until(
        lambda: not any("TracerPid:\t0\n" in (one / "status").read_text() for one in meant),
        "strace is attached",
    )
    return tracer


def _rest(server: Server) -> bool:
    """False: the process is gone, or does not come to rest."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if server.get("/api/counts")["pending"] == 0:
                return True
        except NoAnswer:
            return False
        time.sleep(POLL_SECONDS)
    return False


# --------------------------------------------------------------------------- listing


def prepared(folder: Path, phase: str) -> Path:
    """The folder that a phase begins in."""
    folder.mkdir()
    if phase == "restart":
        scenario = Scenario(folder, phase)
        server = scenario.boot()
        assert server.wait_ready(), server.log_tail
        scenario.send(server)
        effects = folder / "effects"
        wait_until(
            lambda: effects.exists() and effects.read_text().count("\n") > EVENTS * 7,
            "about half the bodies began",
        )
        server.kill()
    return folder


def listed(template: Path, folder: Path, phase: str) -> list[Point]:
    """The points of one phase, in the order of the calls they name."""
    shutil.copytree(template, folder)
    log = folder / "trace"
    assert not Scenario(folder, phase).run(["-o", str(log), "-e", f"trace={CALLS}"]), (
        "the scenario fails without any kill"
    )
    seen: dict[tuple[str, str, str], int] = defaultdict(int)
    points: dict[Point, None] = {}
    for thread, call, path, makes in _calls(log):
        name = (
            "" if phase == "serve" or call == "rename" else path
        )  # strace knows a rename by the path it begins with only
        seen[thread, name, call] += 1
        if makes:
            points.setdefault(Point(phase, name, call, seen[thread, name, call]))
    return list(points)


def _calls(log: Path) -> Iterator[tuple[str, str, str, bool]]:
    """Thread, call, name of the file, and whether it changes anything: of an openat only one that
    makes a file does.
    """
    for line in log.read_text().splitlines():
        if (match := _LINE.match(line)) and (paths := _PATH.findall(match[3])):
            name = Path(paths[-1]).name
            if not re.search(r"\.\d+$", name):  # the file before its rename, named by the process
                yield match[1], match[2], name, match[2] != "openat" or "O_CREAT" in match[3]


# --------------------------------------------------------------------------- killing


def kill_at(point: Point, template: Path, folder: Path) -> tuple[bool, list[str]]:
    """Whether the call came, and what does not hold afterwards."""
    shutil.copytree(template, folder)
    scenario = Scenario(folder, point.phase)
    where = ["-P", str(folder / point.path)] if point.path else []
    inject = f"inject={point.call}:signal=KILL:when={point.ordinal}"
    try:
        killed = scenario.run([*where, "-o", os.devnull, "-e", f"trace={point.call}", "-e", inject])
        wrong = scenario.finish()
    except (subprocess.TimeoutExpired, AssertionError) as error:
        killed, wrong = True, [f"{type(error).__name__}: {error}"]
    if not wrong:
        shutil.rmtree(folder)
    return killed, [f"{point}: {sentence} ({folder})" for sentence in wrong]


class Found(NamedTuple):
    points: int
    tried: int
    missed: list[Point]
    """Calls that did not come, in none of their tries."""
    wrong: list[str]
    by: Counter[str]


def search(
    folder: Path,
    seconds: float | None = None,
    jobs: int = 2,
    phases: Sequence[str] = PHASES,
    after: float = 0.0,
) -> Found:
    """Lists all points and kills at them; with `seconds`, at as many as that gives time for: one of
    each kind, then evenly. `after` leaves out so large a part of the order, which an earlier search
    has done.
    """
    templates = {phase: prepared(folder / phase.replace(" ", "-"), phase) for phase in phases}
    points = [
        point
        for phase in phases
        for point in listed(templates[phase], folder / f"listing-{PHASES.index(phase)}", phase)
    ]
    spread = _spread(points)
    spread = spread[int(len(spread) * after) :]
    ends = None if seconds is None else time.monotonic() + seconds
    tried: list[tuple[Point, bool, list[str]]] = []

    def attempt(numbered: tuple[int, Point]) -> None:
        n, point = numbered
        if ends is None or time.monotonic() < ends:
            for retry in range(TRIES):
                killed, wrong = kill_at(point, templates[point.phase], folder / f"kill-{n}-{retry}")
                if killed or wrong:
                    break
            tried.append((point, killed, wrong))
            if len(tried) % 50 == 0:
                print(f"  {len(tried)} of {len(spread)}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(attempt, enumerate(spread)))
    wrong = [sentence for _, _, found in tried for sentence in found]
    by = Counter(f"{point.phase}: {point.call} {point.path}" for point, _, _ in tried)
    return Found(
        len(points), len(tried), [point for point, killed, _ in tried if not killed], wrong, by
    )


def _spread(points: Sequence[Point]) -> list[Point]:
    """One of each kind first; of the rest, any beginning is spread evenly over all (steps of the
    golden ratio).
    """
    first = {point[:3]: point for point in points}.values()
    rest = [point for point in points if point not in first]
    return [*first, *sorted(rest, key=lambda point: rest.index(point) * 0.6180339887498949 % 1)]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.crash.syscalls", description="kill -9 at every durable system call"
    )
    parser.add_argument(
        "--seconds", type=float, default=None, help="as many as that gives time for; default: all"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--phase", choices=PHASES, default=None, help="one phase; default: all")
    parser.add_argument(
        "--after", type=float, default=0.0, help="go on after this part of them, such as 0.5"
    )
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="eventflow-syscalls-"))
    found = search(
        folder,
        options.seconds,
        options.jobs,
        [options.phase] if options.phase else PHASES,
        options.after,
    )
    for name, n in sorted(found.by.items()):
        print(f"{n:6} {name}")
    print(*(f"did not come: {point}" for point in found.missed), sep="\n")
    print(
        f"{found.points} calls listed, {found.tried} tried, "
        f"{found.tried - len(found.missed)} killed at"
    )
    print("\n".join(found.wrong) or "everything held")
    if not found.wrong:
        shutil.rmtree(folder)
    return bool(found.wrong)


if __name__ == "__main__":
    sys.exit(main())
