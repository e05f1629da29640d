"""Writes log lines to a stream: JSON lines to a file or pipe, pretty ones to a terminal.

`capture.configure` installs one `LogOutput`; the loggers of log.py, the records of `logging` and
the user's structlog all end here. A line is appended to a list, which a thread of the output writes
at most `FLUSH_INTERVAL_SECONDS` later (a warning or a pretty line at once), so that a slow disk or
a full pipe never blocks an event loop. If the stream takes nothing for long, lines are dropped and
counted.
"""

import io
import logging
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any, BinaryIO, Final, TextIO, cast

import orjson
from structlog.dev import ConsoleRenderer, plain_traceback

from eventflow.core.clock import Clock
from eventflow.logs.log import (
    DirectHandler,
    HostLogRecord,
    LogContext,
    log_context,
    render_line,
    short_repr,
)
from eventflow.logs.redaction import (
    Redactor,
    escape_controls,
    escape_controls_by_line,
    escape_json_controls,
)

FLUSH_INTERVAL_SECONDS: Final = 0.1
"""How long a line may wait in memory, and what a kill -9 may lose of the stream. One write carries
some thousand lines.
"""

MAX_QUEUED_BYTES: Final = 8 << 20
"""Bytes that may wait for a stuck stream: some 30,000 lines."""

_RECORD_ATTRIBUTES: Final = frozenset(
    {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}
)
"""What every LogRecord has; its other attributes were given by `extra=`."""


class LogOutput(DirectHandler):
    """One stream and the format of its lines. `stream=None`: lines go only to the log store of
    their run.
    """

    def __init__(
        self,
        stream: BinaryIO | TextIO | None,
        *,
        pretty: bool | None,
        level: int,
        redactor: Redactor,
        clock: Clock,
    ) -> None:
        super().__init__(level)
        self._redactor = redactor
        self._clock = clock
        self._write: Callable[[bytes], None] | None = None
        self._console: ConsoleRenderer | None = None  # pretty lines
        self._queue: list[bytes] = []
        self._queued_bytes = 0
        self._dropped = 0
        self._write_lock = threading.Lock()
        self._has_lines = threading.Event()
        self._flush_now = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        if stream is None:
            return
        self._write = make_writer(stream)
        if pretty if pretty is not None else stream.isatty():
            self._console = make_renderer(None if stream.isatty() else False)
        self._thread = threading.Thread(target=self._run, name="eventflow-log-output", daemon=True)
        self._thread.start()
        if hasattr(os, "register_at_fork"):
            after_fork = weakref.WeakMethod(self._after_fork)
            os.register_at_fork(after_in_child=lambda: (method := after_fork()) and method())

    def write_line(
        self,
        level: int,
        logger: str,
        event: str,
        fields: Mapping[str, Any],
        context: LogContext | None,
    ) -> None:
        line = render_line(level, logger, event, fields, self._clock.now(), self._redactor, context)
        if self._write is None:
            return
        if self._queued_bytes > MAX_QUEUED_BYTES:
            self._dropped += 1
            return
        line = self._format(line) if self._console is not None else escape_json_controls(line)
        self._queue.append(line)
        self._queued_bytes += len(line)
        if not self._has_lines.is_set():
            self._has_lines.set()
        if level >= logging.WARNING or self._console is not None:
            self._flush_now.set()
        if self._thread is None:
            self.flush()

    def emit(self, record: logging.LogRecord) -> None:
        """Log a record of `logging`, from the user's code or a library, with its `extra=`
        fields.
        """
        if isinstance(record, HostLogRecord):
            return
        fields = {
            key: value for key, value in vars(record).items() if key not in _RECORD_ATTRIBUTES
        }
        if record.exc_info:
            fields["exc_info"] = record.exc_info
        if record.stack_info:
            fields["stack"] = record.stack_info
        message: object = record.msg
        if isinstance(message, dict):  # structlog passes its fields to logging this way
            fields = {**fields, **cast(dict[str, Any], message)}
            event = str(fields.pop("event", ""))
        else:
            event = record_message(record)
        self.write_line(record.levelno, record.name, event, fields, log_context.get())

    def _format(self, line: bytes) -> bytes:
        console = cast(ConsoleRenderer, self._console)
        return format_line(cast(dict[str, Any], orjson.loads(line)), console).encode() + b"\n"

    # ----------------------------------------------------------------------- writing

    def _run(self) -> None:
        while not self._closing.is_set():
            self._has_lines.wait()
            self._flush_now.wait(FLUSH_INTERVAL_SECONDS)
            self._has_lines.clear()
            self._flush_now.clear()
            self.flush()

    def flush(self) -> None:
        """Write the queued lines. If the stream fails they are lost: logging stops no run."""
        if self._write is None or not self._write_lock.acquire(timeout=5.0):
            return
        try:
            count = len(self._queue)
            chunk = b"".join(self._queue[:count])
            del self._queue[:count]
            self._queued_bytes = 0
            if self._dropped:
                dropped = self._dropped
                self._dropped -= dropped
                chunk += self._dropped_line(dropped)
            if chunk:
                self._write(chunk)
        except (OSError, ValueError):
            pass  # the disk is full, or the stream is closed
        finally:
            self._write_lock.release()

    def _dropped_line(self, dropped: int) -> bytes:
        line = render_line(
            logging.WARNING,
            "eventflow.output",
            "log.dropped",
            {"lines": dropped},
            self._clock.now(),
            self._redactor,
            None,
        )
        return self._format(line) if self._console is not None else line

    def close(self) -> None:
        self._closing.set()
        self._flush_now.set()
        self._has_lines.set()
        if self._thread is not None:
            self._thread.join(5.0)
            self._thread = None
        self.flush()
        super().close()

    def _after_fork(self) -> None:
        """In a forked child: it has no thread and writes each line itself, without those of its
        parent.
        """
        self._write_lock = threading.Lock()
        self._thread = None
        self._queue = []
        self._queued_bytes = 0


