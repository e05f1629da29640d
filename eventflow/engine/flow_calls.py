"""The run as its flow code sees it: calls, timers, time. The other half of `Execution`.

The sdk (`sdk.flow.FlowCallPerformer`) and the `FlowLoop` call these methods, inside a step of the
flow: their effect must be the same in a replay. Each call takes its key from the scope of the
current task before its coroutine exists.
"""

import asyncio
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable
from contextvars import copy_context
from typing import Any, Final, NoReturn

import orjson

from eventflow.core.clock import Moment
from eventflow.core.declarations import format_location
from eventflow.core.errors import ResultsUnavailable, error_text
from eventflow.engine.actions import Action, AppendEntry, EndRun
from eventflow.engine.awaitables import Call, ChildCall, ControlSignal, EmitCall, Pending
from eventflow.engine.lost_calls import report_unawaited
from eventflow.engine.pending_calls import PendingCalls
from eventflow.engine.run_end import RunEnd, retry_later
from eventflow.engine.task_map import TaskMap
from eventflow.engine.worker_services import WorkerServices
from eventflow.events.event import Event
from eventflow.logs.log import LogContext, get_logger, log_context
from eventflow.loop.cleanup import Cleanup
from eventflow.loop.flow_loop import FlowLoop, FlowTask, FlowTimer
from eventflow.loop.unawaited import CallSite
from eventflow.runs.journal import Entry, Kind, restart_entry
from eventflow.runs.run import NeedsAttention, Restarted, Run
from eventflow.sdk.flow import Flow, RunContext, enter_run
from eventflow.sdk.task import TaskCall
from eventflow.serialization.errors import decode_error

log = get_logger("eventflow.execution")
LOG_EVENTS = {
    "flow.callback_failed": (
        "A callback that flow code scheduled on its event loop raised an exception."
    ),
}


UNREADABLE: Final = object()


