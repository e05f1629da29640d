"""Delivery windows in a transaction: which recorded run an event joins, or that it opens a new
window.

A window is a run that is recorded and has not begun (routing/delivery.py has the modes); events
join it in the transaction that records them. `Transaction` makes a `Windows` for the first event
that needs one; a plain event never comes here. Called by apply.py, admin.py and patterns.py.
"""

from collections.abc import Collection, Iterable

import msgspec
import orjson

from eventflow.runs.run import Run, State
from eventflow.store import rows
from eventflow.store.protocol import Arrival, BatchPolicy, PatternMatch
from eventflow.store.rows import RunRow, Values, WindowRow
from eventflow.store.tables import Commit, RunRows

WindowName = tuple[str, str]
"""Subscription and ordering key ('' without one)."""

_IS_IN_RUN = "SELECT 1 FROM run_events WHERE run = ? AND event = ?"


class Windows:
    """The windows of one transaction."""

    def __init__(self, commit: Commit, runs: RunRows) -> None:
        self._commit = commit
        self._runs = runs
        self._windows: dict[WindowName, WindowRow] = {}
        self._changed: set[WindowName] = set()
        self._grown: dict[int, RunRow] = {}  # runs that events have joined
        self._run_events: list[Values] = []

    # ------------------------------------------------------------------- reading

    def load(self, arrivals: Iterable[Arrival]) -> None:
        """Reads the windows that these events may join, and their runs."""
        self._load(
            {
                _name(run)
                for arrival in arrivals
                for run in arrival.runs
                if run.id in arrival.batch_policies
            }
        )

    def _load(self, names: Collection[WindowName]) -> None:
        missing = [name for name in names if name not in self._windows]
        if not missing:
            return
        for text in rows.known_windows.read(self._commit.connection, missing):
            found = rows.decode_windows(text)
            self._windows.update(
                ((window.subscription, window.ordering_key), window) for window in found
            )
            self._runs.fetch([window.run for window in found])

    # ------------------------------------------------------------------- deciding

    def assign(self, arrival: Arrival, event: int, *, is_replay: bool = False) -> Arrival:
        """Adds the event to the windows that are open.

        Returns the arrival with the runs that are left to start and with the verdicts `batched`.
        `is_replay`: the event may be in an open window already; then it opens one of its own.
        """
        batched: dict[int, int] = {}
        runs: list[Run] = []
        for run in arrival.runs:
            policy = arrival.batch_policies.get(run.id)
            found = None if policy is None else self._open_window(run, policy)
            if policy is None or found is None or self._is_in(found[1], event, is_replay):
                runs.append(run)
                continue
            window, row = found
            due_at = policy.due(window.count + 1, window.opened_at, row.due_at, self._commit.now)
            self._join(window, row, event, len(arrival.body), due_at)
            batched[run.id] = row.id
        verdicts = arrival.verdicts
        if batched:
            verdicts = orjson.dumps(
                [
                    [name, "batched", batched[detail]]
                    if detail in batched
                    else [name, outcome, detail]
                    for name, outcome, detail in orjson.loads(verdicts)
                ]
            )
        return msgspec.structs.replace(arrival, runs=runs, verdicts=verdicts)

    def open(self, run: Run, payload: bytes) -> None:
        """Adds a run that further events may join until it begins."""
        if run.payload is None:
            run.payload = payload
        self._runs.add_growing(run, len(payload))
        self._put(run, 1)

    def place_match(self, match: PatternMatch) -> int:
        """Adds the run of a pattern, or all its events to the window that is open.

        Returns the run that has the events.
        """
        run = match.run
        policy = match.batch_policy
        if policy is not None:
            self._load([_name(run)])
            if (found := self._open_window(run, policy)) is not None:
                window, row = found
                for event in match.events:
                    due_at = policy.due(
                        window.count + 1, window.opened_at, row.due_at, self._commit.now
                    )
                    self._join(window, row, event, 0, due_at)
                row.size += match.size  # counted in the backlog since the events arrived
                return row.id
        self._add_match(match)
        return run.id

    def _add_match(self, match: PatternMatch) -> None:
        """Its deliveries are pending, and its bytes counted, since the events arrived."""
        run = match.run
        events = match.events
        run.deliveries = len(events)
        row = self._runs.add_growing(run, len(run.params or b""))
        row.deliveries = len(events)
        row.size = match.size
        self._grown[run.id] = row
        self._run_events += [(run.id, event) for event in events if event != run.event]
        if match.batch_policy is not None:
            self._put(run, len(events))

    def _open_window(self, run: Run, policy: BatchPolicy) -> tuple[WindowRow, RunRow] | None:
        """The window of this run's name with its run, if that has neither begun nor ended and is
        not full.
        """
        window = self._windows.get(_name(run))
        row = None if window is None else self._runs.get(window.run)
        if window is None or row is None:
            return None
        is_open = row.token == 0 and row.state in (State.PENDING, State.PAUSED)
        return (window, row) if is_open and window.count < policy.size else None

    def _is_in(self, row: RunRow, event: int, is_replay: bool) -> bool:
        if row.event == event:
            return True
        if not is_replay:
            return False
        found = self._commit.connection.execute(_IS_IN_RUN, (row.id, event)).fetchone()
        return found is not None

    def _join(self, window: WindowRow, row: RunRow, event: int, size: int, due_at: int) -> None:
        """The event, of so many bytes, joins a run, which is due at `due_at` now."""
        commit = self._commit
        window.count += 1
        row.deliveries += 1
        row.size += size
        row.due_at = commit.due(due_at)
        commit.totals["pending_bytes"] += size
        commit.note_due(row.due_at)
        self._run_events.append((row.id, event))
        self._grown[row.id] = row
        self._changed.add((window.subscription, window.ordering_key))

    def _put(self, run: Run, count: int) -> None:
        name = _name(run)
        self._windows[name] = WindowRow(*name, run.id, count, self._commit.now)
        self._changed.add(name)

    # ------------------------------------------------------------------- writing

    def flush(self) -> None:
        """After the runs that were added are written."""
        if not self._changed and not self._grown:
            return
        connection = self._commit.connection
        grown = [(row.id, row.deliveries, row.due_at, row.size) for row in self._grown.values()]
        rows.grow_runs.execute(connection, grown)
        rows.insert_run_events.execute(connection, self._run_events)
        windows = [msgspec.structs.astuple(self._windows[name]) for name in self._changed]
        rows.put_windows.execute(connection, windows)
        self._grown.clear()
        self._run_events.clear()
        self._changed.clear()


def _name(run: Run) -> WindowName:
    return run.subscription, run.ordering_key or ""
