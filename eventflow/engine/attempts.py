"""Attempts: the bodies of one run's task calls, bounded in time and number, and their results.

    launch     a copy of the call's context, an asyncio task on the worker's loop
    take_over  the same for a body that has taken its first step already (first_body.py)
    limits     the task's concurrency, the gate for crash suspects, the attempt's timeout
    end        a value → RecordValue · an error → AppendEntry (FAILED with a due time, or ERROR)
               abandoned → nothing

`Execution` launches an attempt when a call is not in the journal; results come back to it as
actions. The late result of an abandoned body is refused. A body that ignores its cancellation gets
`CANCEL_ATTEMPTS` of them and is then left behind; a thread cannot be stopped and keeps its
concurrency slot until it ends.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future as ThreadFuture
from contextlib import suppress
from contextvars import Context, copy_context
from functools import partial
from types import CoroutineType
from typing import Any

import msgspec

from eventflow.core.clock import Clock, microseconds, read_moment, timer_after
from eventflow.core.errors import ANY_FAILURE, TaskTimedOut, error_text, value_or_none
from eventflow.core.secrets import KNOWN_SECRETS
from eventflow.engine.actions import (
    Action,
    AppendEntry,
    EndRun,
    RecordValue,
    ReportFault,
    ReportFenced,
)
from eventflow.engine.first_body import AttemptTask, enter_attempt
from eventflow.engine.journal_writer import JournalWriter
from eventflow.engine.lost_calls import returned_unawaited
from eventflow.engine.run_end import RunEnd
from eventflow.engine.worker_services import CANCEL_ATTEMPTS, WorkerServices
from eventflow.logs.log import LogContext, get_logger, log_context
from eventflow.loop.flow_loop import FlowLoop
from eventflow.loop.started import StartedCoroutine, run_as_task
from eventflow.runs.journal import Entry, Kind
from eventflow.runs.run import MAX_CRASHES, Interrupted, Run
from eventflow.sdk.task import TaskCall
from eventflow.serialization.blobs import OFFLOAD_BYTES, offload
from eventflow.serialization.errors import MAX_DETAIL
from eventflow.store.protocol import Appended, Arrival

CANCEL_INTERVAL = 1.0
"""Seconds between the `CANCEL_ATTEMPTS` cancels of a body that ignores its timeout."""

log = get_logger("eventflow.attempts")
LOG_EVENTS = {
    "task.abandoned": (
        "An attempt did not end after its cancel; it keeps its slot, and its late result is "
        "refused."
    ),
    "task.attempt_failed": (
        "An attempt of a task failed; `retry_in` is the delay before the next one, if any."
    ),
    "task.timeout_missed": (
        "An async body blocked the event loop past its timeout, so it could not be ended; its "
        "value is kept."
    ),
    "task.thread_left_behind": (
        "A plain body continues after its timeout or cancel: `left_behind` counts such threads, "
        "`spare` those that may still replace one."
    ),
    "task.hook_failed": (
        "An on_success or on_failure hook raised an exception; the outcome does not change."
    ),
}


class Attempts(msgspec.Struct, eq=False):
    """Launches and ends the attempts of one run. Everything here runs on the worker's loop.

    `_carry_out` is `Execution.carry_out`. `_run_end` shows whether the run still records anything.
    `running` counts bodies: while there are any, the run is not idle.
    """

    _services: WorkerServices
    run: Run
    run_id: str
    _flow_loop: FlowLoop
    _log_context: LogContext
    _writer: JournalWriter
    _run_end: RunEnd
    _carry_out: Callable[[Action], None]
    running: int = 0

    def launch(self, call: TaskCall) -> None:
        """Starts the next attempt of a call; its body takes its first step in the loop's
        next turn.
        """
        call.attempt += 1
        call.is_running = True
        call.thread = None
        if call.times.asked_at is None:
            call.times.asked_at = self._services.clock.monotonic()
        self.running += 1
        # The next attempt must not see what this one sets in its context.
        may_retry = call.task.options.retries.attempts > 1
        context: Context = call.context.copy() if may_retry else call.context
        on_progress = self._on_checkpoint_progress if self.run.crash_suspect else None
        context.run(
            enter_attempt, self._services, self.run_id, self._log_context, call, on_progress
        )
        # Not loop.create_task: an eager task factory would run the body here, inside the flow's own
        # step.
        call.handle = AttemptTask(self._attempt(call), loop=self._services.loop, context=context)

    def take_over(self, call: TaskCall) -> None:
        """Continues an attempt whose body has taken its first step in a step of the flow
        (first_body.py).
        """
        self.running += 1
        attempt: StartedCoroutine = call.handle.get_coro()
        if call.first_step.has_ended:  # its result is handled in the loop's next turn
            attempt.follow(self._attempt(call))
            return
        self._flow_loop.run_outside(
            run_as_task,
            call.handle,
            self._services.loop,
            attempt.context,
            attempt.take_first_step,
            self._attempt(call),
        )

    def abandon(self, call: TaskCall) -> None:
        """Cancels the call's body, or the timer of its next attempt; nothing of it is recorded from
        here on.
        """
        handle = call.handle
        if handle is not None:
            handle.cancel()
            if self._mark_ended(call):
                self._keep_reference(handle, call)

    async def _attempt(self, call: TaskCall) -> None:
        """Runs one body and reports its result. Whatever the body raises ends here."""
        me: AttemptTask = call.handle
        services = self._services
        context = call.body
        value: Any = None
        try:
            value = await self._body(call)
            ended_at = services.clock.monotonic()
            codec, data = call.task.result.encode(value, key=services.secret)
            if len(data) > OFFLOAD_BYTES:
                bound = log.bind(run=self.run_id, task=call.task.name)
                codec, data = await offload(services.blobs, codec, data, bound)
            arrivals: Sequence[Arrival] = ()
            if context is not None and context.success_events:
                arrivals = [
                    services.derived.event(self.run, *fields) for fields in context.success_events
                ]
        except (
            BaseException
        ) as error:  # around an attempt: recorded, and retried if its Retry allows
            if isinstance(error, GeneratorExit) and not _is_running(me):
                raise  # the loop is gone, and this coroutine is freed
            if call.thread is not None and call.handle is me:
                call.thread = None  # breaks a cycle: it holds the error, and the error this frame
            if call.handle is not me or not self._run_end.is_open:
                pass  # Abandoned: cancelled by the flow or by a drain, or left behind.
            elif (
                isinstance(error, asyncio.CancelledError)
                and me.cancelling()
                and not hasattr(me, "cancels_itself")
                and services.may_be_closing(self.run.id, call.call_key)
            ):
                # Neither the flow nor a timeout cancelled it.
                self._carry_out(EndRun(Interrupted()))
            else:
                if type(value) is CoroutineType:  # why it cannot be encoded
                    error = returned_unawaited(call.task.name, value)
                self._guarded(self._on_failure, call, error)
        else:
            if call.handle is me and self._run_end.is_open:
                self._guarded(self._on_success, call, value, codec, data, arrivals, ended_at)
        finally:
            if (lines := log_context.get()) is not None and lines.partial_lines:
                lines.close()

    def _guarded(self, step: Callable[..., None], *args: Any) -> None:
        try:
            step(*args)
        except BaseException as fault:  # a defect of ours, or a callable in the app's Retry
            self._carry_out(ReportFault(fault))

    # ----------------------------------------------------------------- limits

    def _body(self, call: TaskCall) -> Awaitable[Any]:
        """The body within its limits: _body → _limited (the task's concurrency) → _gated (crash
        suspects) → _timed (the timeout) → the function, on the loop or in a thread.
        """
        if (begun := call.first_step) is not None:
            call.first_step = None
            return begun
        if call.task.options.concurrency is None and not self.run.crash_suspect:
            return self._timed(call)
        return self._limited(call, self._services.limits.for_task(call.task))

    async def _limited(self, call: TaskCall, limit: asyncio.Semaphore | None) -> Any:
        """The body within its task's concurrency limit."""
        if limit is None:
            return await self._gated(call)
        await limit.acquire()
        try:
            return await self._gated(call)
        finally:
            if call.thread is None:
                limit.release()
            else:  # also when the thread ended long ago
                release = partial(_call_on_loop, self._services.loop, limit.release)
                call.thread.add_done_callback(lambda _: release())  # pyright: ignore

    async def _gated(self, call: TaskCall) -> Any:
        """The body of a crash suspect: few at a time, with a journaled start; one crash from
        quarantine, exclusively.
        """
        run = self.run
        gate = self._services.limits.suspects
        if not run.crash_suspect:
            return await self._timed(call)
        async with gate.exclusive() if run.crash_count >= MAX_CRASHES - 1 else gate:
            if run.crash_suspect:  # not cleared meanwhile by another of its calls
                reply = await self._writer.mark_start()
                if not isinstance(reply, Appended):
                    self._carry_out(ReportFenced(reply))
                    raise asyncio.CancelledError("lost the claim")
            return await self._timed(call)

    def _on_checkpoint_progress(self) -> None:
        """A suspect's body saved more than any before it: the crashes so far were not its doing.
        From any thread.
        """
        _call_on_loop(self._services.loop, self._clear_suspicion)

    def _clear_suspicion(self) -> None:
        if self.run.crash_suspect and self._run_end.is_open:
            self._writer.clear_suspicion()

    def _timed(self, call: TaskCall) -> Awaitable[Any]:
        timeout = call.task.options.timeout
        if timeout is not None:
            on_unresponsive = partial(self._on_unresponsive, call, call.attempt)
            return _within(call, timeout, self._services, on_unresponsive)
        if call.task.is_async:
            call.times.began_at = self._services.clock.monotonic()
            return call.task.fn(*call.args, **call.kwargs)
        return _in_thread(call, self._services)

    def _on_unresponsive(self, call: TaskCall, attempt: int) -> None:
        """A body ignored its timeout: record it, leave the body behind, refuse its late result."""
        if call.is_running and call.attempt == attempt and self._run_end.is_open:
            task = call.task
            handle = call.handle
            log.error("task.abandoned", run=self.run_id, task=task.name, attempt=attempt)
            error = TaskTimedOut(task.name, task.options.timeout or 0.0)
            self._guarded(self._on_failure, call, error)
            self._keep_reference(handle, call)

    def _keep_reference(self, handle: asyncio.Task[Any], call: TaskCall) -> None:
        """Holds a task until it has ended: the loop holds its tasks weakly."""
        self._services.abandon(handle, f"{self.run_id}/{call.call_key}")

    # ----------------------------------------------------------------- the end of an attempt

    def _mark_ended(self, call: TaskCall) -> bool:
        """Whether a body was running."""
        if not call.is_running:
            return False
        call.is_running = False
        call.handle = None
        if call.body is not None:
            call.body.is_over = True
        self.running -= 1
        return True

    def _on_success(
        self,
        call: TaskCall,
        value: Any,
        codec: str,
        data: bytes,
        arrivals: Sequence[Arrival],
        ended_at: float,
    ) -> None:
        self._mark_ended(call)
        entry = Entry(
            call_key=call.call_key,
            kind=Kind.VALUE,
            attempt=call.attempt,
            fingerprint=call.fingerprint,
            codec=codec,
            value=data,
        )
        took = call.times.write_to(entry, ended_at)
        self._services.task_durations.observe(call.task.name, "completed", took)
        self._carry_out(RecordValue(entry, arrivals))
        if call.task.options.on_success is not None:
            self._run_hook(call.task.options.on_success, value)

    def _on_failure(self, call: TaskCall, error: BaseException) -> None:
        self._mark_ended(call)
        services = self._services
        options = call.task.options
        call.failed_attempts += 1
        delay = options.retries.delay_after(call.failed_attempts, error, services.rng)
        log.warning(  # in the attempt's context, which adds the run, the task and the attempt
            "task.attempt_failed",
            retry_in=None if delay is None else round(delay, 3),
            error=f"{type(error).__name__}: {KNOWN_SECRETS.excerpt(error_text(error), MAX_DETAIL)}",
        )
        entry = Entry(
            call_key=call.call_key,
            kind=Kind.ERROR if delay is None else Kind.FAILED,
            attempt=call.attempt,
            fingerprint=call.fingerprint,
            error=self._run_end.encode_error(error),
        )
        took = call.times.write_to(entry, services.clock.monotonic())
        services.task_durations.observe(call.task.name, "failed", took)
        arrivals: list[Arrival] = []
        if delay is None:
            for fields in (call.body and call.body.failure_events) or ():
                arrival = value_or_none(services.derived.event, self.run, *fields)
                if arrival is not None:  # else refused: the chain of events is too long already
                    arrivals.append(arrival)
            self._run_hook(options.on_failure, error)
        else:
            call.since = read_moment(services.clock)
            entry.due_at = call.since.wall + microseconds(delay)
            self._run_hook(options.on_retry, error, delay)
        self._carry_out(AppendEntry(entry, arrivals))
        if delay == 0 and not services.draining:
            self.launch(call)

    def _run_hook(self, hook: Callable[..., Any] | None, *args: Any) -> None:
        if hook is not None:
            self._services.spawn(run_hook(self.run_id, hook, *args))


