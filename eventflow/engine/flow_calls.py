"""The run as its flow code sees it: calls, timers, time. The base class of `Execution`.

The sdk (`sdk.flow.FlowCallPerformer`) and the `FlowLoop` call these methods, inside a step of the
flow: their effect must be the same in a replay. Each call takes its key from the scope of the
current task before its coroutine exists.
"""

import asyncio
import logging
from collections.abc import Coroutine, Iterable
from typing import Any, Final, NoReturn

import orjson

from eventflow.core.clock import read_moment
from eventflow.core.declarations import format_location
from eventflow.engine.actions import AppendEntry, EndRun
from eventflow.engine.awaitables import ChildCall, ControlSignal, EmitCall, Pending
from eventflow.engine.calls import Calls, cleans_up, refuse
from eventflow.engine.lost_calls import report_unawaited
from eventflow.engine.task_map import TaskMap
from eventflow.events.event import Event
from eventflow.logs.log import get_logger, log_context
from eventflow.loop.cleanup import Cleanup
from eventflow.loop.flow_loop import FlowTimer
from eventflow.loop.unawaited import CallSite
from eventflow.runs.journal import Entry, Journal, Kind, restart_entry
from eventflow.runs.run import Restarted
from eventflow.sdk.flow import Flow, RunContext, enter_run
from eventflow.sdk.task import TaskCall

log = get_logger("eventflow.execution")
LOG_EVENTS = {
    "flow.callback_failed": (
        "A callback that flow code scheduled on its event loop raised an exception."
    ),
}


NO_JOURNAL: Final = Journal()


class FlowCalls(Calls):
    """Turns what flow code requests into pending calls. `carry_out` executes the actions that
    these return.
    """

    def make_coroutine(self) -> Coroutine[Any, Any, Any]:
        """The flow's coroutine, with its arguments bound. Sets the run's context variables.

        Raises what binding the arguments raises.
        """
        log_context.set(self.log_context)
        run = self.run
        binder = self.flow.binder
        payloads = run.payloads or ((run.payload,) if run.payload is not None else ())
        journal = self.pending.journal if self.has_parts else NO_JOURNAL
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

    def perform_all(
        self, name: str, calls: Iterable[TaskCall], limit: int, patient: bool
    ) -> Coroutine[Any, Any, list[Any]]:
        if self.run_end.is_signalled and not cleans_up(self.loop):
            return refuse(self)
        return TaskMap(name, calls, self.await_call, self.give_up, patient=patient).run(limit)

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
            self.answer(target, entry)
        elif self.root is not None:
            self.loop.cleanup = self.loop.cleanup or Cleanup()
            self.run_end.apply_signal(
                entry, self.root, lambda outcome: self.carry_out(EndRun(outcome))
            )

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
        if self.loop.is_current():
            return self.read_now()
        if self.has_parts:
            return self.pending.now
        return self.first_call.at if isinstance(self.first_call, Entry) else self.began_at

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
                now = read_moment(self.services.clock)
                timer.since = now._replace(wall=timer.due - duration)
            self.request(timer)

    def cancel_timer(self, timer: FlowTimer) -> None:
        self.give_up(timer)

    def on_callback_error(self, context: dict[str, Any]) -> None:
        fields = {"problem": context.get("message"), "exc_info": context.get("exception")}
        log.log_line("flow.callback_failed", logging.ERROR, fields, self.log_context)

    def on_unawaited(self, coro: Any) -> None:
        if self.run_end.is_open and not self.run_end.is_signalled:  # else its end dropped it
            code = self.flow.fn.__code__
            definition = format_location(code.co_filename, code.co_firstlineno)
            replaying = self.pending.is_replaying
            self.run_end.unawaited.append(
                report_unawaited(coro, self.log_context, definition, is_replaying=replaying)
            )
