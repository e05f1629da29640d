"""The windows of delivery modes: which run an event joins, or that a new one is opened. Called by ops.py, doors.py, weaving.py.

A window is a run that is recorded and has not begun (delivery.py says which modes there are). Events join it in the transaction
that records them. How the rows are written is in transaction.py.
"""

from collections.abc import Collection, Iterable

import msgspec
import orjson

from eventflow.runs.run import Run, State
from eventflow.store import rows
from eventflow.store.protocol import Arrival, BatchPolicy, PatternMatch
from eventflow.store.rows import RunRow, WindowRow
from eventflow.store.transaction import Transaction


def know_windows(tx: Transaction, arrivals: Iterable[Arrival]) -> None:
    """Finds the windows that these events may join, and their runs."""
    names = {
        (run.subscription, run.ordering_key or "") for arrival in arrivals if arrival.batch_policies for run in arrival.runs
        if run.id in arrival.batch_policies
    }  # fmt: skip
    know(tx, names)


def know(tx: Transaction, names: Collection[tuple[str, str]]) -> None:
    """Finds these windows, by subscription and lane. Of those that it knows, the transaction knows more than the file."""
    missing = [name for name in names if name not in tx.windows]
    if not missing:
        return
    for text in rows.known_windows.read(tx.connection, missing):
        found = rows.decode_windows(text)
        tx.windows.update(((window.subscription, window.ordering_key), window) for window in found)
        tx.fetch([window.run for window in found])


def gathered(tx: Transaction, arrival: Arrival, event: int) -> Arrival:
    """The arrival as it is once its event has joined the windows that are open, with what it then starts and tells."""
    joined: dict[int, int] = {}
    runs: list[Run] = []
    for run in arrival.runs:
        gather = arrival.batch_policies.get(run.id)
        window = None if gather is None else tx.windows.get((run.subscription, run.ordering_key or ""))
        row = None if window is None else tx.row(window.run)
        if (
            gather is None
            or window is None
            or row is None
            or not is_open(gather, window, row)
            or _is_in(tx, row, event)
        ):
            runs.append(run)
            continue
        joined[run.id] = row.id
        tx.join(
            window, row, event, len(arrival.body), _due(gather, window, row, arrival.received_at)
        )
    verdicts = arrival.verdicts
    if joined:
        told = [[name, "batched", joined[what]] if what in joined else [name, fate, what]
                for name, fate, what in orjson.loads(verdicts)]  # fmt: skip
        verdicts = orjson.dumps(told)
    return msgspec.structs.replace(arrival, runs=runs, verdicts=verdicts)


def is_open(gather: BatchPolicy, window: WindowRow, row: RunRow) -> bool:
    """Whether the window's run has neither begun nor ended, and has room."""
    return (
        row.token == 0 and row.state in (State.PENDING, State.PAUSED) and window.count < gather.size
    )


def _is_in(tx: Transaction, row: RunRow, event: int) -> bool:
    """Whether the event is in this run already: it is replayed, and then begins a window of its own."""
    asked = "SELECT 1 FROM run_events WHERE run = ? AND event = ?"
    return row.event == event or (
        event in tx.replayed
        and tx.connection.execute(asked, (row.id, event)).fetchone() is not None
    )


def _due(gather: BatchPolicy, window: WindowRow, row: RunRow, now: int) -> int:
    """When the run is due, now that another event is in it."""
    return gather.due(window.count + 1, window.opened_at, row.due_at, now)


def place(tx: Transaction, match: PatternMatch, now: int) -> int:
    """A pattern's run is added, or all its events join the window that is open. Returns the run that they are in."""
    run, gather = match.run, match.batch_policy
    if gather is not None:
        name = (run.subscription, run.ordering_key or "")
        if name not in tx.windows:
            know(tx, [name])
        window = tx.windows.get(name)
        row = None if window is None else tx.row(window.run)
        if window is not None and row is not None and is_open(gather, window, row):
            for event in match.events:
                tx.join(window, row, event, 0, _due(gather, window, row, now))
            row.size += match.size  # counted in the backlog already
            return row.id
    tx.add_match(match, now)
    return run.id
