"""Compares a window with the reference: statistics, significance, levels. Used by evaluator.py.

A feature has drifted when its statistic is beyond a threshold (the shift is large enough to matter)
*and* the difference is significant (there are enough samples): thresholds alone raise false alarms
on small windows, p-values alone on large ones. The chance that any feature of an undrifted window
is significant is at most `alpha`, by Holm's correction.
"""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from eventflow.core.clock import to_datetime
from triggers._drift import arrays
from triggers._drift.baseline import Baseline
from triggers._drift.bins import histogram
from triggers._drift.features import BINNED, STREAMING, FeatureSpec
from triggers._drift.schema import DriftFinding, DriftWindow
from triggers._drift.window import EvaluatedWindow, OpenWindow

CLEAN_SHARE = 0.8
"""The hysteresis: a window is clean if every statistic is below this share of its warning."""

MIN_VALUES = 20
"""Values that a feature must have in a window to be evaluated."""

_BINNED: dict[str, Callable[[Any, Any], float]] = {
    "psi": arrays.psi,
    "js": arrays.js,
    "tv": arrays.tv,
}


class MetricResult(msgspec.Struct, frozen=True):
    """One metric of one feature.

    `level`: 0 none, 1 warning, 2 alert. `clean`: below the lower threshold, or not significant.
    """

    feature_index: int
    metric: str
    statistic: float
    p_value: float
    warn: float
    alert: float
    level: int = 0
    clean: bool = True

    @property
    def severity(self) -> float:
        """The statistic in units of its warning threshold, to compare features."""
        return self.statistic / self.warn if self.warn else self.statistic


def measure(
    window: OpenWindow,
    features: Sequence[FeatureSpec],
    baselines: Sequence[Baseline],
    changed: Sequence[bool],
) -> list[MetricResult]:
    """The statistics of a complete window. `changed`: by feature, whether a streaming detector has
    seen a change since the last episode.
    """
    return [
        MetricResult(index, metric, statistic, p, warn, alert)
        for index, each in enumerate(features)
        for metric, warn, alert in each.checks
        if (measured := _measure(metric, index, window, baselines[index], changed[index]))
        is not None
        for statistic, p in (measured,)
    ]


def remeasure(evaluated: EvaluatedWindow, features: Sequence[FeatureSpec]) -> list[MetricResult]:
    """The statistics of a past window, with the present thresholds."""
    bounds = {
        (index, metric): (warn, alert)
        for index, each in enumerate(features)
        for metric, warn, alert in each.checks
    }
    return [
        MetricResult(index, metric, statistic, p, *bounds[index, metric])
        for index, metric, statistic, p in evaluated.measured
    ]


def evaluate(measured: Sequence[MetricResult], alpha: float) -> list[MetricResult]:
    """The measured statistics with their levels: by their thresholds, and by chance."""
    tests = [each.p_value for each in measured if each.metric not in STREAMING]
    significant = iter(arrays.holm(tests, alpha))
    return [
        _with_level(each, each.p_value < 1 if each.metric in STREAMING else next(significant))
        for each in measured
    ]


def _with_level(result: MetricResult, significant: bool) -> MetricResult:
    return msgspec.structs.replace(
        result,
        level=level_of(result) if significant else 0,
        clean=not significant or result.statistic < CLEAN_SHARE * result.warn,
    )


def level_of(result: MetricResult) -> int:
    """By its thresholds alone: 0 below both, 1 a warning, 2 an alert."""
    if result.statistic >= result.alert:
        return 2
    return 1 if result.statistic >= result.warn else 0


def _measure(
    metric: str, index: int, window: OpenWindow, baseline: Baseline, changed: bool
) -> tuple[float, float] | None:
    """Statistic and p-value; None if there are too few values."""
    counts = window.counts[index]
    if metric in BINNED:
        chi2, p = arrays.homogeneity(baseline.counts, counts)
        if metric == "chi2":
            return (chi2 * (1 / baseline.samples + 1 / window.n)) ** 0.5, p
        kept = [pair for pair in zip(baseline.counts, counts, strict=True) if any(pair)]
        reference, current = (arrays.shares(side) for side in zip(*kept, strict=True))
        return _BINNED[metric](reference, current), p
    if metric == "missing":
        return _missing(baseline.counts, counts)
    if sum(counts[:-2]) < MIN_VALUES:
        return None
    if metric in STREAMING:
        return shift(window.mean(index), baseline), 0.0 if changed else 1.0
    return _of_values(
        metric, baseline, arrays.floats([each for each in window.values(index) if _is_number(each)])
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and value == value


def _missing(reference: Sequence[int], current: Sequence[int]) -> tuple[float, float] | None:
    """The difference of the shares of missing and invalid values, and the p-value of the two by two
    table; None if there are none.
    """
    missing_before = sum(reference[-2:])
    missing_now = sum(current[-2:])
    if not missing_before and not missing_now:
        return None
    before = sum(reference)
    now = sum(current)
    _, p = arrays.homogeneity(
        [before - missing_before, missing_before], [now - missing_now, missing_now]
    )
    return abs(missing_before / max(before, 1) - missing_now / max(now, 1)), p


def _of_values(metric: str, baseline: Baseline, values: Any) -> tuple[float, float] | None:
    """Wasserstein's distance has no p-value; that of Kolmogorov-Smirnov is used."""
    sample = arrays.floats(baseline.sample)
    if len(values) < MIN_VALUES or not len(sample):
        return None
    distance = arrays.ks(sample, values)
    p = arrays.ks_p_value(distance, len(sample), len(values))
    return (
        distance if metric == "ks" else arrays.wasserstein(sample, values) / baseline.deviation
    ), p


def shift(mean: float | None, baseline: Baseline) -> float:
    """How far a mean is from the reference's, in its standard deviations."""
    return 0.0 if mean is None else abs(mean - baseline.mean) / baseline.deviation


def make_finding(
    result: MetricResult,
    window: OpenWindow | EvaluatedWindow,
    features: Sequence[FeatureSpec],
    baselines: Sequence[Baseline],
) -> DriftFinding:
    """A result for the event, with histograms if the window still has its counts."""
    index = result.feature_index
    before = None
    after = DriftWindow(
        start=None if window.start is None else to_datetime(window.start),
        end=None if window.end is None else to_datetime(window.end),
        samples=window.n,
    )
    if isinstance(window, OpenWindow):
        baseline = baselines[index]
        before = DriftWindow(
            samples=baseline.samples, histogram=histogram(baseline.bins, baseline.counts)
        )
        bars = histogram(baseline.bins, window.counts[index], window.unseen[index])
        after = msgspec.structs.replace(after, histogram=bars)
    return DriftFinding(
        feature=features[index].name,
        metric=result.metric,
        statistic=result.statistic,
        threshold=result.alert if result.level == 2 else result.warn,
        p_value=None if result.metric in STREAMING else result.p_value,
        baseline=before,
        current=after,
    )
