"""Comparison of the times of two sides: noise, an interval, a test, a correction.

Samples of one process are not independent: the machine drifts, each process has its own offset, and a call may have
modes. So a run counts once, by the median of its samples. The spread between runs of equal code is estimated from:

- The runs of a side. If a side has one run, blocks of its samples in the order taken are used instead, because more
  samples do not average out the offset of a block.
- The other times of the comparison. If equal calls seem to become faster by more than runs and blocks explain, other
  calls will seem to become slower by as much. A change in one direction is judged by changes in the other direction, to
  which a slowdown adds nothing.
- Experience, if too few times are compared.

The variances are added. The degrees of freedom of the sum are those of Welch and Satterthwaite. If both sides have
enough runs for a rank test, the runs of a side show all of its noise, and that test has to agree.

Functions of arrays take any shape. The last axis has the times that are judged together.
"""

from collections.abc import Sequence
from itertools import count
from math import comb
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]
Runs = Sequence[Sequence[float]]
"""Samples of a time in seconds in the order taken, run by run."""

SIGNIFICANCE = 0.005
"""Probability of a false alarm among all times of a comparison, for one look at them. Unclear times are measured again
and looked at several times; all looks together may have 0.01."""

CONFIDENCE = 0.95
"""Confidence level of the interval of a ratio."""

BLOCKS = 5
"""Number of blocks of a run: fewer say little about their spread, and in shorter blocks samples are too similar."""

FEWEST_SAMPLES = 3
"""Fewest samples for an interval of a single run."""

BETWEEN_RUNS = {"cold": 0.01, "warm": 0.01, "graph": 0.01, "wall": 0.03, "eager": 0.03}
"""Spread of times of equal code between runs, by column. It is the standard deviation of their logarithms, in addition
to the spread that a side of one run shows."""

REPEATED = 0.003
"""The same, in addition to the spread that sides of several runs show."""

EXPERIENCE = 4
"""Weight of these two, as a number of times of the comparison."""


class Level(NamedTuple):
    """The times of a side, each from its runs."""

    value: Array
    """Logarithm of seconds, or of a ratio: the mean of the medians of the runs."""

    variance: Array
    """Variance of this mean, as shown by runs or blocks."""

    freedom: Array
    """Degrees of freedom of this variance."""

    runs: Array
    """Number of runs."""


NOTHING = Level(*map(np.array, (np.nan,) * 4))
"""Level of a time that a side does not have."""


class Changes(NamedTuple):
    """Logarithms of later times over earlier ones. Above 0, the call takes longer now."""

    value: Array
    low: Array
    high: Array
    """The interval of the change."""

    p: Array
    """Probability of a change this large in either direction, if nothing changed."""

    @classmethod
    def joined(cls, parts: Sequence["Changes"]) -> "Changes":
        return cls(*map(np.concatenate, zip(*parts, strict=True)))


def level(runs: Runs) -> Level:
    """A time of a side."""
    if not runs:
        return NOTHING
    middles = np.log([np.median(samples) for samples in runs])
    return of_runs(middles) if len(runs) > 1 else of_one_run(np.log(runs[0]))._replace(value=middles[0])


def of_runs(middles: Array) -> Level:
    """From the medians of several runs, which lie along the last axis."""
    runs = middles.shape[-1]
    return _level(middles.mean(-1), middles.var(-1, ddof=1) / runs, runs - 1, runs)


def of_one_run(logarithms: Array) -> Level:
    """From the samples of one run, which lie along the last axis. A single sample shows no spread."""
    middle, samples = np.median(logarithms, -1), logarithms.shape[-1]
    if samples == 1:
        return _level(middle, np.full_like(middle, BETWEEN_RUNS["wall"] ** 2), EXPERIENCE, 1)
    blocks = [np.median(block, -1) for block in np.array_split(logarithms, min(BLOCKS, samples), axis=-1)]
    return _level(middle, np.var(blocks, axis=0, ddof=1), len(blocks) - 1, 1)


def _level(value: Array, variance: Array, freedom: int, runs: int) -> Level:
    return Level(value, variance, np.full_like(value, freedom), np.full_like(value, runs))


