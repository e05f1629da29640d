"""Log lines: their ids, where they go, what they must not contain, and that the host's logging is
untouched.
"""

import asyncio
import contextvars
import io
import json
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import structlog

from eventflow.core.clock import SystemClock
from eventflow.logs.capture import LogConfiguration, configure
from eventflow.logs.log import (
    LogContext,
    LogLine,
    format_timestamp,
    get_logger,
    log_context,
    to_json_line,
)
from eventflow.logs.redaction import Redactor
from eventflow.runs.run import format_id
from tests.logs import events

ROOT = Path(__file__).parents[2]
RUN = 1_763_800_000_000 << 20


class RecordingReceiver:
    """A log receiver that keeps its lines in a list."""

    def __init__(self) -> None:
        self.lines: list[LogLine] = []

    def post(self, line: LogLine) -> None:
        self.lines.append(line)

    @property
    def events(self) -> list[str]:
        return [line.event for line in self.lines]


@pytest.fixture
def received() -> RecordingReceiver:
    return RecordingReceiver()


@pytest.fixture
def stream(tmp_path: Path) -> Iterator[io.BufferedWriter]:
    with open(tmp_path / "log.jsonl", "wb") as file:
        yield file


@pytest.fixture
def configured(stream: io.BufferedWriter) -> Iterator[LogConfiguration]:
    """For tests that do not print: pytest puts its own sys.stdout in place between a fixture and
    its test.
    """
    with configure(stream=stream, level="debug", redactor=Redactor()) as held:
        yield held


@pytest.fixture
def context(received: RecordingReceiver) -> Iterator[LogContext]:
    made = LogContext(RUN, "handle", event=RUN + 1, trigger="orders", logs=received)
    token = log_context.set(made)
    yield made
    log_context.reset(token)


def lines(configured: LogConfiguration, stream: io.BufferedWriter) -> list[dict[str, Any]]:
    configured.flush()
    return [json.loads(line) for line in Path(stream.name).read_text().splitlines()]


# --------------------------------------------------------------------------- the line


def test_a_line_is_one_json_object(configured: LogConfiguration, stream: io.BufferedWriter):
    """A line has timestamp (UTC, microseconds), level, event, logger and its fields, in
    that order.
    """
    get_logger("eventflow.worker").info("run.claimed", run="0abc", wait=0.5)
    [line] = lines(configured, stream)
    assert list(line) == ["timestamp", "level", "event", "logger", "run", "wait"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line.pop("timestamp"))
    assert line == {
        "level": "info",
        "event": "run.claimed",
        "logger": "eventflow.worker",
        "run": "0abc",
        "wait": 0.5,
    }


def test_timestamps_are_exact():
    """Microseconds are neither rounded nor lost at the edge of a second."""
    assert format_timestamp(0) == "1970-01-01T00:00:00.000000Z"
    assert format_timestamp(1_763_800_000_999_999) == "2025-11-22T08:26:40.999999Z"


@pytest.mark.parametrize("how", ["eventflow", "structlog", "logging", "print"])
def test_every_line_in_a_run_carries_its_ids(
    stream: io.BufferedWriter, context: LogContext, how: str
):
    """Run, flow, event and trigger are in each line; in an attempt also the task and the attempt
    number.
    """
    with configure(stream=stream, level="debug", redactor=Redactor()) as configured:

        def log_once() -> None:
            match how:
                case "eventflow":
                    get_logger("shop").info("hello")
                case "structlog":
                    structlog.get_logger("shop").info("hello")
                case "logging":
                    logging.getLogger("shop").info("hello")
                case _:
                    print("hello")

        log_once()
        token = log_context.set(context.for_attempt("score", 2))
        log_once()
        log_context.reset(token)
        flow, attempt = lines(configured, stream)
        ids = {
            "run": format_id(RUN),
            "flow": "handle",
            "ledger_id": format_id(RUN + 1),
            "trigger": "orders",
        }
        assert flow.items() >= ids.items() and "task" not in flow
        assert attempt.items() >= {**ids, "task": "score", "attempt": 2}.items()
        assert flow["event"] == attempt["event"] == "hello"


