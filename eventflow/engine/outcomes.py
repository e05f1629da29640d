"""What follows an outcome in this process once it is durable: its log line, the flow's hooks, and whoever waits for the result.

The worker calls `follow` when a run's Settle has come back. Nothing here changes what was recorded. On the worker's loop.
"""

from collections.abc import Callable, Coroutine
from typing import Any

import orjson

from eventflow.core.clock import SECOND
from eventflow.core.errors import call_catching
from eventflow.engine.attempts import run_hook
from eventflow.engine.execution import Execution
from eventflow.logs.log import get_logger, where
from eventflow.runs.run import (
    Cancelled,
    Completed,
    Failed,
    Held,
    Interrupted,
    Outcome,
    Restarted,
    Suspended,
)
from eventflow.serialization.codecs import decode_error

log = get_logger("eventflow.worker")


class Outcomes:
    """`spawn` runs a hook as a task that the worker owns."""

    def __init__(self, spawn: Callable[[Coroutine[Any, Any, Any]], None]) -> None:
        self._spawn = spawn
        self._watchers: dict[int, list[Callable[[Outcome], None]]] = {}

    def on_settled(self, execution: Execution, outcome: Outcome, at: int) -> None:
        """`at`: when it was recorded, microseconds."""
        token = where.set(execution.here)
        _log(execution, outcome, at)
        where.reset(token)
        options = execution.flow.options
        if (options.on_success or options.on_failure) is not None:
            self._run_hook(execution, outcome)
        if self._watchers and not isinstance(outcome, Suspended | Interrupted | Restarted):
            self.notify(execution.run.id, outcome)

    def _run_hook(self, execution: Execution, outcome: Outcome) -> None:
        options = execution.flow.options
        if isinstance(outcome, Completed) and options.on_success is not None:
            value, error = call_catching(self._value, execution, outcome)
            if error is None:
                self._spawn(run_hook(execution.name, options.on_success, execution.name, value))
        elif isinstance(outcome, Failed) and options.on_failure is not None:
            self._spawn(
                run_hook(
                    execution.name, options.on_failure, execution.name, decode_error(outcome.error)
                )
            )

    def _value(self, execution: Execution, outcome: Completed) -> Any:
        name, data = execution.pool.blobs.fetch(outcome.codec, outcome.value)
        return execution.flow.result.decode(name, data)

    # ----------------------------------------------------------------- who waits

    def notify(self, run: int, outcome: Outcome) -> None:
        """The run has come to this: everybody who watches it hears so."""
        for tell in self._watchers.pop(run, ()):
            tell(outcome)

    def add_watcher(self, run: int, tell: Callable[[Outcome], None]) -> None:
        """`tell(outcome)` when this run settles, or is held, here."""
        self._watchers.setdefault(run, []).append(tell)

    def remove_watcher(self, run: int, tell: Callable[[Outcome], None]) -> None:
        """Nobody waits with this `tell` any more."""
        left = [other for other in self._watchers.pop(run, ()) if other is not tell]
        if left:
            self._watchers[run] = left


def _log(execution: Execution, outcome: Outcome, at: int) -> None:
    """Called where the run's ids are known to every line."""
    match outcome:
        case Completed():
            log.info("run.completed", seconds=(at - execution.run.created_at) / SECOND)
        case Failed():
            error = orjson.loads(outcome.error)
            log.error("run.failed", error=f"{error.get('type')}: {error.get('message')}")
        case Suspended():
            log.info("run.suspended", until=outcome.until)
        case Cancelled():
            log.info("run.cancelled", reason=outcome.reason)
        case Held():
            log.error("run.held", reason=outcome.reason)
        case Interrupted() | Restarted():
            log.info("run.interrupted", afresh=isinstance(outcome, Restarted))
