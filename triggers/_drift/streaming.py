"""Detectors that look at every sample: ADWIN and Page-Hinkley. Pure Python; their state is plain data and small.

They are fed values in standard deviations of the reference. Both follow the published algorithms in the form that the library
river gives them, with which ADWIN agrees sample by sample.

    Bifet, Gavaldà: Learning from Time-Changing Data with Adaptive Windowing, 2007.
    Page: Continuous Inspection Schemes, 1954.
"""

import math
from typing import Any, Protocol

MAX_BUCKETS = 5
MIN_SIDE = 5
CLOCK = 32
GRACE = 10


class Detector(Protocol):
    """One value at a time."""

    def update(self, value: float) -> bool:
        """Whether the mean has changed."""
        ...

    def state(self) -> Any: ...


class Adwin:
    """Adaptive windowing: keeps the longest window whose halves have one mean, at the confidence `delta`.

    The window is an exponential histogram: in row r, buckets of 2^r values each, at most five, as (total, variance). Memory is
    logarithmic in the number of values. Looks every 32 values.
    """

    def __init__(self, delta: float = 0.002, state: Any = None) -> None:
        self.delta = delta
        rows: list[list[list[float]]] = [[]]
        self.rows, width, total, variance, tick = state or (rows, 0.0, 0.0, 0.0, 0)
        self.width, self.total, self.variance, self.tick = width, total, variance, tick

    def state(self) -> Any:
        return [self.rows, self.width, self.total, self.variance, self.tick]

    @property
    def mean(self) -> float:
        return self.total / self.width if self.width else 0.0

    def update(self, value: float) -> bool:
        self._insert(value)
        self.tick += 1
        if self.tick % CLOCK or self.width <= GRACE:
            return False
        changed = False
        while self._cut():
            changed = True
        return changed

    def _insert(self, value: float) -> None:
        self.rows[0].append([value, 0.0])
        self.width += 1
        if self.width > 1:
            before = self.width - 1
            self.variance += before * (value - self.total / before) ** 2 / self.width
        self.total += value
        self._compress()

    def _compress(self) -> None:
        """Two buckets of a full row become one of the next."""
        for place, row in enumerate(self.rows):
            if len(row) <= MAX_BUCKETS:
                return
            (one, v1), (other, v2) = row[0], row[1]
            size = 2.0**place
            merged = [one + other, v1 + v2 + size / 2 * ((one - other) / size) ** 2]
            del row[:2]
            if place + 1 == len(self.rows):
                self.rows.append([])
            self.rows[place + 1].append(merged)

    def _cut(self) -> bool:
        """Looks at every border between buckets, the oldest first; drops the oldest bucket if one parts two means."""
        n0, u0, n1, u1 = 0.0, 0.0, self.width, self.total
        for place in range(len(self.rows) - 1, -1, -1):
            row, size = self.rows[place], 2.0**place
            for total, _ in row[:-1] if place == 0 else row:
                n0, u0, n1, u1 = n0 + size, u0 + total, n1 - size, u1 - total
                if n0 >= MIN_SIDE and n1 >= MIN_SIDE and self._differ(n0, n1, u0 / n0 - u1 / n1):
                    self._drop()
                    return True
        return False

    def _differ(self, n0: float, n1: float, difference: float) -> bool:
        confidence = math.log(2 * math.log(self.width) / self.delta)
        harmonic = 1 / (n0 - MIN_SIDE + 1) + 1 / (n1 - MIN_SIDE + 1)
        variance = self.variance / self.width
        return (
            abs(difference)
            > math.sqrt(2 * harmonic * variance * confidence) + 2 / 3 * confidence * harmonic
        )

    def _drop(self) -> None:
        total, variance = self.rows[-1].pop(0)
        size = 2.0 ** (len(self.rows) - 1)
        self.width -= size
        self.total -= total
        rest = self.total / self.width
        self.variance -= variance + size * self.width * (total / size - rest) ** 2 / (
            size + self.width
        )
        while len(self.rows) > 1 and not self.rows[-1]:
            self.rows.pop()


class PageHinkley:
    """The cumulative sum of deviations from the running mean, up and down; a change when it has come `threshold` off its bound.

    A magnitude of `delta` is tolerated. Begins anew after each change.
    """

    def __init__(
        self,
        threshold: float = 50.0,
        delta: float = 0.005,
        alpha: float = 0.9999,
        state: Any = None,
    ) -> None:
        self.threshold, self.delta, self.alpha = threshold, delta, alpha
        self.n, self.mean, self.up, self.low, self.down, self.high = state or (
            0,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
        )

    def state(self) -> Any:
        return [self.n, self.mean, self.up, self.low, self.down, self.high]

    def update(self, value: float) -> bool:
        self.n += 1
        self.mean += (value - self.mean) / self.n
        self.up = self.alpha * self.up + value - self.mean - self.delta
        self.down = self.alpha * self.down + value - self.mean + self.delta
        self.low, self.high = min(self.low, self.up), max(self.high, self.down)
        if self.n < 30 or (
            self.up - self.low <= self.threshold and self.high - self.down <= self.threshold
        ):
            return False
        self.n, self.mean, self.up, self.low, self.down, self.high = 0, 0.0, 0.0, 0.0, 0.0, 0.0
        return True
