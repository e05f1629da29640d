"""The rows of files: CSV, JSON Lines, JSON and Parquet, as spreadsheets and data frames write them.

`DriftMonitor` reads a reference with `read_rows`, and with `rows=file_rows` the files of a
`Directory`. Text is UTF-8, or UTF-16 with a byte order mark. A CSV may be separated by commas,
semicolons, tabs or bars; a spreadsheet that writes semicolons writes decimal commas.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

from eventflow.events.strict_json import decode_text, read_report
from triggers._drift.values import cell_value

DELIMITERS = (",", ";", "\t", "|")
PROBED_ROWS = 20
"""Of a CSV, to find its delimiter."""

MAX_COLUMNS = 1_000_000
"""Of one JSON row. A file is as large as its writer made it; this guards against nonsense only."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file by its suffix: `.csv`, `.jsonl`, `.ndjson`, `.json` (a list), `.parquet`.

    NaN and empty cells are None. ValueError for another suffix and for a file that is not what its
    suffix says.
    """
    match path.suffix.lower():
        case ".csv":
            return _csv_rows(decode_text(path.read_bytes()))
        case ".jsonl" | ".ndjson":
            return _checked(_lines(path.read_bytes()))
        case ".json":
            return _checked(_json_rows(path.read_bytes()))
        case ".parquet":
            return _parquet_rows(path)
        case other:
            raise ValueError(f"expected .csv, .jsonl, .ndjson, .json or .parquet, found {other!r}")


def _checked(rows: Any) -> list[dict[str, Any]]:
    if not isinstance(rows, list):
        raise ValueError(f"expected a list of objects, found {type(rows).__name__}")
    for number, row in enumerate(cast(list[Any], rows), 1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number}: expected an object, found {type(row).__name__}")
    return cast(list[dict[str, Any]], rows)


def _lines(text: bytes) -> list[Any]:
    """The values of JSON Lines."""
    lines = decode_text(text).encode().split(b"\n")
    return [read_report(line, max_keys=MAX_COLUMNS) for line in lines if line.strip()]


def _json_rows(text: bytes) -> Any:
    """A list of rows. Many tools write JSON Lines into a `.json` file, too."""
    try:
        return read_report(text, max_keys=MAX_COLUMNS)
    except ValueError as error:
        try:
            return _lines(text)
        except ValueError:
            raise error from None


def _csv_rows(text: str) -> list[dict[str, Any]]:
    first, _, rest = text.partition("\n")
    if declared := re.fullmatch(r'"?sep=(.)"?\r?', first):  # Excel's own line
        text = rest
    delimiter = declared[1] if declared else _delimiter(text)
    try:
        lines = [row for row in _cells(text, delimiter) if row]
    except csv.Error as error:  # such as a quote that nothing closes
        raise ValueError(f"expected CSV, found another text: {error}") from None
    while len(lines) > 2 and not any(lines[-1]):  # rows that a spreadsheet adds at the end
        lines.pop()
    if not lines:
        return []
    columns = _columns(lines[0])
    width = len(lines[0])
    rows: list[dict[str, Any]] = []
    for number, cells in enumerate(lines[1:], 1):
        if any(cells[width:]):
            raise ValueError(f"row {number}: expected {width} cells, found {len(cells)}")
        cells += [""] * (width - len(cells))
        rows.append({name: cell_value(cells[at], delimiter == ";") for at, name in columns})
    return rows


def _columns(header: Sequence[str]) -> list[tuple[int, str]]:
    """The columns by their positions. Those of one name are left out: nobody can say which of them
    is meant.
    """
    counts = Counter(header)
    return [(at, name) for at, name in enumerate(header) if counts[name] == 1]


def _delimiter(text: str) -> str:
    """The one that gives most columns, among those by which the first rows are of one length; if
    there is none, the one that gives most columns in the first row.
    """

    def fit(delimiter: str) -> tuple[int, int]:
        try:
            found = list(islice(_cells(text, delimiter), PROBED_ROWS))
        except csv.Error:
            return 0, 0
        lengths = [len(row) for row in found if row] or [0]
        if len(set(lengths)) == 1:
            return (2 if lengths[0] > 1 else 1), lengths[0]
        return (1 if lengths[0] > 1 else 0), lengths[0]

    return max(DELIMITERS, key=fit)


def _cells(text: str, delimiter: str) -> Iterator[list[str]]:
    stream = io.StringIO(text, newline="")
    return csv.reader(stream, delimiter=delimiter, skipinitialspace=delimiter != "\t")


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("a Parquet file needs pyarrow; run: pip install pyarrow") from error
    return cast(Any, parquet).read_table(path).to_pylist()
