"""Values of what the ledger tells of by itself: runs that ended, runs that are late. The store's verbs take them (base.py).

ops.py and late.py make them in the writer's thread; routing.py makes events of them (base.Herald).
"""

from collections.abc import Mapping, Sequence

import msgspec

from eventflow.runs.run import State


class RunEnded(msgspec.Struct, frozen=True):
    """A run that came to a state in which nothing more happens by itself, as the transaction leaves it."""

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
    """A run that has not ended `after` microseconds after it was due to begin (`due_at`), as `at` finds it."""

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
    """What a look for late runs found: those to be told of, by `after`, first who was late first; and when to look again.

    `again`: microseconds, perhaps earlier than a run is late and never later; None: not before there are other live runs.
    """

    runs: Mapping[int, Sequence[int]]
    next_scan_at: int | None
