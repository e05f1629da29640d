"""Late runs: which ones there are, and the transaction that marks them and records their events.

The monitor (engine/late_runs.py) calls `find` in a reader's thread, then `record` in the writer's.
Being late is no state: it is a live run whose time has come, so nothing is written for a run before
it is late. Then its row in `late_runs` and the event are one commit, once for each `after`.
admin.py calls `note_retry`; retention.py drops the rows with the runs.
"""

import sqlite3
from collections.abc import Callable, Mapping, Sequence

from eventflow.runs.run import State
from eventflow.store.protocol import RunEventSource
from eventflow.store.run_events import LateRun, LateRuns
from eventflow.store.transaction import Transaction

MAX_RUNS_PER_SCAN = 20_000
"""Late runs of one flow that one scan finds; the next scan finds the others."""

MAX_ID = (1 << 63) - 1

_SET_BACK_MILLISECONDS = 60_000
"""An id that is further ahead of the clock was made before the clock was set back: a scan, during
which ids are made, takes less time.
"""

LATE_EVENT_TYPE = "eventflow.run.late"
"""The type of their events."""

Wanted = Callable[[str], Mapping[int, bool]]
"""By a flow's name: after how many microseconds its runs are late, and whether the flow was named
or only matched by a `*`.
"""

_FLOWS = """
    WITH RECURSIVE live (state, flow) AS (
        SELECT column1, (SELECT min(flow) FROM runs
            WHERE state < 4 AND blocked = 0 AND state = column1)
        FROM (VALUES (-1), (0), (1), (2), (3))
        UNION ALL
        SELECT l.state, (SELECT min(flow) FROM runs
            WHERE state < 4 AND blocked = 0 AND state = l.state AND flow > l.flow)
        FROM live l WHERE l.flow IS NOT NULL)
    SELECT DISTINCT flow FROM live WHERE flow IS NOT NULL"""
# Before a blocked run there is one of the same flow and ordering key that is not blocked.

_LIVE = """
    SELECT id FROM runs INDEXED BY runs_live
    WHERE state < 4 AND blocked = 0 AND state IN (-1, 0, 1, 2, 3) AND flow = :flow
    UNION ALL
    SELECT id FROM runs INDEXED BY runs_ordering
    WHERE ordering_key IS NOT NULL AND state < 4 AND flow = :flow AND blocked = 1"""

# A run is due when it is recorded. A run that batches events is due when its window closes: that
# is its `due_at`, until the run sleeps; then its start is the closest known instant. The `due_at`
# of a full window is 0; its last event closed it.
_DUE = """CASE
    WHEN r.mode IS NULL OR r.mode NOT IN ('batch', 'debounce') THEN r.created_at
    WHEN r.due_at BETWEEN r.created_at AND ifnull(r.started_at, r.due_at) THEN r.due_at
    WHEN r.started_at IS NOT NULL THEN r.started_at
    ELSE ifnull((SELECT max(e.received_at) FROM run_events m JOIN events e ON e.id = m.event
        WHERE m.run = r.id), r.created_at)
    END"""

_NOT_MARKED = """NOT EXISTS (
    SELECT 1 FROM late_runs l WHERE l.run = r.id
    AND (l.after = :after OR (l.after = 0 AND l.at >= r.created_at + :after)))"""

_LATE = f"""
    SELECT r.id, {_DUE} + :after AS late_at FROM ({_LIVE}) live JOIN runs r ON r.id = live.id
    WHERE live.id < :ceiling AND {_NOT_MARKED}
      AND (:named OR NOT EXISTS (SELECT 1 FROM events e
        WHERE e.id = r.event AND e.type = '{LATE_EVENT_TYPE}'))
    ORDER BY late_at, r.id LIMIT {MAX_RUNS_PER_SCAN + 1}"""

_NEXT = f"SELECT min(id) FROM ({_LIVE}) WHERE id >= :ceiling"

_LATE_NOW = f"""
    SELECT r.id, r.flow, r.state, r.token, r.depth, r.started_at, r.reason, {_DUE} AS due
    FROM runs r
    WHERE r.id IN (SELECT value FROM json_each(:runs)) AND r.state < 4
      AND due + :after <= :now AND {_NOT_MARKED}
    ORDER BY due, r.id"""


def find(connection: sqlite3.Connection, wanted: Wanted, now: int) -> LateRuns:
    """The late runs that are not marked, and when the next one may be late.

    Walks the index of live runs of each such flow, and reads the rows of those old enough to be
    late.
    """
    found: dict[int, list[int]] = {}
    next_scan: list[int] = []
    (newest,) = connection.execute("SELECT max(id) FROM runs").fetchone()
    # Ids increase also while the clock is behind them, so they do not show the age of a run then.
    is_set_back = (newest or 0) >> 20 > now // 1000 + _SET_BACK_MILLISECONDS
    for (flow,) in connection.execute(_FLOWS).fetchall():
        for after, is_named in wanted(flow).items():
            first_too_young = max((now - after) // 1000 + 1, 0) << 20
            ceiling = MAX_ID if is_set_back else first_too_young
            late, next_at = _find_in_flow(connection, flow, after, is_named, now, ceiling)
            found.setdefault(after, []).extend(late)
            if next_at is not None:
                next_scan.append(next_at)
    return LateRuns(
        {after: runs for after, runs in found.items() if runs}, min(next_scan, default=None)
    )


def _find_in_flow(
    connection: sqlite3.Connection, flow: str, after: int, is_named: bool, now: int, ceiling: int
) -> tuple[list[int], int | None]:
    # An id begins with the millisecond that it was made in: runs from `ceiling` on cannot be late.
    asked = {"flow": flow, "after": after, "named": is_named, "ceiling": ceiling}
    rows: list[tuple[int, int]] = connection.execute(_LATE, asked).fetchall()
    next_scan = [late_at for _, late_at in rows if late_at > now]
    (following,) = connection.execute(_NEXT, asked).fetchone()
    if following is not None:
        next_scan.append((following >> 20) * 1000 + after)
    if len(rows) > MAX_RUNS_PER_SCAN:
        next_scan.append(now)
    return [run for run, late_at in rows[:MAX_RUNS_PER_SCAN] if late_at <= now], min(
        next_scan, default=None
    )


def record(tx: Transaction, runs: Sequence[int], after: int, source: RunEventSource | None) -> int:
    """Marks these runs as late, with their events, unless they have ended or are marked.

    Returns how many it marked.
    """
    commit = tx.commit
    asked = {"runs": str(list(runs)), "after": after, "now": commit.now}
    found = tx.connection.execute(_LATE_NOW, asked).fetchall()
    for run, flow, state, token, depth, started_at, reason, due_at in found:
        late = LateRun(
            run=run,
            flow=flow,
            state=State(state),
            token=token,
            depth=depth,
            started_at=started_at,
            reason=reason,
            due_at=due_at,
            after=after,
            at=commit.now,
        )
        if source is not None and (arrival := source.route_late(late)) is not None:
            commit.own_events.append(arrival)
    tx.connection.executemany(
        "INSERT INTO late_runs (run, after, at) VALUES (?, ?, ?)",
        [(row[0], after, commit.at) for row in found],
    )
    return len(found)


def note_retry(tx: Transaction, run: int) -> None:
    """A run that had ended is retried: it is not late for what was due before now."""
    tx.connection.execute(
        "INSERT OR REPLACE INTO late_runs (run, after, at) VALUES (?, 0, ?)", (run, tx.commit.at)
    )
