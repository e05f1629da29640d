"""Again when a file changes: the parent of `dev` and of `run --watch`.

`dev` binds the socket once and hands it to each child it starts: while one ends and the next
begins, connections queue in the kernel, so a webhook that arrives then is answered late, not
refused. A child that was killed begins anew at once, one that cannot start (a syntax error) at the
next change; either is told.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from watchfiles import PythonFilter, watch

from eventflow.core.errors import AppNotFound
from eventflow.server.server import Settings, bind_socket

RELOAD_GRACE_SECONDS = 3.0
"""Seconds an edit waits for attempts under way; what does not end is interrupted, and goes on in
the new code.
"""

POLL_INTERVAL_SECONDS = 1.0
"""Seconds between two looks whether the child still lives; so a child that dies at once begins anew
that often.
"""


class Reloader:
    """The Python files beside a target."""

    def __init__(self, where: str) -> None:
        path = Path(where)
        self.folder = path.resolve().parent if path.exists() else Path.cwd()
        self.stop = threading.Event()

    def changes(self) -> Iterator[set[str]]:
        """The names of changed files; every `LOOK` seconds without a change, none."""
        found_by = watch(
            self.folder, watch_filter=PythonFilter(), stop_event=self.stop, raise_interrupt=False,
            rust_timeout=int(POLL_INTERVAL_SECONDS * 1000), yield_on_timeout=True,
        )  # fmt: skip
        for found in found_by:
            yield {os.path.relpath(path, self.folder) for _, path in found}

    def repeat(self, *_: str) -> int:
        """This very command without `--watch`, now and after every change, until Ctrl-C."""
        command = [
            sys.executable,
            "-m",
            "eventflow",
            *(arg for arg in sys.argv[1:] if arg != "--watch"),
        ]
        stop_on(self.stop, signal.SIGTERM)
        code = subprocess.run(command, check=False).returncode
        for changed in filter(None, self.changes()):
            _say(f"{', '.join(sorted(changed))} changed")
            code = subprocess.run(command, check=False).returncode
        return code


def stop_on(stop: threading.Event, *signals: signal.Signals) -> None:
    def handle(_number: int, _frame: Any) -> None:
        stop.set()

    for number in signals:
        signal.signal(number, handle)


def serve_with_reload(target: str, host: str, port: int, flags: list[str]) -> int:
    """`serve` in a child on a socket of ours, a new child after each change."""
    where = target.partition(":")[0]
    if where.endswith(".py") and not Path(where).is_file():
        raise AppNotFound(target, f"there is no file {where}")
    sock = bind_socket(Settings(host=host, port=port))
    sock.listen(2048)
    sock.set_inheritable(True)
    watching = Reloader(where)
    command = [
        sys.executable,
        "-m",
        "eventflow",
        "serve",
        target,
        "--fd",
        str(sock.fileno()),
        *flags,
    ]
    child = _ChildServer(command, sock.fileno())
    stop_on(watching.stop, signal.SIGINT, signal.SIGTERM)
    child.start()
    for changed in watching.changes():
        if changed:
            _say(f"{', '.join(sorted(changed))} changed, beginning anew")
            child.stop(RELOAD_GRACE_SECONDS)
            child.start()
        elif (code := child.take_exit_code()) is not None:
            _on_exit(child, code)
    return child.stop(None)


def _on_exit(child: "_ChildServer", code: int) -> None:
    """What ended without being asked: killed, the next one takes its runs up; by itself, only
    another code may mend it.
    """
    if code < 0:
        _say(f"the server was ended by {signal.Signals(-code).name}, beginning anew")
        child.start()
    else:
        _say(f"the server ended with exit code {code}; it begins anew when a *.py file changes")


class _ChildServer:
    """The server of the moment."""

    def __init__(self, command: list[str], fd: int) -> None:
        self._command, self._fd = command, fd
        self._process: subprocess.Popen[bytes] | None = None
        self._exit_reported = False

    def start(self) -> None:
        self._exit_reported = False
        self._process = subprocess.Popen(self._command, pass_fds=[self._fd], start_new_session=True)

    def take_exit_code(self) -> int | None:
        """Its exit code, once, when it ended by itself; below 0 the signal that killed it."""
        if self._exit_reported or self._process is None or (code := self._process.poll()) is None:
            return None
        self._exit_reported = True
        return code

    def stop(self, grace: float | None) -> int:
        """Asks it to drain; with a `grace`, no longer than that. Its exit code."""
        process = self._process
        assert process is not None
        if process.poll() is None:
            process.terminate()
        try:
            return process.wait(grace)
        except subprocess.TimeoutExpired:
            process.terminate()  # the second signal: it does not wait for attempts any more
            return process.wait()


def _say(text: str) -> None:
    sys.stderr.write(f"eventflow: {text}\n")
