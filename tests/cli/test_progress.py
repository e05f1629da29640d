"""Retry of many, and the bars of long commands: on a terminal of its own width, and in a pipe."""

import asyncio
import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from eventflow import App, Permanent, flow
from tests.conftest import wait_until
from tests.server_process import EventflowProcess, command, environment, eventflow, serving

FAILED = 300
"""Runs to retry: enough that the command takes some tenths of a second."""

PROGRAM = """
from eventflow import App, Permanent, flow

@flow
async def order(n: int) -> int:
    raise Permanent("no")

@flow
async def bill(n: int) -> int:
    raise Permanent("no")

app = App("shop")
app.add(order)
app.add(bill)
"""


@flow
async def order(n: int) -> int:
    raise Permanent("no")


@flow
async def bill(n: int) -> int:
    raise Permanent("no")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EventflowProcess]:
    """A server on a store with failed runs: `FAILED` orders, and three bills."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / ".eventflow").mkdir()

    async def fill() -> None:
        app = App("shop", store=f"sqlite:///{folder}/.eventflow/shop.db")
        async with app:
            runs = [await app.start(order, n=n) for n in range(FAILED)]
            runs += [await app.start(bill, n=n) for n in range(3)]
            await asyncio.gather(*(run.result() for run in runs), return_exceptions=True)

    asyncio.run(fill())
    (folder / "shop.py").write_text(PROGRAM)
    with serving(folder) as served:
        yield served


def on_terminal(folder: Path, columns: int, *args: str) -> tuple[int, str, str]:
    """Exit code, stdout, and what the terminal got on stderr; COLUMNS is not set."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        command(*args),
        cwd=folder,
        env=environment(),
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
    )
    os.close(theirs)
    shown = b""

    def has_ended() -> bool:
        nonlocal shown
        while select.select([ours], [], [], 0)[0]:
            try:
                shown += os.read(ours, 1 << 16)
            except OSError:  # the other side is closed
                break
        return process.poll() is not None

    try:
        wait_until(has_ended, "the command has ended", within=60)
        has_ended()
    finally:
        process.kill()
        os.close(ours)
    assert process.stdout is not None
    with process.stdout:
        return process.returncode, process.stdout.read(), shown.decode()


def states(served: EventflowProcess) -> int:
    return served.get("/api/counts")["failed"]


@pytest.mark.parametrize("columns", [80, 100])
def test_a_bar_fits_its_terminal_and_is_removed(shop: EventflowProcess, columns: int):
    """`retry --state` on a terminal draws a bar with a rate and the time left, as wide as the
    terminal at most, and removes it; stdout has the result only.
    """
    wait_until(lambda: states(shop) == FAILED + 3, "all have failed")
    code, printed, shown = on_terminal(
        shop.folder, columns, "retry", "--state", "failed", "--flow", "order"
    )
    assert (code, printed) == (0, f"{FAILED} of {FAILED} failed runs retried\n"), shown
    *drawn, last = [frame for frame in re.split(r"\r", shown) if frame]
    assert last == "\x1b[K" and drawn
    for frame in drawn:
        bar = frame.removesuffix("\x1b[K")
        assert len(bar) < columns
        assert re.fullmatch(
            rf"retrying  \[[#-]{{20}}\] +\d+%  \d+/{FAILED}  [\d.,]+/s  .+ left", bar
        ), bar


def test_a_pipe_gets_no_bar(shop: EventflowProcess):
    """In a pipe `retry --state` writes its result and nothing else, as text and as JSON."""
    wait_until(lambda: states(shop) == FAILED + 3, "all have failed")
    done = eventflow(shop.folder, "retry", "--state", "failed", "--flow", "order")
    assert (done.stdout, done.stderr) == (f"{FAILED} of {FAILED} failed runs retried\n", "")
    wait_until(lambda: states(shop) == FAILED + 3, "all have failed")
    done = eventflow(shop.folder, "retry", "--state", "failed", "--flow", "bill", "--json")
    assert done.stderr == "" and json.loads(done.stdout)["matched"] == 3


def test_retry_of_many_takes_the_flow_and_the_state_that_it_is_given(shop: EventflowProcess):
    """`--flow` and `--state` choose the runs, oldest first; the others are left alone, and a dry
    run leaves all.
    """
    wait_until(lambda: states(shop) == FAILED + 3, "all have failed")
    bills = [run["id"] for run in shop.get("/api/runs?flow=bill")["runs"]][::-1]
    tokens = {run: shop.get(f"/api/runs/{run}") for run in bills}
    many = ("retry", "--state", "failed", "--flow", "bill")
    assert eventflow(shop.folder, *many, "--dry-run").stdout == "3 failed runs would be retried\n"
    assert {run: shop.get(f"/api/runs/{run}") for run in bills} == tokens
    orders = shop.get("/api/runs?flow=order&limit=1000")["runs"]
    done = eventflow(shop.folder, *many, "--json")
    assert json.loads(done.stdout) == {"matched": 3, "retried": bills}
    wait_until(lambda: states(shop) == FAILED + 3, "the bills have failed again")
    assert shop.get("/api/runs?flow=order&limit=1000")["runs"] == orders
    none = eventflow(shop.folder, "retry", "--state", "cancelled")
    assert (none.returncode, none.stdout) == (0, "0 of 0 cancelled runs retried\n")
    assert eventflow(shop.folder, "retry", "--flow", "bill").returncode == 2
