"""Logs: one line per thing that happened, with the ids of the run it happened in; pretty on a terminal, JSON lines elsewhere.

Everybody logs through `get_logger(name)`. The executor says what is executing by setting `where`, once per flow and once per
attempt: every line made there carries its ids, and the user's lines (of ours, warnings and worse) go to the run's store too.
Guaranteed for every line: registered secrets are gone from it, tracebacks included, and logging neither blocks nor raises.
Embedded in someone's program nothing of theirs is touched: lines go to the host's `logging`. `serve`, `dev`, `run` and tests
call `configure` of the next room, capture.py, which puts an `Output` (output.py) in place.
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
import structlog

from eventflow.core.clock import SECOND, SystemClock, to_datetime
from eventflow.events.event import format_id
from eventflow.logs.redaction import SECRETS, Redactor, clean

LOGGER: Final = logging.getLogger("eventflow")

# --------------------------------------------------------------------------- where a line is made


class Line(msgspec.Struct, gc=False):
    """One line of a run, redacted and ready to store. `fields` is a JSON object, or None; `at` in microseconds."""

    run: int
    at: int
    level: int
    logger: str
    event: str
    fields: bytes | None = None
    task: str = ""
    attempt: int = 0


class Sink(Protocol):
    """Where a run's lines are kept (`store/logs.py`)."""

    def post(self, line: Line) -> None:
        """Takes a line, from any thread. Never blocks, never raises; what it cannot keep it counts."""
        ...


class Where(msgspec.Struct):
    """What is executing: a flow's body, or with `task` one attempt. Made once, set into `where`, closed when it ends.

    `event` is the ledger id. `replaying` tells whether the flow's body only repeats what it did before: its lines are then
    tagged `replay` and not stored again. The last two fields belong to this file.
    """

    run: int
    flow: str
    event: int | None = None
    trigger: str = ""
    task: str = ""
    attempt: int = 0
    sink: Sink | None = None
    replaying: Callable[[], bool] | None = None
    known: dict[str, Any] | None = None
    tails: dict[Callable[["Where", str], None], str] | None = None

    def ids(self) -> dict[str, Any]:
        """What every line made here carries: `run`, `flow`, `ledger_id`, `trigger`, `task`, `attempt`, those there are."""
        if self.known is None:
            known: dict[str, Any] = {"run": format_id(self.run), "flow": self.flow}
            if self.event is not None:
                known["ledger_id"] = format_id(self.event)
            if self.trigger:
                known["trigger"] = self.trigger
            if self.task:
                known["task"], known["attempt"] = self.task, self.attempt
            self.known = known
        return self.known

    def during(self, task: str, attempt: int) -> "Where":
        """The same run, inside an attempt of `task`. A body never replays."""
        return Where(self.run, self.flow, self.event, self.trigger, task, attempt, self.sink)

    def close(self) -> None:
        """Logs what was printed here without a newline at its end."""
        if self.tails:
            tails, self.tails = self.tails, None
            for say, text in tails.items():
                if text:
                    say(self, text)


where: ContextVar[Where | None] = ContextVar("eventflow_where", default=None)
"""What is executing here, or None outside of any run."""


# --------------------------------------------------------------------------- who logs


class Straight(logging.Handler):
    """A handler that takes eventflow's lines past the records of `logging`, which would double their cost."""

    def line(
        self, level: int, logger: str, event: str, fields: Mapping[str, Any], here: Where | None
    ) -> None:
        raise NotImplementedError


class Log(structlog.BoundLoggerBase):
    """A structlog logger of fixed shape: `log.info("noun.verb_past", field=value)`, `log.bind(field=value)`.

    With a `Straight` handler in place lines go to it; without one, to the host's `logging`, whose levels then hold.
    """

    _logger: logging.Logger
    _context: dict[str, Any]

    def debug(self, event: str, *args: Any, **fields: Any) -> None:
        self._say(logging.DEBUG, event, args, fields)

    def info(self, event: str, *args: Any, **fields: Any) -> None:
        self._say(logging.INFO, event, args, fields)

    def warning(self, event: str, *args: Any, **fields: Any) -> None:
        self._say(logging.WARNING, event, args, fields)

    def error(self, event: str, *args: Any, **fields: Any) -> None:
        self._say(logging.ERROR, event, args, fields)

    def critical(self, event: str, *args: Any, **fields: Any) -> None:
        self._say(logging.CRITICAL, event, args, fields)

    def exception(self, event: str, *args: Any, **fields: Any) -> None:
        """`error` with the traceback of the exception being handled, or of `exc_info=error`."""
        self._say(logging.ERROR, event, args, {"exc_info": True, **fields})

    def _say(self, level: int, event: str, args: tuple[Any, ...], fields: dict[str, Any]) -> None:
        handlers = LOGGER.handlers
        straight = handlers[0] if handlers and isinstance(handlers[0], Straight) else None
        if level < straight.level if straight is not None else not self._logger.isEnabledFor(level):
            return
        if self._context:
            fields = {**self._context, **fields}
        if args:
            event = event % args
        if straight is not None:
            straight.line(level, self._logger.name, event, fields, where.get())
        else:
            _tell_host(self._logger, level, event, fields)


def get_logger(name: str) -> Log:
    """A logger by name. Names that begin with "eventflow" or "triggers" are ours; every other is the user's."""
    return Log(logging.getLogger(name), (), {})


def ours(name: str) -> bool:
    return name.startswith(("eventflow", "triggers"))


class Told(logging.LogRecord):
    """A record made from a line that is already where it belongs, for the host's handlers alone."""


