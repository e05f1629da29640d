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
from eventflow.events.event import show_id
from eventflow.logs.redaction import SECRETS, Redactor, clean

EVENTS: Final[Mapping[str, str]] = {
    "app.started": "The app takes events and runs flows.",
    "app.draining": "A stop was asked for: no new events, no new claims; attempts under way may finish.",
    "app.stopped": "The app is down; what it did not finish is recorded as interrupted.",
    "alert.ignored": "A sender of drift alerts sent something that is none; `reason` says what.",
    "alert.truncated": "Alertmanager left `count` alerts out of a message, as its `max_alerts` says.",
    "alert.unconfirmed": "SNS asked whether a topic is wanted, and could not be told; it asks again.",
    "bucket.opened": "A bucket is listened to; `queue` says by which queue, `known` counts what the cursor holds.",
    "bucket.slowed": "The ledger is full: a bucket's messages and listing wait.",
    "bucket.swept": "The first sweep of a bucket's listing is done; `known` counts its objects.",
    "bucket.tested": "S3 sent its test message: somebody saved a bucket's notification settings, and they lead here.",
    "bucket.unreachable": "A bucket or queue answers with errors; it is asked again after `retry_in` seconds.",
    "check.failed": "A check of data or of a metric did not hold; the line says which column and how many rows.",
    "check.passed": "A check of data or of a metric holds.",
    "checkpoint.damaged": "A checkpoint's sums do not hold; the one before it is looked at.",
    "checkpoint.loaded": "An attempt goes on from `step`, where an earlier one saved it.",
    "checkpoint.not_kept": "A task runs outside a run, where checkpoints are not kept.",
    "checkpoint.not_removed": "A checkpoint that nobody needs any more could not be removed; it is swept later.",
    "checkpoint.passed_over": "A checkpoint was saved under other arguments of its task; the work begins anew.",
    "checkpoint.saved": "A checkpoint is durable (debug).",
    "directory.denied": "A file or folder under a watched directory may not be read; it is looked at again at each sweep.",
    "directory.opened": "A directory is watched; `watch` says how (native or poll).",
    "directory.polled_instead": "The kernel's notifications cannot be had; the directory is polled from now on.",
    "directory.root_found": "A watched directory that was gone is back.",
    "directory.root_missing": "A watched directory is gone. Nothing counts as deleted; it is found again when it is back.",
    "directory.slowed": "The ledger is full: a directory waits before it hands over more files.",
    "directory.walked": "The first sweep of a watched directory is done; `known` and `pending` count its files.",
    "event.conflicted": "A known event came again with other content; the first one stands.",
    "event.dead_lettered": "A delivery went to the dead letters, with its bytes and its reason.",
    "event.recorded": "An event is durable in the ledger, and its runs with it (debug).",
    "file.not_placed": "A recorded file could not be moved to where done files go.",
    "file.not_removed": "A recorded file could not be removed.",
    "file.unsettled": "A file has been growing or changing for long and is not yet taken for complete.",
    "flow.spun": "A flow polls without ever waiting: what it sees may come in another order when it is replayed.",
    "flow.callback_failed": "A callback that flow code gave to its event loop raised.",
    "http.failed": "An HTTP request ended in an error of ours; the answer carries the same id.",
    "journal.long": "A run's journal passed 10,000 entries; every resume reads all of it.",
    "kafka.assigned": "A consumer has its partitions and begins to read them.",
    "kafka.codecs_missing": "Records compressed with these codecs could not be read: a package is not installed.",
    "kafka.commit_failed": "The group's offset was not committed; the ledger's cursor is what counts (debug).",
    "kafka.gap_met": "Offsets of a partition are gone from the broker; a dead letter names them, or the partition stopped.",
    "kafka.lost": "The brokers cannot be reached, or the consumer failed; it is made anew in `again_in` seconds.",
    "kafka.moved_on": "The group's offset is larger than the ledger's cursor: someone moved it. Reading goes on from there.",
    "kafka.partition_stopped": "A partition cannot be read on; the others are. It is tried again.",
    "kafka.rewound": "The ledger lost its end: records that it once had are read again from the cursor it has.",
    "kafka.slowed": "The ledger is full: partitions wait, and pause.",
    "log.dropped": "`lines` lines were not kept: a run logged too fast or too much, or the disk or the log file failed.",
    "log.failed": "The log store cannot write; lines are dropped and counted, runs go on.",
    "log.reset": "The log store's file was damaged: it was set aside and a new one begun. No journal is touched.",
    "lookout.failed": "Late runs could not be looked for, or there is no room to tell of them; it is tried again.",
    "lookout.told": "Events tell of `runs` runs that have not ended `after` seconds after they were due to begin.",
    "loop.blocked": "Code kept an event loop from turning for a second or more; `stack` shows which.",
    "memory.exceeded": "The process holds too much memory: it drains, replaces itself and goes on; `reason` says why.",
    "memory.limit_too_low": "The process began above a memory limit, which is not kept until memory was below it once.",
    "memory.recovered": "Memory is back below the soft limit: runs are begun again.",
    "memory.short": "The process is over its soft memory limit: no runs are begun, what comes in waits in the ledger.",
    "message.not_deleted": "A recorded message could not be deleted from its queue; it comes again, as a duplicate.",
    "message.not_extended": "A message under way could not be kept from others for longer; a copy of it is a duplicate.",
    "notice.filtered": "Notices of objects that a trigger's own prefix, suffix or pattern does not take (debug).",
    "operator.acted": "Someone did something to a run, event or trigger through the API: who, what, to which.",
    "outlet.failed": "A sink could not be given its letters; they stay in the outbox and are sent again.",
    "outlet.not_closed": "A sink did not close in time, or failed to.",
    "outlet.recovered": "A sink that had failed took its letters again.",
    "outlet.refused": "A sink says that it can never take a letter; it became a dead letter of the outlet.",
    "result.not_stored": "A large result could not be put where `results=` says; it is tried again, nothing is lost.",
    "run.broken": "A fault of eventflow's own, or of what the app gave it, stopped a run; it is held.",
    "run.cancelled": "A run ended because someone cancelled it.",
    "run.completed": "A run ended with a result.",
    "run.failed": "A run ended with an error.",
    "run.held": "A run waits for a person; `reason` says what to look at.",
    "run.interrupted": "A drain or crash stopped a run in the middle; it goes on at the next start.",
    "run.lost": "The store refuses what this worker does for a run: another claim holds it, or storage failed.",
    "run.resumed": "A run that waited or was interrupted goes on; `entries` counts what its journal gives back.",
    "run.suspended": "A run waits durably and left memory.",
    "schedule.ahead": "The cursor of a schedule is ahead of the clock: nothing fires until `last` is past; a clock is off.",
    "schedule.changed": "The rule of a schedule is another one than the cursor's; what the old one missed is not made up for.",
    "schedule.ended": "A schedule has no occurrence left; it waits for an edit.",
    "schedule.opened": "A schedule waits for its time; `next` is its next occurrence.",
    "schedule.skipped": "Occurrences passed and do not fire, as the misfire policy says; without `exact` they were more.",
    "schedule.slowed": "The ledger is full: a schedule waits before it hands over its event.",
    "server.stopping": "The server begins its end; `reason` names the signal.",
    "store.failed": "Storage failed in use: nothing more is acknowledged (P10).",
    "store.pages_unchecked": "SQLite's look at the pages of `tables` would take too long beside a worker; rows were read.",
    "store.prune_failed": "A step of retention failed; it will be tried again in a minute.",
    "store.row_corrupt": "A row's checksum does not hold; it is set apart, and everything else goes on.",
    "task.abandoned": "An attempt did not end when asked to; its slot stays taken and its late result will be refused.",
    "task.attempt_failed": "One attempt of a task failed; `retry_in` says when the next one starts, if there is one.",
    "task.hook_failed": "An on_success or on_failure hook raised; the outcome stands.",
    "trigger.opened": "A trigger listens.",
    "trigger.paused": "Someone paused a trigger.",
    "trigger.reopened": "A trigger's listener ended and was opened again; `error` says why it ended.",
    "trigger.resumed": "Someone resumed a trigger.",
    "webhook.refused": "A webhook's sender was turned away: signature, size, type, timestamp or pace; `reason` says which.",
    "worker.task_failed": "Something the worker does besides runs failed; this is a defect of eventflow.",
}
"""Every event name eventflow logs, `noun.verb_past`. info: a state changed; warning: it will be tried again; error: look."""

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
            known: dict[str, Any] = {"run": show_id(self.run), "flow": self.flow}
            if self.event is not None:
                known["ledger_id"] = show_id(self.event)
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
