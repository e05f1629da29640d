"""What the objects of a run answer: values that say what to do next. `Execution.carry_out` does it.

`PendingCalls` and `Suspension` return them; `Attempts` passes them to the execution when a body has
ended. So each of these objects can be read, and tested, alone.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import msgspec

from eventflow.core.errors import StoreError
from eventflow.engine.awaitables import ChildCall, ControlSignal, EmitCall
from eventflow.loop.flow_loop import FlowTimer
from eventflow.runs.journal import Entry
from eventflow.runs.run import Outcome
from eventflow.sdk.task import TaskCall
from eventflow.store.protocol import Arrival, Fenced


class StartAttempt(msgspec.Struct, frozen=True, gc=False):
    """Start the next attempt of a task's call."""

    call: TaskCall


class SetTimer(msgspec.Struct, frozen=True, gc=False):
    """At `due`, microseconds: start the call's next attempt, or record that the timer or the signal
    fired. `target.since` is the moment from which `due` was computed.
    """

    target: TaskCall | FlowTimer | ControlSignal
    due: int


class PublishEvent(msgspec.Struct, frozen=True, gc=False):
    """Record the event, which publishes it."""

    call: EmitCall


class StartChild(msgspec.Struct, frozen=True, gc=False):
    """Record a child run, which makes it due."""

    call: ChildCall


class AppendEntry(msgspec.Struct, frozen=True, gc=False):
    """Record an entry, with the events that it publishes."""

    entry: Entry
    arrivals: Sequence[Arrival] = ()


class RecordValue(msgspec.Struct, frozen=True, gc=False):
    """Record a body's value; deliver it before its commit where a replay will do the same."""

    entry: Entry
    arrivals: Sequence[Arrival] = ()


class AbandonAttempt(msgspec.Struct, frozen=True, gc=False):
    """The flow no longer waits for the call: cancel its body, record nothing of it."""

    call: TaskCall


class CancelTimer(msgspec.Struct, frozen=True, gc=False):
    """Nobody waits for the timer any more; `handle` is what `Clock.timer` returned."""

    handle: Any


class CancelChild(msgspec.Struct, frozen=True, gc=False):
    """The flow no longer waits for the child run that `started` records."""

    started: Entry


class EndRun(msgspec.Struct, frozen=True, gc=False):
    """End with this outcome, unless the run is ending already."""

    outcome: Outcome


class ReportFenced(msgspec.Struct, frozen=True, gc=False):
    """The store refused a write: nothing more may be written."""

    reply: Fenced | StoreError


class ReportFault(msgspec.Struct, frozen=True, gc=False):
    """eventflow's own code, or a callable that the app gave it, raised."""

    error: BaseException


Action: TypeAlias = (
    StartAttempt
    | SetTimer
    | PublishEvent
    | StartChild
    | AppendEntry
    | RecordValue
    | AbandonAttempt
    | CancelTimer
    | CancelChild
    | EndRun
    | ReportFenced
    | ReportFault
)
