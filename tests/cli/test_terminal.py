"""What a person sees: lines that fit 80 and 100 columns, and streams that are closed or ASCII."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from eventflow.cli.inspect import gauge_text
from eventflow.cli.output import table
from eventflow.cli.run_text import event_text
from eventflow.core.clock import SystemClock, duration_text
from eventflow.logs.progress import Progress
from eventflow.runs.run import Ids, format_id
from tests.conftest import wait_until
from tests.server_process import EventflowProcess, command, environment, eventflow, serving


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EventflowProcess]:
    """A server with completed orders, one with a long id, and a failed run with a long message."""
    with serving(tmp_path_factory.mktemp("shop")) as served:
        for ident in ("good", "good", "注文" * 40):
            served.post("/hooks/orders", {"id": ident, "total": 5})
        served.post("/hooks/orders", {"id": "small", "total": -1})
        wait_until(lambda: served.get("/api/counts")["completed"] == 2, "the orders are done")
        served.wait_for(served.start("failing", message="no such luck " * 2000), "failed")
        yield served


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize(
    "args",
    [
        ("ls",),
        ("ls", "events"),
        ("ls", "triggers"),
        ("ls", "flows"),
        ("explain", "small"),
        ("explain", "good"),
        ("doctor",),
    ],
    ids=" ".join,
)
def test_output_fits_the_terminal(shop: EventflowProcess, args: tuple[str, ...], columns: int):
    """No line of a list or an explanation is wider than the terminal."""
    done = eventflow(shop.folder, *args, COLUMNS=str(columns))
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= columns, done.stdout


def test_lists_bound_what_they_repeat(shop: EventflowProcess):
    """A message of 26,000 characters makes no list longer than a page."""
    assert len(eventflow(shop.folder, "ls", "--json").stdout) < 10_000


def test_show_prints_an_error_once(shop: EventflowProcess):
    """`show` without an id is the last run, and repeats neither its error nor its parameters."""
    text = eventflow(shop.folder, "show", COLUMNS="80").stdout
    assert "failing" in text and text.count("ValueError: no such luck") == 1
    assert "see below" in text and (" ago" in text or ", now" in text)


REST = """
import asyncio
import time
from eventflow import App, Retry, flow, task

@task(retries=Retry(attempts=3, delay=3600, jitter=False))
async def fetch(name: str) -> str:
    raise ConnectionError(f"no answer from {name}")

@task(retries=Retry(attempts=1))
async def check(rows: int) -> None:
    assert rows > 10, f"expected more than 10 rows in the orders of yesterday, found {rows}"

@task(timeout=0.2, retries=Retry(attempts=1))
def stuck(seconds: float) -> None:
    time.sleep(seconds)

@task
async def square(n: int) -> int:
    return n * n

@flow
async def fetching(name: str) -> str:
    return await fetch(name)

@flow
async def checking(rows: int) -> None:
    await check(rows)

@flow
async def sticking(seconds: float) -> None:
    await stuck(seconds)

@task
async def rest(name: str) -> None:
    await asyncio.sleep(3600)

@flow
async def resting(name: str) -> None:
    await rest(name)

@flow
async def mapping(n: int) -> int:
    return sum(await square.map(range(n)))

app = App("rest")
for each in (fetching, checking, sticking, mapping, resting):
    app.add(each)
