"""Takes over a process's logging and output: `logging`, structlog, and what flows and tasks print.

`serve`, `dev`, `run` and `eventflow.testing` call `configure`; a program that only imports
eventflow never does. Until `close`, whatever code inside a run logs or prints becomes a line with
the run's ids, in the log store of the run too; outside of a run, prints pass through unchanged.
`close` restores everything. Lines go to the `LogOutput` of output.py.
"""

import logging
import sys
import threading
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, BinaryIO, Final, Literal, Self, TextIO, cast

import structlog

from eventflow.core.clock import Clock, SystemClock
from eventflow.core.forks import call_in_forked_children
from eventflow.logs.log import LOGGER, LogContext, log_context
from eventflow.logs.output import LogOutput
from eventflow.logs.redaction import SECRETS, Redactor

Level = Literal["debug", "info", "warning", "error"]

MAX_PARTIAL_CHARACTERS: Final = 8192
"""Characters printed without a newline that become a line nevertheless."""


class StreamCapture:
    """Replaces `sys.stdout` or `sys.stderr`: text printed inside a run becomes lines of that run.

    With `echo` the text is also printed. Everything else (`fileno`, `buffer`, `encoding`) is that
    of the original stream.
    """

    def __init__(self, original: TextIO, name: str, output: LogOutput, *, echo: bool) -> None:
        self._original = original
        self._name = name
        self._output = output
        self._echo = echo
        self._lock = threading.RLock()
        call_in_forked_children(self._after_fork)

    def write(self, text: str) -> int:
        context = log_context.get()
        if context is None or self._echo:
            self._output.erase_progress()
            self._original.write(text)
        if context is not None:
            self._split(context, text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def _split(self, context: LogContext, text: str) -> None:
        with self._lock:
            if context.partial_lines is None:
                context.partial_lines = {}
            *lines, rest = (context.partial_lines.get(self.log_line, "") + text).split("\n")
            if len(rest) > MAX_PARTIAL_CHARACTERS:
                lines.append(rest)
                rest = ""
            # A progress bar overwrites its line: only what is visible last is kept.
            context.partial_lines[self.log_line] = rest.rpartition("\r")[2]
        for line in lines:
            self.log_line(context, line)

    def log_line(self, context: LogContext, line: str) -> None:
        """Log a printed line as it is visible on a terminal."""
        visible = line.rstrip("\r").rpartition("\r")[2]
        if visible and self._output.level <= logging.INFO:
            self._output.write_line(logging.INFO, self._name, visible, {}, context)

    def _after_fork(self) -> None:
        self._lock = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


class LogConfiguration:
    """What `configure` has set up. `close`, or the end of `with`, restores the state before."""

    def __init__(self, output: LogOutput, restore: ExitStack) -> None:
        self.output = output
        self._restore = restore

    def flush(self) -> None:
        """Write all queued lines to the stream. Call it before `os._exit`."""
        self.output.flush()

    def close(self) -> None:
        """Idempotent."""
        self._restore.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def configure(
    *,
    stream: BinaryIO | TextIO | None,
    pretty: bool | None = None,
    level: Level = "info",
    redactor: Redactor = SECRETS,
    clock: Clock | None = None,
    capture: bool = True,
) -> LogConfiguration:
    """Send every line of the process to `stream`: pretty on a terminal (or by `pretty`), else JSON
    lines.

    `capture=False` leaves prints alone. With `stream=None` nothing is written and the host's
    handlers stay: lines made inside a run go to its log store, and prints are also printed (for
    tests).
    """
    number = logging.getLevelNamesMapping()[level.upper()]
    output = LogOutput(
        stream, pretty=pretty, level=number, redactor=redactor, clock=clock or SystemClock()
    )
    restore = ExitStack()
    restore.callback(output.close)
    _capture_logging(output, restore, replace_handlers=stream is not None)
    if stream is not None or not _host_configured_structlog():
        _capture_structlog(output, number, restore)
    if capture:
        for name in ("stdout", "stderr"):
            _capture_stream(name, output, restore, echo=stream is None)
    return LogConfiguration(output, restore)


def _capture_logging(output: LogOutput, restore: ExitStack, *, replace_handlers: bool) -> None:
    root = logging.getLogger()
    restore.callback(root.setLevel, root.level)
    root.setLevel(min(root.level, output.level) if root.level else output.level)
    if replace_handlers:
        before = root.handlers[:]
        root.handlers.clear()
        restore.callback(lambda: [root.addHandler(handler) for handler in before])
        restore.callback(setattr, LOGGER, "propagate", LOGGER.propagate)
        LOGGER.propagate = False
        LOGGER.handlers.insert(0, output)
        restore.callback(LOGGER.removeHandler, output)
    root.addHandler(output)
    restore.callback(root.removeHandler, output)


def _structlog_config() -> dict[str, Any]:
    config = structlog.get_config()
    return {**config, "processors": list(config["processors"])}


_DEFAULT_STRUCTLOG: Final = None if structlog.is_configured() else _structlog_config()


def _host_configured_structlog() -> bool:
    """Whether the host chose a configuration: `structlog.testing.capture_logs` leaves structlog
    "configured" with its defaults.
    """
    return structlog.is_configured() and _structlog_config() != _DEFAULT_STRUCTLOG


def _capture_structlog(output: LogOutput, level: int, restore: ExitStack) -> None:
    """The user's structlog loggers end in a processor that hands each event to the output."""

    def forward(logger: str, method: str, fields: Any) -> Any:
        event = fields.pop("event", "")
        output.write_line(
            _METHOD_LEVELS.get(method, logging.INFO),
            logger,
            event if isinstance(event, str) else repr(event),
            fields,
            log_context.get(),
        )
        raise structlog.DropEvent

    if structlog.is_configured():
        before = structlog.get_config()
        restore.callback(lambda: structlog.configure(**before))
    else:
        restore.callback(structlog.reset_defaults)
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, forward],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        context_class=dict,
        logger_factory=lambda *names: str(names[0]) if names else "app",
        cache_logger_on_first_use=False,  # a cached logger would outlive `close`
    )


_METHOD_LEVELS: Final = {
    "debug": 10, "info": 20, "msg": 20, "warning": 30, "warn": 30,
    "error": 40, "exception": 40, "critical": 50, "fatal": 50,
}  # fmt: skip


def _capture_stream(name: str, output: LogOutput, restore: ExitStack, *, echo: bool) -> None:
    original = cast(TextIO, getattr(sys, name))
    stream = StreamCapture(original, name, output, echo=echo)
    setattr(sys, name, stream)

    def put_back() -> None:
        if getattr(sys, name) is stream:
            setattr(sys, name, original)

    restore.callback(put_back)
