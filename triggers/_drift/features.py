"""`Numeric` and `Categorical` features: metrics, thresholds, and the field of a row.

drift_monitor.py makes `FeatureSpec`s of the user's `features=`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import msgspec

from eventflow.core.declarations import Declared
from eventflow.core.errors import UsageError
from triggers._drift.json_fields import MissingField, point
from triggers._drift.values import FormattedNumber, plain_value

NumericMetric: TypeAlias = Literal[
    "psi", "js", "tv", "ks", "wasserstein", "adwin", "page-hinkley", "missing"
]
CategoricalMetric: TypeAlias = Literal["psi", "js", "tv", "chi2", "missing"]

THRESHOLDS: Mapping[str, tuple[float, float]] = {
    "psi": (0.1, 0.2),  # the industry's moderate and large
    "js": (0.1, 0.2),  # a distance, base 2: a PSI of 0.06 and 0.22
    "tv": (0.1, 0.2),  # this share of the samples is elsewhere
    "chi2": (0.3, 0.45),  # Cohen's w: a PSI of 0.1 and 0.2
    "ks": (0.1, 0.2),  # a shift by 0.25 and 0.5 sigma of a normal distribution
    "wasserstein": (0.1, 0.2),  # in standard deviations of the reference
    "adwin": (0.2, 0.4),  # shift of the mean, in standard deviations of the reference
    "page-hinkley": (0.2, 0.4),
    "missing": (0.05, 0.1),  # difference of the shares of missing or invalid values
}
"""Thresholds of a warning and of an alert, by metric."""

BINNED = frozenset({"psi", "js", "tv", "chi2"})
SAMPLED = frozenset({"ks", "wasserstein"})
"""Metrics of values, not of bins."""
STREAMING = frozenset({"adwin", "page-hinkley"})
VALUE_ONLY = SAMPLED | STREAMING
"""Metrics that ignore missing values: their share is checked separately."""


class Numeric(msgspec.Struct, frozen=True, metaclass=Declared):
    """A feature of numbers.

    `at`: the field in a row, or a JSON pointer (`"/order/total"`); by default the feature's own
    name. `metric`: how the window is compared with the reference. `warn` and `alert` are its
    thresholds; see the table in the guide for each metric's own. `bins`: quantiles of the
    reference, for PSI, JS and TV and for the histograms in the event.
    """

    at: str | None = None
    metric: NumericMetric = "psi"
    warn: float | None = None
    alert: float | None = None
    bins: int = 10


class Categorical(msgspec.Struct, frozen=True, metaclass=Declared):
    """A feature of categories (texts, whole numbers, booleans). `top`: how many of the reference
    have a bin of their own.
    """

    at: str | None = None
    metric: CategoricalMetric = "psi"
    warn: float | None = None
    alert: float | None = None
    top: int = 50


Feature: TypeAlias = Numeric | Categorical


class FeatureSpec(msgspec.Struct, frozen=True):
    """A feature with its name, and its metrics with their thresholds: (metric, warn, alert)."""

    name: str
    at: str
    feature: Feature
    checks: tuple[tuple[str, float, float], ...]

    @property
    def numeric(self) -> bool:
        return isinstance(self.feature, Numeric)

    @property
    def metric(self) -> str:
        return self.feature.metric

    def is_in(self, row: Any) -> bool:
        """Whether the row has the field, be it null."""
        if isinstance(row, dict) and self.at in row:
            return True
        try:
            point(row, self.at)
        except MissingField:
            return False
        return True

    def value(self, row: Any) -> Any:
        """The value in this row, else None."""
        if isinstance(row, dict) and self.at in row:
            return row[self.at]  # pyright: ignore[reportUnknownVariableType]
        try:
            return point(row, self.at)
        except MissingField:
            return None


def feature_specs(
    features: Sequence[str] | Mapping[str, Feature], kinds: Mapping[str, type[Feature]]
) -> tuple[FeatureSpec, ...]:
    """The features of a monitor. `kinds`: those of bare names. UsageError for invalid options."""
    named = (
        features
        if isinstance(features, Mapping)
        else {name: kinds.get(name, Numeric)() for name in features}
    )
    if not named or isinstance(features, str):
        raise UsageError(
            "DriftMonitor(features=): expected names, or a mapping to Numeric and Categorical, "
            f"found {features!r}"
        )
    return tuple(_feature_spec(name, feature) for name, feature in named.items())


def _feature_spec(name: str, feature: Feature) -> FeatureSpec:
    where = f"DriftMonitor(features=): {name!r}"
    metrics = NumericMetric if isinstance(feature, Numeric) else CategoricalMetric
    if not isinstance(feature, Numeric | Categorical):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UsageError(f"{where}: expected Numeric(...) or Categorical(...), found {feature!r}")
    if feature.metric not in metrics.__args__:
        raise UsageError(
            f"{where}: expected a metric of {', '.join(metrics.__args__)}, found {feature.metric!r}"
        )
    if isinstance(feature, Numeric) and not 2 <= feature.bins <= 200:
        raise UsageError(f"{where}: expected 2 to 200 bins, found {feature.bins}")
    warn, alert = THRESHOLDS[feature.metric]
    warn = (
        feature.warn
        if feature.warn is not None
        else warn
        if feature.alert is None
        else min(warn, feature.alert)
    )
    alert = feature.alert if feature.alert is not None else max(alert, warn)
    if not 0 <= warn <= alert:
        raise UsageError(
            f"{where}: expected thresholds with 0 <= warn <= alert, found {warn} and {alert}"
        )
    checks = [(feature.metric, warn, alert)]
    if feature.metric in VALUE_ONLY:
        checks.append(("missing", *THRESHOLDS["missing"]))
    return FeatureSpec(name, feature.at or name, feature, tuple(checks))


def _is_category(value: Any) -> bool:
    plain = plain_value(value, numeric=True)
    return isinstance(plain, str | bool) and not isinstance(plain, FormattedNumber)


def infer_kinds(
    table: Mapping[str, Sequence[Any]], names: Sequence[str]
) -> dict[str, type[Feature]]:
    """What bare names are: categories where the reference has texts or truth values, else
    numbers.
    """
    return {
        name: Categorical if any(_is_category(value) for value in table.get(name, ())) else Numeric
        for name in names
    }
