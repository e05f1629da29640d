"""Taking over a process's logging, and giving it back: `logging`, structlog, and what flows and tasks print.

`serve`, `dev`, `run` and `eventflow.testing` call `configure`; a program that merely imports eventflow never does. While it
holds, whatever code inside a run logs or prints becomes a line with the run's ids, and goes to the run's store; outside a run,
prints pass through untouched. `close` puts everything back as it was.
"""

import logging
import sys
import threading
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, BinaryIO, Final, Literal, Self, TextIO, cast

import structlog

from eventflow.core.clock import Clock, SystemClock
from eventflow.logs.log import LOGGER, Where, where
from eventflow.logs.output import Output
from eventflow.logs.redaction import SECRETS, Redactor

Level = Literal["debug", "info", "warning", "error"]

TAIL: Final = 8192
"""Characters printed without a newline after which they become a line all the same."""


class Printed:
    """Stands in for `sys.stdout` or `sys.stderr`: what is printed inside a run becomes lines of that run.

    With `echo` the text also goes where it would have gone. Everything else (`fileno`, `buffer`, `encoding`) is the original's.
    """

    def __init__(self, original: TextIO, name: str, output: Output, *, echo: bool) -> None:
        self._original, self._name, self._output, self._echo = original, name, output, echo
        self._lock = threading.RLock()

    def write(self, text: str) -> int:
        here = where.get()
        if here is None or self._echo:
            self._original.write(text)
        if here is not None:
            self._take(here, text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def _take(self, here: Where, text: str) -> None:
        with self._lock:
            if here.tails is None:
                here.tails = {}
            *lines, tail = (here.tails.get(self.say, "") + text).split("\n")
            if len(tail) > TAIL:
                lines, tail = [*lines, tail], ""
            here.tails[self.say] = tail.rpartition("\r")[
                2
            ]  # a progress bar draws over itself: what shows last is kept
        for line in lines:
            self.say(here, line)

    def say(self, here: Where, line: str) -> None:
        """One line as a person at a terminal would have seen it."""
        shown = line.rstrip("\r").rpartition("\r")[2]
        if shown and self._output.level <= logging.INFO:
            self._output.line(logging.INFO, self._name, shown, {}, here)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


class Configured:
    """Logging as `configure` left it; `close` (or the end of `with`) puts back what was there before."""

    def __init__(self, output: Output, undo: ExitStack) -> None:
        self.output, self._undo = output, undo

    def flush(self) -> None:
        """Writes what waits for the stream. Call it before `os._exit`."""
        self.output.flush()

    def close(self) -> None:
        """Idempotent."""
        self._undo.close()

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
) -> Configured:
    """Sends every line of the process to `stream`: pretty if it is a terminal (or as `pretty` says), else as JSON lines.

    `capture=False` leaves prints alone. With `stream=None` nothing is written and the host's handlers stay: lines made inside
    a run go to its store, prints also where they would have gone (for tests).
    """
    number = logging.getLevelNamesMapping()[level.upper()]
    output = Output(
        stream, pretty=pretty, level=number, redactor=redactor, clock=clock or SystemClock()
    )
    undo = ExitStack()
    undo.callback(output.close)
    _take_logging(output, undo, alone=stream is not None)
    if stream is not None or not _structlog_is_the_hosts():
        _take_structlog(output, number, undo)
    if capture:
        for name in ("stdout", "stderr"):
            _take_stream(name, output, undo, echo=stream is None)
    return Configured(output, undo)


def _take_logging(output: Output, undo: ExitStack, *, alone: bool) -> None:
    root = logging.getLogger()
    undo.callback(root.setLevel, root.level)
    root.setLevel(min(root.level, output.level) if root.level else output.level)
    if alone:
        before, root.handlers[:] = root.handlers[:], []
        undo.callback(lambda: [root.addHandler(handler) for handler in before])
        undo.callback(setattr, LOGGER, "propagate", LOGGER.propagate)
        LOGGER.propagate = False
        LOGGER.handlers.insert(0, output)
        undo.callback(LOGGER.removeHandler, output)
    root.addHandler(output)
    undo.callback(root.removeHandler, output)


def _structlog_config() -> dict[str, Any]:
    config = structlog.get_config()
    return {**config, "processors": list(config["processors"])}


_UNTOUCHED: Final = None if structlog.is_configured() else _structlog_config()


def _structlog_is_the_hosts() -> bool:
    """`structlog.testing.capture_logs` leaves structlog "configured", with the defaults it found: those are nobody's choice."""
    return structlog.is_configured() and _structlog_config() != _UNTOUCHED


def _take_structlog(output: Output, level: int, undo: ExitStack) -> None:
    if structlog.is_configured():
        before = structlog.get_config()
        undo.callback(lambda: structlog.configure(**before))
    else:
        undo.callback(structlog.reset_defaults)
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, _pack],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        context_class=dict,
        logger_factory=lambda *names: Door(output, str(names[0]) if names else "app"),
        cache_logger_on_first_use=False,  # a cached logger would outlive `close`
    )


def _pack(
    _logger: Any, method: str, fields: Any
) -> tuple[tuple[str, dict[str, Any]], dict[str, Any]]:
    return (method, fields), {}


_METHODS: Final = {
    "debug": 10, "info": 20, "msg": 20, "warning": 30, "warn": 30, "error": 40, "exception": 40, "critical": 50, "fatal": 50
}  # fmt: skip


class Door:
    """What the user's structlog loggers wrap: every method hands the line to the Output."""

    def __init__(self, output: Output, name: str) -> None:
        self._output, self._name = output, name

    def _say(self, method: str, fields: dict[str, Any]) -> None:
        event = fields.pop("event", "")
        self._output.line(
            _METHODS[method],
            self._name,
            event if isinstance(event, str) else repr(event),
            fields,
            where.get(),
        )

    debug = info = warning = warn = error = critical = fatal = exception = msg = _say


def _take_stream(name: str, output: Output, undo: ExitStack, *, echo: bool) -> None:
    original = cast(TextIO, getattr(sys, name))
    printed = Printed(original, name, output, echo=echo)
    setattr(sys, name, printed)

    def put_back() -> None:
        if getattr(sys, name) is printed:
            setattr(sys, name, original)

    undo.callback(put_back)
