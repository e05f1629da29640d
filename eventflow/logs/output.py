"""Writes log lines to a stream: JSON lines to a file or pipe, pretty ones to a terminal.

`capture.configure` installs one `LogOutput`; the loggers of log.py, the records of `logging` and
the user's structlog all end here. A line is appended to a list, which a thread of the output writes
at most `FLUSH_INTERVAL_SECONDS` later (a warning or a pretty line within 5 ms), so that a slow disk
or a full pipe never blocks an event loop. If the stream takes nothing for long, lines are dropped
and counted.
"""

import io
import logging
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any, BinaryIO, Final, TextIO, cast

import msgspec
import orjson

from eventflow.core.clock import Clock
from eventflow.core.columns import clip, display_width
from eventflow.core.forks import call_in_forked_children
from eventflow.logs.log import (
    DirectHandler,
    HostLogRecord,
    LogContext,
    log_context,
    render_line,
    short_repr,
)
from eventflow.logs.progress import can_redraw
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

URGENT_FLUSH_DELAY_SECONDS: Final = 0.005
"""How long a warning may wait, so that many of them share one write and one wake-up of the thread.
"""

MAX_QUEUED_BYTES: Final = 8 << 20
"""Bytes that may wait for a stuck stream: some 30,000 lines."""

ERASE_LINE: Final = b"\r\x1b[K"

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
        self._style: LineStyle | None = None  # of pretty lines
        self._queue: list[bytes] = []
        self._queued_bytes = 0
        self._dropped = 0
        self._write_lock = threading.Lock()
        self._has_lines = threading.Event()
        self._flush_now = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._bars: dict[object, str] = {}  # the one that changed last at the end
        self._drawn: str = ""  # the bar that is on the terminal, below the last line
        if stream is None:
            return
        self._write = make_writer(stream)
        if pretty if pretty is not None else stream.isatty():
            self._style = make_style(stream)
            if can_redraw(stream):
                self.progress_display = self._show_progress
        self._thread = threading.Thread(target=self._run, name="eventflow-log-output", daemon=True)
        self._thread.start()
        call_in_forked_children(self._after_fork)

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
        line = self._format(line) if self._style is not None else escape_json_controls(line)
        self._queue.append(line)
        self._queued_bytes += len(line)
        if not self._has_lines.is_set():
            self._has_lines.set()
        is_urgent = level >= logging.WARNING or self._style is not None
        if is_urgent and not self._flush_now.is_set():
            self._flush_now.set()
        if self._thread is None:
            self.flush()

    def _show_progress(self, bar: object, text: str) -> None:
        self._bars.pop(bar, None)
        if text:
            self._bars[bar] = text
        self._flush_now.set()
        self._has_lines.set()

    def erase_progress(self) -> None:
        """Before somebody else writes to the terminal. The bar is back with its next change."""
        # A print in a signal handler may interrupt the thread that has the lock.
        if self._drawn and self._write_lock.acquire(timeout=0.1):
            try:
                self._redraw(b"", "")
            except (OSError, ValueError):
                pass  # the terminal is gone
            finally:
                self._write_lock.release()

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
        style = cast(LineStyle, self._style)
        return format_line(cast(dict[str, Any], orjson.loads(line)), style).encode() + b"\n"

    # ----------------------------------------------------------------------- writing

    @property
    def is_alive(self) -> bool:
        """Whether lines are written, or none will be."""
        return self._thread is None or self._thread.is_alive()

    def _run(self) -> None:
        while not self._closing.is_set():
            self._has_lines.wait()
            if self._flush_now.wait(FLUSH_INTERVAL_SECONDS):
                self._closing.wait(URGENT_FLUSH_DELAY_SECONDS)
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
            self._redraw(chunk, next(reversed(list(self._bars.values())), ""))
        except (OSError, ValueError):
            pass  # the disk is full, or the stream is closed
        finally:
            self._write_lock.release()

    def _redraw(self, lines: bytes, bar: str) -> None:
        """Write lines above the bar. Call it with the lock."""
        if self._drawn and (lines or bar != self._drawn):
            lines = ERASE_LINE + lines
        elif not lines and bar == self._drawn:
            return
        width = self._style.width() if self._style is not None else None
        self._drawn = bar
        cast(Callable[[bytes], None], self._write)(lines + clip(bar, (width or 80) - 1).encode())

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
        return self._format(line) if self._style is not None else line

    def close(self) -> None:
        self._bars.clear()
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
        self._has_lines = threading.Event()
        self._flush_now = threading.Event()
        self._closing = threading.Event()
        self._thread = None
        self._bars = {}
        self._drawn = ""
        self.progress_display = None
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


class LineStyle(msgspec.Struct, frozen=True):
    """How pretty lines look. `width` returns the columns of the terminal, None where there is
    none: lines are then not wrapped.
    """

    colors: bool = False
    width: Callable[[], int | None] = lambda: None


def make_style(stream: Any) -> LineStyle:
    """The style for a stream. On a terminal `NO_COLOR` (https://no-color.org) and TERM=dumb
    apply.
    """
    if not stream.isatty():
        return LineStyle()
    colors = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return LineStyle(colors, partial(_terminal_width, stream))