async def run_hook(run: str, hook: Callable[..., Any], *args: Any) -> None:
    """Calls a user's hook, plain or async, after the fact. Its order is not defined, and it changes
    nothing.
    """
    try:
        result = hook(*args)
        if asyncio.iscoroutine(result):
            await result
    except ANY_FAILURE as error:  # around a hook: what it reports has happened already
        log.error("task.hook_failed", run=run, hook=getattr(hook, "__name__", "?"), exc_info=error)


def _is_running(task: asyncio.Task[Any]) -> bool:
    """Whether the caller is a step of this task."""
    with suppress(RuntimeError):  # no loop runs here
        return asyncio.current_task() is task
    return False


# --------------------------------------------------------------------------- time


class AttemptDeadline:
    """Cancels an attempt's asyncio task when its timeout has passed, and again while it ignores
    that.

    `on_unresponsive` is called after `CANCEL_ATTEMPTS`: the attempt then counts as timed out, its
    late result is refused.
    """

    __slots__ = (
        "_cancels",
        "_clock",
        "_loop",
        "_on_unresponsive",
        "_task",
        "_timeout",
        "_timer",
        "expired",
    )

    def __init__(self, clock: Clock, timeout: float, on_unresponsive: Callable[[], None]) -> None:
        self.expired = False
        self._cancels = 0
        self._clock = clock
        self._timeout = timeout
        self._on_unresponsive = on_unresponsive
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[Any] | None = asyncio.current_task()
        self._timer: Any = None

    def start(self) -> None:
        """Starts the timeout. Does nothing after `cancel`."""
        if self._task is not None:
            self._timer = timer_after(
                self._clock, self._loop, microseconds(self._timeout), self._expire
            )

    def _expire(self) -> None:
        self.expired = True
        if self._cancels == CANCEL_ATTEMPTS:
            self._on_unresponsive()
            return
        self._cancels += 1
        if self._task is not None:
            self._task.cancel()
        self._timer = timer_after(
            self._clock, self._loop, microseconds(CANCEL_INTERVAL), self._expire
        )

    def absorb(self) -> None:
        """Takes back the cancellations made here: they become a timeout, and outer code must not
        see them.
        """
        if self._task is not None:
            for _ in range(self._cancels):
                self._task.uncancel()

    def cancel(self) -> None:
        self._task = None
        if self._timer is not None:
            self._timer.cancel()


