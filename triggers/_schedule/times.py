"""What all schedules are to the loop that waits for them: `Times`, a rule that yields instants. And its plain kinds.

Instants are microseconds, as everywhere. `newest` finds the last few before a moment without walking through all of them: a
schedule of seconds after a year's stop has 31 million.
"""

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice, takewhile
from typing import Protocol

from eventflow.core.clock import SECOND, to_datetime

DENSE = 1_000
"""Instants looked at in one stretch of time; a stretch with more is halved."""


class Times(Protocol):
    """A rule for instants. `text` tells two rules apart, in words; the cursor keeps it, so that an edit is noticed."""

    text: str

    def after(self, us: int) -> Iterator[int]:
        """Every instant after `us`, in order; may end, may go on for ever."""
        ...

    def count(self, after: int, until: int, most: int) -> tuple[int, bool]:
        """How many in (after, until], and whether that is all of them; may stop counting at `most`."""
        ...


class EveryTimes:
    """`anchor + k * period`, for whole k, negative ones too."""

    def __init__(self, period: int, anchor: int) -> None:
        self._period, self._anchor = period, anchor
        self.text = f"every {period / SECOND:g} s from {shown(anchor)}"

    def after(self, us: int) -> Iterator[int]:
        at = us - (us - self._anchor) % self._period
        while True:
            at += self._period
            yield at

    def count(self, after: int, until: int, most: int) -> tuple[int, bool]:
        return max(
            0, (until - self._anchor) // self._period - (after - self._anchor) // self._period
        ), True


class AtTimes:
    """Listed instants."""

    def __init__(self, instants: Sequence[int]) -> None:
        self._instants = sorted(set(instants))
        listed = ", ".join(shown(at) for at in self._instants)
        if len(listed) > 200:
            digest = hashlib.blake2b(listed.encode(), digest_size=8).hexdigest()
            listed = f"{len(self._instants)} instants ({digest})"
        self.text = f"at {listed}"

    def after(self, us: int) -> Iterator[int]:
        return (at for at in self._instants if at > us)

    def count(self, after: int, until: int, most: int) -> tuple[int, bool]:
        return sum(after < at <= until for at in self._instants), True


def shown(us: int) -> str:
    """`2026-01-05T05:00:00Z`; fractions only where there are some."""
    return to_datetime(us).isoformat().replace("+00:00", "Z")


def newest(times: Times, after: int, until: int, most: int) -> list[int]:
    """The last instants in (after, until], at most `most`, in order.

    Goes back from `until` in stretches that double, so a quiet schedule costs few, and are halved where it is dense.
    """
    found: deque[int] = deque()
    high, width = until, 60 * SECOND
    while high > after and len(found) < most:
        low = max(after, high - width)
        stretch = list(
            islice(takewhile(lambda at, high=high: at <= high, times.after(low)), DENSE + 1)
        )
        if len(stretch) > DENSE:
            width = (high - low) // 2
            continue
        found.extendleft(reversed(stretch))
        high, width = low, 2 * width
    return list(found)[-most:]
