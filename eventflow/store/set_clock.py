"""What a commit does first when the wall clock was set since the last one: waits that are durations
last as long as they were asked to.

These are open windows and the retries of flows, which wait in the store however short they are. A
run that sleeps there is due by the wall clock, and so is everything after a restart. The writer
calls `shift_waits` before anything of the transaction is decided, and their due times are computed
from its reading of the clock.
"""

import sqlite3

from eventflow.core.clock import SECOND, Moment
from eventflow.store.rows import NEVER

SET_BY = SECOND
"""Microseconds between the two clocks, from one commit to the next, that count as a wall clock that
was set: more than a thread may wait between its two readings.
"""

_SHIFT_RUNS = f"""
    UPDATE runs SET due_at = due_at + :step
    WHERE state IN (0, 2) AND due_at > 0 AND due_at < {NEVER} AND (
        (token = 0 AND mode IN ('batch', 'debounce'))
        OR (reason IS NOT NULL AND cancel_requested = 0))"""
# The second is `RunRow.awaits_retry`.


def step_between(last: Moment | None, now: Moment) -> int:
    """By how many microseconds the wall clock was set between two readings; 0: it was not."""
    if last is None:
        return 0
    step = last.time_left(now, now.wall)
    return step if abs(step) > SET_BY else 0


def shift_waits(connection: sqlite3.Connection, step: int) -> None:
    """Moves the due times of durations by as much as the wall clock was set."""
    connection.execute(_SHIFT_RUNS, {"step": step})
    connection.execute("UPDATE windows SET opened_at = opened_at + ?", (step,))
