"""The statistics that use numpy and scipy, with types: the one module that imports them.

`import scipy.stats` takes about a second, and only the p-value of Kolmogorov-Smirnov needs it:
`ks_p_value` imports it at its first call, and `warm_up` beforehand, outside of any event loop.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingImports=false

from collections.abc import Sequence
from typing import Any, TypeAlias

from eventflow.core.errors import MissingExtra

try:
    import numpy as np
    from scipy import special
except ImportError as error:
    raise MissingExtra("triggers.DriftMonitor", "scipy", "drift") from error

Array: TypeAlias = Any
"""A one-dimensional array of floats."""


def floats(values: Sequence[float] | Array) -> Array:
    return np.asarray(values, dtype=float)


def edges_of(values: Array, bins: int) -> list[float]:
    """Inner edges at the quantiles of finite values; equal ones merged, so that there may be fewer
    than `bins` bins.
    """
    finite = values[np.isfinite(values)]
    if not len(finite):
        return []
    quantiles = np.quantile(finite, np.linspace(0, 1, bins + 1)[1:-1])
    return [float(edge) for edge in np.unique(quantiles)]


def bin_counts(values: Array, edges: Sequence[float]) -> list[int]:
    """How many values are in each bin: below the first edge, from each edge to the next, from the
    last on. No NaN, please.
    """
    positions = np.searchsorted(floats(edges), values, side="right")
    return [int(count) for count in np.bincount(positions, minlength=len(edges) + 1)]


def mean_and_deviation(values: Array) -> tuple[float, float]:
    """Mean and standard deviation of finite values; a deviation of 0 becomes 1, so that it can be
    divided by.
    """
    finite = values[np.isfinite(values)]
    if not len(finite):
        return 0.0, 1.0
    return float(finite.mean()), float(finite.std()) or 1.0


def thinned(values: Array, limit: int) -> list[float]:
    """At most `limit` of them, drawn without order and the same each time."""
    if len(values) <= limit:
        return [float(value) for value in values]
    kept = np.random.default_rng(0).choice(len(values), size=limit, replace=False)
    return [float(value) for value in values[kept]]


# --------------------------------------------------------------------------- statistics of
# histograms


def shares(counts: Sequence[float], pseudo: float = 0.5) -> Array:
    """Counts as shares, with a pseudo-count in each bin: an empty one then weighs little, where a
    clamp would rule the sum.
    """
    found = floats(counts) + pseudo
    return found / found.sum()


def psi(reference: Array, current: Array) -> float:
    """Population stability index of two lists of shares: Σ (c − r) ln(c / r)."""
    return float(np.sum((current - reference) * np.log(current / reference)))


def js(reference: Array, current: Array) -> float:
    """Jensen-Shannon distance, base 2: the root of the divergence, from 0 to 1, as scipy's
    `jensenshannon(base=2)`.
    """
    middle = (reference + current) / 2
    bits = special.rel_entr(reference, middle).sum() + special.rel_entr(current, middle).sum()
    return float(np.sqrt(max(bits, 0.0) / 2 / np.log(2)))


def tv(reference: Array, current: Array) -> float:
    """Total variation: half the sum of the absolute differences, from 0 to 1."""
    return float(np.abs(reference - current).sum() / 2)


def homogeneity(reference: Sequence[int], current: Sequence[int]) -> tuple[float, float]:
    """Pearson's χ² of two rows of counts and its p-value, as scipy's
    `chi2_contingency(correction=False)`.

    Bins in which fewer than ten samples are together are taken for one: the test's p-value needs
    that many.
    """
    table = np.array([reference, current], dtype=float)
    total = table.sum(axis=0)
    rare = total < 10
    kept = table[:, ~rare]
    if total[rare].sum() > 0:
        kept = np.column_stack([kept, table[:, rare].sum(axis=1)])
    sides = kept.sum(axis=1)
    if kept.shape[1] < 2 or not sides.all():
        return 0.0, 1.0
    expected = np.outer(sides, kept.sum(axis=0)) / kept.sum()
    chi2 = float(((kept - expected) ** 2 / expected).sum())
    return chi2, float(special.chdtrc(kept.shape[1] - 1, chi2))


# --------------------------------------------------------------------------- statistics of samples


def ks(reference: Array, current: Array) -> float:
    """The two-sample Kolmogorov-Smirnov statistic: the largest distance of the two empirical
    distributions.
    """
    one = np.sort(reference)
    other = np.sort(current)
    both = np.concatenate([one, other])
    return float(np.abs(_below(one, both) - _below(other, both)).max())


def wasserstein(reference: Array, current: Array) -> float:
    """The first Wasserstein distance: the area between the two empirical distributions."""
    one = np.sort(reference)
    other = np.sort(current)
    both = np.sort(np.concatenate([one, other]))
    return float((np.abs(_below(one, both[:-1]) - _below(other, both[:-1])) * np.diff(both)).sum())


def _below(values: Array, at: Array) -> Array:
    return np.searchsorted(values, at, side="right") / len(values)


def ks_p_value(statistic: float, reference: int, current: int) -> float:
    """As scipy's `ks_2samp(method="asymp")`."""
    effective = reference * current / (reference + current)
    return float(warm_up().kstwo.sf(statistic, np.round(effective)))


def warm_up() -> Any:
    from scipy import stats

    return stats


def holm(p_values: Sequence[float], alpha: float) -> list[bool]:
    """Which of several tests are significant together: the chance of any false one stays at `alpha`
    (Holm 1979).
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    found = [False] * len(p_values)
    for rank, index in enumerate(order):
        if p_values[index] > alpha / (len(p_values) - rank):
            break
        found[index] = True
    return found
