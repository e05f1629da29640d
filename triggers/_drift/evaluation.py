"""A window against the reference: each feature's statistic, whether it can be chance, and how bad
it is.

A feature has drifted when its statistic is beyond a threshold (the shift is large enough to matter)
*and* the difference is significant (the samples are enough to tell): thresholds alone cry wolf on
small windows, p-values alone on large ones. The chance that any feature of an undrifted window is
significant is at most `alpha`, by Holm's correction.
"""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from triggers._drift import arrays
from triggers._drift.baseline import Baseline
from triggers._drift.bins import histogram
from triggers._drift.features import BINNED, STREAMING, FeatureSpec
from triggers._drift.schema import DriftFinding
from triggers._drift.schema import DriftWindow as Shown
from triggers._drift.window import EvaluatedWindow, OpenWindow

from eventflow.core.clock import to_datetime  # isort: skip

CLEAN_SHARE = 0.8
"""The lower threshold of the hysteresis: a window is clean when every statistic is below this share
of the warning's.
"""

MIN_VALUES = 20
"""Values that a feature must have in a window to be judged at all."""

_BINNED: dict[str, Callable[[Any, Any], float]] = {
    "psi": arrays.psi,
    "js": arrays.js,
    "tv": arrays.tv,
}


class MetricResult(msgspec.Struct, frozen=True):
    """One metric of one feature. `level`: 0 nothing, 1 warning, 2 alert. `clean`: below the lower
    threshold, or chance.
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
        """The statistic in units of its warning threshold: what makes one feature worse than
        another.
        """
        return self.statistic / self.warn if self.warn else self.statistic


def measure(
    window: OpenWindow,
    features: Sequence[FeatureSpec],
    baselines: Sequence[Baseline],
    changed: Sequence[bool],
) -> list[MetricResult]:
    """The statistics of a whole window. `changed`: which streaming detectors have seen a change
    since all was well.
    """
    return [
        MetricResult(place, metric, statistic, p, warn, alert)
        for place, each in enumerate(features)
        for metric, warn, alert in each.checks
        if (measured := _measure(metric, place, window, baselines[place], changed[place]))
        is not None
        for statistic, p in (measured,)
    ]


def remeasure(evaluated: EvaluatedWindow, features: Sequence[FeatureSpec]) -> list[MetricResult]:
    """The statistics of a window that is over, with the thresholds of now."""
    bounds = {
        (place, metric): (warn, alert)
        for place, each in enumerate(features)
        for metric, warn, alert in each.checks
    }
    return [
        MetricResult(place, metric, statistic, p, *bounds[place, metric])
        for place, metric, statistic, p in evaluated.measured
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
    metric: str, place: int, window: OpenWindow, baseline: Baseline, changed: bool
) -> tuple[float, float] | None:
    """Statistic and p-value; None where there is too little to judge by."""
    counts = window.counts[place]
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
        return shift(window.mean(place), baseline), 0.0 if changed else 1.0
    return _of_values(
        metric, baseline, arrays.floats([each for each in window.values(place) if _is_number(each)])
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and value == value


def _missing(reference: Sequence[int], current: Sequence[int]) -> tuple[float, float] | None:
    """The difference of the shares of what is no value, and the p-value of the two by two table;
    None if all are values.
    """
    gone = sum(reference[-2:])
    now = sum(current[-2:])
    if not gone and not now:
        return None
    there = sum(reference) - gone
    here = sum(current) - now
    _, p = arrays.homogeneity([there, gone], [here, now])
    return abs(gone / max(there + gone, 1) - now / max(here + now, 1)), p


def _of_values(metric: str, baseline: Baseline, values: Any) -> tuple[float, float] | None:
    """Wasserstein's distance has no p-value of its own: the Kolmogorov-Smirnov test of the same
    samples guards it.
    """
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
    verdict: MetricResult,
    window: OpenWindow | EvaluatedWindow,
    features: Sequence[FeatureSpec],
    baselines: Sequence[Baseline],
) -> DriftFinding:
    """A verdict for people, with the histograms of before and after where the window still has its
    counts.
    """
    place = verdict.feature_index
    before = None
    after = Shown(
        start=None if window.start is None else to_datetime(window.start),
        end=None if window.end is None else to_datetime(window.end),
        samples=window.n,
    )
    if isinstance(window, OpenWindow):
        baseline = baselines[place]
        before = Shown(
            samples=baseline.samples, histogram=histogram(baseline.bins, baseline.counts)
        )
        bars = histogram(baseline.bins, window.counts[place], window.unseen[place])
        after = msgspec.structs.replace(after, histogram=bars)
    return DriftFinding(
        feature=features[place].name,
        metric=verdict.metric,
        statistic=verdict.statistic,
        threshold=verdict.alert if verdict.level == 2 else verdict.warn,
        p_value=None if verdict.metric in STREAMING else verdict.p_value,
        baseline=before,
        current=after,
    )