def test_a_field_cannot_pose_as_an_id(
    configured: LogConfiguration, stream: io.BufferedWriter, context: LogContext
):
    """A user's field with the name of an id or of a part of the line gets an underscore and
    replaces nothing.
    """
    get_logger("shop").info("hello", run="another", level="fatal", timestamp="never", flow="handle")
    [line] = lines(configured, stream)
    assert line["run"] == format_id(RUN) and line["run_"] == "another"
    assert line["level"] == "info" and line["level_"] == "fatal" and line["timestamp_"] == "never"
    assert "flow_" not in line


def test_bound_fields_and_levels(configured: LogConfiguration, stream: io.BufferedWriter):
    """`bind` makes a logger whose every line has the field; each method is its level; `%` arguments
    are filled in.
    """
    log = get_logger("eventflow.trigger").bind(trigger="orders")
    for name in ("debug", "info", "warning", "error", "critical"):
        getattr(log, name)("x.%s", name)
    assert [(line["level"], line["event"]) for line in lines(configured, stream)] == [
        (name, f"x.{name}") for name in ("debug", "info", "warning", "error", "critical")
    ]
    assert {line["trigger"] for line in lines(configured, stream)} == {"orders"}


def test_bound_loggers_are_bound_as_those_of_structlog(
    configured: LogConfiguration, stream: io.BufferedWriter
):
    """`bind`, `unbind`, `try_unbind` and `new` do as in structlog: each returns another logger."""
    log = get_logger("shop").bind(cart=1, step="pay")
    log.unbind("step").info("unbound")
    log.try_unbind("step", "absent").info("unbound")
    with pytest.raises(KeyError, match="absent"):
        log.unbind("absent")
    log.new(step="ship").info("new")
    log.info("bound")
    keys = ("event", "cart", "step")
    assert [tuple(line.get(key) for key in keys) for line in lines(configured, stream)] == [
        ("unbound", 1, None),
        ("unbound", 1, None),
        ("new", None, "ship"),
        ("bound", 1, "pay"),
    ]


def test_lines_below_the_level_are_not_made(
    stream: io.BufferedWriter, context: LogContext, received: RecordingReceiver
):
    """At level warning, info lines reach neither the stream nor the log store."""
    with configure(stream=stream, level="warning", redactor=Redactor()) as held:
        get_logger("shop").info("no")
        structlog.get_logger().info("no")
        logging.getLogger("shop").info("no")
        print("no")
        get_logger("shop").warning("yes")
        assert [line["event"] for line in lines(held, stream)] == ["yes"] == received.events


class Rude:
    def __repr__(self) -> str:
        raise RuntimeError("no repr for you")

    __str__ = __repr__


def test_nothing_logged_raises(configured: LogConfiguration, stream: io.BufferedWriter):
    """Objects without JSON form, broken reprs, circles, huge integers and odd keys make a line, not
    an error.
    """
    circle: list[Any] = []
    circle.append(circle)
    odd = {
        "big": 1 << 80,
        "half": "\udc80",
        "keys": {1: 2, (1, 2): 3},
        "circle": circle,
        "bytes": b"\xff",
        "nan": float("nan"),
    }
    get_logger("shop").info("odd", rude=Rude(), obj=object(), **odd)
    logger = logging.Logger("shop")  # not in the tree, where pytest's own handler would raise
    logger.addHandler(configured.output)
    logger.warning("a %d", "text")
    logger.warning("%s", Rude())
    structlog.get_logger().info({"not": "a text"})
    found = lines(configured, stream)
    assert len(found) == 4
    assert (
        found[0]["big"] == str(1 << 80)
        and found[0]["keys"] == {"1": 2, "(1, 2)": 3}
        and "Rude" in found[0]["rude"]
    )
    assert "a %d" in found[1]["event"] and "text" in found[1]["event"]


def test_deep_data_is_cut():
    """Data nested deeper than JSON writers permit is cut, not refused."""
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"a": deep}
    assert len(to_json_line({"deep": deep})) < 5000


# --------------------------------------------------------------------------- secrets and forgery


