"""What one run waits for, what its journal answers, and what must be started because it does not.

    request       recorded → queued for delivery; new → queued to start
    next_batch    the recorded answers to deliver next: one commit, whole, in its order
    start_new     what to start, once the flow is parked and nothing is left to deliver
    record        an entry became durable: queued for delivery
    give_up       the flow no longer waits

No I/O and no clock here: the methods answer with actions (actions.py), which `Execution` carries
out. Deliveries come in the order of commits, live and replaying alike.
"""

import heapq
from collections.abc import Callable
from typing import TypeAlias

from eventflow.core.clock import Moment
from eventflow.core.errors import ArgumentsChanged
from eventflow.engine.actions import (
    AbandonAttempt,
    Action,
    AppendEntry,
    CancelChild,
    CancelTimer,
    EndRun,
    PublishEvent,
    SetTimer,
    StartAttempt,
    StartChild,
)
from eventflow.engine.awaitables import ChildCall, ControlSignal, EmitCall, Pending
from eventflow.loop.flow_loop import FlowTimer
from eventflow.runs.journal import STARTED_NOTE, TIMEOUT_KEY, Entry, Journal, Kind
from eventflow.runs.run import NeedsAttention
from eventflow.sdk.task import TaskCall
from eventflow.serialization.codecs import fingerprint_diff, is_recorded_unsorted

Answer: TypeAlias = tuple[int, int, Entry, Pending]
"""A durable entry and what waits for it: `(batch, position, entry, target)`."""