def _terminal_width(stream: Any) -> int | None:
    with suppress(OSError, ValueError):  # no terminal any more
        return os.get_terminal_size(stream.fileno()).columns or None
    return None


SHORT_ID_LENGTH = 4
"""Letters of a run's id in a pretty line, its last ones; `eventflow show` takes them."""
EVENT_COLUMN = 20
"""The width of the name of what happened, so that ids stand below each other."""
INDENT = 15
"""Of wrapped lines: below the name of what happened."""

_HIDDEN = frozenset(
    "timestamp level event logger run flow task attempt ledger_id exception stack replay".split()
)
"""Fields that a pretty line shows in another way, or not at all."""

_BARE = frozenset({"error", "reason", "result"})
"""Fields whose value stands for itself."""

_LEVEL_COLORS = {"warning": 33, "error": 31, "critical": 31, "debug": 2}
_LEVEL_LETTERS = {"warning": "W", "error": "E", "critical": "E"}


def format_line(data: dict[str, Any], style: LineStyle) -> str:
    """A line for people: local time, short ids, no control characters, at most the columns of the
    terminal. `eventflow logs` formats stored lines with it.

        09:52:54.432 W task.attempt_failed    krvs handle/score#1  retry_in=0.378
                       ConnectionError: the model server is busy
    """
    moment = datetime.fromisoformat(data["timestamp"]).astimezone()
    level = str(data["level"])
    color = _LEVEL_COLORS.get(level)
    event = escape_controls(str(data["event"]))
    words = [(event.ljust(EVENT_COLUMN), color if color is not None else 1)]
    if (where := _where(data)) is not None:
        words.append((where, 36))
    if data.get("replay"):
        words.append(("(replay)", 2))
    # The attempt of a task is in the prefix, that of a flow is a field.
    hidden = _HIDDEN if data.get("task") else _HIDDEN - {"attempt"}
    fields = [(key, value) for key, value in data.items() if key not in hidden]
    fields.sort(key=lambda field: field[0] in _BARE)
    words += [(_field(key, value), None) for key, value in fields if value is not None]
    time = f"{moment:%H:%M:%S}.{moment.microsecond // 1000:03d}"
    letter = _painted(_LEVEL_LETTERS.get(level, " "), color, style)
    lines = [f"{_painted(time, 2, style)} {letter} {_wrapped(words, style)}"]
    for key in ("exception", "stack"):
        if data.get(key):
            lines.append(escape_controls_by_line(str(data[key])).rstrip())
    return "\n".join(lines)


def _where(data: Mapping[str, Any]) -> str | None:
    """`krvs handle/score#1`: the run, its flow, the task and its attempt."""
    flow = data.get("flow")
    run = data.get("run")
    task = f"{data['task']}#{data.get('attempt', 1)}" if data.get("task") else ""
    name = "/".join(escape_controls(str(part)) for part in (flow, task) if part)
    if not isinstance(run, str):  # `eventflow logs RUN`: all lines are of that run
        return name or None
    return f"{escape_controls(run[-SHORT_ID_LENGTH:])} {name}".rstrip()


_MODULE_OF_ERROR: Final = r"^[\w.]+:(?=[A-Za-z_]\w*(?:: |$))"
"""`builtins:` of `builtins:ValueError: no such order`."""


def _field(key: str, value: Any) -> str:
    """Nested values are shown by `repr`, which escapes control characters itself."""
    text = escape_controls(value) if isinstance(value, str) else repr(value)
    if key in _BARE:
        return re.sub(_MODULE_OF_ERROR, "", text)
    if isinstance(value, str) and (" " in text or not text):
        return f"{key}={text!r}"
    return f"{key}={text}"


def _wrapped(fields: Sequence[tuple[str, int | None]], style: LineStyle) -> str:
    """The fields, two spaces apart, wrapped below each other."""
    width = style.width()
    if width is None or width < 2 * INDENT:
        return "  ".join(_painted(text, color, style) for text, color in fields).rstrip()
    lines: list[list[str]] = [[]]
    column = INDENT
    for text, color in fields:
        if lines[-1] and column + 2 + display_width(text.rstrip()) > width:
            lines.append([])
            column = INDENT
        pieces = _split(text, width - INDENT)
        for piece in pieces[:-1]:
            lines[-1].append(_painted(piece, color, style))
            lines.append([])
        lines[-1].append(_painted(pieces[-1], color, style))
        column = (INDENT if len(pieces) > 1 else column) + 2 + display_width(pieces[-1])
    return f"\n{' ' * INDENT}".join("  ".join(line).rstrip() for line in lines)


def _split(text: str, width: int) -> list[str]:
    """Pieces of at most `width` characters, cut at spaces where there are any."""
    pieces: list[str] = []
    rest = text
    while display_width(rest.rstrip()) > width:
        size = width
        while display_width(rest[:size]) > width:
            size -= 1
        gap = rest.rfind(" ", 1, size + 1)
        at = gap if gap > size // 3 else size
        pieces.append(rest[:at])
        rest = rest[at:].lstrip(" ")
    return [*pieces, rest]


def _painted(text: str, color: int | None, style: LineStyle) -> str:
    if not style.colors or color is None:
        return text
    shown = text.rstrip()
    return f"\x1b[{color}m{shown}\x1b[0m{' ' * (len(text) - len(shown))}"
