"""Memory limits, on a server whose tasks really take memory: over the soft one it begins no runs, over the hard one it replaces
itself, and nothing is lost.
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
from tests.server_process import Served, eventflow, serving

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
    while not (HERE / "let go").exists():
        await asyncio.sleep(0.05)
    return f"{len(taken)} let go"

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


def lines(served: Served, event: str) -> list[dict[str, Any]]:
    return [
        found
        for line in served.log.splitlines()
        if line.startswith("{") and (found := json.loads(line))["event"] == event
    ]


def ready_again(served: Served) -> None:
    """Waits for the life after this one."""
    wait_until(lambda: len(lines(served, "app.started")) > 1, "the next life has begun", within=60)


def send(served: Served, number: int, mb: int) -> None:
    """As a sender does: again, until it is told that the event is recorded. A connection is never refused."""

    def sent() -> bool:
        with suppress(
            httpx2.ReadError, httpx2.RemoteProtocolError, httpx2.ReadTimeout
        ):  # a connection of the life before
            return served.post("/hooks/orders", {"number": number, "mb": mb}).status_code in (
                200,
                202,
            )
        return False

    wait_until(sent, f"order {number} is recorded", within=60)


def asked(served: Served, path: str) -> dict[str, Any]:
    """The answer of whichever life gives one."""
    answers: list[dict[str, Any]] = []

    def answered() -> bool:
        with suppress(httpx2.ReadError, httpx2.RemoteProtocolError, httpx2.ReadTimeout):
            answer = served.client.get(path)
            answers.extend([answer.json()] if answer.status_code == 200 else [])
        return bool(answers)

    wait_until(answered, f"{path} is answered", within=60)
    return answers[0]


def completed(served: Served) -> int:
    return asked(served, "/api/counts")["completed"]


def test_row_35_over_the_soft_limit_no_runs_are_begun(folder: Path):
    """Over --memory-soft events are recorded and their runs wait, which readyz, metrics, ls and the log say; once memory is
    back below it they are begun.
    """
    with serving(folder, "--memory-soft", "260MB", "--log", "json") as served:
        hoarder = served.start("hoarding", mb=250)
        wait_until(lambda: "hoarding" in served.diary, "memory is taken")
        wait_until(lambda: lines(served, "memory.short"), "the server says so")
        send(served, 1, 0)
        assert "--memory-soft is 260MB" in served.get("/readyz")["worker"]
        metrics = served.client.get("/metrics").text
        assert (
            "eventflow_worker_held_back 1.0" in metrics
            and "process_resident_memory_bytes" in metrics
        )
        (run,) = served.get("/api/events/1")["runs"]
        assert run["state"] == "pending"
        assert "short of memory" in eventflow(folder, "ls", "--state", "pending").stdout
        (folder / "let go").touch()
        assert served.wait_for(hoarder, "completed")["result"] == "250 let go"
        served.wait_for(run["id"], "completed")
        wait_until(lambda: lines(served, "memory.recovered"), "the server says so")
        assert served.get("/readyz") == {"ready": True}
        assert len(lines(served, "app.started")) == 1


def test_row_35_over_the_hard_limit_the_process_begins_anew(folder: Path):
    """Over --memory-hard the server drains and replaces itself: same pid, same socket, no connection refused. The run that
    leaks goes on where it was, in as many lives as it takes; only what was cut off is done again, once in each.
    """
    with serving(folder, "--memory-hard", "240MB", "--grace", "0.1", "--log", "json") as served:
        run = served.start("leaking", leaks=60)  # 480 MB in all
        for number in range(20):
            send(served, number, 0)
        ready_again(served)
        assert (
            served.process.stdout is not None
            and json.loads(served.process.stdout.readline()) == served.ready
        )
        wait_until(lambda: completed(served) == 21, "everything is done", within=90)
        assert asked(served, f"/api/runs/{run}")["result"] == sum(range(60))
        assert asked(served, "/api/counts")["accepted"] == 21
        lives = len(lines(served, "app.started"))
        assert lives >= 3 and len(lines(served, "memory.exceeded")) >= lives - 1
        assert 80 <= len(served.diary) <= 80 + lives
        assert served.process.poll() is None and Path(f"{served.store}.lock").exists()
        assert served.stop() == 0


def test_row_35_what_leaked_does_not_come_back(folder: Path):
    """Over --memory-soft with nothing left to do the process is replaced: waiting would be for ever. Each run is done once. A
    socket that was handed over by --fd is kept: nobody else has it.
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


def test_row_35_a_signal_ends_a_process_that_is_replacing_itself(folder: Path):
    """SIGTERM while it drains for want of memory is a stop: it ends with 0 and does not begin anew."""
    with serving(folder, "--memory-hard", "240MB", "--grace", "3", "--log", "json") as served:
        served.start("hoarding", mb=250)
        wait_until(lambda: lines(served, "server.stopping"), "it drains")
        assert served.stop() == 0
        assert len(lines(served, "app.started")) == 1


def test_a_limit_below_what_the_app_takes_is_told_not_kept(folder: Path):
    """An app whose lifespan takes more than the limits would be replaced for ever: an error says so, and its runs are begun."""
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
        wait_until(lambda: lines(served, "memory.limit_too_low"), "the server says so")
        send(served, 1, 0)
        wait_until(lambda: completed(served) == 1, "its run is begun")
        assert not lines(served, "memory.short") and not lines(served, "memory.exceeded")


def test_sizes() -> None:
    """Sizes are what people write; anything else is refused, and says what was expected."""
    assert [parse_size("x", text) for text in ("2GB", "2g", "1.5 GiB", "512Mi", "1024", "3kB")] == [
        2 * 10**9, 2 * 10**9, 3 << 29, 512 << 20, 1024, 3000
    ]  # fmt: skip
    for text in ("", "GB", "2X", "-1GB", "2 GB RAM", "i"):
        with pytest.raises(UsageError, match=r"--memory-soft expected a size such as 2GB"):
            parse_size("--memory-soft", text)


def test_limits_that_cannot_be_kept(folder: Path) -> None:
    """A limit under what the program takes by itself, or a soft one over the hard one, is refused at the start with 2."""
    assert resident() > 10_000_000
    check_limits(resident() * 2, resident() * 3)
    with pytest.raises(UsageError, match="less than --memory-hard"):
        check_limits(3 << 30, 2 << 30)
    done = eventflow(folder, "serve", "shop.py", "--port", "0", "--memory-hard", "10MB")
    assert done.returncode == 2 and "the program alone takes" in done.stderr
