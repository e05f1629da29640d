"""Memory limits, on a server whose tasks really take memory: over the soft one it starts no runs,
over the hard one it re-executes itself, on the same socket.
"""

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

from eventflow.core.errors import UsageError
from eventflow.server.memory_limits import check_limits, parse_size, resident
from tests.conftest import wait_until
from tests.server_process import EventflowProcess, eventflow, serving

LEAKING = """
import asyncio
from pathlib import Path
from eventflow import App
from eventflow import flow, task
from triggers import Webhook

HERE = Path(__file__).parent
KEPT = []

def note(text):
    with (HERE / "diary.txt").open("a") as diary:
        diary.write(text + "\\n")

@task
async def hoard(mb: int) -> str:
    taken = [b"%d" % n * (1 << 19) for n in range(10, 10 + mb)]
    note("hoarding")
    while not (HERE / "release").exists():
        await asyncio.sleep(0.05)
    return f"{len(taken)} released"

@task
async def leak(number: int, mb: int) -> int:
    KEPT.extend(b"%d" % n * (1 << 19) for n in range(10, 10 + mb))
    await asyncio.sleep(0.05)
    note(f"leak {number}")
    return number

@flow
async def hoarding(mb: int) -> str:
    return await hoard(mb)

@flow
async def leaking(leaks: int) -> int:
    return sum([await leak(number, 8) for number in range(leaks)])

@flow
async def order(number: int, mb: int = 0) -> int:
    return await leak(number, mb)

app = App("leaky", concurrency=1)
app.on(Webhook("/orders", verify="none", id="number"), order)
for each in (hoarding, leaking):
    app.add(each)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "shop.py").write_text(LEAKING)
    yield tmp_path


def lines(served: EventflowProcess, event: str) -> list[dict[str, Any]]:
    return [
        found
        for line in served.log.splitlines()
        if line.startswith("{") and (found := json.loads(line))["event"] == event
    ]


def ready_again(served: EventflowProcess) -> None:
    """Waits for the re-executed process."""
    wait_until(
        lambda: len(lines(served, "app.started")) > 1,
        "the re-executed process has started",
        within=60,
    )


def send(served: EventflowProcess, number: int, mb: int) -> None:
    """Sends as a sender does: repeatedly, until the event is recorded. A connection is never
    refused.
    """

    def sent() -> bool:
        with suppress(
            httpx2.ReadError, httpx2.RemoteProtocolError, httpx2.ReadTimeout
        ):  # a connection of the process before
            return served.post("/hooks/orders", {"number": number, "mb": mb}).status_code in (
                200,
                202,
            )
        return False

    wait_until(sent, f"order {number} is recorded", within=60)


def get(served: EventflowProcess, path: str) -> dict[str, Any]:
    """The answer of whichever life gives one."""
    answers: list[dict[str, Any]] = []

    def answered() -> bool:
        with suppress(httpx2.ReadError, httpx2.RemoteProtocolError, httpx2.ReadTimeout):
            answer = served.client.get(path)
            answers.extend([answer.json()] if answer.status_code == 200 else [])
        return bool(answers)

    wait_until(answered, f"{path} is answered", within=60)
    return answers[0]


def completed(served: EventflowProcess) -> int:
    return get(served, "/api/counts")["completed"]


def test_row_35_over_the_soft_limit_no_runs_start(folder: Path):
    """Over --memory-soft events are recorded and their runs wait, as readyz, metrics, ls and the
    log show; once memory is back below it, they run.
    """
    with serving(folder, "--memory-soft", "260MB", "--log", "json") as served:
        hoarder = served.start("hoarding", mb=250)
        wait_until(lambda: "hoarding" in served.diary, "memory is taken")
        wait_until(lambda: lines(served, "memory.soft_limit_exceeded"), "the server logs it")
        send(served, 1, 0)
        assert "--memory-soft is 260MB" in served.get("/readyz")["worker"]
        metrics = served.client.get("/metrics").text
        assert (
            "eventflow_worker_paused 1.0" in metrics and "process_resident_memory_bytes" in metrics
        )
        (run,) = served.get("/api/events/1")["runs"]
        assert run["state"] == "pending"
        assert "short of memory" in eventflow(folder, "ls", "--state", "pending").stdout
        (folder / "release").touch()
        assert served.wait_for(hoarder, "completed")["result"] == "250 released"
        served.wait_for(run["id"], "completed")
        wait_until(lambda: lines(served, "memory.recovered"), "the server logs it")
        assert served.get("/readyz") == {"ready": True}
        assert len(lines(served, "app.started")) == 1


def test_row_35_over_the_hard_limit_the_process_re_executes_itself(folder: Path):
    """Over --memory-hard the server drains and re-executes itself: same pid, same socket, no
    connection refused. The leaking run resumes after each re-exec; only an attempt that was cut off
    is repeated, once per process.
    """
    with serving(folder, "--memory-hard", "240MB", "--grace", "0.1", "--log", "json") as served:
        run = served.start("leaking", leaks=60)  # 480 MB in all
        for number in range(20):
            send(served, number, 0)
        ready_again(served)
        assert (
            served.process.stdout is not None
            and json.loads(served.process.stdout.readline()) == served.ready_line
        )
        wait_until(lambda: completed(served) == 21, "everything is done", within=90)
        assert get(served, f"/api/runs/{run}")["result"] == sum(range(60))
        assert get(served, "/api/counts")["accepted"] == 21
        processes = len(lines(served, "app.started"))
        assert processes >= 3 and len(lines(served, "memory.hard_limit_exceeded")) >= processes - 1
        assert 80 <= len(served.diary) <= 80 + processes
        assert served.process.poll() is None and Path(f"{served.store}.lock").exists()
        assert served.stop() == 0


def test_row_35_a_stuck_process_re_executes_itself(folder: Path):
    """Over --memory-soft with no run left at work the process re-executes itself, since it would
    wait forever. Each run is done once.
    """
    sock = socket.create_server(("127.0.0.1", 0))
    options = ("--memory-soft", "240MB", "--log", "json", "--fd", str(sock.fileno()))
    with serving(folder, *options, pass_fds=[sock.fileno()]) as served:
        sock.close()
        for number in range(16):
            send(served, number, 16)
        ready_again(served)
        wait_until(lambda: completed(served) == 16, "everything is done", within=60)
        assert sorted(served.diary) == sorted(f"leak {number}" for number in range(16))


def test_row_35_a_signal_ends_a_process_that_drains_for_memory(folder: Path):
    """SIGTERM during a drain for memory ends the process with 0; it does not re-execute itself."""
    with serving(folder, "--memory-hard", "240MB", "--grace", "3", "--log", "json") as served:
        served.start("hoarding", mb=250)
        wait_until(lambda: lines(served, "server.stopping"), "it drains")
        assert served.stop() == 0
        assert len(lines(served, "app.started")) == 1


def test_a_limit_below_the_size_of_the_app_is_not_enforced(folder: Path):
    """An app whose lifespan takes more than the limits would restart forever: an error is logged,
    and its runs start.
    """
    model = """
