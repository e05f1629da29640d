"""When an idle run leaves memory.

A run is idle when no body of it runs and nothing of it is being recorded. It leaves memory when
every branch of it waits durably for `SUSPEND_AFTER` or longer, and is replayed when the first of
them is due. `Execution` makes one per run and asks it when the flow is parked.
"""

from collections.abc import Callable

import msgspec

from eventflow.core.clock import SECOND, Moment, Timer, read_moment, timer_after
from eventflow.engine.actions import AppendEntry, EndRun
from eventflow.engine.awaitables import ChildCall, ControlSignal, Pending
from eventflow.engine.pending_calls import PendingCalls
from eventflow.engine.worker_services import WorkerServices
from eventflow.loop.flow_loop import FlowTimer
from eventflow.runs.journal import RUNNING_TIME_NOTE, TIMEOUT_KEY, Entry, Journal, Kind
from eventflow.runs.run import NeedsAttention, Suspended
from eventflow.sdk.flow import FlowOptions
from eventflow.sdk.task import TaskCall

SUSPEND_AFTER = 60 * SECOND
"""A run leaves memory when every branch of it waits at least this long."""

MAX_SCANNED = 16
"""Waiting branches that are examined each time the flow parks; more are examined once a second."""


class Suspension(msgspec.Struct, eq=False):
    """`on_recheck(True)` is called when `decide` is due again, with `scan_all`."""

    _services: WorkerServices
    _flow: FlowOptions
    _pending: PendingCalls
    _on_recheck: Callable[[bool], None]
    is_idle: bool = False
    idle_since: float = 0.0
    """By the monotonic clock."""
    _counted_since: float = 0.0
    _time_is_recorded: bool = False
    _recheck_timer: Timer | None = None

    def set_idle(self, idle: bool) -> None:
        """An idle run gives up its slot, and takes one when it works again."""
        self.is_idle = idle
        slots = self._services.limits.slots
        if idle:
            self.idle_since = self._services.clock.monotonic()
            slots.release()
        else:
            slots.working += 1

    def decide(self, *, scan_all: bool) -> EndRun | AppendEntry | None:
        """What an idle run does when its flow has parked: stay (None), leave memory, or be held
        because nothing will come.

        Without `scan_all` a run with many waiting branches stays, and is examined a second later.
        """
        waiting = self._pending.waiting
        journal = self._pending.journal
        if not waiting or (journal.unclaimed and waiting.keys() <= {TIMEOUT_KEY}):
            return EndRun(NeedsAttention(_stuck_reason(journal)))
        if len(waiting) > MAX_SCANNED and not scan_all:
            self._recheck_after(SECOND)
            return None
        targets = waiting.values()
        due_times: list[int] = []
        now = read_moment(self._services.clock)
        for target in targets:
            due, since = self._wait(target)
            if due is not None and since is not None:
                if since.time_left(now, due) < SUSPEND_AFTER:
                    return None
                due_times.append(due)
        if any(type(target) is ChildCall for target in targets):
            # Most children are quick, and coming back costs a replay.
            idle = int((self._services.clock.monotonic() - self.idle_since) * SECOND)
            if idle < SUSPEND_AFTER and not self._services.limits.capacity.is_tight:
                self._recheck_after(SUSPEND_AFTER - idle)
                return None
        until = min(due_times, default=None)
        # Its commit makes the flow park again, and the decision comes back here.
        return self.record_time() or EndRun(Suspended(until, journal.last_batch, journal.count))

    def _wait(self, target: Pending) -> tuple[int | None, Moment | None]:
        """Until when the target waits, and since when."""
        match target:
            case FlowTimer():
                return target.due, target.since
            case ControlSignal():
                return None if self._counts_running_time else target.due, target.since
            case TaskCall():
                return self._pending.journal.attempts(target.call_key)[2], target.since
            case _:
                return None, None

    def _recheck_after(self, duration: int) -> None:
        if self._recheck_timer is None:
            services = self._services
            self._recheck_timer = timer_after(
                services.clock, services.loop, duration, self._recheck
            )

    def _recheck(self) -> None:
        self._recheck_timer = None
        self._on_recheck(True)

    @property
    def _counts_running_time(self) -> bool:
        return self._flow.timeout_counts == "running" and self._flow.timeout is not None

    def begin_count(self) -> None:
        """Starts to count the time in memory, if the flow has `timeout_counts="running"`."""
        if self._counts_running_time:
            self._counted_since = self._services.clock.monotonic()

    def record_time(self) -> AppendEntry | None:
        """The time this run has spent in memory, once per execution; None unless its timeout counts
        only that.
        """
        if self._time_is_recorded or not self._counts_running_time:
            return None
        self._time_is_recorded = True
        journal = self._pending.journal
        last = journal.running_time_note
        ran = int((self._services.clock.monotonic() - self._counted_since) * SECOND)
        return AppendEntry(
            Entry(
                call_key=RUNNING_TIME_NOTE,
                kind=Kind.NOTE,
                attempt=1 if last is None else last.attempt + 1,
                due_at=journal.running_time + ran,
            )
        )

    def close(self) -> None:
        if self._recheck_timer is not None:
            self._recheck_timer.cancel()
            self._recheck_timer = None


def _stuck_reason(journal: Journal) -> str:
    unclaimed = sorted(journal.unclaimed)
    if not unclaimed:
        return "the flow waits for a result that no task, sleep or child run of it can deliver"
    shown = ", ".join(unclaimed[:5]) + (" …" if len(unclaimed) > 5 else "")
    return (
        f"diverged: the flow no longer makes the recorded calls {shown}; "
        "deploy the code that made them, or retry it with --from-scratch"
    )
