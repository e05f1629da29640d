"""Retry of many, and the bars of long commands: on a terminal of its own width, and in a pipe."""

import asyncio
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from eventflow import App, Permanent, flow
from eventflow.logs.progress import Progress, can_redraw
from tests.conftest import wait_until
from tests.server_process import EventflowProcess, command, environment, eventflow, serving
from triggers._files.post_actions import _copy

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


class OnTerminal:
    """A command whose stdin and stderr are a terminal of `columns`; COLUMNS is not set."""

    def __init__(self, folder: Path, columns: int, *args: str, **env: str) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.process = subprocess.Popen(
            command(*args),
            cwd=folder,
            env=environment(TERM="xterm", **env),
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=theirs,
            text=True,
        )
        os.close(theirs)
        self._shown = b""

    def __enter__(self) -> "OnTerminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        os.close(self._ours)

    @property
    def shown(self) -> str:
        """What the terminal got so far."""
        while select.select([self._ours], [], [], 0)[0]:
            try:
                self._shown += os.read(self._ours, 1 << 16)
            except OSError:  # the other side is closed
                break
        return self._shown.decode()

    def has_ended(self) -> bool:
        _ = self.shown  # a full terminal would stop it
        return self.process.poll() is not None

    def printed(self) -> str:
        """Its stdout, once it has ended."""
        wait_until(self.has_ended, "the command has ended", within=60)
        return self.process.communicate()[0]


def on_terminal(folder: Path, columns: int, *args: str) -> tuple[int, str, str]:
    """Exit code, stdout, and what the terminal got on stderr."""
    with OnTerminal(folder, columns, *args) as it:
        printed = it.printed()
        return it.process.returncode, printed, it.shown


def bars_and_lines(shown: str) -> tuple[list[str], list[str]]:
    """The bars, and the lines that stay, of what a terminal got: each bar was erased by the next
    bar or by the lines above it.
    """
    *bars, last = re.split(r"\r\x1b\[K", shown.replace("\r\n", "\n"))
    lines = [part.rpartition("\n")[0] for part in (*bars, last)]
    return [part.rpartition("\n")[2] for part in bars], "\n".join(filter(None, lines)).split("\n")


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
    assert (none.returncode, none.stdout) == (0, "no run is cancelled\n")
    assert eventflow(shop.folder, "retry", "--flow", "bill").returncode == 2


STEPS = """
from asyncio import sleep
from eventflow import flow, task

@task
async def step(n: int) -> int:
    print(f"step {n} begins")
    await sleep(0.3)
    return n

@flow
async def work() -> int:
    return sum([await step(n) for n in range(5)])
"""


@pytest.mark.parametrize("columns", [80, 100])
def test_run_watch_has_a_bar_below_its_lines(tmp_path: Path, columns: int):
    """`run --watch` on a terminal counts the calls that have ended; from the second run on it knows
    how many there will be, and shows a bar with the time left. Log lines stand above it, whole. An
    edit during a run repeats it.
    """
    (tmp_path / "steps.py").write_text(STEPS)
    with OnTerminal(tmp_path, columns, "run", "steps.py:work", "--watch") as watching:
        wait_until(lambda: "step 3 begins" in watching.shown, "the first run", within=30)
        (tmp_path / "steps.py").write_text(STEPS + "\n")
        wait_until(lambda: watching.shown.count("run.completed") == 2, "the second run", within=30)
        wait_until(lambda: watching.shown.endswith("\n"), "the bar is removed")
        watching.process.send_signal(signal.SIGINT)
        wait_until(watching.has_ended, "Ctrl-C ends it")
        assert watching.process.returncode == 0 and "Interrupt" not in watching.shown
        bars, lines = bars_and_lines(watching.shown)
    known = r"  \[[#-]{20}\] +\d+%  [0-5]/5 calls  ([\d.]+/s  .+ left|[0-9] s)"
    unknown = r"  [0-5] calls(  [\d.]+/s)?  [0-9] s"
    for pattern in (known, unknown):
        assert any(re.fullmatch(f"running work{pattern}", bar) for bar in bars), bars
    for bar in filter(None, bars):
        assert len(bar) < columns
        assert re.fullmatch(f"running work({known}|{unknown})", bar), bar
    printed = [line for line in lines if "begins" in line]
    assert len(printed) == 10
    assert all(re.match(r"\S*\d\d:\d\d:\d\d\.\d{3}", line) for line in printed), printed


