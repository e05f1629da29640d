"""The rows of files: CSV, JSON Lines, JSON and Parquet, as spreadsheets and data frames write them.

`DriftMonitor` reads a reference with `read_rows`, and with `rows=file_rows` the files of a
`Directory`. Text is UTF-8, or UTF-16 with a byte order mark. A CSV may be separated by commas,
semicolons, tabs or bars; a spreadsheet that writes semicolons writes decimal commas.
"""

import csv
import io
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

from eventflow.events.strict_json import decode_text, read_report

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
            lines = decode_text(path.read_bytes()).encode().split(b"\n")
            return [read_report(line, max_keys=MAX_COLUMNS) for line in lines if line.strip()]
        case ".json":
            return read_report(path.read_bytes(), max_keys=MAX_COLUMNS)
        case ".parquet":
            return _parquet_rows(path)
        case other:
            raise ValueError(f"expected .csv, .jsonl, .ndjson, .json or .parquet, found {other!r}")


def _csv_rows(text: str) -> list[dict[str, Any]]:
    first, _, rest = text.partition("\n")
    if declared := re.fullmatch(r"sep=(.)\r?", first):  # Excel's own line
        text = rest
    delimiter = declared[1] if declared else _delimiter(text)
    has_decimal_comma = delimiter == ";"
    return [
        {name: _cell(cell, has_decimal_comma) for name, cell in row.items()}
        for row in csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    ]


def _delimiter(text: str) -> str:
    """The one that gives most columns, among those by which the first rows are of one length."""

    def width(delimiter: str) -> int:
        lengths = [len(row) for row in islice(_cells(text, delimiter), PROBED_ROWS) if row]
        return lengths[0] if len(set(lengths)) == 1 else 0

    return max(DELIMITERS, key=width)


def _cells(text: str, delimiter: str) -> Iterator[list[str]]:
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)


MAX_DIGITS = 300
"""Of a whole number in a cell; a longer one is infinite as a float, and so no valid value."""

_DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?(nan|inf)", re.I | re.A)


def _cell(text: Any, has_decimal_comma: bool) -> Any:
    """CSV has no types: empty is missing, what reads as a number is one."""
    if not isinstance(text, str):
        return text
    stripped = text.strip()
    if not stripped:
        return None
    if has_decimal_comma and _DECIMAL_COMMA.fullmatch(stripped):
        stripped = stripped.replace(",", ".")
    if not _NUMBER.fullmatch(stripped):
        return text
    is_whole = stripped.lstrip("+-").isdigit() and len(stripped) <= MAX_DIGITS
    return int(stripped) if is_whole else float(stripped)


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("a Parquet file needs pyarrow; run: pip install pyarrow") from error
    return cast(Any, parquet).read_table(path).to_pylist()