def test_secrets_are_gone_from_the_rendered_line(
    stream: io.BufferedWriter, context: LogContext, received: RecordingReceiver
):
    """A registered value is removed from events, fields, nested data, structs, tracebacks, prints
    and stored lines.
    """
    redactor, secret = Redactor(), "hunter2-hunter2"
    redactor.register(secret)
    with configure(stream=stream, redactor=redactor) as held:
        log = get_logger("shop")
        log.info(
            f"using {secret}",
            url=f"https://x?{secret}",
            deep={"a": [secret], secret: 1},
            line=LogLine(1, 2, 3, "a", secret),
        )
        print("printed", secret)
        logging.getLogger("lib").warning("%s", secret, extra={"e": secret})
        structlog.get_logger().info("x", y=secret)
        try:
            raise ValueError(secret) from KeyError(secret)
        except ValueError as error:
            log.exception("failed")
            log.error("failed", exc_info=error)
            logging.getLogger("lib").exception("failed")
            structlog.get_logger().exception("failed")
        found = lines(held, stream)
    assert len(found) == 8 == len(received.lines)
    assert "hunter2" not in json.dumps(found)
    assert "hunter2" not in repr(received.lines)
    assert all(
        "ValueError: ***" in line["exception"] and "KeyError" in line["exception"]
        for line in found[4:]
    )


def test_fields_named_like_secrets_are_hidden(
    stream: io.BufferedWriter, context: LogContext, received: RecordingReceiver
):
    """A password, header or URL with a password is hidden although nobody registered it."""
    with configure(stream=stream, level="debug", redactor=Redactor()) as configured:
        get_logger("shop").info(
            "connect",
            dsn="postgresql://u:pw123456@h/d",
            headers={"Authorization": "Bearer abcdefghij"},
        )
        print("password=abcdefghij")
        text = json.dumps(lines(configured, stream)) + repr(received.lines)
        assert (
            "pw123456" not in text and "abcdefghij" not in text and "postgresql://u:***@h/d" in text
        )


def test_a_line_cannot_be_forged(configured: LogConfiguration, stream: io.BufferedWriter):
    """A line break or control in a text starts no second line and reaches no terminal."""
    get_logger("shop").info('x\n{"level":"error"}\r\x1b[2J\u202e\x9b', field="a\nb\x1b")
    configured.flush()
    raw = Path(stream.name).read_bytes()
    assert raw.count(b"\n") == 1
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", raw.decode())
    assert json.loads(raw)["event"] == 'x\n{"level":"error"}\r\x1b[2J\u202e\x9b'


# --------------------------------------------------------------------------- the run's store


def test_stored_are_the_users_lines_and_own_warnings(
    configured: LogConfiguration, context: LogContext, received: RecordingReceiver
):
    """Of eventflow's own lines only warnings and errors are stored with a run: the ledger has the
    rest.
    """
    ours = get_logger("eventflow.worker")
    ours.info("run.claimed")
    ours.warning("task.attempt_failed", error="ValueError")
    get_logger("shop").debug("mine", order=7)
    assert [(line.event, line.level, line.logger) for line in received.lines] == [
        ("task.attempt_failed", 30, "eventflow.worker"),
        ("mine", 10, "shop"),
    ]
    assert received.lines[1].run == RUN
    assert orjson.loads(received.lines[1].fields or b"") == {"order": 7}


def test_a_replayed_line_is_tagged_and_not_stored_again(
    stream: io.BufferedWriter, context: LogContext, received: RecordingReceiver
):
    """During a replay the lines of the flow body are tagged `replay` and not stored; those of
    attempts are.
    """
    with configure(stream=stream, level="debug", redactor=Redactor()) as configured:
        context.replaying = lambda: True
        get_logger("shop").info("again")
        print("again")
        token = log_context.set(context.for_attempt("score", 1))
        get_logger("shop").info("new")
        log_context.reset(token)
        context.replaying = lambda: False
        get_logger("shop").info("new")
        assert [line.get("replay") for line in lines(configured, stream)] == [
            True,
            True,
            None,
            None,
        ]
        assert received.events == ["new", "new"]


def test_concurrent_attempts_log_under_their_own_ids(
    stream: io.BufferedWriter, context: LogContext, received: RecordingReceiver
):
    """Coroutines and threads that run at once each log under their own task and attempt."""
    with configure(stream=stream, redactor=Redactor()):

        async def body(n: int) -> None:
            log_context.set(context.for_attempt(f"t{n}", n))
            print("coroutine")
            await asyncio.sleep(0)
            await asyncio.to_thread(print, "thread")
            logging.getLogger("lib").info("logging")

        async def main() -> None:
            await asyncio.gather(*(body(n) for n in range(1, 20)))

        asyncio.run(main())
        found = sorted((line.task, line.attempt, line.event) for line in received.lines)
        assert found == sorted(
            (f"t{n}", n, event)
            for n in range(1, 20)
            for event in ("coroutine", "thread", "logging")
        )


