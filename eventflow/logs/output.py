"""Where lines leave the process: JSON lines into a file or pipe, pretty ones onto a terminal.

`capture.configure` puts one `Output` in place; loggers of `log.py`, the records of `logging` and the user's structlog all end
here. A line is appended to a list, and a thread of the Output's own writes it at most `LINGER` later (a warning or a pretty
line at once), so that a slow disk or a stuffed pipe never holds an event loop. A stream that takes nothing for long loses
lines, and then says how many.
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
from eventflow.logs.log import Straight, Told, Where, compose, show_value, where
from eventflow.logs.redaction import Redactor, clean, clean_lines, escape_json

LINGER: Final = 0.1
"""Seconds a line may wait in memory: what a kill -9 may take from the stream. One write for some thousand lines."""

MOST: Final = 8 << 20
"""Bytes that may wait for a stream that is stuck: some 30,000 lines."""

_STANDARD: Final = frozenset({*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"})
"""What every LogRecord has; the rest of its attributes came by `extra=`."""


class Output(Straight):
    """One stream and how lines look on it. `stream=None`: lines only go to their run's store (capture without a stream)."""

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
        self._redactor, self._clock = redactor, clock
        self._write = None if stream is None else writer(stream)
        self._pretty = pretty if pretty is not None else stream is not None and stream.isatty()
        self._renderer = (
            renderer(None if stream is not None and stream.isatty() else False)
            if self._pretty
            else None
        )
        self._lines: list[bytes] = []
        self._waiting = self._lost = 0
        self._turn = threading.Lock()
        self._some, self._now, self._closing = (
            threading.Event(),
            threading.Event(),
            threading.Event(),
        )
        self._thread: threading.Thread | None = None
        if self._write is not None:
            self._thread = threading.Thread(
                target=self._run, name="eventflow-log-output", daemon=True
            )
            self._thread.start()
            if hasattr(os, "register_at_fork"):
                again = weakref.WeakMethod(self._after_fork)
                os.register_at_fork(after_in_child=lambda: (method := again()) and method())

    def line(
        self, level: int, logger: str, event: str, fields: Mapping[str, Any], here: Where | None
    ) -> None:
        line = compose(level, logger, event, fields, self._clock.now(), self._redactor, here)
        if self._write is None:
            return
        if self._waiting > MOST:
            self._lost += 1
            return
        line = self._show(line) if self._renderer is not None else escape_json(line)
        self._lines.append(line)
        self._waiting += len(line)
        if not self._some.is_set():
            self._some.set()
        if level >= logging.WARNING or self._renderer is not None:
            self._now.set()
        if self._thread is None:
            self.flush()

    def emit(self, record: logging.LogRecord) -> None:
        """A record of `logging`, from the user's code or a library; fields given as `extra=` come along."""
        if isinstance(record, Told):
            return
        fields = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            fields["exc_info"] = record.exc_info
        if record.stack_info:
            fields["stack"] = record.stack_info
        said: object = record.msg
        if isinstance(said, dict):  # structlog's way of handing its fields to logging
            fields = {**fields, **cast(dict[str, Any], said)}
            event = str(fields.pop("event", ""))
        else:
            event = message(record)
        self.line(record.levelno, record.name, event, fields, where.get())

    # ----------------------------------------------------------------------- pretty

    def _show(self, line: bytes) -> bytes:
        return (
            show(
                cast(dict[str, Any], orjson.loads(line)), cast(ConsoleRenderer, self._renderer)
            ).encode()
            + b"\n"
        )

    # ----------------------------------------------------------------------- the stream

    def _run(self) -> None:
        while not self._closing.is_set():
            self._some.wait()
            self._now.wait(LINGER)
            self._some.clear()
            self._now.clear()
            self.flush()

    def flush(self) -> None:
        """Writes what waits. A stream that fails loses it: logs stop no run."""
        if self._write is None or not self._turn.acquire(timeout=5.0):
            return
        try:
            count = len(self._lines)
            chunk = b"".join(self._lines[:count])
            del self._lines[:count]
            self._waiting = 0
            if self._lost:
                lost, self._lost = self._lost, 0
                chunk += self._dropped(lost)
            if chunk:
                self._write(chunk)
        except (OSError, ValueError):
            pass
        finally:
            self._turn.release()

    def _dropped(self, lines: int) -> bytes:
        fields, now = {"lines": lines}, self._clock.now()
        line = compose(
            logging.WARNING, "eventflow.output", "log.dropped", fields, now, self._redactor, None
        )
        return self._show(line) if self._renderer is not None else line

    def close(self) -> None:
        self._closing.set()
        self._now.set()
        self._some.set()
        if self._thread is not None:
            self._thread.join(5.0)
            self._thread = None
        self.flush()
        super().close()

    def _after_fork(self) -> None:
        """A forked child has no thread and shares no lock: it writes each line itself, and none of its parent's."""
        self._turn, self._thread = threading.Lock(), None
        self._lines, self._waiting = [], 0


def message(record: logging.LogRecord) -> str:
    """What the caller meant, also when the arguments do not fit the text."""
    with suppress(
        Exception
    ):  # a user's __str__ may raise anything, and logging must not end the run that logs
        return record.getMessage()
    return f"{show_value(record.msg)} (with arguments that do not fit: {show_value(record.args)})"


def writer(stream: BinaryIO | TextIO) -> Callable[[bytes], None]:
    """Writes all of some bytes to a text, buffered or raw stream, and flushes it."""
    target: Any = getattr(stream, "buffer", stream)
    text = isinstance(stream, io.TextIOBase) and target is stream  # a StringIO, a notebook's stream

    def write(chunk: bytes) -> None:
        if text:
            target.write(chunk.decode())
        else:
            left = memoryview(chunk)
            while (
                left
            ):  # under python -u, sys.stderr.buffer is a raw file, which may take a part only
                left = left[target.write(left) or 0 :]
        target.flush()

    return write


# --------------------------------------------------------------------------- how a pretty line looks


def renderer(colors: bool | None = None) -> ConsoleRenderer:
    """structlog's console lines; for `None`, a terminal, `NO_COLOR` (https://no-color.org) and TERM=dumb are heard."""
    if colors is None:
        colors = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return ConsoleRenderer(
        colors=colors, sort_keys=False, pad_event_to=22, exception_formatter=plain_traceback
    )


def show(data: dict[str, Any], console: ConsoleRenderer) -> str:
    """One line's fields as a person reads them: local time, no controls. `eventflow logs` shows stored lines with it too."""
    moment = datetime.fromisoformat(data["timestamp"]).astimezone()
    fields = {key: _shown(key, value) for key, value in data.items()}
    fields["timestamp"] = f"{moment:%H:%M:%S}.{moment.microsecond // 1000:03d}"
    return console(None, data["level"], fields)


def _shown(key: str, value: Any) -> Any:
    """Texts without controls; what is nested the console shows by `repr`, which lets none pass either."""
    if not isinstance(value, str):
        return value
    return clean_lines(value) if key in ("exception", "stack") else clean(value)
