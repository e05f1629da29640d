"""Which due runs a worker gets: round-robin over flows, by priority then age within a flow, at most
a flow's cap.

The writer calls `claim` at the end of a batch, after its other operations are written. Of an
ordering key only the head (the run that is not blocked) can be claimed. One statement walks the
index of live runs by its groups (state, flow, priority) and reads only the first runs of each
group, so that the cost does not depend on the backlog.
"""

import sqlite3
from collections.abc import Sequence

import msgspec
import orjson

from eventflow.runs.run import Run, State
from eventflow.store.patterns import next_due
from eventflow.store.protocol import Claim, Claimed
from eventflow.store.rows import NEVER
from eventflow.store.transaction import Transaction

_CLAIMABLE = "state < 4 AND blocked = 0 AND state"

_FIRST = f"""
    SELECT json_group_array(json_array(due_at, id)) FROM (
        SELECT due_at, id FROM runs
        WHERE {_CLAIMABLE} = h.state AND flow = h.flow AND priority = h.priority AND due_at <= :now
        ORDER BY due_at, id LIMIT {{}})"""

_GROUPS = f"""
    WITH RECURSIVE flows (state, flow) AS (
        SELECT column1, (SELECT min(flow) FROM runs WHERE {_CLAIMABLE} = column1)
        FROM (VALUES (0), (2))
        UNION ALL
        SELECT f.state, (SELECT min(flow) FROM runs WHERE {_CLAIMABLE} = f.state AND flow > f.flow)
        FROM flows f WHERE f.flow IS NOT NULL),
    heads (state, flow, priority) AS (
        SELECT f.state, f.flow, (SELECT max(priority) FROM runs
            WHERE {_CLAIMABLE} = f.state AND flow = f.flow)
        FROM flows f WHERE f.flow IS NOT NULL
        UNION ALL
        SELECT h.state, h.flow, (SELECT max(priority) FROM runs
            WHERE {_CLAIMABLE} = h.state AND flow = h.flow AND priority < h.priority)
        FROM heads h WHERE h.priority IS NOT NULL)
    SELECT json_group_array(json_array(
        flow, priority,
        (SELECT min(due_at) FROM runs
            WHERE {_CLAIMABLE} = h.state AND flow = h.flow AND priority = h.priority
            AND due_at > :now),
        json(CASE WHEN h.flow IN (SELECT value FROM json_each(:capped))
            THEN ({_FIRST.format(":few")}) ELSE ({_FIRST.format(":most")}) END)))
    FROM heads h WHERE h.priority IS NOT NULL"""


class Group(msgspec.Struct, array_like=True):
    """Of one flow, state and priority: the due runs as (due_at, id), and the next due time."""

    flow: str
    priority: int
    next_due: int | None
    due: list[tuple[int, int]]


_decode = msgspec.json.Decoder(list[Group]).decode


def claim(tx: Transaction, op: Claim) -> Claimed:
    """Gives up to `op.limit` due runs to the caller: each becomes RUNNING under a new token."""
    if tx.patterns.advance_due():
        tx.flush()
    groups = due_groups(tx.connection, tx.commit.now, op)
    queues, has_more = _queues(groups, op)
    chosen = _round_robin(queues, op.limit)
    has_more = has_more or sum(map(len, queues)) > len(chosen)
    due = [
        group.next_due for group in groups if group.next_due is not None and group.next_due != NEVER
    ]
    if (pattern_due := next_due(tx.connection)) is not None:
        due.append(pattern_due)
    return Claimed(_start(tx, chosen), has_more, min(due, default=None), tx.commit.read_at)


def due_groups(connection: sqlite3.Connection, now: int, op: Claim) -> list[Group]:
    """What is due, by flow and priority.

    Of a flow with a small cap few runs are read: its backlog may be long, and the end of each of
    its runs leads to another claim.
    """
    capped = {flow: cap for flow, cap in op.caps.items() if cap < op.limit}
    parameters = {
        "now": now,
        "most": op.limit + 1,
        "few": max(capped.values(), default=0) + 1,
        "capped": orjson.dumps([*capped]).decode(),
    }
    return _decode(connection.execute(_GROUPS, parameters).fetchone()[0])


def _queues(groups: Sequence[Group], op: Claim) -> tuple[list[list[int]], bool]:
    """By flow its due runs, best first, cut at its cap; and whether a cap or the limit cut any."""
    flows: dict[str, list[tuple[int, int, int]]] = {}
    for group in groups:
        flows.setdefault(group.flow, []).extend(
            (-group.priority, due_at, ident) for due_at, ident in group.due
        )
    queues: list[list[int]] = []
    cut = False
    for flow, due in flows.items():
        most = min(op.limit, op.caps.get(flow, op.limit))
        cut = cut or len(due) > most
        queues.append([ident for _, _, ident in sorted(due)[:most]])
    return queues, cut


def _round_robin(queues: Sequence[Sequence[int]], limit: int) -> list[int]:
    """One of each flow in turn, until `limit` or all."""
    chosen: list[int] = []
    for turn in range(max(map(len, queues), default=0)):
        for queue in queues:
            if turn < len(queue) and len(chosen) < limit:
                chosen.append(queue[turn])
    return chosen


def _start(tx: Transaction, chosen: Sequence[int]) -> list[Run]:
    tx.runs.fetch(chosen)
    rows = [tx.runs.need(ident) for ident in chosen]
    new = {row.id for row in rows if row.started_at is None}
    for row in rows:
        row.token += 1
        row.started_at = row.started_at or tx.commit.at
        row.clear_wait_reason()
        tx.runs.move(row, State.RUNNING)
    runs = tx.runs.load(rows)
    for run in runs:
        run.begins = run.id in new
    tx.flush()
    return runs