from contextlib import asynccontextmanager

@asynccontextmanager
async def model():
    yield [b"%d" % n * (1 << 19) for n in range(10, 260)]

app = App("leaky", lifespan=model)
"""
    (folder / "shop.py").write_text(LEAKING.replace('app = App("leaky", concurrency=1)', model))
    with serving(
        folder, "--memory-soft", "220MB", "--memory-hard", "240MB", "--log", "json"
    ) as served:
        wait_until(lambda: lines(served, "memory.limit_too_low"), "the server logs it")
        send(served, 1, 0)
        wait_until(lambda: completed(served) == 1, "its run is begun")
        assert not lines(served, "memory.soft_limit_exceeded") and not lines(
            served, "memory.hard_limit_exceeded"
        )


def test_sizes() -> None:
    """Sizes are parsed as people write them; anything else raises and names what was expected."""
    assert [parse_size("x", text) for text in ("2GB", "2g", "1.5 GiB", "512Mi", "1024", "3kB")] == [
        2 * 10**9,
        2 * 10**9,
        3 << 29,
        512 << 20,
        1024,
        3000,
    ]
    for text in ("", "GB", "2X", "-1GB", "2 GB RAM", "i"):
        with pytest.raises(UsageError, match=r"--memory-soft expected a size such as 2GB"):
            parse_size("--memory-soft", text)


def test_limits_that_cannot_be_enforced(folder: Path) -> None:
    """A limit below what the program alone takes, or a soft one above the hard one, exits 2 at the
    start.
    """
    assert resident() > 10_000_000
    check_limits(resident() * 2, resident() * 3)
    with pytest.raises(UsageError, match="less than --memory-hard"):
        check_limits(3 << 30, 2 << 30)
    done = eventflow(folder, "serve", "shop.py", "--port", "0", "--memory-hard", "10MB")
    assert done.returncode == 2 and "the program alone takes" in done.stderr