def beside(own: Sequence[float], reference: Sequence[float]) -> list[float]:
    """A run in units of the reference's times in the same rounds, which removes a common drift."""
    rounds = min(len(own), len(reference))
    return [mine / theirs for mine, theirs in zip(own[:rounds], reference[:rounds], strict=True)]


def middle(runs: Runs) -> float:
    """The time of a side: the geometric mean of the medians of its runs."""
    return float(np.exp(level(runs).value))


def compared(times: Sequence[tuple[Runs, Runs]], column: str) -> Changes:
    """Times of a column that are judged together, before and after. A side without runs is NaN."""
    levels = [[level(runs) for runs in side] for side in zip(*times, strict=True)]
    before, after = (Level(*map(np.array, zip(*side, strict=True))) for side in levels)
    least_p = [_least_p(*pair, few=runs_that_confirm(len(times))) for pair in times]
    return changes(before, after, np.array(least_p), BETWEEN_RUNS[column])


def _least_p(before: Runs, after: Runs, few: int) -> float:
    """Largest p value of a change that counts, for any estimate of its noise."""
    if min(len(before), len(after)) >= few:
        return float(rank_test(*([np.median(samples) for samples in runs] for runs in (before, after))))
    return float(reaching(np.concatenate(before), np.concatenate(after))) if before and after else 1.0


def reaching(before: Array, after: Array) -> Array:
    """1 if a sample of either side, along the last axis, is nearer to the typical value of the other side. A call with
    two modes may look like this if each run is mostly in one mode. Else 0."""
    earlier, later = (np.median(each, -1, keepdims=True) for each in (before, after))
    half, way = np.sqrt(earlier * later), np.sign(later - earlier)
    apart = (way * (half - before) > 0).all(-1) & (way * (after - half) > 0).all(-1)
    return np.where(apart, 0.0, 1.0)


def rank_test(before: ArrayLike, after: ArrayLike) -> Array:
    """The p value of the exact Mann-Whitney test of the medians of runs, which lie along the last axis."""
    from scipy.stats import mannwhitneyu  # Imported here, because it takes long and tables of results do not need it.

    return np.asarray(mannwhitneyu(before, after, axis=-1, method="exact").pvalue)


def changes(before: Level, after: Level, least_p: Array, between_runs: float = BETWEEN_RUNS["wall"]) -> Changes:
    """Compare two sides, time by time, with the noise of each time and of the others. NaN is no time.

    Args:
        before: the old side.
        after: the new side.
        between_runs: spread between runs from experience.
        least_p: lower bound of p values for any estimate of the noise: that of the rank test if there are enough runs,
            else 1 for samples that are `reaching`.
    """
    value = np.round(after.value - before.value, 12)  # Rounding errors are removed.
    seen = before.variance + after.variance
    counted = 1 / before.runs + 1 / after.runs
    runs = np.minimum(before.runs, after.runs)
    beyond = np.maximum(0, value**2 - seen) / counted
    experience = np.where(runs == 1, between_runs, REPEATED) ** 2
    down, up = (_noise(beyond, way, experience) for way in (value <= 0, value >= 0))
    by_others_down = (value > 0) | ((value == 0) & (down[0] < up[0]))
    variance, freedom = (np.where(by_others_down, *each) for each in zip(down, up, strict=True))
    shown = runs >= runs_that_confirm(value.shape[-1])
    hidden = np.where(shown, REPEATED**2, variance) * counted
    parts = hidden**2 / freedom + before.variance**2 / before.freedom + after.variance**2 / after.freedom
    found = _tested(value, hidden + seen, (hidden + seen) ** 2 / parts)
    return found._replace(p=np.maximum(found.p, least_p))


def changes_in_turns(before: Sequence[float], after: Sequence[float]) -> Changes:
    """Changes between calls that alternated in one process: the ratios of their rounds, block by block."""
    return _by_blocks(np.log(beside(after, before)))


def intervals(several: Sequence[Sequence[float]]) -> Array:
    """The interval of the typical value of each series of samples, as a row of two.
    Fewer than three samples have an interval from 0 to infinity."""
    bounds = np.tile([0.0, np.inf], (len(several), 1))
    lengths = np.fromiter(map(len, several), dtype=int)
    for length in np.unique(lengths):
        if length >= FEWEST_SAMPLES:
            indices = np.flatnonzero(lengths == length).tolist()
            with np.errstate(all="ignore"):  # Logarithms warn if there is no time, and so no interval.
                found = _by_blocks(np.log([several[index] for index in indices]))
            bounds[indices] = np.exp(np.stack([found.low, found.high], axis=-1))
    return bounds


