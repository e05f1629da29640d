"""Tabular data for checks: columns of rows or frames, nulls, and the distribution of values.

Data are a list of dicts, a dict of sequences, or a frame whose columns convert to lists (pandas,
polars, pyarrow). Frames are recognised by their methods, so that no frame library is needed. Pure
functions, called by checks.py.
"""

import math
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias, cast

import msgspec

from eventflow.core.errors import UsageError
from eventflow.serialization.tagged_json import type_name

Data: TypeAlias = Any
"""Rows, columns or a frame; anything else raises UsageError."""

EMPTY_BIN_SHARE = 1e-4
"""The share that an empty bin counts as, since PSI is undefined for zero."""
MAX_CATEGORIES = 100
"""Categories per profile; the rarer ones share one bin."""

_NULLS = frozenset({"NAType", "NaTType"})  # pandas' nulls, which compare as unknown


def is_null(value: Any) -> bool:
    """None, NaN, and pandas' NA and NaT."""
    if type(value) is str or type(value) is int:
        return False
    return (
        value is None
        or type(value).__name__ in _NULLS
        or (isinstance(value, Real) and bool(value != value))
    )


def hashable(value: Any) -> Any:
    """The value itself, or for a list or dict a text that represents it in a set."""
    try:
        hash(value)
    except TypeError:
        return f"{type(value).__name__}:{value!r}"
    return value


# --------------------------------------------------------------------------- columns


def columns_of(data: Data) -> list[str]:
    """The names of the columns; for rows, all keys of any row."""
    if isinstance(data, Mapping):
        return list(cast(Mapping[str, Any], data))
    if _is_frame(data):
        return [
            str(name)
            for name in (data.column_names if hasattr(data, "column_names") else data.columns)
        ]
    return list(dict.fromkeys(name for row in _rows_of(data) for name in row))


def column(data: Data, name: str) -> Sequence[Any]:
    """The values of a column, in order; None for a row without it.

    Raises UsageError if there is no such column.
    """
    if _is_frame(data) or isinstance(data, Mapping):
        if name not in columns_of(data):
            raise UsageError(
                f"checks: expected a column {name!r}, found {', '.join(columns_of(data)) or 'none'}"
            )
        return _as_list(data[name])
    rows = _rows_of(data)
    if rows and not any(name in row for row in rows):
        raise UsageError(
            f"checks: expected a column {name!r}, found {', '.join(columns_of(data)) or 'none'}"
        )
    return [row.get(name) for row in rows]


def count_of(data: Data) -> int:
    """The number of rows; for a dict of sequences, the longest length."""
    if isinstance(data, Mapping):
        return max((len(values) for values in cast(Mapping[str, Any], data).values()), default=0)
    return len(data) if _is_frame(data) else len(_rows_of(data))


def _is_frame(data: Any) -> bool:
    return hasattr(data, "columns") and hasattr(data, "__getitem__") and hasattr(data, "__len__")


def _rows_of(data: Any) -> Sequence[Mapping[str, Any]]:
    found = type_name(data)
    if isinstance(data, list | tuple):
        rows = cast(Sequence[Any], data)
        if not rows or isinstance(rows[0], Mapping):
            return rows
        found = f"{found} of {type_name(rows[0])}"
    raise UsageError(f"checks: expected a list of dicts, a dict of lists or a frame, found {found}")


def _as_list(values: Any) -> Sequence[Any]:
    for name in ("to_list", "to_pylist", "tolist"):
        if hasattr(values, name):
            return getattr(values, name)()
    return list(values)


def json_or_text(value: Any) -> Any:
    """A value as JSON data if possible, else as text, for a result."""
    if isinstance(value, list):
        return [json_or_text(each) for each in cast(list[Any], value)]
    if value is None or isinstance(value, bool) or (type(value) is int and abs(value) < 1 << 53):
        return value
    if type(value) is float and math.isfinite(value):
        return value
    text = value if type(value) is str else str(value)
    return text.encode(errors="backslashreplace").decode()[:80]


# --------------------------------------------------------------------------- numbers


def not_finite(value: Any) -> list[tuple[int, Any]]:
    """The numbers in `value` that are NaN or infinite, each with its index."""
    numpy: Any = sys.modules.get("numpy")
    # Vectorised, since a model may have many weights.
    if numpy is not None and isinstance(value, numpy.ndarray) and value.dtype.kind in "fc":
        flat = value.ravel()
        return [
            (int(index), flat[index].item()) for index in numpy.flatnonzero(~numpy.isfinite(flat))
        ]
    return [
        (index, number) for index, number in enumerate(_flat(value)) if not math.isfinite(number)
    ]


def _flat(value: Any) -> Iterable[float]:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        for each in cast(Sequence[Any], value):
            yield from _flat(each)
    else:
        yield float(value)


# --------------------------------------------------------------------------- distributions


class Profile(msgspec.Struct, frozen=True):
    """The distribution of values, as JSON data.

    Numbers have `edges` between bins; other values have `values`, one per bin. `shares`: of the
    bins in order, then of values in no bin, then of nulls.
    """

    shares: Sequence[float]
    edges: Sequence[float] | None = None
    values: Sequence[Any] | None = None

    def shares_of(self, values: Iterable[Any]) -> list[float]:
        """The shares of other values in these bins."""
        indexes: Mapping[Any, int] = {value: index for index, value in enumerate(self.values or ())}
        size = len(self.shares)
        counts = [0] * size
        for value in values:
            if is_null(value):
                counts[size - 1] += 1
            elif self.edges is None:
                counts[indexes.get(hashable(value), size - 2)] += 1
            else:
                counts[
                    bisect_right(self.edges, value) if isinstance(value, Real) else size - 2
                ] += 1
        total = sum(counts)
        return [count / total for count in counts] if total else [0.0] * size


def profile(values: Iterable[Any], bins: int = 10) -> Profile:
    """The profile of reference values, for `distribution`.

    Numbers are put into `bins` bins of about equal share.
    """
    listed = list(_as_list(values))
    known = [value for value in listed if not is_null(value)]
    if not known:
        raise UsageError("checks.profile(): expected some values that are not null, found none")
    if all(map(_is_number, known)):
        known.sort()
        edges = sorted({float(known[len(known) * step // bins]) for step in range(1, bins)})
        blank = Profile([0.0] * (len(edges) + 3), edges=edges)
    else:
        common = [value for value, _ in Counter(map(hashable, known)).most_common(MAX_CATEGORIES)]
        blank = Profile([0.0] * (len(common) + 2), values=common)
    return msgspec.structs.replace(blank, shares=blank.shares_of(listed))


def _is_number(value: Any) -> bool:
    return type(value) is not bool and isinstance(value, Real)


def psi(reference: Profile, shares: Sequence[float]) -> float:
    """The population stability index, Σ (p - q) · ln(p / q) over the bins; infinite for no rows."""
    if not any(shares):
        return math.inf
    pairs = [
        (max(p, EMPTY_BIN_SHARE), max(q, EMPTY_BIN_SHARE))
        for p, q in zip(shares, reference.shares, strict=True)
    ]
    return sum((p - q) * math.log(p / q) for p, q in pairs)
