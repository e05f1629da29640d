"""How often a monitor cries wolf, and how soon it sees one: measured with fixed seeds, printed,
held to what it states.
"""

import numpy as np
import pytest
from scipy import stats

from eventflow.testing import MemoryTrigger
from triggers import DriftMonitor, Numeric
from triggers._drift import arrays
from triggers._drift.config import Sample
from triggers._drift.engine import Engine

FEATURES, WINDOW, REFERENCES, PER_REFERENCE = 20, 1000, 100, 10
ALPHA = 0.01
NAMES = [f"f{number}" for number in range(FEATURES)]


def engine(rng: np.random.Generator, metric: str, confirm: int) -> Engine:
    """A monitor's whole inside, without a source, on a reference of 2,000 rows."""
    monitor = DriftMonitor(
        MemoryTrigger("rows"),
        features={name: Numeric(metric=metric) for name in NAMES},  # pyright: ignore
        reference={name: rng.normal(size=2000) for name in NAMES},
        window=WINDOW,
        alpha=ALPHA,
        confirm=confirm,
        cooldown=0,
    )
    return Engine(monitor._config, {}, 0)


def window(rng: np.random.Generator, shift: float = 0.0) -> Sample:
    """1,000 rows of 20 independent features; `shift` moves the first one."""
    rows = rng.normal(size=(WINDOW, FEATURES))
    rows[:, 0] += shift
    return Sample(rows.tolist(), 1)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("metric", ["psi", "ks"])
def test_d6_false_alarms_keep_to_the_stated_rate(metric: str, capsys: pytest.CaptureFixture[str]):
    """Of 1,000 undrifted windows of 20 features, those with a significant one are inside the 99.9 %
    bound of `alpha`.

    Significance alone is the hardest measure: the thresholds and `confirm` only make alarms rarer.
    """
    bound = int(stats.binom.ppf(0.999, REFERENCES * PER_REFERENCE, ALPHA))
    bare = alarms = 0
    for seed in range(REFERENCES):
        rng = np.random.default_rng(seed)
        found = engine(rng, metric, confirm=1)
        for _ in range(PER_REFERENCE):
            found.add_samples([window(rng)], 1)
            assert len(found.results) == FEATURES
            bare += any(arrays.holm([verdict.p_value for verdict in found.results], ALPHA))
            alarms += any(verdict.level for verdict in found.results)
    with capsys.disabled():
        print(
            f"\n{metric}: {bare} of {REFERENCES * PER_REFERENCE} undrifted windows x {FEATURES} "
            "features significant "
            f"(stated rate {ALPHA:.0%}, 99.9 % bound {bound}); {alarms} with the thresholds"
        )
    assert bare <= bound
    assert alarms <= bound


@pytest.mark.parametrize("metric", ["psi", "ks", "js", "wasserstein", "tv"])
def test_a_shift_of_half_a_sigma_is_found_in_time(metric: str, capsys: pytest.CaptureFixture[str]):
    """A shift of 0.5 sigma in one of 20 features is detected within `confirm` windows: 2,000 rows,
    in each of 20 seeds.
    """
    needed = list[int]()
    for seed in range(20):
        rng = np.random.default_rng(1000 + seed)
        found = engine(rng, metric, confirm=2)
        for _ in range(3):
            assert found.add_samples([window(rng)], 1) == []
        reported, rows = list[str](), 0
        while "f0" not in reported:
            reported += [
                str(each.drift.feature) for each in found.add_samples([window(rng, 0.5)], 1)
            ]
            rows += WINDOW
            assert rows <= 5 * WINDOW, "not found at all"
        needed.append(rows)
    with capsys.disabled():
        print(
            f"\n{metric}: 0.5 sigma found after at most {max(needed)} rows (stated: {2 * WINDOW}) "
            f"in {len(needed)} seeds"
        )
    assert max(needed) <= 2 * WINDOW


def test_a_streaming_detector_finds_half_a_sigma_sooner(capsys: pytest.CaptureFixture[str]):
    """ADWIN detects a shift of 0.5 sigma within 500 rows, in the middle of a window, and nothing in
    20,000 rows before.
    """
    needed = list[int]()
    for seed in range(10):
        rng = np.random.default_rng(2000 + seed)
        monitor = DriftMonitor(
            MemoryTrigger("rows"),
            features={"x": Numeric(metric="adwin")},
            reference={"x": rng.normal(size=2000)},
            window=10_000,
        )
        found = Engine(monitor._config, {}, 0)
        assert found.add_samples([Sample(rng.normal(size=(20_000, 1)).tolist(), 1)], 1) == []
        rows = 0
        while not found.add_samples([Sample(rng.normal(0.5, 1, size=(10, 1)).tolist(), 1)], 1):
            rows += 10
            assert rows <= 2000, "not found at all"
        needed.append(rows + 10)
    with capsys.disabled():
        print(
            f"\nadwin: 0.5 sigma found after {min(needed)} to {max(needed)} rows (stated: 500) in "
            f"{len(needed)} seeds"
        )
    assert max(needed) <= 500
