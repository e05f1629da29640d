"""Values for runs of several events: how an event joins a delivery window, an event of a pattern, a
match.

Part of the store's interface (protocol.py). routing/router.py and routing/pattern_runner.py make
them; windows.py and patterns.py read them.
"""

from collections.abc import Sequence

import msgspec

from eventflow.runs.run import Run


class BatchPolicy(msgspec.Struct, frozen=True):
    """How an event may join a run that is recorded and has not begun (routing/delivery.py).

    Durations in microseconds.

    The run of the first event is due `wait` later. With `is_extended` each further event postpones
    that, to at most `max_wait` after the first. With `size` events the run is due at once, and
    full.
    """

    mode: str
    size: int
    wait: int = 0
    max_wait: int = 0
    is_extended: bool = False

    def due(self, count: int, opened_at: int, due_at: int, now: int) -> int:
        """When a run is due that was due at `due_at` and now gets its `count`-th event."""
        if count >= self.size:
            return 0
        return min(now + self.wait, opened_at + self.max_wait) if self.is_extended else due_at


class PatternEvent(msgspec.Struct, frozen=True):
    """An event for a pattern: its part (a number), its key, and when it happened (microseconds).

    `is_paused`: its trigger is paused.
    """

    subscription: str
    key: str
    part: int
    time: int
    is_paused: bool = False
    depth: int = 0


class PatternMatch(msgspec.Struct, frozen=True):
    """The run of a pattern that matched, its events, and their size in bytes.

    `batch_policy`: the events may join an open window.
    """

    run: Run
    events: Sequence[int]
    size: int
    batch_policy: BatchPolicy | None = None
