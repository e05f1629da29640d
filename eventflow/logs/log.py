"""Log lines: one per thing that happened, with the ids of the run it happened in.

Everybody logs through `get_logger(name)` and declares its events in a module constant `LOG_EVENTS`
(event name `noun.verb_past` to one sentence; tests/logs/test_log.py compares both). The engine sets
`log_context` once per flow and once per attempt: each line made there carries its ids, and lines of
the user's code, and eventflow's warnings and errors, also go to the log store of the run.

Guaranteed for every line: registered secrets are removed, tracebacks included, and logging neither
blocks nor raises. Embedded in a program, eventflow changes nothing of its logging: lines go to the
host's `logging`. `serve`, `dev`, `run` and tests call `configure` (capture.py), which puts a
`LogOutput` (output.py) in place.

A line of eventflow does not pass structlog's processor chain, which takes a third longer per line
even without redaction; the engine logs several lines per run. capture.py connects the user's own
structlog loggers. An embedded App does not import structlog: that takes 9 ms, and 48 ms where rich
is installed, a third of a first run.
"""

import logging
import reprlib
import sys
import traceback
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Final, Protocol, cast

import msgspec
import orjson

from eventflow.core.clock import SECOND, SystemClock, to_datetime
from eventflow.events.event import format_id
from eventflow.logs.redaction import SECRETS, Redactor, escape_controls

LOGGER: Final = logging.getLogger("eventflow")

# --------------------------------------------------------------------------- context of a line


class LogLine(msgspec.Struct, gc=False):
    """One line of a run, redacted. `fields`: a JSON object, or None; `at` in microseconds."""

    run: int
    at: int
    level: int
    logger: str
    event: str
    fields: bytes | None = None
    task: str = ""
    attempt: int = 0


class LogReceiver(Protocol):
    """Where the lines of runs are stored (`LogStore` of store.py; a list in tests)."""

    def post(self, line: LogLine) -> None:
        """Queue a line, from any thread. Never blocks or raises; lines it cannot store are
        counted.
        """
        ...


class LogContext(msgspec.Struct):
    """What executes now: a flow body or, with `task`, one attempt. Closed when that ends.

    `event` is the ledger id. `replaying` returns whether the flow body repeats what it did before:
    its lines are then tagged `replay` and not stored again. `run_id` is the run's id as text, where
    it is known. The three fields before it are private to this package: the ids of a line, those of
    the run if this is one of its attempts, and text printed without a newline at its end, by
    stream.
    """

    run: int
    flow: str
    event: int | None = None
    trigger: str = ""
    task: str = ""
    attempt: int = 0
    logs: LogReceiver | None = None
    replaying: Callable[[], bool] | None = None
    cached_ids: dict[str, Any] | None = None
    run_ids: dict[str, Any] | None = None
    partial_lines: dict[Callable[["LogContext", str], None], str] | None = None
    run_id: str = ""

    def ids(self) -> dict[str, Any]:
        """The fields of each line: `run`, `flow`, and `ledger_id`, `trigger`, `task`, `attempt` if
        set.
        """
        if self.cached_ids is None:
            ids: dict[str, Any]
            if self.run_ids is not None:
                ids = self.run_ids.copy()
            else:
                ids = {"run": self.run_id or format_id(self.run), "flow": self.flow}
                if self.event is not None:
                    ids["ledger_id"] = format_id(self.event)
                if self.trigger:
                    ids["trigger"] = self.trigger
            if self.task:
                ids["task"] = self.task
                ids["attempt"] = self.attempt
            self.cached_ids = ids
        return self.cached_ids

    def for_attempt(self, task: str, attempt: int) -> "LogContext":
        """The context of an attempt of this run. A task body never replays."""
        return LogContext(
            self.run,
            self.flow,
            self.event,
            self.trigger,
            task,
            attempt,
            self.logs,
            run_ids=self.cached_ids or self.ids(),
        )

    def close(self) -> None:
        """Log what was printed without a newline at its end."""
        if self.partial_lines:
            partial_lines = self.partial_lines
            self.partial_lines = None
            for log_line, text in partial_lines.items():
                if text:
                    log_line(self, text)


log_context: ContextVar[LogContext | None] = ContextVar("eventflow_log_context", default=None)
"""What executes in this context, or None outside of any run."""


# --------------------------------------------------------------------------- loggers


class DirectHandler(logging.Handler):
    """A handler that takes eventflow's lines without a `LogRecord`, which would double
    their cost.

    `progress_display`, if it has a terminal: shows a text below the lines, or removes it when
    empty. The first argument says whose it is.
    """

    progress_display: Callable[[object, str], None] | None = None

    def write_line(
        self,
        level: int,
        logger: str,
        event: str,
        fields: Mapping[str, Any],
        context: LogContext | None,
    ) -> None:
        raise NotImplementedError


def direct_handler() -> DirectHandler | None:
    """The one that `configure` has installed."""
    handlers = LOGGER.handlers
    return handlers[0] if handlers and isinstance(handlers[0], DirectHandler) else None


