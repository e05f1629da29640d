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
    """`number`: its position in the stream; of a time window, the number of spans since 1970."""

    def __init__(self, number: int, specs: Sequence[FeatureSpec]) -> None:
        self.number: int = number
        self._specs: Sequence[FeatureSpec] = specs
        self._sampled: list[int] = [
            index for index, each in enumerate(specs) if each.metric in ("ks", "wasserstein")
        ]
        self.n: int = 0  # rows
        self.start: int | None = None  # time of the earliest row, in microseconds
        self.end: int | None = None
        self.counts: list[list[int]] = [[] for _ in specs]
        self.unseen: list[dict[str, int]] = [{} for _ in specs]
        self.sums: list[float] = [0.0 for _ in specs]
        self.stride: int = 1  # one row in this many is sampled
        self.rows = Rows(f"drift:x/{number}/")
        self._touched: bool = False

    def add(
        self, rows: Sequence[Sequence[Any]], times: Sequence[int], baselines: Sequence[Baseline]
    ) -> None:
        """Rows of values in the features' order, and their times."""
        self.start = min(times) if self.start is None else min(self.start, *times)
        self.end = max(times) if self.end is None else max(self.end, *times)
        for index, (spec, baseline) in enumerate(zip(self._specs, baselines, strict=True)):
            column = to_column(spec, [row[index] for row in rows])
            found = baseline.bins.count(column)
            before = self.counts[index]
            self.counts[index] = (
                [one + other for one, other in zip(before, found, strict=True)] if before else found
            )
            self.unseen[index] = baseline.bins.unseen(column, self.unseen[index])
            if spec.numeric:
                self.sums[index] += float(column.values.sum())
        self._sample(rows)
        self.n += len(rows)
        self._touched = True

    def _sample(self, rows: Sequence[Sequence[Any]]) -> None:
        if not self._sampled:
            return
        offset = -self.n % self.stride
        self.rows.extend(
            [[row[index] for index in self._sampled] for row in rows[offset :: self.stride]]
        )
        while len(self.rows) > SAMPLE_SIZE:
            self.rows.halve()
            self.stride *= 2

    def values(self, index: int) -> list[Any]:
        """The sampled values of a feature whose metric needs them."""
        column = self._sampled.index(index)
        return [row[column] for row in self.rows.rows]

    def mean(self, index: int) -> float | None:
        """The mean of a numeric feature's values."""
        values = sum(self.counts[index][:-2])
        return self.sums[index] / values if values else None

    # ------------------------------------------------------------------------- parts

    @property
    def key(self) -> str:
        return f"drift:w/{self.number}"

    def changes(self) -> Iterator[tuple[str, Json]]:
        if self._touched:
            unseen = {str(index): each for index, each in enumerate(self.unseen) if each}
            yield (
                self.key,
                [self.n, self.start, self.end, self.counts, unseen, self.sums, self.stride],
            )
            yield from self.rows.changes()
            self._touched = False

    def removal(self) -> Iterator[tuple[str, Json]]:
        """The changes that delete the window."""
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
