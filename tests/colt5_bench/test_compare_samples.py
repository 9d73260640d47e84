"""The statistics of times: what they find, how rarely they are wrong, and laws that hold for any samples."""

from math import comb, log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap

from colt5_bench.compare.samples import CONFIDENCE, SIGNIFICANCE, Change, change, holm, judge
from colt5_bench.timing import median_interval

SECONDS = st.floats(1e-7, 1e2)
SAMPLES = st.lists(SECONDS, min_size=1, max_size=25)
OPPOSITE = {"worse": "better", "better": "worse", "same": "same", "unclear": "unclear"}


def verdict(before, after, threshold=0.05, over=None):
    found = change(before, after, over)
    return judge(found, found.p, threshold)


def noisy(generator, count, seconds=1e-3, spread=0.01):
    return list(seconds * generator.lognormal(0, spread, count))


@settings(max_examples=30)
@given(SAMPLES)
def test_samples_are_never_worse_than_themselves(samples):
    found = change(samples, samples)
    assert found.ratio == 1
    assert found.low <= 1 <= found.high
    assert verdict(samples, samples) in ("same", "unclear")


@settings(max_examples=30)
@given(SAMPLES, SAMPLES, st.floats(0, 1), st.tuples(SAMPLES, SAMPLES) | st.none())
def test_what_is_worse_one_way_round_is_better_the_other(before, after, threshold, over):
    there, back = verdict(before, after, threshold, over), verdict(after, before, threshold, over and over[::-1])
    assert there == OPPOSITE[back]


@settings(max_examples=30)
@given(SAMPLES, SAMPLES, st.sampled_from([2.0**power for power in (-10, -1, 1, 10)]))
def test_the_unit_of_time_does_not_matter(before, after, factor):
    """Nor does the speed of a machine, in units of the reference: all of its samples scale."""
    scaled = [factor * sample for sample in after]
    over = change(before, scaled, ([1.0], [factor]))
    assert over.ratio == pytest.approx(change(before, after).ratio, rel=1e-9)


@settings(max_examples=30)
@given(SAMPLES, SAMPLES)
def test_the_ratio_lies_in_its_interval(before, after):
    found = change(before, after)
    assert found.low <= found.ratio * (1 + 1e-9)
    assert found.ratio <= found.high * (1 + 1e-9)


@pytest.mark.parametrize("count", [9, 10, 41])
def test_the_interval_is_that_of_a_bootstrap(count):
    """Of scipy, which draws the resamples one by one."""
    generator = np.random.default_rng(count)
    samples = noisy(generator, count, spread=0.2)
    found = change([1e-3], samples)
    drawn = bootstrap(
        (np.log(samples),),
        np.median,
        n_resamples=9999,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=generator,
    ).confidence_interval
    width = drawn.high - drawn.low
    assert log(found.low) == pytest.approx(drawn.low - log(1e-3), abs=0.1 * width)
    assert log(found.high) == pytest.approx(drawn.high - log(1e-3), abs=0.1 * width)


def test_a_tenth_slower_is_found_and_nothing_in_equal_calls():
    """Of 200 pairs with ten samples each, which is the fewest that a run takes, as many tests corrected for."""
    generator = np.random.default_rng(0)
    pairs = [(noisy(generator, 10), noisy(generator, 10)) for _ in range(199)]
    slower = noisy(generator, 10), noisy(generator, 10, seconds=1.1e-3)
    changes = [change(*pair) for pair in (*pairs, slower)]
    verdicts = [judge(found, p, 0.05) for found, p in zip(changes, holm([found.p for found in changes]), strict=True)]
    assert verdicts[-1] == "worse"
    assert set(verdicts[:-1]) == {"same"}


def test_equal_calls_are_hardly_ever_called_different():
    """At a threshold of 0 the test alone decides: of 200 comparisons some 2 may be wrong, each at 1 %."""
    generator = np.random.default_rng(1)
    wrong = sum(verdict(noisy(generator, 30), noisy(generator, 30), 0.0) in ("worse", "better") for _ in range(200))
    # More than 8 of 200 at 1 % each are a matter of less than one in a thousand.
    at_most = sum(comb(200, k) * SIGNIFICANCE**k * (1 - SIGNIFICANCE) ** (200 - k) for k in range(9))
    assert 1 - at_most < 1e-3
    assert wrong <= 8


def test_the_interval_covers_the_true_ratio():
    """95 % of the time; of 300 intervals fewer than 90 % are a matter of less than one in a thousand."""
    generator = np.random.default_rng(2)
    covered = 0
    for _ in range(300):
        found = change(noisy(generator, 31, spread=0.1), noisy(generator, 31, seconds=1.2e-3, spread=0.1))
        covered += found.low <= 1.2 <= found.high
    assert covered >= 270


def test_few_or_noisy_samples_are_unclear():
    assert verdict([1.0] * 3, [2.0] * 3) == "unclear"
    generator = np.random.default_rng(3)
    assert verdict(noisy(generator, 10, spread=0.3), noisy(generator, 10, spread=0.3)) == "unclear"


def test_a_change_below_the_threshold_is_the_same_however_certain():
    assert verdict([1.0] * 100, [1.04] * 100) == "same"
    assert verdict([1.0] * 100, [1.06] * 100) == "worse"


def test_a_reference_that_is_slower_too_excuses():
    """As on a machine of half the speed; the reference alone may not slow down unnoticed."""
    ours, theirs = [1.0] * 20, [5.0] * 20
    twice, as_before = [2.0] * 20, [10.0] * 20
    assert verdict(ours, twice, over=(theirs, as_before)) == "same"
    assert verdict(ours, twice, over=(theirs, theirs)) == "worse"


@given(st.lists(st.floats(0, 1), max_size=30))
def test_holm(values):
    corrected = holm(values)
    assert all(p <= q <= 1 for p, q in zip(values, corrected, strict=True))
    # Where a plain correction by the number of tests finds something, this does.
    assert all(q <= min(1, len(values) * p) for p, q in zip(values, corrected, strict=True))
    order = sorted(range(len(values)), key=values.__getitem__)
    assert [corrected[i] for i in order] == sorted(corrected)


def test_holm_by_hand():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([]) == []


def test_a_long_tail_moves_no_median():
    """One sample in ten that another program delayed."""
    assert verdict([1.0] * 30, [1.0] * 27 + [50.0] * 3) == "same"
    assert median_interval([1.0] * 27 + [50.0] * 3) == (1.0, 1.0)


def test_a_change_that_the_test_does_not_confirm_is_unclear():
    assert judge(Change(2.0, 1.9, 2.1, 0.5), 0.5, 0.05) == "unclear"
