"""Whether samples of two runs are of calls that take equally long: a rank test, an interval, a correction."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, log1p

import numpy as np
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu

from colt5_bench.compare.findings import Verdict

SIGNIFICANCE = 0.01
"""How probable one false alarm may be, of all times of a comparison together."""

CONFIDENCE, RESAMPLES = 0.95, 4000
"""Of the interval of a ratio, and how often medians are drawn for it."""

FEW_SAMPLES = 20
"""Up to which the test is exact."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Change:
    """Later samples over earlier ones."""

    ratio: float
    """Of the medians; above 1 it takes longer now."""

    low: float
    high: float
    """The bootstrap interval of the ratio."""

    p: float
    """Of the Mann-Whitney test: how probable ranks this far apart are, if nothing changed."""


def change(
    before: Sequence[float],
    after: Sequence[float],
    over: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Change:
    """Compare samples in seconds, of any number from 1.

    Args:
        before: earlier samples, all positive.
        after: later samples.
        over: samples of the reference beside the earlier and beside the later ones, in units of whose median times are
            then: as on machines of different speed.
    """
    if _key(after, over and over[1]) < _key(before, over and over[0]):
        # Drawn the same way round whichever comes first: what is worse in one order is better in the other.
        swapped = change(after, before, over and (over[1], over[0]))
        return Change(1 / swapped.ratio, 1 / swapped.high, 1 / swapped.low, swapped.p)
    earlier, later = (np.log(np.asarray(samples, dtype=np.float64)) for samples in (before, after))
    generator = np.random.default_rng(0)
    logarithms = _medians(later, generator) - _medians(earlier, generator)
    if over:
        of_earlier, of_later = (np.log(np.asarray(samples, dtype=np.float64)) for samples in over)
        logarithms += _medians(of_earlier, generator) - _medians(of_later, generator)
        earlier, later = earlier - np.median(of_earlier), later - np.median(of_later)
    few = min(len(before), len(after)) <= FEW_SAMPLES
    low, high = np.quantile(logarithms, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Change(
        ratio=exp(np.median(later) - np.median(earlier)),
        low=exp(low),
        high=exp(high),
        # The normal distribution finds nothing in few samples that survives the correction, the exact one takes long
        # for many.
        p=float(mannwhitneyu(earlier, later, method="exact" if few else "asymptotic").pvalue),
    )


def holm(values: Sequence[float]) -> list[float]:
    """The p values of tests that are made together, corrected so that one false alarm of all is as probable as each
    says: the smallest times their number, the next times one less, and none smaller than the one before (Holm 1979)."""
    corrected, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = largest
    return corrected


def judge(found: Change, p: float, threshold: float) -> Verdict:
    """What a change means.

    It is worse or better if the test says that something changed, and the whole interval that it changed by more than
    the threshold; it is the same if the whole interval lies within. All else is unclear, and more samples may tell.

    Args:
        found: the change.
        p: its p value, corrected for the number of tests.
        threshold: the relative change that counts: 0.05 for a time of 1.05, and for one over 1.05.
    """
    bound, low, high = log1p(threshold), log(found.low), log(found.high)
    if p < SIGNIFICANCE and low > bound:
        return "worse"
    if p < SIGNIFICANCE and high < -bound:
        return "better"
    return "same" if -bound <= low and high <= bound else "unclear"


def _key(samples: Sequence[float], of_reference: Sequence[float] | None) -> tuple[list[float], list[float]]:
    return sorted(samples), sorted(of_reference or ())


def _medians(samples: Array, generator: np.random.Generator) -> Array:
    """Medians of resamples with replacement.

    A resample picks by uniform numbers, so its middle is where the middle of so many uniform numbers lies: the k-th
    smallest of n has a beta distribution, and the next one is the smallest of those that are left.
    """
    ordered, count = np.sort(samples), len(samples)
    lower = (count - 1) // 2
    middle = generator.beta(lower + 1, count - lower, RESAMPLES)
    medians = ordered[np.minimum(middle * count, count - 1).astype(int)]
    if count % 2:
        return medians
    upper = middle + (1 - middle) * generator.beta(1, count - lower - 1, RESAMPLES)
    return (medians + ordered[np.minimum(upper * count, count - 1).astype(int)]) / 2