class FlowCalls(ABC):
    """Turns what flow code asks for into pending calls. `carry_out` does what these answer."""

    services: WorkerServices
    run: Run
    flow: Flow[..., Any]
    run_id: str
    run_end: RunEnd
    loop: FlowLoop
    pending: PendingCalls
    log_context: LogContext
    root: FlowTask | None
    """The flow's first task, once it exists."""

    @abstractmethod
    def carry_out(self, action: Action) -> None: ...

    @abstractmethod
    def start_new(self) -> None: ...

    @abstractmethod
    def guarded(self, call: Callable[..., None], *args: Any) -> None: ...

    def make_coroutine(self) -> Coroutine[Any, Any, Any]:
        """The flow's coroutine, with its arguments bound. Sets the run's context variables.

        Raises what binding the arguments raises.
        """
        log_context.set(self.log_context)
        run = self.run
        binder = self.flow.binder
        payloads = run.payloads or ((run.payload,) if run.payload is not None else ())
        journal = self.pending.journal
        enter_run(
            RunContext(
                self.run_id,
                self.flow.name,
                payloads,
                self._read_context_time,
                self.services.state,
                journal.generation,
                journal.seed,
            )
        )
        if run.given is not None:
            return self.flow.fn(**run.given)
        events = [Event.from_recorded(payload) for payload in payloads]
        if run.params is not None:
            event = events[-1] if events else None
            arguments = binder.bind_params(orjson.loads(run.params), event)
        elif run.mode is not None:
            arguments = binder.bind_events(events)
        else:
            arguments = binder.bind_event(events[0]) if events else {}
        return self.flow.fn(**arguments)

    # ----------------------------------------------------------------- calls

    async def perform(self, call: Call) -> Any:
        """The call's recorded or new result. Its call key is taken already."""
        if self.run_end.outcome is not None or self.run_end.is_signalled:
            await refuse_unless_cleanup(self)
        # If the flow's only task waits for this call, no step is left: the flow is parked. In an
        # `except` block it takes the longer way: a body must not see the error handled there.
        parks = (
            self.loop.is_parked_but_for(self.root)
            and not self.pending.answers
            and sys.exception() is None
        )
        self._make_call(call)
        if parks and (entry := self._answer_at_once()) is not None:
            if entry.kind is Kind.ERROR:
                raise decode_error(entry.error or b"{}")
            value = self._read_value(call, entry)
            if value is not UNREADABLE:
                return value
        future = call.future = asyncio.Future(loop=self.loop)
        try:
            return await future
        except BaseException:
            self._give_up(call)
            raise
        finally:  # an error refers to this frame, and must not be referred to by it
            call.future = None
            del future

    def _make_call(self, call: Call) -> None:
        if not self.run_end.is_open:
            raise asyncio.CancelledError(self.run_end.outcome)
        if type(call) is TaskCall:
            call.context = copy_context()
            times = call.times
            times.after = self.pending.last_delivered
            times.asked_at = self.services.clock.monotonic()
        self._request(call)

    def _await_call(self, call: Call) -> asyncio.Future[Any]:
        self._make_call(call)
        future: asyncio.Future[Any] = asyncio.Future(loop=self.loop)
        call.future = future
        return future

    def _answer_at_once(self) -> Entry | None:
        """What `on_parked` does for a flow that waits for one call, in the step that makes it: the
        recorded answer, or the value of a body that ends without waiting.
        """
        pending = self.pending
        if self.loop.cleanup is not None or not self.run_end.is_open:
            return None
        if not pending.answers:
            pending.is_replaying = False
            self.guarded(self.start_new)
        if not pending.answers or not self.run_end.is_open:
            return None
        ((_, _, entry, _),) = pending.next_batch()
        return entry

    def _read_value(self, call: Call, entry: Entry) -> Any:
        """The recorded value, or UNREADABLE: then the run ends."""
        try:
            return decode_value(call, entry, self.services)
        except ResultsUnavailable:
            self.carry_out(EndRun(retry_later(self.services, self.pending.journal)))
        except BaseException as error:  # the code expects another type; the stored value stays
            reason = f"{call.call_key}: the recorded value cannot be read back: {error_text(error)}"
            self.carry_out(EndRun(NeedsAttention(reason)))
        return UNREADABLE

    def _request(self, target: Pending) -> None:
        if (action := self.pending.request(target)) is not None:
            self.carry_out(action)

    def _give_up(self, target: Pending) -> None:
        if (action := self.pending.give_up(target)) is not None:
            self.carry_out(action)

    def perform_all(
        self, name: str, calls: Iterable[TaskCall], limit: int, patient: bool
    ) -> Coroutine[Any, Any, list[Any]]:
        if self.run_end.is_signalled and not cleans_up(self.loop):
            return refuse(self)
        return TaskMap(name, calls, self._await_call, self._give_up, patient=patient).run(limit)

    def child_call(
        self, flow: Flow[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], site: CallSite
    ) -> ChildCall:
        call_key = self.loop.current_scope().call_key(flow.name)
        return ChildCall(flow, call_key, flow.binder.unpack(args, kwargs), site)

    def perform_emit(self, event_type: str, fields: dict[str, Any]) -> Coroutine[Any, Any, str]:
        call_key = self.loop.current_scope().call_key(f"emit:{event_type}")
        return self.perform(EmitCall(call_key, event_type, fields))

    def emission(self, call: EmitCall) -> AppendEntry:
        """The entry that publishes the event; or the error that the flow receives instead."""
        ident = f"{self.run_id}/{call.call_key}"
        try:
            arrival = self.services.derived.event(self.run, ident, call.type, call.fields)
        except BaseException as error:  # of this event, or of user code that it starts
            attempt = self.pending.journal.attempts(call.call_key)[0] + 1
            entry = Entry(call_key=call.call_key, kind=Kind.ERROR, attempt=attempt)
            entry.error = self.run_end.encode_error(error)
            return AppendEntry(entry)
        entry = Entry(call_key=call.call_key, kind=Kind.EMIT, value=ident.encode())
        return AppendEntry(entry, (arrival,))

    async def perform_restart(self, params: dict[str, Any]) -> NoReturn:
        if self.run_end.is_signalled:
            await refuse(self)
        first = restart_entry(self.pending.journal.generation + 1)
        self.carry_out(EndRun(Restarted(self.flow.binder.unpack((), params), first)))
        while True:  # until the unwinding cancels it
            await asyncio.Future(loop=self.loop)

    # ----------------------------------------------------------------- answers

    def deliver(self, entry: Entry, target: Pending) -> None:
        """Gives the flow a recorded answer, firing or signal."""
        if isinstance(target, FlowTimer):
            target.fire()
        elif not isinstance(target, ControlSignal):
            self._answer(target, entry)
        elif self.root is not None:
            self.loop.cleanup = self.loop.cleanup or Cleanup()
            self.run_end.apply_signal(
                entry, self.root, lambda outcome: self.carry_out(EndRun(outcome))
            )

    def _answer(self, call: Call, entry: Entry) -> None:
        """Sets the call's future, unless it is done."""
        future = call.future
        if future is None or future.done():
            return
        if entry.kind is Kind.ERROR:
            future.set_exception(decode_error(entry.error or b"{}"))
            # Recorded: no warning if the flow ignores it.
            future._log_traceback = False  # pyright: ignore
        else:
            value = self._read_value(call, entry)
            if value is not UNREADABLE:
                future.set_result(value)

    # ----------------------------------------------------------------- scopes

    def is_recorded_scope(self, path: str) -> bool | None:
        return self.pending.journal.has_scope(path)

    # ----------------------------------------------------------------- time

    def read_now(self) -> int:
        """The flow's time. Before the first delivery it is the start, which is then recorded."""
        if (start := self.pending.record_start()) is not None:
            self.carry_out(start)
        return self.pending.now

    def _read_context_time(self) -> int:
        """`current_run().now`. No replay depends on what a task body reads."""
        return self.read_now() if self.loop.is_current() else self.pending.now

    def set_timer(self, timer: FlowTimer) -> None:
        if self.run_end.is_open:
            pending = self.pending
            duration = timer.due - pending.now
            again = pending.journal.repeated_at
            if again:
                # The flow's time is still that of the recorded values: count from the start of this
                # attempt, which may be later than its due time. Sleeps too: one within a block's
                # timeout must stay before or after that.
                started = self.run.started_at or 0
                if started <= self.services.clock.now():  # else the wall clock was set back
                    again = max(again, started)
                timer.due = max(timer.due, again + duration)
            if self.run.begins or pending.is_live:
                monotonic = self.services.clock.monotonic()
                timer.since = Moment(timer.due - duration, monotonic)
            self._request(timer)

    def cancel_timer(self, timer: FlowTimer) -> None:
        self._give_up(timer)

    def on_callback_error(self, context: dict[str, Any]) -> None:
        log.error(
            "flow.callback_failed",
            run=self.run_id,
            problem=context.get("message"),
            exc_info=context.get("exception"),
        )

    def on_unawaited(self, coro: Any) -> None:
        if self.run_end.is_open and not self.run_end.is_signalled:  # else its end dropped it
            code = self.flow.fn.__code__
            definition = format_location(code.co_filename, code.co_firstlineno)
            replaying = self.pending.is_replaying
            self.run_end.unawaited.append(
                report_unawaited(coro, self.run_id, definition, is_replaying=replaying)
            )

    def _is_replaying(self) -> bool:
        """Whether the flow's log lines repeat those of an earlier execution, or will be repeated by
        a later one.
        """
        return self.pending.is_replaying or self.run_end.will_resume


