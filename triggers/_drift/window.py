"""An open window: counts per bin, sums, and an even sample of the rows for metrics that need
values. Its size is bounded.

engine.py adds rows and takes `changes()`: only the parts that a batch touched, so that a commit
writes little. Sampled rows are stored in parts of ROWS_PER_PART; beyond SAMPLE_SIZE rows every
second one is dropped, and from then on only every second new one is added, repeatedly. A closed
window is an `EvaluatedWindow`, its statistics; history.py stores the last ones.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from eventflow.events.event import Json
from triggers._drift.baseline import SAMPLE_SIZE, Baseline
from triggers._drift.bins import to_column
from triggers._drift.features import FeatureSpec

ROWS_PER_PART = 32
"""A single new row rewrites 16 rows on average."""


class EvaluatedWindow(msgspec.Struct, array_like=True, frozen=True):
    """The statistics of a closed window. Stored as an array. Times in microseconds.

    `by`: `MonitorConfig.measurement_hash` of the features, reference and window length. `at`: when
    it was evaluated. `measured`: feature index, metric, statistic and p-value of each check.
    `is_burst`: it is a change in the middle of a window, seen by a streaming detector.
    """

    by: str
    at: int
    n: int
    start: int | None
    end: int | None
    measured: list[tuple[int, str, float, float]]
    is_burst: bool = False


class Rows:
    """Rows of values, stored in parts: a full part is written once."""

    def __init__(self, prefix: str, rows: Sequence[Sequence[Any]] = ()) -> None:
        self.prefix = prefix
        self.rows: list[Sequence[Any]] = list(rows)
        self._saved = len(self.rows)
        self._parts = -(-len(self.rows) // ROWS_PER_PART)

    def __len__(self) -> int:
        return len(self.rows)

    def extend(self, rows: Sequence[Sequence[Any]]) -> None:
        self.rows += rows

    def halve(self) -> None:
        """Drops every second row."""
        self.rows = self.rows[::2]
        self._saved = 0

    def clear(self) -> None:
        self.rows = []
        self._saved = 0

    def changes(self) -> Iterator[tuple[str, Json]]:
        first = self._saved // ROWS_PER_PART
        parts = -(-len(self.rows) // ROWS_PER_PART)
        for part in range(first, parts):
            yield (
                f"{self.prefix}{part}",
                [list(row) for row in self.rows[part * ROWS_PER_PART : (part + 1) * ROWS_PER_PART]],
            )
        for part in range(parts, self._parts):
            yield f"{self.prefix}{part}", None
        self._saved = len(self.rows)
        self._parts = parts

    @classmethod
    def loaded(cls, prefix: str, parts: Mapping[str, Any]) -> "Rows":
        rows: list[Sequence[Any]] = []
        number = 0
        while (part := parts.get(f"{prefix}{number}")) is not None:
            rows += part
            number += 1
        return cls(prefix, rows)


class OpenWindow:
    """One window, open. `number` is its place in the stream, or for windows of time the periods
    since 1970.
    """

    def __init__(self, number: int, watched: Sequence[FeatureSpec]) -> None:
        self.number = number
        self._watched = watched
        self._kept = [
            place for place, each in enumerate(watched) if each.metric in ("ks", "wasserstein")
        ]
        self.n = 0
        self.start: int | None = None
        self.end: int | None = None
        self.counts: list[list[int]] = [[] for _ in watched]
        self.unseen: list[dict[str, int]] = [{} for _ in watched]
        self.sums: list[float] = [0.0 for _ in watched]
        self.stride = 1
        self.rows = Rows(f"drift:x/{number}/")
        self._touched = False

    def add(
        self, rows: Sequence[Sequence[Any]], times: Sequence[int], baselines: Sequence[Baseline]
    ) -> None:
        """Rows of values in the features' order, and their times."""
        self.start = min(times) if self.start is None else min(self.start, *times)
        self.end = max(times) if self.end is None else max(self.end, *times)
        for place, (watched, baseline) in enumerate(zip(self._watched, baselines, strict=True)):
            column = to_column(watched, [row[place] for row in rows])
            found = baseline.bins.count(column)
            before = self.counts[place]
            self.counts[place] = (
                [one + other for one, other in zip(before, found, strict=True)] if before else found
            )
            self.unseen[place] = baseline.bins.unseen(column, self.unseen[place])
            if watched.numeric:
                self.sums[place] += float(column.values.sum())
        self._sample(rows)
        self.n += len(rows)
        self._touched = True

    def _sample(self, rows: Sequence[Sequence[Any]]) -> None:
        if not self._kept:
            return
        offset = -self.n % self.stride
        self.rows.extend(
            [[row[place] for place in self._kept] for row in rows[offset :: self.stride]]
        )
        while len(self.rows) > SAMPLE_SIZE:
            self.rows.halve()
            self.stride *= 2

    def values(self, place: int) -> list[Any]:
        """The sampled values of a feature whose metric needs them."""
        column = self._kept.index(place)
        return [row[column] for row in self.rows.rows]

    def mean(self, place: int) -> float | None:
        """The mean of a numeric feature's values."""
        values = sum(self.counts[place][:-2])
        return self.sums[place] / values if values else None

    # ------------------------------------------------------------------------- parts

    @property
    def key(self) -> str:
        return f"drift:w/{self.number}"

    def changes(self) -> Iterator[tuple[str, Json]]:
        if self._touched:
            unseen = {str(place): each for place, each in enumerate(self.unseen) if each}
            yield (
                self.key,
                [self.n, self.start, self.end, self.counts, unseen, self.sums, self.stride],
            )
            yield from self.rows.changes()
            self._touched = False

    def removal(self) -> Iterator[tuple[str, Json]]:
        """What takes the window out of the store."""
        yield self.key, None
        self.rows.clear()
        yield from self.rows.changes()

    @classmethod
    def loaded(
        cls, number: int, specs: Sequence[FeatureSpec], parts: Mapping[str, Any]
    ) -> "OpenWindow":
        window = cls(number, specs)
        stored = parts[window.key]
        window.n = stored[0]
        window.start = stored[1]
        window.end = stored[2]
        window.counts = stored[3]
        for index, each in stored[4].items():
            window.unseen[int(index)] = each
        window.sums = stored[5]
        window.stride = stored[6]
        window.rows = Rows.loaded(window.rows.prefix, parts)
        return window
