"""Ends the waits of a run in memory: the next attempts that wait for their time start now.

runtime.py calls this on the flow loop, for `eventflow retry RUN`. A run that has left memory is
woken by the store (store/rerun.py).
"""

from eventflow.core.clock import read_moment
from eventflow.engine.actions import CancelTimer, SetTimer
from eventflow.engine.execution import Execution
from eventflow.sdk.task import TaskCall


def start_waiting_attempts(execution: Execution | None) -> int:
    """How many attempts start now instead of at their due time; 0 for a run that is not in memory.

    The due times in the journal stay: after a crash they apply again.
    """
    if execution is None or not execution.run_end.is_open:
        return 0
    now = read_moment(execution.services.clock)
    started = 0
    for call in list(execution.pending.waiting.values()):
        if isinstance(call, TaskCall) and call.handle is not None and not call.is_running:
            execution.carry_out(CancelTimer(call.handle))
            call.since = now
            execution.carry_out(SetTimer(call, now.wall))
            started += 1
    return started
