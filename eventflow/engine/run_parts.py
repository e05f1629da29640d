"""The objects of one run in memory.

Most runs have one event and one task whose body does not wait. Such a run needs its flow's loop and
one recorded value. The other objects, its parts, are made when the first of them is used: by a flow
that waits, makes a second call, sets a timer or fails, or from outside by a cancel.
"""

from abc import ABC, abstractmethod
from asyncio import AbstractEventLoop
from typing import Any, Generic, TypeVar

import msgspec

from eventflow.core.clock import SECOND
from eventflow.engine.actions import Action
from eventflow.engine.attempts import Attempts
from eventflow.engine.journal_writer import JournalWriter, Reply
from eventflow.engine.pending_calls import PendingCalls
from eventflow.engine.run_end import RunEnd
from eventflow.engine.suspension import Suspension
from eventflow.engine.worker_services import WorkerServices
from eventflow.logs.log import LogContext
from eventflow.loop.flow_loop import DETACHED_HOST, FlowLoop, LoopHost
from eventflow.runs.journal import Entry, Journal
from eventflow.runs.run import Outcome, Run, format_id
from eventflow.sdk.flow import Flow
from eventflow.sdk.task import TaskCall

T = TypeVar("T")

MAKES_ALL_PARTS = False
"""Whether each run makes all parts at its start. Tests compare the two."""

SETTLED_LOOP = FlowLoop(DETACHED_HOST, AbstractEventLoop())
"""In place of the loops of settled runs, which are freed before the store has replied."""
SETTLED_LOOP.close()


class RunningCall(msgspec.Struct, frozen=True, gc=False):
    """An attempt that executes or waits for a slot, seen from outside. `after` as in the journal;
    `waited` and `took` in microseconds until now; `took` is None while it waits for a slot.
    """

    call_key: str
    attempt: int
    after: int
    waited: int
    took: int | None


class RunPart(Generic[T]):
    """An attribute of RunParts that `make_parts` sets, when the first of them is read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, run: "RunParts", owner: type) -> T:
        """Called while the instance has no attribute of the name."""
        if run.has_parts:
            raise AttributeError(f"{self._name}: expected to be used before the end of the run")
        run.make_parts(Journal())
        return vars(run)[self._name]


class RunParts(LoopHost, ABC):
    """The parts of one run. `has_parts`: whether each `RunPart` has been made."""

    run_end = RunPart[RunEnd]()
    pending = RunPart[PendingCalls]()
    writer = RunPart[JournalWriter]()
    attempts = RunPart[Attempts]()
    suspension = RunPart[Suspension]()

    def __init__(
        self, services: WorkerServices, run: Run, flow: Flow[..., Any], journal: Journal | None
    ) -> None:
        self.services = services
        self.run = run
        self.flow = flow
        self.run_id = format_id(run.id)
        self.loop = FlowLoop(self, services.loop, run.id)
        self.log_context = LogContext(
            run.id,
            flow.name,
            run.event,
            logs=services.logs,
            replaying=self.is_replaying,
            run_id=self.run_id,
        )
        self.began_at = services.clock.now()
        self.has_parts = False
        self.first_call: TaskCall | Entry | None = None
        """While the body of the run's first call takes its first step: the call. After that, in a
        run without parts: the entry of its value, which the flow has received.
        """
        self.settled_as: Outcome | None = None
        """How the run was settled without parts."""
        if journal is not None or MAKES_ALL_PARTS:
            self.make_parts(journal or Journal())

    def make_parts(self, journal: Journal) -> None:
        """Makes the parts, in the state that the run has reached without them."""
        services = self.services
        run = self.run
        run_end = RunEnd(services, self.flow, journal)
        pending = PendingCalls(journal, self.began_at, is_suspect=run.crash_suspect)
        writer = JournalWriter(services, run, self.on_appended)
        vars(self).update(
            run_end=run_end,
            pending=pending,
            writer=writer,
            attempts=Attempts(
                services,
                run,
                self.run_id,
                self.loop,
                self.log_context,
                writer,
                run_end,
                self.carry_out,
            ),
            suspension=Suspension(services, self.flow.options, pending, self.rest),
        )
        self.has_parts = True  # not before: other threads read the parts if it is set
        if isinstance(entry := self.first_call, Entry):
            self.note_value(entry)
        if self.settled_as is not None:
            run_end.outcome = self.settled_as
            run_end.is_closed = True

    def note_value(self, entry: Entry) -> None:
        """The flow has received the value of the run's first call."""
        if self.has_parts:
            self.writer.keep_uncommitted(entry)
            self.pending.note_delivered(entry)
        else:
            self.first_call = entry

    @abstractmethod
    def carry_out(self, action: Action) -> None: ...

    @abstractmethod
    def on_appended(self, reply: Reply) -> None: ...

    @abstractmethod
    def rest(self, recheck: bool = False) -> None: ...

    def is_replaying(self) -> bool:
        """Whether the flow's log lines repeat those of an earlier execution, or will be repeated by
        a later one.
        """
        return self.has_parts and (self.pending.is_replaying or self.run_end.will_resume)

    @property
    def ended_calls(self) -> int:
        """How many calls and timers have ended. From any thread."""
        if self.has_parts:
            return len(self.pending.journal.finals)
        return int(isinstance(self.first_call, Entry))

    def running_calls(self) -> list[RunningCall]:
        """The attempts under way, in the order of their calls. From any thread."""
        now = self.services.clock.monotonic()
        found: list[RunningCall] = []
        waiting = self.pending.waiting.values() if self.has_parts else ()
        for call in [self.first_call, *waiting]:
            if not isinstance(call, TaskCall) or not call.is_running:
                continue
            times = call.times
            began = times.began_at
            asked = times.asked_at if times.asked_at is not None else began or now
            after = 0 if times.after is None else times.after.batch
            waited = int(((began or now) - asked) * SECOND)
            took = None if began is None else int((now - began) * SECOND)
            found.append(RunningCall(call.call_key, call.attempt, after, waited, took))
        return found