async def _within(
    call: TaskCall, timeout: float, services: WorkerServices, on_unresponsive: Callable[[], None]
) -> Any:
    """The body's return value, or its exception; TaskTimedOut when it took longer than
    its timeout.
    """
    deadline = AttemptDeadline(services.clock, timeout, on_unresponsive)
    try:
        if not call.task.is_async:
            return await _in_thread(call, services, deadline.start)
        deadline.start()
        began = call.times.began_at = services.clock.monotonic()
        value = await call.task.fn(*call.args, **call.kwargs)
        took = services.clock.monotonic() - began
        if took > timeout and not deadline.expired:  # no timer could fire meanwhile
            log.warning(
                "task.timeout_missed",
                task=call.task.name,
                seconds=round(took, 3),
                timeout=timeout,
                hint="its body blocked the event loop; write `def` instead of `async def`",
            )
        return value
    except asyncio.CancelledError:
        if not deadline.expired or asyncio.current_task() is not call.handle:
            raise
        deadline.absorb()
        raise TaskTimedOut(call.task.name, timeout) from None
    finally:
        deadline.cancel()


# --------------------------------------------------------------------------- threads


def _in_thread(
    call: TaskCall, services: WorkerServices, on_start: Callable[[], None] | None = None
) -> Coroutine[Any, Any, Any]:
    """Runs a plain `def` body in a thread. `on_start` is called on the loop when the
    thread begins.
    """
    begun = None if on_start is None else partial(_call_on_loop, services.loop, on_start)
    call.thread = services.threads.submit(_work, copy_context(), call, services.clock, begun)
    return _thread_result(call.thread, call.task.name, services)


async def _thread_result(thread: ThreadFuture[Any], task: str, services: WorkerServices) -> Any:
    try:
        return await asyncio.wrap_future(thread)
    except asyncio.CancelledError:
        threads = services.threads
        if threads.leave_behind(thread) and not services.draining:
            log.warning(
                "task.thread_left_behind",
                task=task,
                left_behind=threads.left_behind,
                spare=max(0, threads.max_spare - threads.left_behind),
                hint="a thread cannot be stopped: give its I/O a timeout of its own",
            )
        raise
    finally:  # breaks a cycle: it holds the error, and the error this frame
        del thread


def _work(context: Context, call: TaskCall, clock: Clock, begun: Callable[[], None] | None) -> Any:
    call.times.began_at = clock.monotonic()
    if begun is not None:
        begun()
    try:
        return context.run(partial(call.task.fn, *call.args, **call.kwargs))
    except StopIteration as stop:  # a future cannot carry it
        raise RuntimeError(f"task {call.task.name!r} raised StopIteration") from stop


def _call_on_loop(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # the loop is closed: nobody waits for this any more
        loop.call_soon_threadsafe(call)