"""


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EventflowProcess, str, str]]:
    """A server with a run that waits for a retry and a failed check, whose ids follow; and with a
    body that ran on after its timeout, and a long map.
    """
    folder = tmp_path_factory.mktemp("rest")
    (folder / "shop.py").write_text(REST)
    with serving(folder) as served:
        waiting = served.start("fetching", name="the warehouse")
        failed = served.start("checking", rows=3)
        served.wait_for(served.start("sticking", seconds=600), "failed")
        served.wait_for(served.start("mapping", n=300), "completed")
        served.wait_for(waiting, "waiting")
        served.wait_for(failed, "failed")
        yield served, waiting, failed


def text_of(served: EventflowProcess, *args: str) -> str:
    """What a command prints on a terminal of 80 columns; no line is wider."""
    done = eventflow(served.folder, *args, COLUMNS="80")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80, done.stdout
    return done.stdout


def test_a_waiting_run_shows_its_due_time(rest: tuple[EventflowProcess, str, str]):
    """`ls` says when a waiting run is due; `show` says it before the error, uncut."""
    served, waiting, _ = rest
    assert "due in 59 min" in text_of(served, "ls")
    shown = text_of(served, "show", waiting)
    assert "next attempt in 59 min; ConnectionError: no answer from the warehouse" in shown


def test_a_failed_check_is_one_traceback(rest: tuple[EventflowProcess, str, str]):
    """The frames of the flow and those of the task, then the error, once."""
    served, _, failed = rest
    shown = eventflow(served.folder, "show", failed, COLUMNS="80").stdout
    assert shown.count("Traceback") == 1 and "recorded traceback" not in shown
    assert "in checking" in shown and "in check\n" in shown
    assert shown.count("AssertionError: expected more than 10 rows") == 1


def test_ls_failed(rest: tuple[EventflowProcess, str, str]):
    """`ls --failed` lists what failed, with a reason that is read whole in 80 columns."""
    served, waiting, failed = rest
    listed = text_of(served, "ls", "--failed")
    assert failed in listed and waiting not in listed
    assert "TaskTimedOut: task 'stuck' ran longer than its timeout of 0.2 s" in listed


def test_a_long_map_shows_how_long_its_calls_took(rest: tuple[EventflowProcess, str, str]):
    """The spread of a map's calls is not cut."""
    served, _, _ = rest
    run = served.get("/api/runs", flow="mapping")["runs"][0]["id"]
    assert "(longest)" in text_of(served, "show", run)


SHOW_SECONDS = 10.0
"""For `show` on a busy machine, with the start of Python."""


@pytest.fixture(scope="module")
def large(
    rest: tuple[EventflowProcess, str, str],
) -> tuple[EventflowProcess, str, str]:
    """A server with a completed map of 10,000 calls and a run whose body works for long."""
    served, _, _ = rest
    whole = served.start("mapping", n=10_000)
    working = served.start("resting", name="the night " * 20)
    wait_until(
        lambda: served.get(f"/api/runs/{whole}")["state"] == "completed", "all calls", within=120
    )
    return served, whole, working


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("which", ["map", "working"])
def test_show_of_any_run_fits_the_terminal(
    large: tuple[EventflowProcess, str, str], columns: int, which: str
):
    """`show` of a map of 10,000 calls, and of a run whose body still works, fits the terminal and
    answers within seconds.
    """
    served, whole, working = large
    run = whole if which == "map" else working
    started = time.monotonic()
    done = eventflow(served.folder, "show", run, COLUMNS=str(columns))
    seconds = time.monotonic() - started
    printed = done.stdout
    assert done.returncode == 0, done.stderr
    assert run in printed and max(map(len, printed.splitlines())) <= columns, printed
    assert ("10,000" if which == "map" else "running") in printed, printed
    assert len(printed) < 10_000
    assert seconds < SHOW_SECONDS


def test_status_names_threads_left_behind(rest: tuple[EventflowProcess, str, str]):
    """A plain body that runs on after its timeout is counted in `status` and in /metrics."""
    served, _, _ = rest
    text = text_of(served, "status")
    assert "runs executed  yes" in text and "1 left behind" in text
    assert served.get("/api/status")["threads_left_behind"] == 1
    metrics = served.client.get("/metrics").text
    assert "eventflow_threads_left_behind 1.0" in metrics


def test_logs_name_the_task(rest: tuple[EventflowProcess, str, str]):
    """A line of a task names it and its attempt; an error has no module in front."""
    served, _, failed = rest
    text = eventflow(served.folder, "logs", failed).stdout
    assert "check#1" in text and "builtins:" not in text
    done = eventflow(served.folder, "logs", COLUMNS="80")
    assert done.returncode == 0, done.stderr


def test_a_kind_is_no_command(rest: tuple[EventflowProcess, str, str]):
    """Where a kind of `ls` is given as a command, the error says which command lists it."""
    served, _, _ = rest
    for given, kind in (("dead", "dead-letters"), ("runs", "runs")):
        done = eventflow(served.folder, given)
        assert done.returncode == 2 and f"eventflow ls {kind}" in done.stderr


def test_wrong_retries_of_a_flow_are_refused(tmp_path: Path):
    """`@flow(retry_delay=)` names the option to write, with file and line."""
    (tmp_path / "f.py").write_text(
        "from eventflow import flow\n\n\n@flow(retry_delay=3)\nasync def f() -> None: ...\n"
    )
    done = eventflow(tmp_path, "run", "f.py:f")
    assert done.returncode == 2 and "retries=Retry(" in done.stderr and "f.py:4" in done.stderr