# --------------------------------------------------------------------------- prints


def test_prints_become_lines(
    stream: io.BufferedWriter, context: LogContext, received: RecordingReceiver
):
    """Each printed line is a line; the rest is logged at `close`; of a progress bar only the last
    state.
    """
    with configure(stream=stream, level="debug", redactor=Redactor()) as configured:
        print("one\ntwo", "three", 4)
        print("warn", file=sys.stderr)
        print("", end="\n\n")
        print("\r10 %\r20 %", end="")
        print("\r99 %", end="\r100 %\n")
        print("tail", end="")
        assert received.events == ["one", "two three 4", "warn", "100 %"]
        context.close()
        context.close()
        assert received.events[4:] == ["tail"]
        assert [line["logger"] for line in lines(configured, stream)] == [
            "stdout",
            "stdout",
            "stderr",
            "stdout",
            "stdout",
        ]


def test_a_print_without_end_is_bounded(
    stream: io.BufferedWriter, context: LogContext, received: RecordingReceiver
):
    """Text without any newline becomes lines before it fills the memory."""
    with configure(stream=stream, level="debug", redactor=Redactor()):
        for _ in range(100):
            print("x" * 1000, end="")
        assert len(received.lines) == 11
        assert sum(len(line.event) for line in received.lines) == 99_000


def test_prints_outside_a_run_pass_through(
    configured: LogConfiguration,
    stream: io.BufferedWriter,
    received: RecordingReceiver,
    capsys: pytest.CaptureFixture[str],
):
    """Text printed outside of a run is printed as before and is not a line."""
    with configure(stream=stream, redactor=Redactor()) as held:
        print("plain")
        print("plain", file=sys.stderr)
        assert lines(held, stream) == []
    assert capsys.readouterr() == ("plain\n", "plain\n")


def test_the_captured_stream_is_a_stream(
    stream: io.BufferedWriter, context: LogContext, received: RecordingReceiver
):
    """`sys.stdout` still has encoding, isatty, flush and writelines."""
    with configure(stream=stream, redactor=Redactor()):
        assert sys.stdout.encoding and sys.stdout.isatty() is False
        sys.stdout.writelines(["a\n", "b\n"])
        sys.stdout.flush()
    assert received.events == ["a", "b"]


# --------------------------------------------------------------------------- what is the host's


def state() -> tuple[Any, ...]:
    root, own = logging.getLogger(), logging.getLogger("eventflow")
    return (
        root.handlers[:],
        root.level,
        own.handlers[:],
        own.propagate,
        own.level,
        sys.stdout,
        sys.stderr,
        structlog.is_configured(),
        structlog.get_config(),
    )


@pytest.mark.parametrize("to_stream", [True, False])
def test_close_restores_everything(stream: io.BufferedWriter, to_stream: bool):
    """`close` leaves logging, structlog and sys.stdout as they were before `configure`, also if
    called twice.
    """
    before = state()
    held = configure(stream=stream if to_stream else None)
    assert state() != before
    held.close()
    held.close()
    assert state() == before


def test_embedded_nothing_is_touched():
    """Importing eventflow and logging with it leaves the host's logging, structlog and streams
    alone.
    """
    code = (
        "import logging, sys, structlog\n"
        "def state(): return (logging.getLogger().handlers, logging.getLogger().level, "
        "logging.getLogger('eventflow').handlers,"
        " structlog.is_configured(), sys.stdout is sys.__stdout__)\n"
        "before = state()\n"
        "import eventflow, eventflow.logs.log\n"
        "eventflow.logs.log.get_logger('eventflow.worker').info('run.claimed', run='x')\n"
        "assert state() == before, state()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_embedded_lines_go_to_the_hosts_logging(
    caplog: pytest.LogCaptureFixture, context: LogContext, received: RecordingReceiver
):
    """Without `configure` a line is a record of `logging`, redacted, at the host's level; in a run
    it is stored too.
    """
    log = get_logger("eventflow.worker")
    with caplog.at_level(logging.WARNING):
        log.info("run.claimed")
        try:
            raise ValueError("password=hunter2hunter2")
        except ValueError:
            log.exception("run.failed", token="hunter2hunter2", text="a\nb")
    [record] = caplog.records
    assert (record.name, record.levelname) == ("eventflow.worker", "ERROR")
    assert record.getMessage().startswith(f"run.failed run={format_id(RUN)} flow=handle")
    assert "text=a\\nb" in record.getMessage()
    assert "ValueError: password=***" in caplog.text and "hunter2" not in caplog.text
    assert received.events == ["run.failed"]