def cleans_up(loop: FlowLoop) -> bool:
    """Whether the current step of a cancelled flow cleans up."""
    return loop.cleanup is not None and loop.cleanup.is_ongoing(asyncio.current_task(loop))


async def refuse_unless_cleanup(calls: FlowCalls) -> None:
    """Raises CancelledError once the flow is cancelled or ends, unless it calls to clean up."""
    if not (calls.run_end.is_open and cleans_up(calls.loop)):
        await refuse(calls)


async def refuse(calls: FlowCalls) -> NoReturn:
    """Cancels the flow again, which continues although it was cancelled; in the end it is ended.

    The sleep ends the step of a flow that retries for ever, also while the flow is closed.
    """
    await asyncio.sleep(0)
    if (action := calls.run_end.refuse()) is not None:
        calls.carry_out(action)
    raise asyncio.CancelledError(calls.run_end.outcome)


def decode_value(call: Call, entry: Entry, services: WorkerServices) -> Any:
    """The value that an entry records for the call, by the codec of its task or flow."""
    if isinstance(call, EmitCall):
        return (entry.value or b"").decode()
    result = call.task.result if isinstance(call, TaskCall) else call.flow.result
    codec = entry.codec or "json"
    data = entry.value or b"null"
    if codec.endswith("@blob"):
        codec, data = services.blobs.fetch(codec, data)
    return result.decode(codec, data, allow_pickle=True, key=services.secret)
