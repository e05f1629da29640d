"""Runs that are late: which ones there are, and the transaction that tells of them.

The lookout (eventflow/engine/late_runs.py) asks `look` in a reader's thread, then `tell` in the writer's. Being late is no state: it is a
live run whose time has come, so nothing is written for a run before it is told of. Then its row in `late` and the event are one
commit: once for each `after`, whatever is killed when. doors.py calls `note_retry`; retention drops the rows with the runs.
"""

import sqlite3
from collections.abc import Callable, Mapping, Sequence

from eventflow.runs.run import State
from eventflow.store.run_events import LateRuns, LateRun
from eventflow.store.transaction import Transaction

MAX_RUNS_PER_SCAN = 20_000
"""Runs of one flow that a look finds late at once; the next one finds the others."""

LATE_EVENT_TYPE = "eventflow.run.late"
"""The type of the events that tell of it."""

Wanted = Callable[[str], Mapping[int, bool]]
"""By a flow's name: after how long somebody wants to hear of its runs, and whether the flow was named or only met by a `*`."""

_FLOWS = """
    WITH RECURSIVE live (state, flow) AS (
        SELECT column1, (SELECT min(flow) FROM runs WHERE state < 4 AND blocked = 0 AND state = column1)
        FROM (VALUES (-1), (0), (1), (2), (3))
        UNION ALL
        SELECT l.state, (SELECT min(flow) FROM runs WHERE state < 4 AND blocked = 0 AND state = l.state AND flow > l.flow)
        FROM live l WHERE l.flow IS NOT NULL)
    SELECT DISTINCT flow FROM live WHERE flow IS NOT NULL"""
# A run that is blocked has one before it in its lane that is not, and is of the same flow.

_LIVE = """
    SELECT id FROM runs INDEXED BY runs_live
    WHERE state < 4 AND blocked = 0 AND state IN (-1, 0, 1, 2, 3) AND flow = :flow
    UNION ALL
    SELECT id FROM runs INDEXED BY runs_ordering WHERE ordering_key IS NOT NULL AND state < 4 AND flow = :flow AND blocked = 1"""

# A run is due when it is recorded; one that gathers events, when its window closes: that is its `due_at`, until the run sleeps
# (then its start is the nearest thing known). A window that is full has 0 there; its last event closed it.
_DUE = """CASE
    WHEN r.mode IS NULL OR r.mode NOT IN ('batch', 'debounce') THEN r.created_at
    WHEN r.due_at BETWEEN r.created_at AND ifnull(r.started_at, r.due_at) THEN r.due_at
    WHEN r.started_at IS NOT NULL THEN r.started_at
    ELSE ifnull((SELECT max(e.received_at) FROM run_events m JOIN events e ON e.id = m.event WHERE m.run = r.id), r.created_at)
    END"""

_UNTOLD = """NOT EXISTS (
    SELECT 1 FROM late_runs l WHERE l.run = r.id AND (l.after = :after OR (l.after = 0 AND l.at >= r.created_at + :after)))"""

_LATE = f"""
    SELECT r.id, {_DUE} + :after AS late_at FROM ({_LIVE}) live JOIN runs r ON r.id = live.id
    WHERE live.id < :ceiling AND {_UNTOLD}
      AND (:named OR NOT EXISTS (SELECT 1 FROM events e WHERE e.id = r.event AND e.type = '{LATE_EVENT_TYPE}'))
    ORDER BY late_at, r.id LIMIT {MAX_RUNS_PER_SCAN + 1}"""

_NEXT = f"SELECT min(id) FROM ({_LIVE}) WHERE id >= :ceiling"

_TOLD_NOW = f"""
    SELECT r.id, r.flow, r.state, r.token, r.depth, r.started_at, r.reason, {_DUE} AS due FROM runs r
    WHERE r.id IN (SELECT value FROM json_each(:runs)) AND r.state < 4 AND due + :after <= :now AND {_UNTOLD}
    ORDER BY due, r.id"""


def find(connection: sqlite3.Connection, wanted: Wanted, now: int) -> LateRuns:
    """The late runs that nobody was told of, and when the next one may be late.

    It costs a walk over the index of live runs of each such flow, and a look at the rows of those old enough to be late.
    """
    found: dict[int, list[int]] = {}
    again: list[int] = []
    for (flow,) in connection.execute(_FLOWS).fetchall():
        for after, is_named in wanted(flow).items():
            late, next_at = _look_at(connection, flow, after, is_named, now)
            found.setdefault(after, []).extend(late)
            if next_at is not None:
                again.append(next_at)
    return LateRuns(
        {after: runs for after, runs in found.items() if runs}, min(again, default=None)
    )


def _look_at(
    connection: sqlite3.Connection, flow: str, after: int, is_named: bool, now: int
) -> tuple[list[int], int | None]:
    # An id begins with the millisecond that it was made in: what has a larger one than this cannot be late yet.
    asked = {
        "flow": flow,
        "after": after,
        "named": is_named,
        "ceiling": max((now - after) // 1000 + 1, 0) << 20,
    }
    rows: list[tuple[int, int]] = connection.execute(_LATE, asked).fetchall()
    again = [late_at for _, late_at in rows if late_at > now]
    (following,) = connection.execute(_NEXT, asked).fetchone()
    if following is not None:
        again.append((following >> 20) * 1000 + after)
    if len(rows) > MAX_RUNS_PER_SCAN:
        again.append(now)
    return [run for run, late_at in rows[:MAX_RUNS_PER_SCAN] if late_at <= now], min(again, default=None)


def record(tx: Transaction, runs: Sequence[int], after: int) -> int:
    """Records that these runs are late, with the events that tell of it. Returns of how many it still holds."""
    asked = {"runs": str(list(runs)), "after": after, "now": tx.now}
    told = tx.connection.execute(_TOLD_NOW, asked).fetchall()
    for run, flow, state, token, depth, started_at, reason, due_at in told:
        late = LateRun(
            run, flow, State(state), token, depth, started_at, reason, due_at, after, tx.now
        )
        if tx.herald is not None and (arrival := tx.herald.route_late(late)) is not None:
            tx.silences.append(arrival)
    tx.connection.executemany(
        "INSERT INTO late_runs (run, after, at) VALUES (?, ?, ?)",
        [(row[0], after, tx.at) for row in told],
    )
    return len(told)


def note_retry(tx: Transaction, run: int) -> None:
    """A run that had ended lives again: what it would have been late for by now, it is not."""
    tx.connection.execute(
        "INSERT OR REPLACE INTO late_runs (run, after, at) VALUES (?, 0, ?)", (run, tx.at)
    )
