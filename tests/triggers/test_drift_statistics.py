"""The statistics against independent ones: scipy's for histograms and samples, river's for the
streaming detectors (D18).
"""

import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from river.drift import ADWIN
from river.drift import PageHinkley as RiverPageHinkley
from scipy import stats
from scipy.spatial.distance import jensenshannon

from triggers._drift import arrays
from triggers._drift.bins import make_bins, to_column
from triggers._drift.features import Categorical, Numeric, feature_specs
from triggers._drift.streaming import Adwin, PageHinkley

EXACT = 1e-9


def test_d18_histograms_agree_with_scipy():
    """PSI, JS, TV and χ² of 1,000 random pairs of histograms are scipy's to 1e-9."""
    rng = np.random.default_rng(18)
    for _ in range(1000):
        bins = int(rng.integers(2, 30))
        before, after = rng.integers(5, 500, size=bins), rng.integers(5, 500, size=bins)
        one, other = (before + 0.5) / (before + 0.5).sum(), (after + 0.5) / (after + 0.5).sum()
        ours, theirs = arrays.shares(before.tolist()), arrays.shares(after.tolist())
        assert arrays.psi(ours, theirs) == pytest.approx(
            stats.entropy(one, other) + stats.entropy(other, one), abs=EXACT
        )
        assert arrays.js(ours, theirs) == pytest.approx(
            jensenshannon(one, other, base=2), abs=EXACT
        )
        assert arrays.tv(ours, theirs) == pytest.approx(np.abs(one - other).sum() / 2, abs=EXACT)
        chi2, p = arrays.homogeneity(before.tolist(), after.tolist())
        expected: Any = stats.chi2_contingency([before, after], correction=False)
        assert chi2 == pytest.approx(expected.statistic, abs=1e-9 * max(1, expected.statistic))
        assert p == pytest.approx(expected.pvalue, abs=EXACT)


def test_samples_agree_with_scipy():
    """Kolmogorov-Smirnov, its p-value and Wasserstein's distance of random samples, with ties, are
    scipy's to 1e-9.
    """
    rng = np.random.default_rng(19)
    for number in range(200):
        one = rng.normal(size=int(rng.integers(20, 800)))
        other = rng.normal(
            rng.uniform(0, 0.5), rng.uniform(0.5, 2), size=int(rng.integers(20, 800))
        )
        if number % 3 == 0:
            one, other = one.round(1), other.round(1)
        expected: Any = stats.ks_2samp(one, other, method="asymp")
        assert arrays.ks(one, other) == pytest.approx(expected.statistic, abs=EXACT)
        assert arrays.ks_p_value(arrays.ks(one, other), len(one), len(other)) == pytest.approx(
            expected.pvalue, abs=EXACT
        )
        assert arrays.wasserstein(one, other) == pytest.approx(
            stats.wasserstein_distance(one, other), abs=EXACT
        )


def test_wasserstein_is_evidentlys():
    """In standard deviations of the reference it is what evidently 0.7.23 wrote for these data
    (`num_method="wasserstein"`).
    """
    rng = np.random.default_rng(7)
    before = [rng.normal(10, 2, 500).round(3), rng.normal(40, 8, 500).round(3)]
    after = [rng.normal(12, 2, 500).round(3), rng.normal(40, 8, 500).round(3)]
    for one, other, expected in zip(
        before, after, (1.1799603668677907, 0.08173655497736874), strict=True
    ):
        _, deviation = arrays.mean_and_deviation(one)
        assert arrays.wasserstein(one, other) / deviation == pytest.approx(expected, abs=EXACT)


def test_d18_adwin_agrees_with_river():
    """On 20 seeded streams with changes, ADWIN sees the changes that river's sees, at the same
    sample.
    """
    for seed in range(20):
        draw = random.Random(seed)
        theirs, ours = ADWIN(), Adwin()
        expected, found = list[int](), list[int]()
        for place in range(4000):
            value = draw.gauss(place // 1000 % 2 * draw.choice([0.4, 0.7]), 1)
            theirs.update(value)
            if theirs.drift_detected:
                expected.append(place)
            if ours.update(value):
                found.append(place)
                ours = Adwin()  # river starts over after a change; we keep the window's newer half
        assert found == expected and ours.mean == pytest.approx(theirs.estimation, abs=EXACT)


def test_page_hinkley_agrees_with_river():
    """Page-Hinkley finds what river's finds, on the same streams."""
    for seed in range(20):
        draw = random.Random(seed)
        theirs, ours = RiverPageHinkley(), PageHinkley()
        for place in range(3000):
            value = draw.gauss(place // 1000 % 2 * 0.5, 1)
            theirs.update(value)
            assert ours.update(value) == theirs.drift_detected, (seed, place)


def test_detectors_go_on_from_their_state():
    """A detector made from the plain data of another continues as that one would have."""
    for make in (lambda state: Adwin(state=state), lambda state: PageHinkley(state=state)):
        draw = random.Random(3)
        whole, broken = make(None), make(None)
        for place in range(2000):
            value = draw.gauss(place // 1000, 1)
            if place % 97 == 0:
                broken = make(broken.state())
            assert whole.update(value) == broken.update(value)
        assert whole.state() == broken.state() and whole.mean == broken.mean


def test_holm_is_the_step_down_procedure():
    """Significant are the smallest p-values as long as each is below alpha over the number of tests
    that are left.
    """
    assert arrays.holm([0.004, 0.03, 0.011, 0.6], 0.05) == [True, False, True, False]
    assert arrays.holm([0.02, 0.02, 0.02], 0.05) == [False, False, False]
    assert arrays.holm([], 0.05) == []


def test_every_value_has_a_bin():
    """Values beyond the reference and infinities are in the outer bins; missing, invalid and unseen
    ones in their own.
    """
    (number,) = feature_specs({"x": Numeric(bins=4)}, {})
    bins = make_bins(number, to_column(number, [float(each) for each in range(100)]))
    counts = bins.count(
        to_column(
            number,
            [-1e9, float("-inf"), 1e9, float("inf"), 50, True, None, float("nan"), "text", {}],
        )
    )
    assert sum(counts) == 10 and counts[0] == 3 and counts[-3] == 2 and counts[-2:] == [2, 2]
    (category,) = feature_specs({"c": Categorical(top=2)}, {})
    bins = make_bins(category, to_column(category, ["a"] * 5 + ["b"] * 3 + ["c"]))
    assert bins.categories == ["a", "b"]
    assert bins.count(to_column(category, ["a", "c", "new", 1, None, []])) == [1, 0, 3, 1, 1]


def test_the_extra_is_named():
    """Without numpy, the error of DriftMonitor names the package to install; DriftAlert
    needs none.
    """
    code = """
import sys
sys.modules["numpy"] = None
from triggers import DriftAlert
DriftAlert("/drift", verify="none")
try:
    from triggers import DriftMonitor
except Exception as error:
    print(error)
"""
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert "pip install 'eventflow-reactor[drift]'" in output
