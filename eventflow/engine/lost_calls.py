"""Calls that a flow loses: made and never awaited, or cut off when the flow returns.

Python hides both: the first as a RuntimeWarning without a line, the second not at all. `Execution`
calls `report_lost_calls` when its flow has returned.
"""

import logging
from collections.abc import Iterable
from typing import Any

from eventflow.core.errors import NotAwaited
from eventflow.engine.awaitables import ChildCall, EmitCall, Pending
from eventflow.logs.log import LogContext, get_logger
from eventflow.loop.unawaited import called_name, made_at, origin
from eventflow.runs.run import Completed, Failed, Outcome
from eventflow.sdk.task import TaskCall
from eventflow.serialization.errors import encode_error

MAX_LISTED = 10
"""Calls that one log line or error names."""

log = get_logger("eventflow.execution")
LOG_EVENTS = {
    "call.cut_off": (
        "A flow returned while calls were still running; they are abandoned and not recorded."
    ),
    "call.not_awaited": (
        "A flow made a call and never awaited it, so it did not run; `call` and `at` name it. With "
        "App(strict=True) the run fails."
    ),
}


def report_unawaited(coro: Any, lines: LogContext, definition: str, *, is_replaying: bool) -> str:
    """Logs a coroutine that was never awaited; returns `what at file:line`.

    `definition`: where the flow is defined, if the line of the call is not known.
    """
    name = called_name(coro)
    at = origin(coro) or definition
    if not is_replaying:  # the line was logged when the flow took this step first
        fields = {"call": name, "at": at, "hint": "write `await` before it"}
        log.log_line("call.not_awaited", logging.WARNING, fields, lines)
    return f"{name} at {at}"


def returned_unawaited(name: str, coro: Any) -> NotAwaited:
    """The error for a flow or a task, `name`, that returned a call instead of its value."""
    call = called_name(coro)
    at = made_at(coro)  # the code that runs now did not make it
    coro.close()  # Python would warn of it
    return NotAwaited(name, call if at is None else f"{call} at {at}")


def report_lost_calls(
    outcome: Outcome,
    lines: LogContext,
    waiting: Iterable[Pending],
    unawaited: list[str] | None,
) -> Outcome:
    """Logs the calls that the end of a completed flow cuts off. Returns the outcome: a failure if
    `unawaited` (None: not strict) names calls.
    """
    if not isinstance(outcome, Completed):
        return outcome
    cut_off = [
        target.call_key for target in waiting if isinstance(target, TaskCall | ChildCall | EmitCall)
    ]
    if cut_off:
        fields = {
            "count": len(cut_off),
            "calls": cut_off[:MAX_LISTED],
            "hint": "await them before the flow returns",
        }
        log.log_line("call.cut_off", logging.WARNING, fields, lines)
    if unawaited:
        more = f" and {len(unawaited) - MAX_LISTED} more" if len(unawaited) > MAX_LISTED else ""
        listed = ", ".join(unawaited[:MAX_LISTED])
        return Failed(encode_error(NotAwaited(lines.flow, listed + more)))
    return outcome
