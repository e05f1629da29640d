"""`Baseline`: what a monitor stores of the reference for each feature; and the reference's sources.

A baseline has bins, counts, mean and deviation, and SAMPLE_SIZE values for metrics that need them:
its size is bounded, whatever the reference's. The reference is a file, a table in memory, or the
first rows of the stream (then the baseline is stored with the cursor).
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import msgspec

from eventflow.core.errors import UsageError
from triggers._drift import arrays
from triggers._drift.bins import Bins, make_bins, to_column
from triggers._drift.features import VALUE_ONLY, FeatureSpec
from triggers._drift.row_files import read_rows

SAMPLE_SIZE = 1500
"""Values of a reference, and of a window: under 64 KiB for each feature, enough to see a shift of
0.15 sigma.
"""

Table: TypeAlias = Mapping[str, Sequence[Any]]
"""Columns by name."""

Reference: TypeAlias = int | str | os.PathLike[str] | Mapping[str, Any]


class Baseline(msgspec.Struct, frozen=True):
    """One feature's reference."""

    bins: Bins
    counts: list[int]
    mean: float = 0.0
    deviation: float = 1.0
    sample: list[float] = []

    @property
    def samples(self) -> int:
        return sum(self.counts)


def make_baseline(spec: FeatureSpec, raw: Sequence[Any]) -> Baseline:
    """The baseline of a reference's column."""
    column = to_column(spec, raw)
    bins = make_bins(spec, column)
    counts = bins.count(column)
    if not spec.numeric:
        return Baseline(bins, counts)
    mean, deviation = arrays.mean_and_deviation(column.values)
    sample = arrays.thinned(column.values, SAMPLE_SIZE) if spec.metric in VALUE_ONLY else []
    return Baseline(bins, counts, mean, deviation, sample)


def check_baseline(spec: FeatureSpec, baseline: Baseline, least: int) -> None:
    """UsageError for a reference with fewer than `least` values."""
    found = baseline.samples - sum(baseline.counts[-2:])
    if found < least:
        raise UsageError(
            f"DriftMonitor(reference=): expected at least {least} values of {spec.name!r} "
            f"(at {spec.at!r}), found {found} among {baseline.samples} rows"
        )


# --------------------------------------------------------------------------- tables


def read_table(reference: str | os.PathLike[str] | Mapping[str, Any]) -> Table:
    """A reference's columns: of a CSV, JSON Lines or Parquet file, or a mapping of lists or arrays.
    UsageError otherwise.
    """
    if isinstance(reference, Mapping):
        return {name: _listed(column) for name, column in reference.items()}
    if hasattr(reference, "to_dict") and hasattr(
        reference, "columns"
    ):  # a pandas data frame, without importing pandas
        frame = cast(Any, reference)
        return {str(name): _listed(frame[name]) for name in frame.columns}
    path = Path(reference)
    try:
        return columns(read_rows(path))
    except (OSError, ValueError) as error:
        raise UsageError(f"DriftMonitor(reference={str(path)!r}): {error}") from error


def _listed(column: Any) -> Sequence[Any]:
    return column.tolist() if hasattr(column, "tolist") else list(column)


def columns(rows: Sequence[Mapping[str, Any]]) -> Table:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}
