"""Histograms of how long runs and attempts took, since the start of the process, for `/metrics`.

`Outcomes` and `Attempts` observe on the worker's loop; web/metrics.py reads from another thread.
"""

from bisect import bisect_left
from collections.abc import Mapping

BOUNDS = (0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 30.0, 120.0, 600.0, 3600.0)
"""Upper bounds of the buckets in seconds; above them is one more."""

MAX_SERIES = 2000
"""Label sets; names come from the code, so this bounds mistakes such as generated tasks."""


class Durations:
    """One histogram for each `(name, outcome)`."""

    __slots__ = ("_series",)

    def __init__(self) -> None:
        # A count for each bucket, and the sum at the end.
        self._series: dict[tuple[str, str], list[float]] = {}

    def observe(self, name: str, outcome: str, seconds: float) -> None:
        series = self._series.get((name, outcome)) or self._new_series(name, outcome)
        series[bisect_left(BOUNDS, seconds)] += 1
        series[-1] += seconds

    def _new_series(self, name: str, outcome: str) -> list[float]:
        """A series for this key. With MAX_SERIES already, `read` does not return it."""
        series: list[float] = [0] * (len(BOUNDS) + 2)
        if len(self._series) < MAX_SERIES:
            self._series[name, outcome] = series
        return series

    def read(self) -> Mapping[tuple[str, str], tuple[list[tuple[str, float]], float]]:
        """By name and outcome: the cumulative buckets as Prometheus wants them, and the sum."""
        found: dict[tuple[str, str], tuple[list[tuple[str, float]], float]] = {}
        for key, series in list(self._series.items()):
            *counts, seconds = series
            total: float = 0
            buckets: list[tuple[str, float]] = []
            for bound, count in zip((*map(str, BOUNDS), "+Inf"), counts, strict=True):
                total += count
                buckets.append((bound, total))
            found[key] = (buckets, seconds)
        return found