def _by_blocks(logarithms: Array) -> Changes:
    """Changes from samples of one run along the last axis. Blocks count as independent."""
    count = min(BLOCKS, logarithms.shape[-1])
    blocks = [np.median(block, -1) for block in np.array_split(logarithms, count, axis=-1)]
    level = of_runs(np.stack(blocks, axis=-1))
    return _tested(level.value, level.variance + REPEATED**2 / count, level.freedom)


def _tested(value: Array, variance: Array, freedom: Array) -> Changes:
    """By Student's distribution."""
    from scipy.special import stdtr, stdtrit  # Imported here, because it takes long and a run starts without it.

    error = np.sqrt(variance)
    reach = stdtrit(freedom, (1 + CONFIDENCE) / 2) * error
    return Changes(value, value - reach, value + reach, 2 * stdtr(freedom, -np.abs(value) / error))


def _noise(beyond: Array, way: Array, experience: Array) -> tuple[Array, Array]:
    """Variance between runs, from times that changed in one direction and from experience, and its degrees of
    freedom."""
    times = way.sum(-1, keepdims=True) + EXPERIENCE
    total = np.where(way, beyond, 0).sum(-1, keepdims=True)
    return (EXPERIENCE * experience + total) / times, np.broadcast_to(times, beyond.shape)


def narrower(alone: Changes, relative: Changes) -> tuple[Changes, Changes]:
    """The more certain of two changes, alone and relative to the reference, and the other one."""
    better = relative.high - relative.low < alone.high - alone.low
    both = list(zip(relative, alone, strict=True))
    return tuple(Changes(*(np.where(where, *pair) for pair in both)) for where in (better, ~better))  # type: ignore[return-value]


def holm(p: Array) -> Array:
    """The p values of several tests, corrected for their number. A value is then the probability of any false alarm
    among all tests. The smallest is multiplied by the number, the next by one less, and none is below the one
    before (Holm 1979)."""
    order = np.argsort(p, axis=-1)
    remaining = np.arange(p.shape[-1], 0, -1)
    corrected = np.maximum.accumulate(np.take_along_axis(p, order, -1) * remaining, axis=-1)
    return np.take_along_axis(np.minimum(corrected, 1), np.argsort(order, axis=-1), -1)


def judge(change: Changes, p: Array, bound: ArrayLike, other: Changes | None = None) -> Array:
    """Meaning of each change: 1 worse, -1 better, 0 the same, NaN unclear.

    A change is worse or better if the test is significant and the whole interval is beyond the bound. It is the same if
    the whole interval is within the bound. Otherwise it is unclear, and more runs may decide. The change alone and the
    change relative to the reference have to agree: if the other one contradicts, the other one decides.

    Args:
        change: the changes.
        p: their p values, corrected for the number of tests.
        bound: the smallest change that counts, as a logarithm.
        other: the same changes alone, or relative to the reference. NaN, or None for all, without a reference.
    """
    bound, other = np.asarray(bound), other or Changes(*NOTHING)
    within = (-bound <= change.low) & (change.high <= bound)
    certain = p < SIGNIFICANCE
    worse, better = certain & (change.low > bound), certain & (change.high < -bound)
    contradicted = (worse & (other.value <= bound)) | (better & (other.value >= -bound))
    excused = contradicted & (-bound <= other.low) & (other.high <= bound)
    meaning = np.where(within | excused, 0.0, np.nan)
    return np.where(worse & ~contradicted, 1.0, np.where(better & ~contradicted, -1.0, meaning))


def runs_that_confirm(times: int) -> int:
    """Number of runs that each side needs before a worse time is reported, if more can be measured.

    With so many runs, a rank test, which is valid for any noise, finds a change among this number of times if the sides
    do not overlap. The runs then show all of the noise.
    """
    return next(runs for runs in count(1) if 2 * times <= SIGNIFICANCE * comb(2 * runs, runs))
