"""Moves due times in the store after the wall clock was set, so that durations keep their length.

The durations are open windows and the delays of `@flow(retries=)`, which wait in the store however
short they are. A run that has left memory for a sleep is due by the wall clock, and so is
everything after a restart. The writer calls `shift_waits` at the start of a transaction, before any
decision; due times in the transaction are computed from the same reading of the clock.
"""

import sqlite3

from eventflow.core.clock import SECOND, Moment
from eventflow.store.rows import NEVER

_MIN_STEP_US = SECOND
"""The wall clock was set if it differs from the monotonic clock by more than this between two
commits. A thread pauses for less between its readings of the two clocks.
"""

_SHIFT_RUNS = f"""
    UPDATE runs SET due_at = due_at + :step
    WHERE state IN (0, 2) AND due_at > 0 AND due_at < {NEVER} AND (
        (token = 0 AND mode IN ('batch', 'debounce'))
        OR (reason IS NOT NULL AND cancel_requested = 0))"""
# The first condition is an open window, the second one is `RunRow.awaits_retry`.


def step_between(last: Moment | None, now: Moment) -> int:
    """By how many microseconds the wall clock was set between two readings; 0: it was not."""
    if last is None:
        return 0
    step = last.time_left(now, now.wall)
    return step if abs(step) > _MIN_STEP_US else 0


def shift_waits(connection: sqlite3.Connection, step: int) -> None:
    """Moves the due times of durations by as much as the wall clock was set."""
    connection.execute(_SHIFT_RUNS, {"step": step})
    connection.execute("UPDATE windows SET opened_at = opened_at + ?", (step,))