@pytest.mark.parametrize("redirect", [">&-", "2>&-", "| head -c 0"])
def test_a_closed_stdout_fails_no_run(tmp_path: Path, redirect: str):
    """A run that completed is exit 0, whatever becomes of its output."""
    (tmp_path / "f.py").write_text(
        "from eventflow import flow\n\n\n@flow\nasync def f() -> str:\n    return 'a…é'\n"
    )
    shell = f"set -o pipefail; {' '.join(command('run', 'f.py:f'))} {redirect}"
    done = subprocess.run(
        ["bash", "-c", shell], cwd=tmp_path, env=environment(), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_ascii_stdout_fails_no_run(tmp_path: Path):
    """An ASCII stdout takes the result of a run."""
    (tmp_path / "f.py").write_text(
        "from eventflow import flow\n\n\n@flow\nasync def f() -> str:\n    return 'a…é'\n"
    )
    done = eventflow(tmp_path, "run", "f.py:f", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0 and done.stdout.startswith('"a')


def test_text_for_an_ascii_terminal_is_ascii(tmp_path: Path):
    """Text and errors replace what an ASCII stream cannot show; JSON keeps every character."""
    (tmp_path / "f.py").write_text(
        "from eventflow import flow\n\n\n@flow\nasync def f() -> str:\n"
        "    print('naïve…')\n    return 'naïve…'\n"
    )
    ascii_only: dict[str, Any] = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    eventflow(tmp_path, "run", "f.py:f")
    shown = eventflow(tmp_path, "show", **ascii_only).stdout
    assert shown.isascii() and r"na\xefve..." in shown
    assert r"na\xefve..." in eventflow(tmp_path, "logs", **ascii_only).stdout
    assert "naïve…" in eventflow(tmp_path, "show", "--json", **ascii_only).stdout
    refused = eventflow(tmp_path, "show", "näh", **ascii_only)
    assert r"'n\xe4h'" in refused.stderr


def test_bare_command_prints_help(tmp_path: Path):
    """`eventflow` alone prints its help, with real line ends."""
    done = eventflow(tmp_path)
    assert done.returncode == 0 and "Usage: eventflow" in done.stdout and "\\n" not in done.stdout


def test_ends_of_ids_differ():
    """The last four letters of ids tell apart runs that begin one after the other."""
    ids = Ids()
    ends = [format_id(ids.next(1_764_000_000_000_000 + n * 1000))[-4:] for n in range(5000)]
    assert len(set(ends)) == len(ends)


def test_a_long_detail_is_wrapped_below_its_row():
    """A detail that does not fit beside its row is shown whole below it, on the allowed lines."""
    rows = [{"check": "ledger", "detail": "sums hold: 1,975 events, 4,012 runs, 1 dead"}]
    text = table(rows, ("check", "detail"), "", width=40, reason_lines=3)
    assert click.unstyle(text).splitlines()[1:] == [
        "ledger",
        "    sums hold: 1,975 events, 4,012 runs,",
        "    1 dead",
    ]


def test_explain_prints_the_whole_reason():
    """Why an event could not be bound is not cut at the width of the terminal."""
    why = "flow 'order' cannot bind parameter 'order': Expected `str`, got `int` - at `$.order.id`"
    verdict = {"subscription": "webhook-orders/order", "outcome": "invalid", "reason": why}
    fields = dict.fromkeys(("type", "source", "subject", "trigger", "conflicts", "event"))
    event = {"id": "e", "event_id": "e", "received_at": "2026-01-31T08:00:00Z", "duplicates": 0}
    text = event_text({**fields, **event, "verdicts": [verdict]}, 80)
    assert " ".join(text.split()).endswith(why) and max(map(len, text.splitlines())) <= 80


def test_gauges_are_readable():
    """A gauge is its name and number; one that is an instant says how long until then."""
    soon = SystemClock().now() / 1e6 + 3600.5
    assert gauge_text("next_timestamp_seconds", soon) == "next in 1 h"
    assert gauge_text("lag_messages", 12.0) == "lag_messages 12"


def test_durations_and_bars():
    """Durations are short; a bar says how many, how fast, and how long still."""
    assert [duration_text(s) for s in (0.31, 12.44, 192, 187200)] == [
        "310 ms", "12.4 s", "3 m 12 s", "2 d 4 h",
    ]  # fmt: skip
    bar = Progress("retrying", 1000, show=None)
    bar.done = 700
    assert bar.line(2.0) == "retrying  [##############------]   70%  700/1,000  350/s  857 ms left"
