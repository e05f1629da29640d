"""Waits until an app is idle, and describes the runs that keep it busy.

Idle means: everything posted to the store is durable and answered, no task body runs, and nothing
happens until time passes or an event arrives. Called by clock.py and drain.py.
"""

import asyncio
from collections.abc import Iterator, Mapping
from typing import Any, cast

from eventflow.app import App
from eventflow.core.clock import SystemClock, to_datetime
from eventflow.engine.execution import Execution
from eventflow.loop.flow_loop import FlowTimer
from eventflow.runs.run import State, format_id
from eventflow.sdk.task import TaskCall
from eventflow.store.writer import ConnectionJob


class Stuck(AssertionError):
    """The app was not done in time. The message lists the live runs and what each waits for."""


class RealTimeDeadline:
    """A deadline in real time, independent of the app's clock."""

    def __init__(self, within: float) -> None:
        self._clock = SystemClock()
        self._until = self._clock.monotonic() + within

    @property
    def passed(self) -> bool:
        return self._clock.monotonic() > self._until


async def wait_until_idle(
    app: App, timeout: float, deadline: RealTimeDeadline | None = None
) -> bool:
    """True when the app is idle. False when it is busy but recorded nothing for `timeout` seconds,
    or at the `deadline`.
    """
    idle_checks = 0
    last = -1
    no_progress = RealTimeDeadline(timeout)
    while idle_checks < 2:
        is_idle, batch = await app.runtime.on_flow_loop(_check_idle(app))
        if batch != last:
            idle_checks = 0
            last = batch
            no_progress = RealTimeDeadline(timeout)
        idle_checks = idle_checks + 1 if is_idle else 0
        if no_progress.passed or (deadline is not None and deadline.passed):
            return False
        await asyncio.sleep(0 if is_idle else 0.001)
    return True


async def _check_idle(app: App) -> tuple[bool, int]:
    """Whether the app is idle after everything posted so far was answered; and the number of the
    last commit.
    """
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[Any] = loop.create_future()

    def last_batch(connection: Any) -> int:
        return connection.execute("SELECT batch FROM ledger").fetchone()[0]

    def answer(batch: Any) -> None:
        if answered.done():
            return
        if isinstance(batch, BaseException):
            answered.set_exception(batch)
        else:
            answered.set_result(batch)

    app.store.post(cast(Any, ConnectionJob(last_batch)), answer, loop)
    batch = await answered
    await asyncio.sleep(0)
    return app.runtime.worker.is_idle and app.runtime.late_run_monitor.is_idle, batch


async def live_runs_text(app: App, problem: str) -> str:
    """A table of the live runs with what each of them waits for, below `problem`."""
    rows = [("RUN", "FLOW", "STATE", "WAITS FOR")]
    for state in (State.RUNNING, State.WAITING, State.PENDING, State.PAUSED, State.HELD):
        for row in await app.store.runs(state=state, limit=20):
            execution = app.runtime.worker.executions.get(row["id"])
            reasons = (
                _stored_reason(row)
                if execution is None
                else ", ".join(_pending_reasons(execution)) or "its own steps"
            )
            rows.append((format_id(row["id"]), row["flow"], row["state"], reasons))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    ]
    return "\n".join([problem, *lines])


def _stored_reason(row: Mapping[str, Any]) -> str:
    if row["state"] == "held":
        return row["reason"] or "a person"
    if row["state"] == "paused":
        return "its trigger, which is paused"
    if row["blocked"]:
        return f"the run before it with ordering key {row['ordering_key']!r}"
    return (
        "an answer" if row["due_at"] is None else f"{to_datetime(row['due_at']):%Y-%m-%d %H:%M:%S}"
    )


def _pending_reasons(execution: Execution) -> Iterator[str]:
    """The calls that a run in memory waits for."""
    for call_key, target in execution.pending.waiting.items():
        if isinstance(target, TaskCall):
            yield (
                f"the body of {call_key}, attempt {target.attempt}"
                if target.is_running
                else f"the next attempt of {call_key}"
            )
        elif isinstance(target, FlowTimer):
            yield f"{call_key} at {to_datetime(target.due):%Y-%m-%d %H:%M:%S}"
        else:
            yield call_key
