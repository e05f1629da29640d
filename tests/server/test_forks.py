"""Task bodies that fork while a source is at work: the child keeps nothing of the server, and no
item of the source is lost or recorded twice.
"""

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.aws import Bucket
from tests.aws import serving as aws_server
from tests.brokers import noida, tansu
from tests.conftest import wait_until
from tests.server_process import EventflowProcess, serving

APP = """
import asyncio, json, logging, multiprocessing, os, subprocess, sys, time
from pathlib import Path

from eventflow import App, Event, flow, task
from triggers import S3, Directory, Kafka

HERE, LINES = Path(__file__).parent, int(os.environ["LINES"])
CHILD = '''
import os, pathlib, sys, time
here = pathlib.Path(sys.argv[1])
(here / f"child-{os.getpid()}").touch()
while not (here / "end").exists():
    time.sleep(0.02)
'''

@task
async def note(number: int) -> None:
    with (HERE / "diary.txt").open("a") as diary:
        diary.write(f"{number}\\n")

@flow
async def handle(event: Event) -> None:
    data = event.data
    await note(int(data["n"] if "n" in data else data.get("key") or data["name"]))

def child() -> None:
    for n in range(0, LINES, 2):
        print("from the child", os.getpid(), n)
        logging.getLogger("child").warning("from the child %d %d", os.getpid(), n + 1)
    (HERE / f"child-{os.getpid()}").touch()
    while not (HERE / "end").exists():
        time.sleep(0.02)
    os._exit(0)

def fork(how: str) -> int:
    if how == "os.fork":
        return os.fork() or child()
    if how == "multiprocessing":
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        return process.pid
    return subprocess.Popen([sys.executable, "-c", CHILD, str(HERE)], close_fds=False).pid

@task
async def on_the_loop(how: str) -> int:
    return fork(how)

@task
def in_a_thread(how: str) -> int:
    return fork(how)

@flow
async def forking(how: str, thread: bool) -> int:
    return await (in_a_thread if thread else on_the_loop)(how)

kind = {"Kafka": Kafka, "S3": S3, "Directory": Directory}[os.environ["KIND"]]
source = kind(os.environ["PLACE"], **json.loads(os.environ["OPTIONS"]), name="source")
app = App("forks", threads=4)
app.on(source, handle)
app.add(forking)
"""

LINES = 20
"""The line that each child logs, half of them by `print`."""

KAFKA = {
    "noida": {"group_instance_id": "server", "session_timeout_ms": 6_000},
    "tansu": {
        "session_timeout_ms": 1_000,
        "heartbeat_interval_ms": 200,
        "rebalance_timeout_ms": 1_000,
    },
}


class Sender:
    """Sends items to a source: `put(n)` sends item n. `env` tells the app which source it is."""

    def __init__(
        self,
        put: Callable[[int], object],
        kind: str,
        place: str,
        options: Mapping[str, Any],
        env: Mapping[str, str] | None = None,
    ) -> None:
        given = {"KIND": kind, "PLACE": place, "OPTIONS": json.dumps(options), "LINES": str(LINES)}
        self.env = {**given, **(env or {})}
        self.sent = 0
        self._put = put

    def send(self, count: int = 5) -> None:
        for _ in range(count):
            self._put(self.sent)
            self.sent += 1

    def arrived(self, server: EventflowProcess) -> None:
        """Waits until each item is one event with one run, which is completed."""

        def listed(path: str) -> list[dict[str, Any]]:
            return server.get(f"/api/{path}&limit=1000")[path.partition("?")[0]]

        wait_until(
            lambda: (
                len(listed("events?trigger=source")) >= self.sent
                and server.get("/api/counts")["pending"] == 0
            ),
            f"{self.sent} items are recorded and their runs have ended",
            within=40,
        )
        assert len(listed("events?trigger=source")) == self.sent
        assert [run["state"] for run in listed("runs?flow=handle")] == ["completed"] * self.sent
        assert {int(line) for line in server.diary} == set(range(self.sent))


