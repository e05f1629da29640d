"""What follows an outcome once it is durable: its log line, the flow's hooks, and the callbacks of
those who wait for it.

`Worker` calls `on_settled` when the Settle of a run was answered. Nothing here changes what was
recorded. On the worker's loop.
"""

import logging
from collections.abc import Callable
from typing import Any, Final

import orjson

from eventflow.core.clock import SECOND, to_datetime
from eventflow.engine.attempts import run_hook
from eventflow.engine.execution import Execution
from eventflow.engine.worker_services import WorkerServices
from eventflow.logs.log import get_logger
from eventflow.runs.run import (
    Cancelled,
    Completed,
    Failed,
    Interrupted,
    NeedsAttention,
    Outcome,
    Restarted,
    Retried,
    Suspended,
)
from eventflow.serialization.errors import decode_error, error_summary, raised_at

log = get_logger("eventflow.worker")
LOG_EVENTS = {
    "run.attempt_failed": (
        "A run's flow raised, and its `retries` are not used up; `retry_in` is the delay before "
        "the next attempt, in seconds."
    ),
    "run.cancelled": "A run was cancelled.",
    "run.completed": "A run ended with a result.",
    "run.failed": "A run ended with an error.",
    "run.held": "A run needs a person; `reason` says why.",
    "run.interrupted": "A drain or crash interrupted a run; it continues at the next start.",
    "run.suspended": "A run waits durably and left memory.",
}


_ENDS: Final[dict[type, str]] = {
    Completed: "completed",
    Failed: "failed",
    Cancelled: "cancelled",
    Retried: "retried",
}


class Outcomes:
    def __init__(self, services: WorkerServices) -> None:
        self._services = services
        self._watchers: dict[int, list[Callable[[Outcome], None]]] = {}

    def on_settled(self, execution: Execution, outcome: Outcome, at: int) -> None:
        """`at`: when the outcome was recorded, microseconds."""
        _log(execution, outcome, at)
        if (state := _ENDS.get(type(outcome))) is not None:
            run = execution.run
            seconds = (at - (run.started_at or run.created_at)) / SECOND
            self._services.run_durations.observe(run.flow, state, seconds)
        options = execution.flow.options
        if (options.on_success or options.on_failure or options.on_retry) is not None:
            self._run_hook(execution, outcome)
        if self._watchers and not isinstance(
            outcome, Suspended | Interrupted | Restarted | Retried
        ):
            self.notify(execution.run.id, outcome)

    def _run_hook(self, execution: Execution, outcome: Outcome) -> None:
        name = execution.run_id
        options = execution.flow.options
        if isinstance(outcome, Completed) and options.on_success is not None:
            try:
                value = self._value(execution, outcome)
            except BaseException:  # a result that cannot be read has no hook
                return
            self._services.spawn(run_hook(name, options.on_success, name, value))
        elif isinstance(outcome, Failed) and options.on_failure is not None:
            error = decode_error(outcome.error)
            self._services.spawn(run_hook(name, options.on_failure, name, error))
        elif isinstance(outcome, Retried) and options.on_retry is not None:
            error = decode_error(outcome.note.error or b"{}")
            delay = outcome.delay / SECOND
            self._services.spawn(run_hook(name, options.on_retry, name, error, delay))

    def _value(self, execution: Execution, outcome: Completed) -> Any:
        codec, data = self._services.blobs.fetch(outcome.codec, outcome.value)
        return execution.flow.result.decode(codec, data)

    # ----------------------------------------------------------------- watchers

    def notify(self, run: int, outcome: Outcome) -> None:
        """Calls and removes the run's watchers."""
        for call in self._watchers.pop(run, ()):
            call(outcome)

    def add_watcher(self, run: int, call: Callable[[Outcome], None]) -> None:
        """`call(outcome)` when this run settles, or is held, in this process."""
        self._watchers.setdefault(run, []).append(call)

    def remove_watcher(self, run: int, call: Callable[[Outcome], None]) -> None:
        left = [other for other in self._watchers.pop(run, ()) if other is not call]
        if left:
            self._watchers[run] = left


def _log(execution: Execution, outcome: Outcome, at: int) -> None:
    """Logs the outcome as a line of the run, with its ids."""
    context = execution.log_context
    match outcome:
        case Completed():
            seconds = (at - execution.run.created_at) / SECOND
            log.log_line("run.completed", logging.INFO, {"seconds": seconds}, context)
        case Failed():
            error = orjson.loads(outcome.error)
            fields = {"error": error_summary(error), "at": raised_at(error)}
            log.log_line("run.failed", logging.ERROR, fields, context)
        case Retried(note):
            error = orjson.loads(note.error or b"{}")
            count = orjson.loads(note.value or b"{}")
            fields = {
                "attempt": count.get("attempt"),
                "attempts": count.get("attempts"),
                "retry_in": round(outcome.delay / SECOND, 3),
                "error": error_summary(error),
                "at": raised_at(error),
            }
            log.log_line("run.attempt_failed", logging.WARNING, fields, context)
        case Suspended():
            until = None if outcome.until is None else to_datetime(outcome.until).isoformat()
            log.log_line("run.suspended", logging.INFO, {"until": until}, context)
        case Cancelled():
            log.log_line("run.cancelled", logging.INFO, {"reason": outcome.reason}, context)
        case NeedsAttention():
            log.log_line("run.held", logging.ERROR, {"reason": outcome.reason}, context)
        case Interrupted() | Restarted():
            fields = {"restarted": isinstance(outcome, Restarted)}
            log.log_line("run.interrupted", logging.INFO, fields, context)
