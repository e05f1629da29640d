"""The reference: what of it each feature keeps, `Baseline`, and where it is read from.

A baseline is bins, counts, mean and deviation, and for metrics that need values at most `SAMPLE` of
them: its size is bounded, whatever the reference's. It comes from a file, a table in memory, or the
first N rows of the stream (then it is kept with the cursor).
"""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import msgspec
import orjson

from eventflow.core.errors import UsageError
from triggers._drift import arrays
from triggers._drift.bins import Bins, make_bins, to_column
from triggers._drift.features import VALUE_ONLY, FeatureSpec

SAMPLE_SIZE = 1500
"""Values kept of a reference, and of a window, so that both stay under 64 KiB for each feature:
enough to see 0.15 sigma.
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
    """What a feature keeps of a reference's column."""
    column = to_column(spec, raw)
    bins = make_bins(spec, column)
    counts = bins.count(column)
    if not spec.numeric:
        return Baseline(bins, counts)
    mean, deviation = arrays.mean_and_deviation(column.values)
    sample = arrays.thinned(column.values, SAMPLE_SIZE) if spec.metric in VALUE_ONLY else []
    return Baseline(bins, counts, mean, deviation, sample)


def check_baseline(spec: FeatureSpec, baseline: Baseline, least: int) -> None:
    """UsageError for a reference that nothing can be compared with."""
    found = baseline.samples - sum(baseline.counts[-2:])
    if found < least:
        raise UsageError(
            f"DriftMonitor(reference=): expected at least {least} values of {spec.name!r} (at {spec.at!r}), "
            f"found {found} among {baseline.samples} rows"
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


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file by its suffix: `.csv`, `.jsonl`, `.ndjson`, `.json` (a list), `.parquet`.
    ValueError for others.
    """
    match path.suffix.lower():
        case ".csv":
            with path.open(newline="", encoding="utf-8") as file:
                return [
                    {name: _cell(text) for name, text in row.items()}
                    for row in csv.DictReader(file)
                ]
        case ".jsonl" | ".ndjson":
            return [orjson.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
        case ".json":
            return orjson.loads(path.read_bytes())
        case ".parquet":
            return _parquet(path)
        case other:
            raise ValueError(f"expected .csv, .jsonl, .ndjson, .json or .parquet, found {other!r}")


def _cell(text: Any) -> Any:
    """CSV has no types: empty is missing, what reads as a number is one."""
    if not isinstance(text, str):
        return text
    stripped = text.strip()
    if not stripped:
        return None
    try:
        return float(stripped) if any(letter in ".eEnN" for letter in stripped) else int(stripped)
    except ValueError:
        return text


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("a Parquet file needs pyarrow; run: pip install pyarrow") from error
    return cast(Any, parquet).read_table(path).to_pylist()