class PendingCalls:
    """The pending calls of one run, by call key. `now` is the flow's time, that of the last
    delivery, in microseconds.
    """

    __slots__ = (
        "_last_logged_batch",
        "_loaded_batch",
        "_now_is_recorded",
        "answers",
        "is_replaying",
        "journal",
        "last_delivered",
        "now",
        "unstarted",
        "waiting",
    )

    def __init__(self, journal: Journal, began_at: int, *, is_suspect: bool) -> None:
        self.journal = journal
        self.waiting: dict[str, Pending] = {}
        self.answers: list[Answer] = []
        """Recorded, and to be delivered: a heap."""
        self.unstarted: list[Pending] = []
        """Neither recorded nor started."""
        self.last_delivered: Entry | None = None
        """Its `batch` is final once it is durable, which it is before a new call starts."""
        self.now = journal.started_at or journal.first_at or began_at
        self._now_is_recorded = journal.started_at is not None
        self.is_replaying = journal.last_own_batch > 0
        # Log lines that followed the last delivery may be lost after a crash; they are stored
        # before a suspension.
        self._last_logged_batch = journal.last_own_batch - is_suspect
        self._loaded_batch = journal.last_batch

    def record_start(self) -> AppendEntry | None:
        """To be called when the flow reads `now`: before the first delivery that is the start,
        which must survive a crash.
        """
        if self._now_is_recorded:
            return None
        self._now_is_recorded = True
        return AppendEntry(Entry(call_key=STARTED_NOTE, kind=Kind.NOTE, due_at=self.now))

    @property
    def is_live(self) -> bool:
        """Whether the last delivery was recorded after the journal was read: no earlier execution
        has made the requests that the flow makes now.
        """
        last = self.last_delivered
        return last is not None and (not last.batch or last.batch > self._loaded_batch)

    # ----------------------------------------------------------------- requests

    def request(self, target: Pending) -> EndRun | None:
        """Adds a pending call. EndRun: its arguments are not those recorded, and its task does not
        allow that.
        """
        journal = self.journal
        call_key = target.call_key
        mismatch: EndRun | None = None
        if type(target) is ChildCall and (started := journal.children.get(call_key)) is not None:
            _, mismatch = self._compare(started, target)
        if (entry := journal.finals.get(call_key)) is not None:
            journal.unclaimed.discard(call_key)
            accepted, changed = self._compare(entry, target)
            mismatch = mismatch or changed
            if accepted:
                heapq.heappush(self.answers, (entry.batch, entry.position, entry, target))
                return mismatch
        self.waiting[call_key] = target
        self.unstarted.append(target)
        return mismatch

    def _compare(self, entry: Entry, target: Pending) -> tuple[bool, EndRun | None]:
        """Whether the recorded entry answers this call, by its arguments or by its task's
        policy.
        """
        mine: bytes | None = getattr(target, "fingerprint", None)
        if mine is None or entry.fingerprint is None or mine == entry.fingerprint:
            return True, None
        diff = fingerprint_diff(entry.fingerprint, mine)
        if not diff:
            return True, None
        if isinstance(target, TaskCall | ChildCall) and is_recorded_unsorted(
            entry.fingerprint, target.marked_arguments()
        ):
            return True, None
        policy = target.task.options.on_changed if type(target) is TaskCall else "error"
        if policy == "error":
            return False, EndRun(NeedsAttention(str(ArgumentsChanged(target.call_key, diff))))
        return policy == "accept", None

    def expect(self, signal: ControlSignal) -> None:
        """Adds a signal whose entry is about to be recorded."""
        self.waiting[signal.call_key] = signal

    def give_up(self, target: Pending) -> Action | None:
        """Flow code no longer waits for this: nothing of it is recorded from here on."""
        if self.waiting.pop(target.call_key, None) is None:
            return None
        return self._drop(target)

    def close(self) -> list[Action]:
        """Gives up everything."""
        self.unstarted.clear()
        self.answers.clear()
        if not self.waiting:
            return []
        drops = [self._drop(target) for target in self.waiting.values()]
        self.waiting = {}
        return [action for action in drops if action is not None]

    def _drop(self, target: Pending) -> Action | None:
        if type(target) is TaskCall:
            return AbandonAttempt(target)
        if type(target) is ChildCall:
            started = self.journal.children.get(target.call_key)
            return None if started is None else CancelChild(started)
        handle = getattr(target, "handle", None)
        return None if handle is None else CancelTimer(handle)

    # ----------------------------------------------------------------- answers

    def next_batch(self) -> list[Answer]:
        """Removes and returns the answers that the next commit holds, whole, in its order.

        There must be `answers`.
        """
        answers = self.answers
        batch = answers[0][0]
        if batch > self._last_logged_batch:
            self.is_replaying = False
        taken: list[Answer] = []
        while answers and answers[0][0] == batch:
            answer = heapq.heappop(answers)
            at = answer[2].at
            if at > self.now or not self._now_is_recorded:
                self.now = at
                self._now_is_recorded = True
            taken.append(answer)
        self.last_delivered = taken[-1][2]
        return taken

    def note_delivered(self, entry: Entry) -> None:
        """The flow has received the value of its first call before this object was made."""
        self.last_delivered = entry
        self.now = entry.at
        self._now_is_recorded = True

    def is_only(self, call_key: str) -> bool:
        """Whether the run waits for this call alone (its timeout aside), with nothing left to
        deliver or to start.
        """
        waiting = self.waiting
        return (
            not self.answers
            and not self.unstarted
            and call_key in waiting
            and len(waiting) - (TIMEOUT_KEY in waiting) == 1
        )

    def deliver_uncommitted(self, entry: Entry) -> None:
        """Queues the value of the only pending call for delivery before its commit, which will hold
        nothing else.
        """
        target = self.waiting.pop(entry.call_key)
        heapq.heappush(self.answers, (self.journal.last_batch + 1, 0, entry, target))

    # ----------------------------------------------------------------- starts

    def start_new(self, read: Callable[[], Moment]) -> list[Action]:
        """How to start what was requested and is not recorded, in the order of the requests.

        `read` reads the clock.
        """
        new = self.unstarted
        self.unstarted = []
        actions: list[Action] = []
        for target in new:
            if target.call_key in self.waiting:
                action = self._start(target, read)
                if action is not None:
                    actions.append(action)
        return actions

    def start_emissions(self) -> list[EmitCall]:
        """The emissions to start, if nothing else is; otherwise none."""
        calls: list[EmitCall] = []
        for target in self.unstarted:
            if target.call_key in self.waiting:
                if not isinstance(target, EmitCall):
                    return []
                calls.append(target)
        self.unstarted = []
        return calls

    def _start(self, target: Pending, read: Callable[[], Moment]) -> Action | None:
        match target:
            case TaskCall():
                if self.journal.count and (due := self._continue_attempts(target)) is not None:
                    target.since = read()
                    return (
                        SetTimer(target, due) if due > target.since.wall else StartAttempt(target)
                    )
                return StartAttempt(target)
            case FlowTimer() | ControlSignal():
                if target.due is None:
                    return None
                if target.since is None:
                    now = read()  # the flow's time does not go back with the wall clock
                    target.since = now._replace(wall=max(now.wall, self.now))
                return SetTimer(target, target.due)
            case EmitCall():
                return PublishEvent(target)
            case ChildCall():
                started = target.call_key in self.journal.children  # its answer is on its way
                return None if started else StartChild(target)

    def _continue_attempts(self, call: TaskCall) -> int | None:
        """Counts the call's recorded attempts; when its next one is due, if that is recorded."""
        journal = self.journal
        attempt, spent, due = journal.attempts(call.call_key)
        call.attempt = attempt
        call.failed_attempts = spent
        if (replaced := journal.finals.get(call.call_key)) is not None:  # on_changed="rerun"
            call.attempt = max(call.attempt, replaced.attempt)
        return due

    # ----------------------------------------------------------------- durable entries

    def record(self, entry: Entry) -> Action | None:
        """Takes in an entry of this run that is durable, its own or a child's answer."""
        call_key = entry.call_key
        known = self.journal.finals.get(call_key)
        if known is not None and (known.batch, known.position) == (entry.batch, entry.position):
            return None  # the answer of a child run may arrive twice
        self.journal.add(entry)
        if entry.kind is Kind.VALUE or entry.kind.is_final:
            if (target := self.waiting.pop(call_key, None)) is not None:
                heapq.heappush(self.answers, (entry.batch, entry.position, entry, target))
        elif entry.kind is Kind.FAILED:
            call = self.waiting.get(call_key)
            if (
                isinstance(call, TaskCall)
                and call.attempt == entry.attempt
                and not call.is_running
                and entry.due_at is not None
            ):
                return SetTimer(call, entry.due_at)
        elif entry.kind is Kind.CHILD and call_key not in self.waiting:
            return CancelChild(entry)  # given up while its start was being recorded
        return None