def _tell_host(logger: logging.Logger, level: int, event: str, fields: dict[str, Any]) -> None:
    """Embedded: the line as a record of `logging`, `event key=value`, its fields as `record.fields`.

    The traceback goes along redacted, as `exc_text`: with `exc_info` set, the host's formatter would print the raw one.
    """
    line = compose(level, logger.name, event, fields, SystemClock().now(), SECRETS, where.get())
    data = cast(dict[str, Any], orjson.loads(line))
    text, trace = data["event"], data.pop("exception", None)
    rest = {key: value for key, value in data.items() if key not in _BASE}
    words = (
        f"{key}={value if isinstance(value, str) else orjson.dumps(value).decode()}"
        for key, value in rest.items()
    )
    told = Told(logger.name, level, "(eventflow)", 0, clean(" ".join((text, *words))), (), None)
    told.exc_text = trace
    told.fields = rest
    logger.handle(told)


# --------------------------------------------------------------------------- from a call to a line

_LEVELS: Final = {10: "debug", 20: "info", 30: "warning", 40: "error", 50: "critical"}
_BASE: Final = frozenset({"timestamp", "level", "event", "logger"})
_RESERVED: Final = _BASE | {"run", "flow", "ledger_id", "trigger", "task", "attempt", "replay"}
_DEEPEST: Final = 20
_SHORT: Final = reprlib.Repr()
_SHORT.maxother = _SHORT.maxstring = _SHORT.maxlong = 2000


def compose(
    level: int,
    logger: str,
    event: str,
    fields: Mapping[str, Any],
    now: int,
    secrets: Redactor,
    here: Where | None,
) -> bytes:
    """The line as JSON with a newline, redacted. A line of the user's, or a warning, goes to the store of the run `here`."""
    data: dict[str, Any] = {
        "timestamp": timestamp(now),
        "level": level_word(level),
        "event": event,
        "logger": logger,
    }
    replay = False
    own = ours(logger)
    if here is not None:
        data.update(here.ids())
        if here.replaying is not None and here.replaying():
            data["replay"] = replay = True
    if fields:
        _add(data, fields)
    line = dump(data)
    if (
        "exception" in data
        or not secrets.harmless(fields)
        or not (own or secrets.harmless({"event": event}))
    ):
        line = dump(secrets.data(orjson.loads(line)))
    if (
        here is not None
        and here.sink is not None
        and not replay
        and (not own or level >= logging.WARNING)
    ):
        here.sink.post(_kept(here, level, logger, now, line))
    return line


def _add(data: dict[str, Any], fields: Mapping[str, Any]) -> None:
    """Fields follow the ids; one that would take the place of something else gets an underscore."""
    if not _RESERVED.isdisjoint(fields):
        fields = {
            f"{key}_" if key in data and data[key] != value else key: value
            for key, value in fields.items()
        }
    data.update(fields)
    if "exc_info" in fields and (error := _error(data.pop("exc_info"))) is not None:
        data["exception"] = "".join(traceback.format_exception(error)).rstrip()


def _error(exc_info: Any) -> BaseException | None:
    match exc_info:
        case BaseException() as error:
            return error
        case (_, BaseException() as error, _):
            return error
        case _:
            return sys.exception() if exc_info else None


def _kept(here: Where, level: int, logger: str, now: int, line: bytes) -> Line:
    data = cast(dict[str, Any], orjson.loads(line))
    rest = {key: value for key, value in data.items() if key not in _RESERVED}
    return Line(
        here.run,
        now,
        level,
        logger,
        data["event"],
        orjson.dumps(rest) if rest else None,
        here.task,
        here.attempt,
    )


def timestamp(us: int) -> str:
    """RFC 3339 in UTC with microseconds."""
    whole, rest = divmod(us, SECOND)
    return f"{_to_the_second(whole)}.{rest:06d}Z"


@lru_cache(maxsize=8)
def _to_the_second(whole: int) -> str:
    return to_datetime(whole * SECOND).strftime("%Y-%m-%dT%H:%M:%S")


def level_word(level: int) -> str:
    return _LEVELS.get(level) or logging.getLevelName(level).lower()


def dump(data: dict[str, Any]) -> bytes:
    """`data` as one line of JSON, whatever is in it: what has no JSON form goes by its `repr`, cut at 2,000 characters."""
    try:
        return orjson.dumps(data, default=_shown, option=orjson.OPT_APPEND_NEWLINE)
    except (
        TypeError
    ):  # a lone surrogate, an integer over 64 bits, a key that is no string, a circle
        return orjson.dumps(_plain(data, 0), default=_shown, option=orjson.OPT_APPEND_NEWLINE)


def _shown(value: object) -> Any:
    return msgspec.structs.asdict(value) if isinstance(value, msgspec.Struct) else show_value(value)


def show_value(value: object) -> str:
    """`repr`, cut at 2,000 characters; a `__repr__` that raises is survived."""
    return _text(_SHORT.repr(value))


def _plain(value: Any, depth: int) -> Any:
    match value:
        case str():
            return _text(value)
        case bool() | float() | None:
            return value
        case int():
            return value if -(1 << 63) <= value < 1 << 64 else show_value(value)
        case dict() if depth < _DEEPEST:
            return {
                _text(str(key)): _plain(held, depth + 1)
                for key, held in cast(dict[Any, Any], value).items()
            }
        case list() | tuple() | set() | frozenset() if depth < _DEEPEST:
            return [_plain(held, depth + 1) for held in cast(list[Any], value)]
        case _:
            return show_value(value)


def _text(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
