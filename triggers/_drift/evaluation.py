"""A window against the reference: each feature's statistic, whether it can be chance, and how bad it is.

A feature has drifted when its statistic is beyond a threshold (the shift is large enough to matter) *and* the difference is
significant (the samples are enough to tell): thresholds alone cry wolf on small windows, p-values alone on large ones. The
chance that any feature of an undrifted window is significant is at most `alpha`, by Holm's correction.
"""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from triggers._drift import arrays
from triggers._drift.baseline import Baseline
from triggers._drift.bins import histogram
from triggers._drift.features import BINNED, STREAMING, Watched
from triggers._drift.schema import Finding
from triggers._drift.schema import Window as Shown
from triggers._drift.window import Judged, Window

from eventflow.core.clock import to_datetime  # isort: skip

LEAVE = 0.8
"""The lower threshold of the hysteresis: a window is clean when every statistic is below this share of the warning's."""

LEAST = 20
"""Values that a feature must have in a window to be judged at all."""

_BINNED: dict[str, Callable[[Any, Any], float]] = {
    "psi": arrays.psi,
    "js": arrays.js,
    "tv": arrays.tv,
}


class Verdict(msgspec.Struct, frozen=True):
    """One metric of one feature. `level`: 0 nothing, 1 warning, 2 alert. `clean`: below the lower threshold, or chance."""

    place: int
    metric: str
    statistic: float
    p_value: float
    warn: float
    alert: float
    level: int = 0
    clean: bool = True

    @property
    def badness(self) -> float:
        """The statistic in units of its warning threshold: what makes one feature worse than another."""
        return self.statistic / self.warn if self.warn else self.statistic


def measure(
    window: Window,
    watched: Sequence[Watched],
    baselines: Sequence[Baseline],
    changed: Sequence[bool],
) -> list[Verdict]:
    """The statistics of a whole window. `changed`: which streaming detectors have seen a change since all was well."""
    return [
        Verdict(place, metric, statistic, p, warn, alert)
        for place, each in enumerate(watched)
        for metric, warn, alert in each.checks
        if (measured := _measure(metric, place, window, baselines[place], changed[place]))
        is not None
        for statistic, p in (measured,)
    ]


def measured_then(judged: Judged, watched: Sequence[Watched]) -> list[Verdict]:
    """The statistics of a window that is over, with the thresholds of now."""
    bounds = {
        (place, metric): (warn, alert)
        for place, each in enumerate(watched)
        for metric, warn, alert in each.checks
    }
    return [
        Verdict(place, metric, statistic, p, *bounds[place, metric])
        for place, metric, statistic, p in judged.measured
    ]


def judge(found: Sequence[Verdict], alpha: float) -> list[Verdict]:
    """The verdicts of a window: what is measured, against its thresholds and chance."""
    tests = [verdict.p_value for verdict in found if verdict.metric not in STREAMING]
    significant = iter(arrays.holm(tests, alpha))
    return [
        _levelled(
            verdict, verdict.p_value < 1 if verdict.metric in STREAMING else next(significant)
        )
        for verdict in found
    ]


def _levelled(verdict: Verdict, significant: bool) -> Verdict:
    beyond = (
        2 if verdict.statistic >= verdict.alert else 1 if verdict.statistic >= verdict.warn else 0
    )
    return msgspec.structs.replace(
        verdict,
        level=beyond if significant else 0,
        clean=not significant or verdict.statistic < LEAVE * verdict.warn,
    )


def _measure(
    metric: str, place: int, window: Window, baseline: Baseline, changed: bool
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
    if sum(counts[:-2]) < LEAST:
        return None
    if metric in STREAMING:
        return shift(window.mean(place), baseline), 0.0 if changed else 1.0
    return _of_values(
        metric, baseline, arrays.floats([each for each in window.values(place) if _is_number(each)])
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and value == value


def _missing(reference: Sequence[int], current: Sequence[int]) -> tuple[float, float] | None:
    """The difference of the shares of what is no value, and the p-value of the two by two table; None if all are values."""
    gone, now = sum(reference[-2:]), sum(current[-2:])
    if not gone and not now:
        return None
    there, here = sum(reference) - gone, sum(current) - now
    _, p = arrays.homogeneity([there, gone], [here, now])
    return abs(gone / max(there + gone, 1) - now / max(here + now, 1)), p


def _of_values(metric: str, baseline: Baseline, values: Any) -> tuple[float, float] | None:
    """Wasserstein's distance has no p-value of its own: the Kolmogorov-Smirnov test of the same samples guards it."""
    sample = arrays.floats(baseline.sample)
    if len(values) < LEAST or not len(sample):
        return None
    distance = arrays.ks(sample, values)
    p = arrays.ks_p_value(distance, len(sample), len(values))
    return (
        distance if metric == "ks" else arrays.wasserstein(sample, values) / baseline.deviation
    ), p


def shift(mean: float | None, baseline: Baseline) -> float:
    """How far a mean is from the reference's, in its standard deviations."""
    return 0.0 if mean is None else abs(mean - baseline.mean) / baseline.deviation


def finding(
    verdict: Verdict,
    window: Window | Judged,
    watched: Sequence[Watched],
    baselines: Sequence[Baseline],
) -> Finding:
    """A verdict for people, with the histograms of before and after where the window still has its counts."""
    place, before = verdict.place, None
    after = Shown(
        start=None if window.start is None else to_datetime(window.start),
        end=None if window.end is None else to_datetime(window.end),
        samples=window.n,
    )
    if isinstance(window, Window):
        baseline = baselines[place]
        before = Shown(
            samples=baseline.samples, histogram=histogram(baseline.bins, baseline.counts)
        )
        bars = histogram(baseline.bins, window.counts[place], window.unseen[place])
        after = msgspec.structs.replace(after, histogram=bars)
    return Finding(
        feature=watched[place].name,
        metric=verdict.metric,
        statistic=verdict.statistic,
        threshold=verdict.alert if verdict.level == 2 else verdict.warn,
        p_value=None if verdict.metric in STREAMING else verdict.p_value,
        baseline=before,
        current=after,
    )
