"""The soak, short enough for every change; and whether its verdicts would see anything grow."""

import shutil
from pathlib import Path
from random import Random

import pytest

from tests.soak.__main__ import Soak
from tests.soak.account import Account
from tests.soak.figures import FIGURES, Sample, judge

NAMES = [figure.name for figure in FIGURES]


@pytest.mark.timeout(400)
def test_nothing_grows_under_mixed_traffic(tmp_path: Path):
    """Under mixed traffic from every source nothing that the process holds grows, no event is lost,
    and none is handled twice.
    """
    soak = Soak(tmp_path, seconds=60)
    soak.run()
    assert soak.wrong == []
    assert soak.growing == [], soak.report()
    shutil.rmtree(tmp_path)


@pytest.mark.timeout(300)
def test_each_leak_is_found(tmp_path: Path):
    """A body that leaks what a figure measures makes the verdict on that figure fail."""
    soak = Soak(tmp_path, seconds=24, leak=NAMES)
    soak.run()
    assert soak.growing == NAMES, soak.report()
    shutil.rmtree(tmp_path)


def series(rise_per_second: float = 0.0, *, seconds: int = 300, noise: float = 0.0) -> list[Sample]:
    """A sample per second, in which each figure begins at 100."""
    draw = Random(1)
    return [
        Sample(at, dict.fromkeys(NAMES, 100 + rise_per_second * at + draw.gauss(0, noise)), {})
        for at in range(seconds)
    ]


def flat(samples: list[Sample], name: str) -> bool:
    (found,) = [each for each in judge(samples, warm_up=150) if each.figure.name == name]
    return found.flat


def test_a_verdict_ignores_noise_and_finds_a_slow_leak():
    """Noise and single outliers do not make a figure grow; one descriptor a minute, hidden in the
    noise, does.
    """
    noisy = series(noise=3)
    for at in (160, 200, 299):
        noisy[at] = Sample(at, dict.fromkeys(NAMES, 10_000.0), {})
    assert flat(noisy, "descriptors") and flat(noisy, "threads")
    assert not flat(series(1 / 60, noise=0.5), "descriptors")


def test_a_verdict_ignores_the_warm_up():
    """What a process takes at its start, and a fall, are no growth."""
    settled = [Sample(each.at, dict.fromkeys(NAMES, min(each.at, 140.0)), {}) for each in series()]
    assert all(each.flat for each in judge(settled, warm_up=150))
    assert all(each.flat for each in judge(series(-1.0), warm_up=150))


def test_a_verdict_needs_samples():
    """A soak that is too short to be judged says so, and passes nothing."""
    with pytest.raises(ValueError, match=r"expected 10 samples after 150 s, found 5"):
        judge(series(seconds=155), warm_up=150)


def test_the_account_finds_what_is_lost_or_doubled(tmp_path: Path):
    """A note that is missing, written twice, or of something that nobody sent is a finding, and so
    is a hole in a schedule.
    """
    account = Account()
    account.cancelled = 1
    for ident in ("a", "b", "c"):
        account.expect(ident, "order")
    own = "at 1\nlate l\ndrift d\nevery 1\nevery 2\ncron 2\ncron 4\n"
    effects = tmp_path / "effects"
    effects.write_text(f"order a\norder b\norder c\n{own}")
    assert account.compare(effects) == []
    account.expect("d", "order", "fail")
    effects.write_text(f"order a\norder b\norder b\norder d\nfail d\nclick e\n{own}{own}every 4\n")
    assert account.compare(effects) == [
        "order b: 2 times, expected 1",
        "order c: 0 times, expected 1",
        "nobody sent click e",
        *(f"{each}: 2 times, expected 1" for each in own.splitlines()),
        "0 notes of failed, expected 1",
        "schedule every: from 2 to 4, expected 1 s",
    ]
