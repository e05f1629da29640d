"""`Bins`: the histogram of one feature, made from its reference; and `Column`, its sorted values.

The bins of numbers are quantiles of the reference, the outer ones open-ended; those of categories
are the most frequent ones and `other`. Missing values (null, NaN, absent) and invalid ones (another
type) have a bin each: a jump of the null rate is drift.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from triggers._drift import arrays
from triggers._drift.features import Categorical, FeatureSpec, Numeric
from triggers._drift.schema import Bin
from triggers._drift.values import MAX_FLOAT, plain_value

MISSING = "missing"
INVALID = "invalid"
OTHER = "other"

MAX_LABEL_LENGTH = 64
"""In characters; longer categories are cut."""

MAX_UNSEEN = 32
"""Categories absent from the reference that a window counts by name; the rest count as `other`."""


class Column(msgspec.Struct):
    """The valid values of one feature (an array of floats, or a list of categories), and the number
    of others.
    """

    values: Any
    missing: int = 0
    invalid: int = 0

    @property
    def samples(self) -> int:
        return len(self.values) + self.missing + self.invalid


def to_column(spec: FeatureSpec, raw: Sequence[Any]) -> Column:
    """Sorts raw values into valid, missing and invalid ones; keeps the order of the valid ones."""
    return _numbers(raw) if spec.numeric else _categories(raw)


def _numbers(raw: Sequence[Any]) -> Column:
    if {type(value) for value in raw} <= {int, float}:
        found = arrays.floats(raw)
        kept = found[found == found]  # NaN is not itself
        return Column(kept, missing=len(found) - len(kept))
    values = list[float]()
    missing = 0
    invalid = 0
    for given in raw:
        value = plain_value(given, numeric=True)
        if value is None or value != value:
            missing += 1
        elif isinstance(value, float) or (isinstance(value, int) and abs(value) <= MAX_FLOAT):
            values.append(float(value))
        else:
            invalid += 1
    return Column(arrays.floats(values), missing, invalid)


def _categories(raw: Sequence[Any]) -> Column:
    values = list[str]()
    missing = 0
    invalid = 0
    for given in raw:
        value = plain_value(given, numeric=False)
        if isinstance(value, str):
            values.append(value[:MAX_LABEL_LENGTH])
        elif value is None or value != value:
            missing += 1
        elif isinstance(value, bool | int | float):
            values.append(_label(value))
        else:
            invalid += 1
    return Column(values, missing, invalid)


def _label(value: bool | int | float) -> str:
    """A number as a category, with all its digits; 1 and 1.0 are the same one."""
    if isinstance(value, bool):
        return str(value).lower()
    is_whole = isinstance(value, int) or (value.is_integer() and abs(value) < 2**53)
    return str(int(value)) if is_whole else repr(value)


class Bins(msgspec.Struct, frozen=True):
    """The bins of a feature: `edges` between those of numbers, or `categories`. The last two are
    missing and invalid.
    """

    edges: Sequence[float] = ()
    categories: Sequence[str] | None = None

    @property
    def labels(self) -> list[str]:
        if self.categories is not None:
            named = [*map(printable, self.categories), OTHER]
        elif not self.edges:
            named = ["any"]
        else:
            low = f"< {self.edges[0]:g}"
            high = f">= {self.edges[-1]:g}"
            pairs = zip(self.edges[:-1], self.edges[1:], strict=True)
            named = [low, *(f"[{one:g}, {other:g})" for one, other in pairs), high]
        return [*named, MISSING, INVALID]

    def count(self, column: Column) -> list[int]:
        if self.categories is None:
            found = arrays.bin_counts(column.values, self.edges)
        else:
            counted = Counter[str](column.values)
            found = [counted.pop(category, 0) for category in self.categories]
            found.append(sum(counted.values()))
        return [*found, column.missing, column.invalid]

    def unseen(self, column: Column, before: Mapping[str, int]) -> dict[str, int]:
        """Counts of categories that the reference has not, at most MAX_UNSEEN of them, added to
        those of before.
        """
        if self.categories is None:
            return {}
        found = dict(before)
        known = set(self.categories)
        for category, count in Counter[str](column.values).items():
            if category not in known and (category in found or len(found) < MAX_UNSEEN):
                found[category] = found.get(category, 0) + count
        return found


def make_bins(spec: FeatureSpec, column: Column) -> Bins:
    """The bins that a reference gives."""
    match spec.feature:
        case Numeric(bins=bins):
            return Bins(edges=arrays.edges_of(column.values, bins))
        case Categorical(top=top):
            counted = Counter[str](column.values)
            return Bins(
                categories=sorted(sorted(counted, key=lambda name: (-counted[name], name))[:top])
            )


def histogram(
    bins: Bins, counts: Sequence[int], unseen: Mapping[str, int] | None = None
) -> list[Bin]:
    """The bars of a histogram, with one for each unseen category; empty `other`, missing and
    invalid are left out.
    """
    total = max(sum(counts), 1)
    bars = list(zip(bins.labels, counts, strict=True))
    if unseen and bins.categories is not None:
        index = len(bins.categories)
        named = [
            (printable(name), count)
            for name, count in sorted(unseen.items(), key=lambda each: -each[1])
        ]
        rest = (OTHER, counts[index] - sum(unseen.values()))
        bars[index : index + 1] = [*named, rest]
    return [
        Bin(label, count, round(count / total, 6))
        for label, count in bars
        if count or label not in (OTHER, MISSING, INVALID)
    ]


def printable(text: str) -> str:
    """A category as a label: what does not print is escaped."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )
