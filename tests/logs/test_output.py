"""The stream: pretty on a terminal, JSON elsewhere; complete after any end except a kill; never
blocking.
"""

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from eventflow.logs.capture import configure
from eventflow.logs.log import get_logger
from eventflow.logs.output import MAX_QUEUED_BYTES, LineStyle, format_line
from eventflow.logs.redaction import Redactor
from tests.conftest import wait_until

ROOT = Path(__file__).parents[2]
HEAD = """\
import sys, os, logging, threading
from eventflow.logs.capture import configure
from eventflow.logs.log import get_logger
"""


def program(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-c", HEAD + code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )


def on_a_terminal(code: str, **env: str) -> str:
    """What a program writes to a terminal."""
    ours, theirs = pty.openpty()
    clean = {
        key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")
    }
    child = subprocess.Popen(
        [sys.executable, "-c", HEAD + code],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        env={**clean, "TERM": "xterm", **env},
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux says EIO when the other side is closed
            break
        if not chunk:
            break
        seen += chunk
    os.close(ours)
    assert child.wait() == 0
    return seen.decode()


def test_a_bar_stands_below_lines_and_prints():
    """On a terminal a bar is erased before each line and each print, and when its work ends."""
    shown = on_a_terminal(
        "from eventflow.logs import progress\nprogress.FIRST_DRAWN_SECONDS = 0.0\n"
        "held = configure(stream=sys.stderr)\n"
        "with progress.log_progress('moving', 10) as bar:\n"
        "    bar.step()\n    held.flush()\n    print('printed', flush=True)\n"
        "    get_logger('x').info('x.y')\n    held.flush()\n"
        "held.close()",
        NO_COLOR="1",
    )
    *parts, last = shown.replace("\r\n", "\n").split("\r\x1b[K")
    assert last == "" and parts[0].startswith("moving  [##")
    lines = "".join(part for part in parts if "\n" in part).split("\n")
    assert lines[0] == "printed" and lines[1].endswith("x.y")


def test_json_into_a_pipe():
    """Where stderr is no terminal each line is one JSON object, and stdout stays free for data."""
    done = program(
        "configure(stream=sys.stderr)\nget_logger('eventflow.app').info('app.started', "
        "port=8710)\nprint('data')"
    )
    assert done.stdout == "data\n"
    assert (
        json.loads(done.stderr).items()
        >= {"event": "app.started", "level": "info", "port": 8710}.items()
    )


def test_pretty_on_a_terminal():
    """On a terminal a line is for people: local time, level, event, fields, in colour; no control
    of a message gets through.
    """
    seen = on_a_terminal(
        "configure(stream=sys.stderr)\nget_logger('eventflow.app').info('app.started', port=8710)\n"
        "get_logger('shop').info('x\\x1b]0;title\\x07\\u202e\\nforged', field='\\x1b[2J')"
    )
    assert "\x1b[" in seen
    plain = re.sub(r"\x1b\[[0-9;]*m", "", seen)
    assert re.search(
        r"^\d\d:\d\d:\d\d\.\d{3}   app\.started +port=8710\r$",
        plain,
        re.MULTILINE,
    )
    assert "\x1b" not in plain and "\x07" not in plain and "\u202e" not in plain
    assert "\\x1b]0;title\\x07\\u202e\\nforged" in plain


def test_no_color_turns_colours_off():
    """NO_COLOR turns colours off."""
    assert "\x1b" not in on_a_terminal(
        "configure(stream=sys.stderr)\nget_logger('x').info('app.started')", NO_COLOR="1"
    )


def test_pretty_tracebacks_keep_their_lines():
    """A traceback is written completely below its line, without control characters."""
    seen = on_a_terminal(
        "configure(stream=sys.stderr)\n"
        "try: raise ValueError('bad\\x1b[2J')\nexcept ValueError: "
        "get_logger('x').exception('run.failed')",
        NO_COLOR="1",
    )
    assert "Traceback (most recent call last):\r\n" in seen and "ValueError: bad\\x1b[2J" in seen


@pytest.mark.parametrize("pretty", [True, False])
def test_pretty_overrides_the_kind_of_stream(tmp_path: Path, pretty: bool):
    """`pretty=` overrides whether the stream is a terminal."""
    with (
        open(tmp_path / "log", "wb") as file,
        configure(stream=file, pretty=pretty, redactor=Redactor()),
    ):
        get_logger("x").info("app.started")
    assert (tmp_path / "log").read_bytes().startswith(b"{") is not pretty


@pytest.mark.parametrize(
    "end",
    [
        "",
        "sys.exit(0)",
        "raise SystemExit",
        "configuration.close()",
        "configuration.flush(); os._exit(0)",
        "logging.shutdown()",
    ],
)
def test_no_line_is_lost_at_the_end(end: str):
    """All lines are written at any end of the program except a kill."""
    code = (
        "configuration = configure(stream=sys.stderr)\n"
        "for n in range(5000): get_logger('x').info('x.y', n=n)\n"
    )
    done = program(code + end)
    assert [json.loads(line)["n"] for line in done.stderr.splitlines()] == list(range(5000))


def test_lines_come_while_the_program_runs(tmp_path: Path):
    """A line waits in memory for a fraction of a second; a kill -9 loses no more."""
    path = tmp_path / "log"
    code = (
        f"configure(stream=open({str(path)!r}, 'wb'))\n"
        "get_logger('x').info('app.started')\nthreading.Event().wait()"
    )
    child = subprocess.Popen([sys.executable, "-c", HEAD + code], cwd=ROOT)
    try:
        wait_until(
            lambda: path.exists() and b"app.started" in path.read_bytes(), "the line is in the file"
        )
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()


def test_python_unbuffered():
    """Under `python -u`, as containers run it, whole lines come in order although the raw stream
    may take a part only.
    """
    done = program(
        "configure(stream=sys.stderr)\nfor n in range(2000): get_logger('x').info('x.y', n=n, "
        "text='t' * 500)",
        "-u",
    )
    assert [json.loads(line)["n"] for line in done.stderr.splitlines()] == list(range(2000))


def test_lines_of_many_threads_stay_whole(tmp_path: Path):
    """Threads that log at once lose no line, mix none, and each thread's lines keep their order."""
    path = tmp_path / "log"
    with open(path, "wb") as file, configure(stream=file, redactor=Redactor()):

        def log_lines(who: int) -> None:
            for n in range(500):
                get_logger("x").info("x.y", who=who, n=n)

        threads = [threading.Thread(target=log_lines, args=(who,)) for who in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [[line["n"] for line in found if line["who"] == who] for who in range(8)] == [
        list(range(500))
    ] * 8


def test_a_stuck_stream_blocks_nobody(tmp_path: Path):
    """A pipe that nobody reads does not block logging; once it is read again, the dropped lines are
    counted.
    """
    reader, written = os.pipe()
    file = os.fdopen(written, "wb")
    configuration = configure(stream=file, redactor=Redactor())
    text = "x" * 10_000
    total = MAX_QUEUED_BYTES // 10_000 + 500
    start = time.monotonic()
    for n in range(total):
        get_logger("x").info("x.y", n=n, text=text)
    assert time.monotonic() - start < 20
    seen = io.BytesIO()

    def drain() -> None:
        while chunk := os.read(reader, 1 << 16):
            seen.write(chunk)

    thread = threading.Thread(target=drain)
    thread.start()
    configuration.close()
    file.close()
    thread.join()
    os.close(reader)
    found = [json.loads(line) for line in seen.getvalue().splitlines()]
    kept = sum(line["event"] == "x.y" for line in found)
    lost = sum(line["lines"] for line in found if line["event"] == "log.dropped")
    assert lost > 0 and kept + lost == total


def test_a_closed_stream_stops_nobody(tmp_path: Path):
    """When the stream is gone (a closed file, a full disk) lines are lost and nothing is raised."""
    file = open(tmp_path / "log", "wb")  # noqa: SIM115
    with configure(stream=file, redactor=Redactor()) as configuration:
        file.close()
        get_logger("x").error("run.failed")
        configuration.flush()
    with (
        open("/dev/full", "wb", buffering=0) as full,
        configure(stream=full, redactor=Redactor()) as configuration,
    ):
        get_logger("x").error("run.failed")
        configuration.flush()


def test_a_text_stream_serves_too():
    """A stream without bytes beneath, such as a notebook's, is written as text."""
    stream = io.StringIO()
    with configure(stream=stream, redactor=Redactor()):
        get_logger("x").info("app.started")
    assert json.loads(stream.getvalue())["event"] == "app.started"


def test_a_forked_child_writes_its_own_lines_once():
    """A forked child has no writer thread: it writes at once, and repeats no line of its parent."""
    code = (
        "configuration = configure(stream=sys.stderr)\nlog = "
        "get_logger('x')\nlog.info('x.parent')\n"
        "child = os.fork()\n"
        "if not child: log.info('x.child'); os._exit(0)\n"
        "os.waitpid(child, 0)\nlog.info('x.parent')"
    )
    done = program(code, "-W", "ignore::DeprecationWarning")
    assert sorted(json.loads(line)["event"] for line in done.stderr.splitlines()) == [
        "x.child",
        "x.parent",
        "x.parent",
    ]


def test_a_signal_handler_may_log():
    """A handler that interrupts a line being made logs its own line, and nothing hangs or
    is torn.
    """
    code = (
        "import signal\nheld = configure(stream=sys.stderr)\nlog = get_logger('x')\n"
        "def handle(*_):\n"  # begins the next interval when it ends: it interrupts no handler
        "    log.warning('x.signal')\n    signal.setitimer(signal.ITIMER_REAL, 0.0005)\n"
        "signal.signal(signal.SIGALRM, handle)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.0005)\n"
        "for n in range(20000): log.info('x.y', n=n)\n"
        "signal.signal(signal.SIGALRM, signal.SIG_IGN)"
    )
    done = program(code)
    found = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == 0 and [line["n"] for line in found if "n" in line] == list(
        range(20000)
    )
    assert any(line["event"] == "x.signal" for line in found)


def test_a_stored_line_is_formatted_like_a_live_one():
    """`format_line` formats the fields of a line, from the stream or the log store, without
    controls.
    """
    line = {
        "timestamp": "2025-11-22T08:26:40.999999Z",
        "level": "info",
        "event": "a\x1b[31m",
        "logger": "shop",
        "n": 1,
        "d": {"k": "\x1b"},
    }
    text = format_line(line, LineStyle())
    assert "a\\x1b[31m" in text and "n=1" in text and "\x1b" not in text


def test_the_attempt_of_a_flow_is_shown():
    """The log line of a flow's failed attempt has the attempt's number, like that of a task."""
    line = {
        "timestamp": "2026-11-30T12:00:00Z",
        "level": "warning",
        "event": "run.attempt_failed",
        "flow": "order",
        "attempt": 2,
        "attempts": 3,
    }
    assert format_line(line, LineStyle()).endswith("order  attempt=2  attempts=3")
    assert format_line({**line, "task": "charge"}, LineStyle()).endswith("charge#2  attempts=3")
