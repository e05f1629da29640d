"""The command line beside a program that has an App of its own: it reads the store without the
lock, and says what it cannot do there.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.server_process import environment, eventflow

HOST = """
import asyncio, sys
from eventflow import App, Permanent, current_run, flow, sleep

@flow
async def order(n: int) -> int:
    current_run().log.info("an order came in")
    return n * 2

@flow
async def bad() -> None:
    raise Permanent("no such luck")

@flow
async def long() -> None:
    await sleep(3600)

async def main() -> None:
    app = App("shop")
    app.add(order, bad, long)
    async with app:
        done = await app.start(order, n=21)
        await done.result()
        failed = await app.start(bad)
        await asyncio.gather(failed.result(), return_exceptions=True)
        sleeps = await app.start(long)
        print(done.id, failed.id, sleeps.id, flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        later = await app.start(order, n=1)
        print(await later.result(), flush=True)

asyncio.run(main())
"""


class Host(NamedTuple):
    folder: Path
    process: subprocess.Popen[str]
    done: str
    failed: str
    sleeps: str


@contextmanager
def hosted(folder: Path) -> Iterator[Host]:
    """A program without a server that has the store in `folder` open."""
    (folder / "host.py").write_text(HOST)
    process = subprocess.Popen(
        [sys.executable, "host.py"],
        cwd=folder,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield Host(folder, process, *process.stdout.readline().split())
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with hosted(tmp_path_factory.mktemp("host")) as made:
        yield made


def messages(host: Host) -> str:
    """What a command says on stderr beside its output."""
    return (
        f"eventflow: process {host.process.pid} has the store open without a server: "
        "reading it as it is now\n"
    )


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        (("ls",), "completed"),
        (("ls", "runs", "--state", "failed"), "no such luck"),
        (("show", "DONE"), "42"),
        (("show", "FAILED"), "Permanent: no such luck"),
        (("logs", "DONE"), "an order came in"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_the_store_of_an_embedded_app_is_read(host: Host, args: tuple[str, ...], shown: str):
    """`ls`, `show` and `logs` read the store that another process has open, and say so once."""
    names = {"DONE": host.done, "FAILED": host.failed}
    done = eventflow(host.folder, *(names.get(each, each) for each in args))
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
    assert done.stderr == messages(host)


def test_json_of_an_embedded_store_is_whole(host: Host):
    """The note stands on stderr, so that `--json` stays JSON."""
    done = eventflow(host.folder, "ls", "runs", "--json")
    assert {run["flow"] for run in json.loads(done.stdout)["runs"]} >= {"order", "bad", "long"}


@pytest.mark.parametrize(
    "args",
    [
        ("retry", "FAILED"),
        ("retry", "--state", "failed"),
        ("cancel", "SLEEPS"),
        ("emit", "thing.made", "--data", "{}"),
        ("pause", "src"),
    ],
    ids=" ".join,
)
def test_what_would_change_an_embedded_store_is_refused(host: Host, args: tuple[str, ...]):
    """A command that writes ends with 75, names the process that has the store and what to do, and
    changes nothing.
    """
    names = {"FAILED": host.failed, "SLEEPS": host.sleeps}
    (host.folder / "app.py").write_text(HOST.partition("async def main")[0] + "app = App('shop')\n")
    before = eventflow(host.folder, "ls", "runs", "--json").stdout
    command = (names.get(each, each) for each in args)
    done = eventflow(host.folder, *command, "--app", "app.py")
    assert done.returncode == 75, (done.stdout, done.stderr)
    assert done.stdout == ""
    error = done.stderr.removeprefix(messages(host))
    assert f"process {host.process.pid} has {os.path.realpath(host.folder)}" in error
    assert "can only read" in error and "in that program, or stop it" in error
    assert eventflow(host.folder, "ls", "runs", "--json").stdout == before


def test_reading_disturbs_no_embedded_app(tmp_path: Path):
    """After all that, the program that has the store continues, and its next run completes."""
    with hosted(tmp_path) as host:
        assert eventflow(host.folder, "ls").returncode == 0
        assert eventflow(host.folder, "cancel", host.sleeps).returncode != 0
        assert host.process.stdin is not None and host.process.stdout is not None
        host.process.stdin.write("\n")
        host.process.stdin.flush()
        assert host.process.stdout.readline() == "2\n"
        assert host.process.wait(30) == 0
