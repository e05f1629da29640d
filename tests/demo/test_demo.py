"""`eventflow demo` holds what it shows: it ends well and in time, stays up when asked, cleans up,
and tells what broke.
"""

import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import httpx2

from eventflow.core.clock import SystemClock
from eventflow.demo.report import Report
from tests.conftest import wait_until


@contextmanager
def playing(folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The demo as a process of its own; its folders are made in `folder`."""
    command = [sys.executable, "-m", "eventflow", "demo", *options]
    process = subprocess.Popen(
        command,
        env={**os.environ, "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout
    with process.stdout:
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def lines_until(process: subprocess.Popen[str], text: str) -> list[str]:
    """What it prints, up to the line with `text` in it."""
    assert process.stdout
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"expected {text!r}, found:\n{''.join(lines)}")


def servers(lines: list[str]) -> list[tuple[str, int]]:
    """Where each life of the server was, and its process."""
    found = re.findall(r"ready +(http://\S+), process (\d+)", "".join(lines))
    return [(url, int(pid)) for url, pid in found]


def test_the_demo_holds_in_twenty_seconds(tmp_path: Path):
    """Two lives of one server around a kill -9, every sentence checked, exit code 0, nothing left
    behind, no colours.
    """
    began = time.monotonic()
    with playing(tmp_path) as process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert time.monotonic() - began < 20
    assert "BROKEN" not in out and "\x1b" not in out
    assert out.count("  ok      ") == 14
    (first, second) = servers([out])
    assert first[0] == second[0] and first[1] != second[1]
    for line_pattern in (
        r"score\(order-3\), attempt 2: ConnectionError",
        r"recovered +score\(order-3\), attempt 3",
        r"kill -9 .* runs were",
    ):
        assert re.search(line_pattern, out)
    assert list(tmp_path.iterdir()) == []


def test_the_demo_stays_up_until_it_is_stopped(tmp_path: Path):
    """With --serve the second life answers after the demo, also to the commands that it shows;
    SIGTERM ends both with exit code 0, nothing is left behind.
    """
    with playing(tmp_path, "--serve") as process:
        lines = lines_until(process, "eventflow emit")
        url, pid = servers(lines)[-1]
        assert httpx2.get(f"{url}/readyz").json() == {"ready": True}
        shown = next(at for at, line in enumerate(lines) if "In another terminal" in line)
        env = {
            **os.environ,
            "PATH": "/usr/bin:/bin",
        }  # as in a terminal where no virtual environment is active
        command = ["bash", "-ec", "".join(line.strip() + "\n" for line in lines[shown + 1 :])]
        output = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=60, check=True
        ).stdout
        assert "handle_order" in output and "msg-odd" in output and "recorded" in output, output
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 0, out
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the server is gone")
    assert list(tmp_path.iterdir()) == []


def test_a_demo_that_breaks_reports_it(tmp_path: Path):
    """A server that dies by another hand breaks the demo: exit code 1, its last words, and the
    folder is kept to look at.
    """
    with playing(tmp_path) as process:
        (_, pid) = servers(lines_until(process, "ready"))[0]
        os.kill(pid, signal.SIGKILL)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 1, out
    assert "BROKEN" in out and "The last lines of" in out
    (folder,) = tmp_path.iterdir()
    assert (folder / "shop.py").is_file()


def test_a_taken_port_is_reported(tmp_path: Path):
    """When the server cannot start, the demo repeats why, and ends with exit code 1."""
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        playing(tmp_path, "--port", str(taken.getsockname()[1])) as process,
    ):
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "did not start" in out and "taken by another process" in out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_on_a_terminal_only(monkeypatch):
    """Colour goes to a terminal, unless NO_COLOR; what does not hold is counted."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    for stream, coloured in ((Terminal(), True), (io.StringIO(), False)):
        report = Report(stream, SystemClock())
        report.timeline("kill -9", "gone")
        report.check(True, "this holds")
        report.check(False, "this does not", "something else")
        assert ("\x1b[" in stream.getvalue()) is coloured
        assert (
            report.failed_checks == 1 and "this does not; found something else" in stream.getvalue()
        )
    monkeypatch.setenv("NO_COLOR", "1")
    report = Report(plain := Terminal(), SystemClock())
    report.timeline("kill -9", "gone")
    assert "\x1b[" not in plain.getvalue()


def test_long_lines_are_wrapped_on_a_terminal(monkeypatch):
    """On a terminal a long text continues below its beginning, in a pipe it is one line."""
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for stream, lines in (
        (Terminal(), ["  ok      every 202 is one event in the", "          ledger"]),
        (io.StringIO(), ["  ok      every 202 is one event in the ledger"]),
    ):
        Report(stream, SystemClock()).check(True, "every 202 is one event in the ledger")
        assert click.unstyle(stream.getvalue()).splitlines() == lines
