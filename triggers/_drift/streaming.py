"""Detectors that look at every sample: ADWIN and Page-Hinkley. Pure Python; their state is plain
data and small.

They are fed values in standard deviations of the reference. Both follow the published algorithms in
the form that the library river gives them, with which ADWIN agrees sample by sample.

    Bifet, Gavaldà: Learning from Time-Changing Data with Adaptive Windowing, 2007.
    Page: Continuous Inspection Schemes, 1954.
"""

import math
from typing import Any, Protocol

from triggers._drift.baseline import Baseline

MAX_BUCKETS = 5
MIN_SIDE = 5
CHECK_EVERY = 32
MIN_WIDTH = 10


class Detector(Protocol):
    """One value at a time."""

    def update(self, value: float) -> bool:
        """Whether the mean has changed."""
        ...

    def state(self) -> Any: ...


class Adwin:
    """Adaptive windowing: keeps the longest window whose halves have one mean, at the confidence
    `delta`.

    The window is an exponential histogram: in row r, buckets of 2^r values each, at most five, as
    (total, variance). Memory is logarithmic in the number of values. Looks every 32 values.
    """

    def __init__(self, delta: float = 0.002, state: Any = None) -> None:
        rows: list[list[list[float]]] = [[]]
        self.delta: float = delta
        start: Any = state or (rows, 0.0, 0.0, 0.0, 0)
        self.rows: list[list[list[float]]] = start[0]
        self.width: float = start[1]
        self.total: float = start[2]
        self.variance: float = start[3]
        self.tick: int = start[4]

    def state(self) -> Any:
        return [self.rows, self.width, self.total, self.variance, self.tick]

    @property
    def mean(self) -> float:
        return self.total / self.width if self.width else 0.0

    def update(self, value: float) -> bool:
        self._insert(value)
        self.tick += 1
        if self.tick % CHECK_EVERY or self.width <= MIN_WIDTH:
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
        for index, row in enumerate(self.rows):
            if len(row) <= MAX_BUCKETS:
                return
            (one, v1) = row[0]
            (other, v2) = row[1]
            size = 2.0**index
            merged = [one + other, v1 + v2 + size / 2 * ((one - other) / size) ** 2]
            del row[:2]
            if index + 1 == len(self.rows):
                self.rows.append([])
            self.rows[index + 1].append(merged)

    def _cut(self) -> bool:
        """Looks at every border between buckets, the oldest first; drops the oldest bucket if one
        parts two means.
        """
        n0 = 0.0
        u0 = 0.0
        n1 = self.width
        u1 = self.total
        for index in range(len(self.rows) - 1, -1, -1):
            row = self.rows[index]
            size = 2.0**index
            for total, _ in row[:-1] if index == 0 else row:
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
    """The cumulative sum of deviations from the running mean, upwards and downwards.

    A sum that is `threshold` away from its bound is a change; it restarts the sums. Deviations of
    `delta` are tolerated.
    """

    def __init__(
        self,
        threshold: float = 50.0,
        delta: float = 0.005,
        alpha: float = 0.9999,
        state: Any = None,
    ) -> None:
        self.threshold: float = threshold
        self.delta: float = delta
        self.alpha: float = alpha
        start: Any = state or (0, 0.0, 0.0, 0.0, 0.0, 0.0)
        self.n: int = start[0]
        self.mean: float = start[1]
        self.up: float = start[2]
        self.low: float = start[3]
        self.down: float = start[4]
        self.high: float = start[5]

    def state(self) -> Any:
        return [self.n, self.mean, self.up, self.low, self.down, self.high]

    def update(self, value: float) -> bool:
        self.n += 1
        self.mean += (value - self.mean) / self.n
        self.up = self.alpha * self.up + value - self.mean - self.delta
        self.down = self.alpha * self.down + value - self.mean + self.delta
        self.low = min(self.low, self.up)
        self.high = max(self.high, self.down)
        if self.n < 30 or (
            self.up - self.low <= self.threshold and self.high - self.down <= self.threshold
        ):
            return False
        self.n = 0
        self.mean = 0.0
        self.up = 0.0
        self.low = 0.0
        self.down = 0.0
        self.high = 0.0
        return True


MIN_ROWS_AFTER_CHANGE = 16
"""Rows after a change from which on their mean is looked at; a power of two, as all later looks."""

SAME_CHANGE_ROWS = 64
"""Rows after which a change is another one: a detector that adapts reports one change
repeatedly.
"""


class FeatureDetector:
    """A streaming detector on one feature, in standard deviations of its reference.

    A detected change may be small, or chance: the rows after it decide. `update` is true when there
    are twice as many of them as the last time, and `shift` is how far their mean is from the
    reference's.
    """

    def __init__(self, metric: str, delta: float, baseline: Baseline | None) -> None:
        self.changed: bool = False
        self.rows: int = 0  # since the change
        self.sum: float = 0.0  # of their values
        self._metric: str = metric
        self._delta: float = delta
        self._baseline: Baseline | None = baseline
        self._detector: Detector = self._new_detector(None)
        for value in baseline.sample if baseline else ():
            self._detector.update(self._scaled(value))

    def _new_detector(self, state: Any) -> Detector:
        return Adwin(self._delta, state) if self._metric == "adwin" else PageHinkley(state=state)

    def _scaled(self, value: float) -> float:
        assert self._baseline is not None
        return (value - self._baseline.mean) / self._baseline.deviation

    def load(self, state: Any) -> None:
        self.changed = state[0]
        self.rows = state[1]
        self.sum = state[2]
        self._detector = self._new_detector(state[3])

    def state(self) -> list[Any]:
        return [self.changed, self.rows, self.sum, self._detector.state()]

    @property
    def shift(self) -> float:
        """From the reference's mean to that of the rows since the change; 0 while four standard
        errors could explain it.
        """
        found = abs(self.sum / self.rows)
        return found if found >= 4 / self.rows**0.5 else 0.0

    def update(self, value: Any) -> bool:
        """Adds a value; whether it is time to look at `shift`."""
        if self._baseline is None or not isinstance(value, int | float):
            return False
        scaled = self._scaled(value)
        is_change = self._detector.update(scaled)
        if is_change and (not self.changed or self.rows >= SAME_CHANGE_ROWS):
            self.changed = True
            self.rows = 0
            self.sum = 0.0
        if not self.changed:
            return False
        self.rows += 1
        self.sum += scaled
        return self.rows >= MIN_ROWS_AFTER_CHANGE and self.rows & (self.rows - 1) == 0
