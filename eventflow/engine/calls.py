"""The calls that a flow awaits: how one is made, started and answered.

A call waits for its answer on a future of the flow's loop, with one exception: the first call of a
run is answered in the step that makes it, if the flow waits for nothing else and the body ends
without waiting.
"""

import asyncio
import sys
from abc import abstractmethod
from collections.abc import Callable
from contextvars import copy_context
from typing import Any, Final, NoReturn, TypeGuard

from eventflow.core.errors import ResultsUnavailable, error_text
from eventflow.engine.actions import EndRun
from eventflow.engine.awaitables import Call, EmitCall, Pending
from eventflow.engine.first_body import begin_first_body
from eventflow.engine.run_end import retry_later
from eventflow.engine.run_parts import RunParts
from eventflow.engine.worker_services import WorkerServices
from eventflow.loop.flow_loop import FlowLoop, FlowTask
from eventflow.runs.journal import Entry, Kind
from eventflow.runs.run import NeedsAttention
from eventflow.sdk.task import TaskCall
from eventflow.serialization.errors import decode_error

UNREADABLE: Final = object()


class Calls(RunParts):
    """Makes the calls of a run and gives the flow their answers."""

    root: FlowTask | None
    """The flow's first task, once it exists."""

    @abstractmethod
    def guarded(self, call: Callable[..., None], *args: Any) -> None: ...

    async def perform(self, call: Call) -> Any:
        """The call's recorded or new result. Its call key is taken already."""
        if self._may_begin(call):
            if (entry := self._begin(call)) is not None:
                value = self._read_value(call, entry)
                if value is not UNREADABLE:
                    return value
        else:
            if self.run_end.outcome is not None or self.run_end.is_signalled:
                await refuse_unless_cleanup(self)
            self._make_call(call)
        future = call.future = asyncio.Future(loop=self.loop)
        try:
            return await future
        except BaseException:
            self.give_up(call)
            raise
        finally:  # breaks a cycle: an error refers to this frame
            call.future = None
            del future

    def _may_begin(self, call: Call) -> TypeGuard[TaskCall]:
        """Whether this is the run's first call, and the flow waits for nothing else: no step is
        left, so it is parked, and the body may start now.

        In an `except` block it may not: it must not see the error that is handled there.
        """
        return (
            not self.has_parts
            and type(call) is TaskCall
            and call.task.is_plain
            and self.first_call is None
            and self.loop.is_parked_but_for(self.root)
            and not self.services.draining
            and not self.run.crash_suspect
            and sys.exception() is None
        )

    def _begin(self, call: TaskCall) -> Entry | None:
        """Starts the body. The entry of its value; None if the body waits or failed, which
        `Attempts` then handles.
        """
        services = self.services
        self.first_call = call
        entry = begin_first_body(services, self.run_id, self.log_context, self.loop, call)
        if entry is None:
            self.first_call = None
            self.pending.waiting[call.call_key] = call
            self.guarded(self.attempts.take_over, call)
        else:  # the flow's time from here on, so the store keeps it
            entry.at = max(self.began_at, services.clock.now())
            self.note_value(entry)
        return entry

    def _make_call(self, call: Call) -> None:
        if not self.run_end.is_open:
            raise asyncio.CancelledError(self.run_end.outcome)
        if type(call) is TaskCall:
            call.context = copy_context()
            times = call.times
            times.after = self.pending.last_delivered
            times.asked_at = self.services.clock.monotonic()
        self.request(call)

    def await_call(self, call: Call) -> asyncio.Future[Any]:
        self._make_call(call)
        future: asyncio.Future[Any] = asyncio.Future(loop=self.loop)
        call.future = future
        return future

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

    def request(self, target: Pending) -> None:
        if (action := self.pending.request(target)) is not None:
            self.carry_out(action)

    def give_up(self, target: Pending) -> None:
        if (action := self.pending.give_up(target)) is not None:
            self.carry_out(action)

    def answer(self, call: Call, entry: Entry) -> None:
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


def cleans_up(loop: FlowLoop) -> bool:
    """Whether the current step of a cancelled flow cleans up."""
    return loop.cleanup is not None and loop.cleanup.is_ongoing(asyncio.current_task(loop))


async def refuse_unless_cleanup(calls: Calls) -> None:
    """Raises CancelledError once the flow is cancelled or ends, unless it calls to clean up."""
    if not (calls.run_end.is_open and cleans_up(calls.loop)):
        await refuse(calls)


async def refuse(calls: Calls) -> NoReturn:
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