LANDING = """
from eventflow import App, flow
from eventflow.logs import progress
from triggers import Directory, {after}

progress.FIRST_DRAWN_SECONDS = 0.0

@flow
async def land(name: str) -> None: ...

app = App("landing")
app.on(Directory("landing", settle=0.2, after={after_value}), land)
"""

FILES = 400


@pytest.mark.parametrize(
    ("after", "value"),
    [("move", 'move("done")'), ("outcome, move", 'outcome(completed=move("done"))')],
)
def test_moves_of_many_files_have_a_bar(tmp_path: Path, after: str, value: str):
    """While a server on a terminal moves files, a bar below its log lines counts them; it is
    removed when they are moved.
    """
    landing = tmp_path / "landing"
    landing.mkdir()
    for n in range(FILES):
        (landing / f"{n}.csv").write_text(f"{n}\n" * 1000)
    (tmp_path / "shop.py").write_text(LANDING.format(after=after, after_value=value))
    arguments = ("serve", "shop.py", "--port", "0", "--log", "pretty")
    with OnTerminal(tmp_path, 80, *arguments) as serving_it:
        done = landing / "done"

        def are_moved() -> bool:
            _ = serving_it.shown
            return done.exists() and len(list(done.iterdir())) == FILES

        wait_until(are_moved, "all files are moved", within=60)
        serving_it.process.terminate()
        serving_it.printed()
        bars, lines = bars_and_lines(serving_it.shown)
    drawn = [bar for bar in bars if bar]
    assert any(bar.startswith("moving") for bar in drawn)
    for bar in drawn:
        assert len(bar) < 80
        assert re.fullmatch(
            r"(moving|reading) landing/  \[[#-]{20}\] +\d+%  \d+/\d+(  [\d.,]+/s  .+ left)?", bar
        ), bar
    assert not any("landing/  [" in line for line in lines)


def test_a_bar_of_files_moves_within_a_large_file(tmp_path: Path):
    """The copy of a large file to another device moves the bar by its share."""
    source, target = os.fsencode(tmp_path / "a"), os.fsencode(tmp_path / "b")
    Path(tmp_path / "a").write_bytes(b"x" * (5 << 19))
    seen: list[str] = []
    progress = Progress("moving", 1, show=seen.append, after=0.0)
    assert _copy(source, target, threading.Event(), progress)
    assert progress.done == 1.0
    assert seen[0].startswith("moving  [########------------]   40%  0/1  ")


def test_a_dumb_terminal_gets_no_bar(monkeypatch: pytest.MonkeyPatch):
    """Where TERM=dumb says that a line cannot be erased, no bar is drawn."""
    monkeypatch.setenv("TERM", "dumb")
    ours, theirs = pty.openpty()
    try:
        with open(theirs, "w", closefd=False) as stream:
            assert not can_redraw(stream)
            monkeypatch.setenv("TERM", "xterm")
            assert can_redraw(stream)
    finally:
        os.close(ours)
        os.close(theirs)


def test_an_error_in_colour_takes_the_whole_line(shop: EventflowProcess):
    """An error of 73 columns stays on one line of a terminal of 80, although its label is red."""
    with OnTerminal(shop.folder, 80, "explain", "nothing", NO_COLOR="") as it:
        wait_until(it.has_ended, "the command has ended", within=30)
        shown = it.shown
    line = "no event matches 'nothing'; `eventflow ls events` lists what there is"
    assert shown == f"\x1b[31merror:\x1b[0m {line}\r\n"