@contextmanager
def kafka(folder: Path, kind: str) -> Iterator[Sender]:
    with tansu() if kind == "tansu" else noida(folder / "broker") as broker:
        topic = asyncio.run(broker.create())
        options = {
            "bootstrap_servers": broker.server,
            "group_id": "forks",
            "fetch_max_wait_ms": 100,
            **KAFKA[kind],
        }
        yield Sender(lambda n: asyncio.run(broker.send(topic, {"n": n})), "Kafka", topic, options)


@contextmanager
def s3(folder: Path) -> Iterator[Sender]:
    with aws_server("ministack", folder) as aws:
        bucket = Bucket(aws)
        queue = bucket.queue()
        options = {"queue": queue.url, "wait": 1, "visibility": 3}
        yield Sender(lambda n: bucket.put(str(n)), "S3", bucket.name, options, aws.env)


@contextmanager
def directory(folder: Path) -> Iterator[Sender]:
    inbox = folder / "inbox"
    inbox.mkdir()
    options = {"settle": 0.1}
    yield Sender(lambda n: (inbox / str(n)).write_text("data"), "Directory", str(inbox), options)


SOURCES: dict[str, Callable[[Path], AbstractContextManager[Sender]]] = {
    "kafka on noida": lambda folder: kafka(folder, "noida"),
    "kafka on tansu": lambda folder: kafka(folder, "tansu"),
    "s3": s3,
    "directory": directory,
}

WAYS = [
    (how, thread)
    for how in ("os.fork", "multiprocessing", "subprocess")
    for thread in (True, False)
]


@pytest.mark.parametrize("name", SOURCES)
def test_forks_while_a_source_is_at_work(tmp_path: Path, name: str) -> None:
    """Bodies fork in each way while a source is at work. A child has no TCP socket and no lock,
    logs, and ends by SIGTERM; every item is recorded once and runs once, also when the server is
    killed and another one, with another hash seed, starts on its port while children are alive.
    """
    children: list[int] = []
    with SOURCES[name](tmp_path) as source:
        try:
            with serve(tmp_path, source) as server:
                source.send()
                source.arrived(server)
                for how, thread in WAYS:
                    source.send(2)
                    run = server.start("forking", how=how, thread=thread)
                    children.append(server.wait_for(run, "completed")["result"])
                    source.send(2)
                for child, way in zip(children, WAYS, strict=True):
                    _keeps_nothing(tmp_path, child, way)
                source.arrived(server)
                for child in children[::2]:
                    os.kill(child, signal.SIGTERM)
                    wait_until(lambda child=child: not _is_alive(child), "it ends by SIGTERM")
                source.send()
                source.arrived(server)
                assert len(server.diary) == source.sent
                lines = server.log
                for child, (how, _) in zip(children, WAYS, strict=True):
                    wanted = 0 if how == "subprocess" else 1  # that one has its own output
                    for n in range(LINES):
                        assert lines.count(f'"from the child {child} {n}"') == wanted
                port = server.url.rpartition(":")[2]
                source.send()
                server.kill()
            assert all(_is_alive(child) for child in children[1::2])
            source.send()
            with serve(tmp_path, source, "--port", port, seed=2) as server:
                source.send()
                source.arrived(server)
                assert server.stop() == 0
        finally:
            (tmp_path / "end").touch()
            for child in children:
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)


def serve(folder: Path, source: Sender, *options: str, seed: int = 1):
    (folder / "forks.py").write_text(APP)
    env = {**source.env, "PYTHONHASHSEED": str(seed)}
    return serving(folder, "--log", "json", *options, file="forks.py", env=env)


def _keeps_nothing(folder: Path, child: int, way: tuple[str, bool]) -> None:
    wait_until((folder / f"child-{child}").exists, f"{way}: the child has logged")
    tcp = {
        fields[9]: f"{fields[1]} {fields[2]}"
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/{child}/net/{table}").read_text().splitlines()[1:]
        if (fields := line.split())
    }
    held: list[str] = []
    for each in Path(f"/proc/{child}/fd").iterdir():
        with suppress(OSError):
            target = os.readlink(each)
            if target.startswith("socket:["):
                held += [f"socket {tcp[inode]}"] if (inode := target[8:-1]) in tcp else []
            if "lock:" in Path(f"/proc/{child}/fdinfo/{each.name}").read_text():
                held.append(f"lock of {target}")
    assert not held, (way, held)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