def record_message(record: logging.LogRecord) -> str:
    """The message of a record, also when its arguments do not fit the text."""
    # A user's __str__ may raise anything, and logging must not end the run that logs.
    with suppress(Exception):
        return record.getMessage()
    return f"{short_repr(record.msg)} (with arguments that do not fit: {short_repr(record.args)})"


def make_writer(stream: BinaryIO | TextIO) -> Callable[[bytes], None]:
    """A function that writes bytes completely to a text, buffered or raw stream, and flushes it."""
    target: Any = getattr(stream, "buffer", stream)
    is_text = isinstance(stream, io.TextIOBase) and target is stream  # a StringIO, a notebook

    def write(chunk: bytes) -> None:
        if is_text:
            target.write(chunk.decode())
        else:
            rest = memoryview(chunk)
            while rest:  # under python -u, sys.stderr.buffer is raw and may take only a part
                rest = rest[target.write(rest) or 0 :]
        target.flush()

    return write


# --------------------------------------------------------------------------- pretty lines


def make_renderer(colors: bool | None = None) -> ConsoleRenderer:
    """structlog's console lines. `None`: a terminal, so `NO_COLOR` (https://no-color.org) and
    TERM=dumb apply.
    """
    if colors is None:
        colors = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return ConsoleRenderer(
        colors=colors, sort_keys=False, pad_event_to=22, exception_formatter=plain_traceback
    )


def format_line(data: dict[str, Any], console: ConsoleRenderer) -> str:
    """A line for people: local time, no control characters. `eventflow logs` formats stored lines
    with it.
    """
    moment = datetime.fromisoformat(data["timestamp"]).astimezone()
    fields = {key: _without_controls(key, value) for key, value in data.items()}
    fields["timestamp"] = f"{moment:%H:%M:%S}.{moment.microsecond // 1000:03d}"
    return console(None, data["level"], fields)


def _without_controls(key: str, value: Any) -> Any:
    """A text without control characters. Nested values are shown by `repr`, which escapes them
    itself.
    """
    if not isinstance(value, str):
        return value
    return (
        escape_controls_by_line(value) if key in ("exception", "stack") else escape_controls(value)
    )
