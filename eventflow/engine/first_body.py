"""The first step of the body of a run's first call, before the run has any parts.

The flow's only task awaits the call, so the flow is parked and the body may start at once. If the
body ends in its first step, the flow receives the value in the step that made the call, and the run
needs no parts (run_parts.py). Otherwise attempts.py continues the body after that step.

`Calls.perform` (calls.py) decides when to do so. A replay delivers the same in both cases
(docs/design.md).
"""

import asyncio
from contextvars import copy_context
from typing import Any

from eventflow.engine.worker_services import WorkerServices
from eventflow.logs.log import LogContext, log_context
from eventflow.loop.flow_loop import FlowLoop, leave_flow
from eventflow.loop.started import StartedCoroutine, run_as_task
from eventflow.runs.journal import Entry, Kind
from eventflow.sdk.checkpoint import enter_checkpoints
from eventflow.sdk.task import TaskCall, TaskContext, enter_task
from eventflow.serialization.blobs import OFFLOAD_BYTES


class AttemptTask(asyncio.Task[Any]):
    """The asyncio task of an attempt; knows whether its body has cancelled it."""

    __slots__ = ("cancels_itself",)

    cancels_itself: bool

    def cancel(self, msg: Any = None) -> bool:
        if asyncio.current_task(self.get_loop()) is self:
            self.cancels_itself = True
        return super().cancel(msg)


def begin_first_body(
    services: WorkerServices, run_id: str, log: LogContext, flow_loop: FlowLoop, call: TaskCall
) -> Entry | None:
    """The entry of the body's value. None: the body waits or failed, or its value needs more than
    an entry; `Attempts.take_over` then continues the call after the step taken here.
    """
    context = call.context = copy_context()
    if call.task.options.retries.attempts > 1:
        context = context.copy()  # the next attempt must not see what this one sets
    call.attempt = 1
    call.is_running = True
    times = call.times
    times.asked_at = services.clock.monotonic()
    times.began_at = times.asked_at
    attempt = StartedCoroutine(context)
    body = call.first_step = StartedCoroutine(context)
    task = call.handle = AttemptTask(attempt, loop=services.loop, context=context)
    entry = flow_loop.run_outside(
        run_as_task, task, services.loop, context, _take_step, services, run_id, log, call, body
    )
    if entry is None:
        return None
    attempt.end()
    call.is_running = False
    call.handle = None
    call.first_step = None
    if call.body is not None:
        call.body.is_over = True
    return entry


def _take_step(
    services: WorkerServices,
    run_id: str,
    log: LogContext,
    call: TaskCall,
    body: StartedCoroutine,
) -> Entry | None:
    task = call.task
    context = enter_attempt(services, run_id, log, call)
    try:
        coro = task.fn(*call.args, **call.kwargs)
    except BaseException as error:  # the arguments do not fit: recorded like any failure
        body.fail(error)
        return None
    body.take_first_step(coro)
    if not body.has_value or context.success_events:
        return None
    ended_at = services.clock.monotonic()
    try:
        codec, data = task.result.encode(body.value, key=services.secret)
    except BaseException:  # it is encoded again, and the failure recorded
        return None
    if len(data) > OFFLOAD_BYTES:
        return None
    if (lines := log_context.get()) is not None and lines.partial_lines:
        lines.close()
    entry = Entry(
        call_key=call.call_key,
        kind=Kind.VALUE,
        attempt=1,
        fingerprint=call.fingerprint,
        codec=codec,
        value=data,
    )
    took = call.times.write_to(entry, ended_at)
    services.task_durations.observe(task.name, "completed", took)
    return entry


def enter_attempt(
    services: WorkerServices, run_id: str, log: LogContext, call: TaskCall, on_progress: Any = None
) -> TaskContext:
    """Sets the context variables that a body reads, in the current context. Its TaskContext."""
    name = call.task.name
    leave_flow()
    log_context.set(log.for_attempt(name, call.attempt))
    key = f"{run_id}/{call.call_key}"
    call.body = TaskContext(run_id, name, call.attempt, key, None, call.fingerprint)
    enter_task(call.body)
    enter_checkpoints(services.checkpoints, on_progress)
    return call.body