class Log:
    """A logger with the methods of structlog's: `log.info("noun.verb_past", field=value)`,
    `log.bind(field=value)`.

    Lines go to the `DirectHandler` if `configure` has installed one, else to the host's `logging`,
    whose levels then apply.
    """

    __slots__ = ("_context", "_logger")

    def __init__(self, logger: logging.Logger, context: dict[str, Any]) -> None:
        self._logger = logger
        self._context = context

    def bind(self, **fields: Any) -> "Log":
        """A logger whose lines have these fields, too."""
        return Log(self._logger, {**self._context, **fields})

    def unbind(self, *names: str) -> "Log":
        """A logger without these fields. Raises KeyError for one that is not bound."""
        left = self._context.copy()
        for name in names:
            del left[name]
        return Log(self._logger, left)

    def try_unbind(self, *names: str) -> "Log":
        """As `unbind`; a field that is not bound is ignored."""
        return self.unbind(*self._context.keys() & names)

    def new(self, **fields: Any) -> "Log":
        """A logger with these fields only."""
        return Log(self._logger, fields)

    def debug(self, event: str, *args: Any, **fields: Any) -> None:
        self.log_line(event, logging.DEBUG, fields, log_context.get(), args)

    def info(self, event: str, *args: Any, **fields: Any) -> None:
        self.log_line(event, logging.INFO, fields, log_context.get(), args)

    def warning(self, event: str, *args: Any, **fields: Any) -> None:
        self.log_line(event, logging.WARNING, fields, log_context.get(), args)

    def error(self, event: str, *args: Any, **fields: Any) -> None:
        self.log_line(event, logging.ERROR, fields, log_context.get(), args)

    def critical(self, event: str, *args: Any, **fields: Any) -> None:
        self.log_line(event, logging.CRITICAL, fields, log_context.get(), args)

    def exception(self, event: str, *args: Any, **fields: Any) -> None:
        """`error` with the traceback of the exception being handled, or of `exc_info=error`."""
        self.log_line(event, logging.ERROR, {"exc_info": True, **fields}, log_context.get(), args)

    def log_line(
        self,
        event: str,
        level: int,
        fields: dict[str, Any],
        context: LogContext | None,
        args: tuple[Any, ...] = (),
    ) -> None:
        """A line of the run of `context`, whatever executes now; `args` are for `event % args`."""
        direct = direct_handler()
        if direct is None:
            if not _wants(self._logger, level, context):
                return
        elif level < direct.level:
            return
        if self._context:
            fields = {**self._context, **fields}
        if args:
            event = event % args
        if direct is None:
            _log_to_host(self._logger, level, event, fields, context)
        else:
            direct.write_line(level, self._logger.name, event, fields, context)


def get_logger(name: str) -> Log:
    """A logger. Names that begin with "eventflow" or "triggers" are eventflow's, others the
    user's.
    """
    return Log(logging.getLogger(name), {})


class HostLogRecord(logging.LogRecord):
    """A record for the host's handlers only: `LogOutput` ignores it, the line is stored already."""


def _wants(logger: logging.Logger, level: int, context: LogContext | None) -> bool:
    """Embedded: whether the host sees a line of this level, or the log store of the run keeps it,
    which has info lines whatever the host wants to see.
    """
    is_kept = level >= logging.INFO and context is not None and context.logs is not None
    return is_kept or logger.isEnabledFor(level)


def _log_to_host(
    logger: logging.Logger,
    level: int,
    event: str,
    fields: dict[str, Any],
    context: LogContext | None,
) -> None:
    """Embedded: a record with the message `event key=value` and the fields as `record.fields`.

    The redacted traceback is set as `exc_text`; with `exc_info` set, the host's formatter would
    print the raw one.
    """
    line = render_line(level, logger.name, event, fields, SystemClock().now(), SECRETS, context)
    if not logger.isEnabledFor(level):
        return  # stored with the run only
    data = cast(dict[str, Any], orjson.loads(line))
    trace = data.pop("exception", None)
    extra = {key: value for key, value in data.items() if key not in _BASE}
    pairs = (
        f"{key}={value if isinstance(value, str) else orjson.dumps(value).decode()}"
        for key, value in extra.items()
    )
    message = escape_controls(" ".join((data["event"], *pairs)))
    record = HostLogRecord(logger.name, level, "(eventflow)", 0, message, (), None)
    record.exc_text = trace
    record.fields = extra
    logger.handle(record)


# --------------------------------------------------------------------------- from a call to a line

_LEVELS: Final = {10: "debug", 20: "info", 30: "warning", 40: "error", 50: "critical"}
_BASE: Final = frozenset({"timestamp", "level", "event", "logger"})
_RESERVED: Final = _BASE | {"run", "flow", "ledger_id", "trigger", "task", "attempt", "replay"}
_SPECIAL: Final = _RESERVED | {"exc_info"}
_OWN_LOGGERS: Final = ("eventflow", "triggers")
_MAX_DEPTH: Final = 20
_REPR: Final = reprlib.Repr()
_REPR.maxother = 2000
_REPR.maxstring = 2000
_REPR.maxlong = 2000


