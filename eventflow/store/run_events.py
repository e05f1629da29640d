"""Values for the events that the store makes itself: runs that ended, runs that are late.

Part of the store's interface (protocol.py). apply.py and late_runs.py make them in the writer
thread; the router makes events of them (`RunEventSource`).
"""

from collections.abc import Mapping, Sequence

import msgspec

from eventflow.runs.run import State


class RunEnded(msgspec.Struct, frozen=True):
    """A run that ended or is held, as the transaction leaves it. Instants are microseconds."""

    run: int
    flow: str
    state: State
    token: int
    depth: int
    event: int | None
    started_at: int | None
    at: int
    reason: str | None
    result: bytes | None
    codec: str | None
    error: bytes | None


class LateRun(msgspec.Struct, frozen=True):
    """A run that has not ended `after` microseconds after it was due to begin (`due_at`), as of
    `at`.
    """

    run: int
    flow: str
    state: State
    token: int
    depth: int
    started_at: int | None
    reason: str | None
    due_at: int
    after: int
    at: int


class LateRuns(msgspec.Struct, frozen=True):
    """The result of a scan for late runs: runs that are not recorded as late, by `after`, in the
    order in which they became late.

    `next_scan_at` (microseconds) may be earlier than the next run is late, never later. None: not
    before there are new runs.
    """

    runs: Mapping[int, Sequence[int]]
    next_scan_at: int | None
