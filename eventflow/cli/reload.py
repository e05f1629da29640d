"""Restarts on file changes: the parent process of `eventflow dev` and of `eventflow run --watch`.

`dev` binds the socket once and passes it to each child server. During a restart connections queue
in the kernel, so a webhook that arrives then is answered late instead of refused. A killed child is
restarted at once, one that exits (a syntax error) after the next change; both are reported.
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

from eventflow.cli.output import note
from eventflow.core.errors import AppNotFound, UsageError
from eventflow.server.server import Settings, bind_socket

RELOAD_GRACE_SECONDS = 3.0
"""Time for running attempts to end; the others are interrupted, and run again in the new code."""

POLL_INTERVAL_SECONDS = 1.0
"""Interval between two checks of the child, and so between two restarts of one that keeps dying."""

ENV_FILE = ".env"
"""Loaded from the working directory by each child (target.py)."""


class Reloader:
    """Watches the Python files in the folder of a target, and `.env` in the working directory."""

    def __init__(self, target: str) -> None:
        path = Path(target)
        self.folder = path.resolve().parent if path.exists() else Path.cwd()
        self.stop = threading.Event()

    def changes(self) -> Iterator[set[str]]:
        """The names of changed files; an empty set after each poll interval without a change."""
        batches = watch(
            self.folder,
            watch_filter=PythonFilter(),
            stop_event=self.stop,
            raise_interrupt=False,
            rust_timeout=int(POLL_INTERVAL_SECONDS * 1000),
            yield_on_timeout=True,
        )
        env_version = _version_of(ENV_FILE)
        for found in self._readable(batches):
            changed = {os.path.relpath(path, self.folder) for _, path in found}
            if (version := _version_of(ENV_FILE)) != env_version:
                env_version = version
                changed.add(ENV_FILE)
            yield changed

    def _readable(self, batches: Iterator[set[Any]]) -> Iterator[set[Any]]:
        try:
            yield from batches
        except RuntimeError as error:  # of watchfiles: a name that is not UTF-8
            raise UsageError(
                f"the folder {self.folder} cannot be watched: {error}; rename that file, or "
                "use `eventflow serve`"
            ) from None

    def repeat(self) -> int:
        """Run this command without `--watch`, now and after every change, until Ctrl-C. A change
        during a run repeats it when it has ended.
        """
        arguments = [arg for arg in sys.argv[1:] if arg != "--watch"]
        command = [sys.executable, "-m", "eventflow", *arguments]
        process = subprocess.Popen(command)

        def end(number: int, _frame: Any) -> None:
            self.stop.set()
            if number == signal.SIGTERM:  # Ctrl-C reaches the run too
                process.terminate()

        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, end)
        for changed in filter(None, self.changes()):
            process.wait()
            note(f"{', '.join(sorted(changed))} changed")
            process = subprocess.Popen(command)
        code = process.wait()
        return code if code >= 0 else 128 - code


def _version_of(path: str) -> tuple[int, int, int] | None:
    """What changes with each write of a file; None without the file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def stop_on(stop: threading.Event, *signals: signal.Signals) -> None:
    def handle(_number: int, _frame: Any) -> None:
        stop.set()

    for number in signals:
        signal.signal(number, handle)


def serve_with_reload(target: str, host: str, port: int, flags: list[str]) -> int:
    """Run `eventflow serve` in a child process on a socket of this one; restart it after each
    change. The exit code of the last child.
    """
    where = target.partition(":")[0]
    if where.endswith(".py") and not Path(where).is_file():
        raise AppNotFound(target, f"there is no file {where}")
    sock = bind_socket(Settings(host=host, port=port))
    sock.listen(2048)
    sock.set_inheritable(True)
    reloader = Reloader(where)
    fd = sock.fileno()
    serve = [sys.executable, "-m", "eventflow", "serve", target, "--fd", str(fd), *flags]
    child = _ChildServer(serve, fd)
    # The child is in a session of its own: it does not get the SIGHUP of a closed terminal.
    stop_on(reloader.stop, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    child.start()
    try:
        for changed in reloader.changes():
            if changed:
                note(f"{', '.join(sorted(changed))} changed, restarting")
                child.stop(RELOAD_GRACE_SECONDS)
                child.start()
            elif (code := child.take_exit_code()) is not None:
                _on_exit(child, code)
    except BaseException:  # it cannot watch: the server must not stay behind
        child.stop(None)
        raise
    return child.stop(None)


def _on_exit(child: "_ChildServer", code: int) -> None:
    """Restart a server that was killed: the next one continues its runs. One that exited by itself
    would do so again until the code changes.
    """
    if code < 0:
        note(f"the server was ended by {signal.Signals(-code).name}, restarting")
        child.start()
    else:
        note(
            f"the server ended with exit code {code}; it restarts when a *.py file or .env changes"
        )


class _ChildServer:
    """The current server process."""

    def __init__(self, command: list[str], fd: int) -> None:
        self._command = command
        self._fd = fd
        self._process: subprocess.Popen[bytes] | None = None
        self._exit_reported = False

    def start(self) -> None:
        self._exit_reported = False
        self._process = subprocess.Popen(self._command, pass_fds=[self._fd], start_new_session=True)

    def take_exit_code(self) -> int | None:
        """The exit code of a server that ended by itself, once; negative for a signal."""
        if self._exit_reported or self._process is None or (code := self._process.poll()) is None:
            return None
        self._exit_reported = True
        return code

    def stop(self, grace: float | None) -> int:
        """Drain the server, for at most `grace` seconds if given. Its exit code."""
        process = self._process
        assert process is not None
        if process.poll() is None:
            process.terminate()
        try:
            return process.wait(grace)
        except subprocess.TimeoutExpired:
            process.terminate()  # a second signal ends the wait for attempts
            return process.wait()
