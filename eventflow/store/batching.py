"""Values of several events that belong to one run: how an event joins a window, what a pattern is given, what it came to.

Part of what goes through the store's verbs (base.py); routing.py and weaver.py make them, ops.py reads them.
"""

from collections.abc import Sequence

import msgspec

from eventflow.runs.run import Run


class BatchPolicy(msgspec.Struct, frozen=True):
    """How an event may join a run that is recorded and has not begun (delivery.py). Durations in microseconds.

    The run of the first event is due `wait` later; with `renewed` each further event puts that off, to at most `longest` after
    the first. With `size` events it is due at once, and full.
    """

    mode: str
    size: int
    wait: int = 0
    max_wait: int = 0
    is_extended: bool = False

    def due(self, count: int, opened_at: int, due_at: int, now: int) -> int:
        """When a run is due that was due at `due_at`, and gets its `count`-th event now."""
        if count >= self.size:
            return 0
        return min(now + self.wait, opened_at + self.max_wait) if self.is_extended else due_at


class PatternEvent(msgspec.Struct, frozen=True):
    """An event for a pattern: which part it is of, under which key, and when it happened. `held`: its trigger is paused."""

    subscription: str
    key: str
    part: int
    time: int
    is_paused: bool = False
    depth: int = 0


class PatternMatch(msgspec.Struct, frozen=True):
    """The run of a pattern that has matched, the events it is of, and their bytes; `gather`: they may join another's run."""

    run: Run
    events: Sequence[int]
    size: int
    batch_policy: BatchPolicy | None = None
