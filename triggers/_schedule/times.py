"""`Times`: a rule that yields instants; and the two simple rules, `EveryTimes` and `AtTimes`.

Cron expressions are in cron.py. Instants are microseconds. `newest` finds the last few before an
instant without walking through all: a schedule of seconds has 31 million after a year.
"""

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice, takewhile
from typing import Protocol

from eventflow.core.clock import SECOND, to_datetime

MAX_PER_STRETCH = 1_000
"""Instants examined in one stretch of time; a stretch with more is halved."""


class Times(Protocol):
    """A rule for instants. `text` describes it; the cursor holds it, so that an edit is noticed."""

    text: str

    def after(self, us: int) -> Iterator[int]:
        """Every instant after `us`, in order; finite or infinite."""
        ...

    def count(self, after: int, until: int, limit: int) -> tuple[int, bool]:
        """The number of instants in (after, until], and whether it is exact; may stop at
        `limit`.
        """
        ...


class EveryTimes:
    """`anchor + k * period`, for whole k, negative ones too."""

    def __init__(self, period: int, anchor: int) -> None:
        self._period: int = period
        self._anchor: int = anchor
        self.text = f"every {period / SECOND:g} s from {format_instant(anchor)}"

    def after(self, us: int) -> Iterator[int]:
        at = us - (us - self._anchor) % self._period
        while True:
            at += self._period
            yield at

    def count(self, after: int, until: int, limit: int) -> tuple[int, bool]:
        first = (after - self._anchor) // self._period
        last = (until - self._anchor) // self._period
        return max(0, last - first), True


class AtTimes:
    """Listed instants."""

    def __init__(self, instants: Sequence[int]) -> None:
        self._instants = sorted(set(instants))
        listed = ", ".join(format_instant(at) for at in self._instants)
        if len(listed) > 200:
            digest = hashlib.blake2b(listed.encode(), digest_size=8).hexdigest()
            listed = f"{len(self._instants)} instants ({digest})"
        self.text = f"at {listed}"

    def after(self, us: int) -> Iterator[int]:
        return (at for at in self._instants if at > us)

    def count(self, after: int, until: int, limit: int) -> tuple[int, bool]:
        return sum(after < at <= until for at in self._instants), True


def format_instant(us: int) -> str:
    """`2026-01-05T05:00:00Z`; fractions only where there are some."""
    return to_datetime(us).isoformat().replace("+00:00", "Z")


def newest(times: Times, after: int, until: int, limit: int) -> list[int]:
    """The last instants in (after, until], at most `limit`, in order.

    Searches back from `until` in stretches that double, and are halved where instants are dense.
    """
    found: deque[int] = deque()
    high = until
    width = 60 * SECOND
    while high > after and len(found) < limit:
        low = max(after, high - width)
        stretch = list(
            islice(
                takewhile(lambda at, high=high: at <= high, times.after(low)), MAX_PER_STRETCH + 1
            )
        )
        if len(stretch) > MAX_PER_STRETCH:
            width = (high - low) // 2
            continue
        found.extendleft(reversed(stretch))
        high, width = low, 2 * width
    return list(found)[-limit:]