def test_capture_without_a_stream(
    received: RecordingReceiver,
    context: LogContext,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
):
    """For tests: lines of a run are stored once, nothing is written, prints are printed, and the
    host's handlers get records; also after `capture_logs`, which leaves structlog configured.
    """
    with structlog.testing.capture_logs():
        pass
    with configure(stream=None), caplog.at_level(logging.INFO):
        print("printed")
        structlog.get_logger().info("bound")
        logging.getLogger("lib").info("recorded")
        get_logger("shop").info("logged")
    assert received.events == ["printed", "bound", "recorded", "logged"]
    assert capsys.readouterr().out == "printed\n"
    assert [record.getMessage().split()[0] for record in caplog.records] == ["recorded", "logged"]


def test_a_hosts_dictconfig_does_not_disable_own_loggers(
    configured: LogConfiguration, stream: io.BufferedWriter
):
    """`logging.config.dictConfig` disables loggers it does not know; eventflow's own lines are
    still written.
    """
    log = get_logger("eventflow.worker")
    log.info("run.claimed")
    loggers = [logging.getLogger("eventflow.worker"), logging.getLogger("eventflow")]
    for logger in loggers:
        logger.disabled = True
    try:
        log.info("run.completed")
    finally:
        for logger in loggers:
            logger.disabled = False
    assert [line["event"] for line in lines(configured, stream)] == ["run.claimed", "run.completed"]


# --------------------------------------------------------------------------- names


def test_each_log_event_is_declared_once_where_it_is_logged():
    """Each event is declared once, in a package that logs it, as `noun.verb_past` with a sentence;
    nothing is declared that is not logged.
    """
    logged = {(event, package(module)) for event, module in events.logged()}
    # Written without a logger: the output and the store count what they drop.
    logged.add(("log.dropped", "eventflow/logs"))
    declared = [(event, package(module)) for event, _, module in events.declared()]
    names = [event for event, _ in declared]
    assert len(set(names)) == len(names)
    assert set(declared) <= logged
    assert {event for event, at in logged if at != "eventflow/demo"} == set(names)
    for event, description, _ in events.declared():
        assert events.NAME.fullmatch(event) and re.match("[A-Z].*[.]$", description)


def package(module: str) -> str:
    """`eventflow/store` of eventflow/store/sqlite.py, `triggers` of all triggers."""
    folder = module.split("/")[:-1]
    return "/".join(folder[:2] if folder[0] == "eventflow" else folder[:1])


def test_context_is_not_shared_with_other_threads(
    stream: io.BufferedWriter, context: LogContext, received: RecordingReceiver
):
    """A thread that a task starts has no context, so its prints pass through; with a copied context
    they do not.
    """
    with configure(stream=stream, level="debug", redactor=Redactor()):
        bare = threading.Thread(target=print, args=("bare",))
        copied = threading.Thread(target=contextvars.copy_context().run, args=(print, "copied"))
        for thread in (bare, copied):
            thread.start()
            thread.join()
        assert received.events == ["copied"]


def test_a_line_costs_microseconds(tmp_path: Path):
    """Two to four lines a run at thousands of runs a second: a line in a run stays far below 60 µs
    even on a loaded machine.
    """
    clock = SystemClock()
    with open(tmp_path / "log", "wb") as file, configure(stream=file, redactor=Redactor()):
        token = log_context.set(LogContext(RUN, "handle"))
        log, best = get_logger("eventflow.worker"), float("inf")
        for _ in range(5):
            start = clock.monotonic()
            for n in range(1000):
                log.info("run.completed", ms=1.5, tasks=n)
            best = min(best, (clock.monotonic() - start) / 1000)
        log_context.reset(token)
    assert best < 60e-6
