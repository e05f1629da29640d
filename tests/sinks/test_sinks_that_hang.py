"""Sinks whose `send` never ends, with SIGTERM and kill -9: the process ends, and the next one sends
again what was not sent.
"""

import asyncio
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.brokers import noida
from tests.conftest import wait_until
from tests.server_process import EventflowProcess, serving

APP = """
import asyncio, os, time
from pathlib import Path

from eventflow import App, emit, flow
from triggers import KafkaSink

HERE = Path(__file__).parent
HOW = os.environ.get("HOW", "")

def block() -> None:
    while True:
        try:
            time.sleep(0.02)
        except BaseException:
            pass

async def ignore_cancels() -> None:
    while True:
        try:
            await asyncio.sleep(0.02)
        except BaseException:
            pass

async def hang(how: str) -> None:
    if how == "waits":
        await asyncio.Event().wait()
    if how == "ignores its cancel":
        await ignore_cancels()
    if how == "a thread":
        await asyncio.to_thread(block)
    if how == "blocks the loop":
        block()

class Sink:
    def __init__(self, name: str, how: str) -> None:
        self.name = name
        self.how = how

    async def send(self, *messages) -> None:
        with (HERE / f"{self.name}-begun.txt").open("a") as begun:
            begun.writelines(f"{message.event.data['n']}\\n" for message in messages)
        await hang(self.how)
        with (HERE / f"{self.name}.txt").open("a") as sent:
            sent.writelines(f"{message.event.data['n']}\\n" for message in messages)

    async def close(self) -> None:
        if HOW == "its close, too":
            await ignore_cancels()

@flow
async def makes(n: int) -> int:
    await emit("thing.made", {"n": n})
    return n

app = App("hanging")
app.add(makes)
app.send("thing.made", Sink("hanging", "waits" if HOW == "its close, too" else HOW))
app.send("thing.made", Sink("healthy", ""))
if broker := os.environ.get("BROKER"):
    app.send("thing.made", KafkaSink("made", bootstrap_servers=broker))
"""

HOWS = ("waits", "ignores its cancel", "a thread", "blocks the loop", "its close, too")
MESSAGES = 5
GRACE = 0.5


def serve(folder: Path, how: str = "", seed: int = 1, **env: str):
    (folder / "hanging.py").write_text(APP)
    env = {"HOW": how, "PYTHONHASHSEED": str(seed), **env}
    return serving(folder, "--grace", str(GRACE), file="hanging.py", env=env)


def make(server: EventflowProcess, numbers: range) -> None:
    """Starts runs that emit a message each, one after another."""
    for n in numbers:
        assert server.wait_for(server.start("makes", n=n), "completed")["result"] == n


def lines(file: Path) -> list[int]:
    return [int(line) for line in file.read_text().splitlines()] if file.exists() else []


def end(server: EventflowProcess, number: int) -> None:
    began = time.monotonic()
    server.signal(number)
    assert server.wait() == (0 if number == signal.SIGTERM else -number)
    assert time.monotonic() - began < GRACE + 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("how", HOWS)
def test_row_34_a_send_that_never_ends(tmp_path: Path, how: str, number: signal.Signals) -> None:
    """The process ends by grace + 5 s. No run waits for the sink, and no other sink unless it
    blocks their loop. The next process sends all messages in order, those of the interrupted send
    again.
    """
    sent = range(1)
    with serve(tmp_path, how) as server:
        run = server.start("makes", n=0)
        wait_until(lambda: lines(tmp_path / "hanging-begun.txt"), "the send has begun")
        if how != "blocks the loop":
            server.wait_for(run, "completed")
            sent = range(MESSAGES)
            make(server, range(1, MESSAGES))
            wait_until(lambda: lines(tmp_path / "healthy.txt") == [*sent], "the other one sends")
        end(server, number)
    assert not (tmp_path / "hanging.txt").exists()
    begun = lines(tmp_path / "hanging-begun.txt")
    with serve(tmp_path, seed=2) as server:
        wait_until(lambda: lines(tmp_path / "hanging.txt") == [*sent], "all are sent, in order")
        assert lines(tmp_path / "hanging-begun.txt") == [*begun, *sent]
        wait_until(
            lambda: sorted(set(lines(tmp_path / "healthy.txt"))) == [*sent], "by the other one too"
        )
        assert server.stop() == 0
    if how != "blocks the loop" and number == signal.SIGTERM:
        assert lines(tmp_path / "healthy.txt") == [*sent]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_row_34_a_broker_that_never_answers(tmp_path: Path, number: signal.Signals) -> None:
    """The same for a `KafkaSink` whose broker accepts connections and never answers; the topic has
    each message after a broker that answers takes its place.
    """
    with silent() as address, serve(tmp_path, BROKER=address) as server:
        make(server, range(MESSAGES))
        wait_until(
            lambda: lines(tmp_path / "healthy.txt") == [*range(MESSAGES)], "the other one sends"
        )
        end(server, number)
    with noida(tmp_path / "broker") as broker:
        asyncio.run(broker.create("made"))
        with serve(tmp_path, seed=2, BROKER=broker.server) as server:
            records = asyncio.run(broker.read("made", MESSAGES))
            assert [record.headers and record.offset for record in records] == [*range(MESSAGES)]
            assert server.stop() == 0


@contextmanager
def silent() -> Iterator[str]:
    """The address of a server that reads nothing and answers nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
