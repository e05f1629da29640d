"""One value of a row, from whatever a file, a library or the user's `rows=` gave it as.

row_files.py makes the cells of a CSV, which has no types; bins.py and config.py ask for the plain
value that a feature counts.
"""

import re
import sys
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

MISSING_WORDS = frozenset({"na", "n/a", "#n/a", "nan", "nat", "null", "none", "-", "?"})
"""How writers of tables spell a number that is missing, in lower case."""

MAX_DIGITS = 300
"""Of a whole number in a cell; a longer one is infinite as a float, and so no valid value."""

MAX_FLOAT = sys.float_info.max
"""A larger integer is no float."""

_DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+", re.A)
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?(nan|inf)", re.I | re.A)
_PADDED = re.compile(r"0\d+", re.A)
_FORMATTED = re.compile(r"[-+(]?\s*[$€£¥]?\s*\d[\d.,'’\s]*[%$€£¥)]?", re.A)


class PaddedNumber(str):
    """A cell such as `00501`: a number for `Numeric`, and for `Categorical` another code than
    `501`.
    """

    __slots__ = ()


class FormattedNumber(str):
    """A cell that is a number for people only: `1,234.50`, `1.234,50`, `5 %`, `€ 3`."""

    __slots__ = ()


def cell_value(text: str, has_decimal_comma: bool) -> Any:
    """The value of a cell: empty is None, what reads as a number or a boolean is one."""
    stripped = text.strip()
    if not stripped:
        return None
    if has_decimal_comma and _DECIMAL_COMMA.fullmatch(stripped):
        stripped = stripped.replace(",", ".")
    if _PADDED.fullmatch(stripped):
        return PaddedNumber(stripped)
    if _NUMBER.fullmatch(stripped):
        is_whole = stripped.lstrip("+-").isdigit() and len(stripped) <= MAX_DIGITS
        return int(stripped) if is_whole else float(stripped)
    if (lower := stripped.lower()) in ("true", "false"):
        return lower == "true"
    return FormattedNumber(text) if _FORMATTED.fullmatch(stripped) else text


def plain_value(value: Any, *, numeric: bool) -> Any:
    """The value without its library's type: of numpy's scalars and `Decimal` a number. `numeric`:
    for `Numeric`, where padded numbers are numbers and words such as NA are missing.
    """
    if isinstance(value, str):
        if not numeric:
            return value
        if value.strip().lower() in MISSING_WORDS:
            return None
        return int(value) if isinstance(value, PaddedNumber) and len(value) <= MAX_DIGITS else value
    if type(value).__name__ == "NAType":  # pandas' own, which cannot be compared
        return None
    if isinstance(value, Decimal):
        return float(value) if value.is_finite() else None
    if hasattr(value, "dtype") and not getattr(value, "shape", None):
        return value.item()
    return value


def check_numbers(column: str, values: Iterable[Any]) -> None:
    """Raises ValueError for a column of numbers that holds numbers formatted for people, or none
    at all though it is not empty.
    """
    has_number = False
    other: Any = None
    for value in values:
        plain = plain_value(value, numeric=True)
        if isinstance(plain, FormattedNumber):
            raise ValueError(
                f"expected plain numbers in the column {column!r}, found {plain[:40]!r}; "
                "write them without grouping, currency and percent signs"
            )
        if isinstance(plain, int | float):
            has_number = True
        elif plain is not None:
            other = plain
    if other is not None and not has_number:
        found = repr(other)[:40]
        raise ValueError(f"expected numbers in the column {column!r}, found {found}")
