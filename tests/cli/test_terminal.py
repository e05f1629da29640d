"""What a person sees: lines that fit 80 and 100 columns, and streams that are closed or ASCII."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from eventflow.cli.progress import Progress
from eventflow.cli.times import duration_text
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
    assert "see below" in text and " ago" in text


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


def test_bare_command_prints_help(tmp_path: Path):
    """`eventflow` alone prints its help, with real line ends."""
    done = eventflow(tmp_path)
    assert done.returncode == 0 and "Usage: eventflow" in done.stdout and "\\n" not in done.stdout


def test_ends_of_ids_differ():
    """The last four letters of ids tell apart runs that begin one after the other."""
    ids = Ids()
    ends = [format_id(ids.next(1_764_000_000_000_000 + n * 1000))[-4:] for n in range(5000)]
    assert len(set(ends)) == len(ends)


def test_durations_and_bars():
    """Durations are short; a bar says how many, how fast, and how long still."""
    assert [duration_text(s) for s in (0.31, 12.44, 192, 187200)] == [
        "310 ms", "12.4 s", "3 m 12 s", "2 d 4 h",
    ]  # fmt: skip
    bar = Progress("retrying", 1000)
    bar.done = 700
    assert bar.line(2.0) == "retrying  [##############------]   70%  700/1,000  350/s  857 ms left"