def render_line(
    level: int,
    logger: str,
    event: str,
    fields: Mapping[str, Any],
    now: int,
    secrets: Redactor,
    context: LogContext | None,
) -> bytes:
    """The redacted line as JSON with a newline.

    Lines of the user's code, warnings and errors are also posted to `context.logs`.
    """
    data: dict[str, Any] = {
        "timestamp": format_timestamp(now),
        "level": _LEVELS.get(level) or level_name(level),
        "event": event,
        "logger": logger,
    }
    is_replay = False
    is_own = logger.startswith(_OWN_LOGGERS)
    if context is not None:
        data.update(context.cached_ids or context.ids())
        if context.replaying is not None and context.replaying():
            data["replay"] = is_replay = True
    if _SPECIAL.isdisjoint(fields):
        data.update(fields)
    else:
        _add_special_fields(data, fields)
    try:
        line = orjson.dumps(data, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:
        line = to_json_line(data)
        data = cast(dict[str, Any], orjson.loads(line))
    if (
        "exception" in data
        or not secrets.is_clean(fields)
        or not (is_own or secrets.is_clean({"event": event}))
    ):
        data = secrets.redact_data(orjson.loads(line))
        line = to_json_line(data)
    if (
        context is not None
        and context.logs is not None
        and not is_replay
        and (not is_own or level >= logging.WARNING)
    ):
        context.logs.post(_stored_line(context, level, logger, now, data))
    return line


def _add_special_fields(data: dict[str, Any], fields: Mapping[str, Any]) -> None:
    """Add the fields after the ids; a field that would replace an id gets an underscore, an error
    becomes its traceback.
    """
    fields = {
        f"{key}_" if key in data and data[key] != value else key: value
        for key, value in fields.items()
    }
    data.update(fields)
    if "exc_info" in fields and (error := _exception_of(data.pop("exc_info"))) is not None:
        data["exception"] = "".join(traceback.format_exception(error)).rstrip()


def _exception_of(exc_info: Any) -> BaseException | None:
    match exc_info:
        case BaseException() as error:
            return error
        case (_, BaseException() as error, _):
            return error
        case _:
            return sys.exception() if exc_info else None


def _stored_line(
    context: LogContext, level: int, logger: str, now: int, data: dict[str, Any]
) -> LogLine:
    kept = _RESERVED if context.task else _RESERVED - {"attempt"}  # of a flow, a field as others
    fields = {key: value for key, value in data.items() if key not in kept}
    return LogLine(
        context.run,
        now,
        level,
        logger,
        data["event"],
        orjson.dumps(fields) if fields else None,
        context.task,
        context.attempt,
    )


def format_timestamp(us: int) -> str:
    """RFC 3339 in UTC with microseconds."""
    seconds, rest = divmod(us, SECOND)
    return f"{_format_seconds(seconds)}.{rest:06d}Z"


@lru_cache(maxsize=8)
def _format_seconds(seconds: int) -> str:
    return to_datetime(seconds * SECOND).strftime("%Y-%m-%dT%H:%M:%S")


def level_name(level: int) -> str:
    return _LEVELS.get(level) or logging.getLevelName(level).lower()


def to_json_line(data: dict[str, Any]) -> bytes:
    """`data` as one line of JSON. A value without a JSON form becomes its `repr`, cut at 2,000
    characters.
    """
    try:
        return orjson.dumps(data, default=_json_default, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:
        # A lone surrogate, an integer over 64 bits, a key that is not a string, a cycle.
        return orjson.dumps(
            _to_json_data(data, 0), default=_json_default, option=orjson.OPT_APPEND_NEWLINE
        )


def _json_default(value: object) -> Any:
    return msgspec.structs.asdict(value) if isinstance(value, msgspec.Struct) else short_repr(value)


def short_repr(value: object) -> str:
    """`repr`, cut at 2,000 characters; a `__repr__` that raises is handled."""
    return _escape_surrogates(_REPR.repr(value))


def _to_json_data(value: Any, depth: int) -> Any:
    match value:
        case str():
            return _escape_surrogates(value)
        case bool() | float() | None:
            return value
        case int():
            return value if -(1 << 63) <= value < 1 << 64 else short_repr(value)
        case dict() if depth < _MAX_DEPTH:
            return {
                _escape_surrogates(str(key)): _to_json_data(item, depth + 1)
                for key, item in cast(dict[Any, Any], value).items()
            }
        case list() | tuple() | set() | frozenset() if depth < _MAX_DEPTH:
            return [_to_json_data(item, depth + 1) for item in cast(list[Any], value)]
        case _:
            return short_repr(value)


def _escape_surrogates(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
