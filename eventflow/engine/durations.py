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

    __slots__ = ("_counts", "_sums")

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], list[int]] = {}
        self._sums: dict[tuple[str, str], float] = {}

    def observe(self, name: str, outcome: str, seconds: float) -> None:
        key = (name, outcome)
        counts = self._counts.get(key)
        if counts is None:
            if len(self._counts) >= MAX_SERIES:
                return
            self._sums[key] = 0.0
            counts = self._counts[key] = [0] * (len(BOUNDS) + 1)
        counts[bisect_left(BOUNDS, seconds)] += 1
        self._sums[key] += seconds

    def read(self) -> Mapping[tuple[str, str], tuple[list[tuple[str, float]], float]]:
        """By name and outcome: the cumulative buckets as Prometheus wants them, and the sum."""
        found: dict[tuple[str, str], tuple[list[tuple[str, float]], float]] = {}
        for key, counts in list(self._counts.items()):
            total = 0
            buckets: list[tuple[str, float]] = []
            for bound, count in zip((*map(str, BOUNDS), "+Inf"), list(counts), strict=True):
                total += count
                buckets.append((bound, total))
            found[key] = (buckets, self._sums[key])
        return found
