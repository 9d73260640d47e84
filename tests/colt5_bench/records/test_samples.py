"""The statistics of times: detections, error rates, and properties that hold for any samples."""

from dataclasses import replace
from math import comb
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu, ttest_ind

from colt5_bench.compare import simulation
from colt5_bench.compare.findings import verdict_on
from colt5_bench.records.samples import (
    SIGNIFICANCE,
    Changes,
    beside,
    changes,
    changes_in_turns,
    compared,
    holm,
    judge,
    middle,
    narrower,
    of_runs,
    rank_test,
    runs_that_confirm,
)

DOCS = Path(__file__).parents[3] / "docs" / "measuring.md"

SECONDS = st.floats(1e-7, 1e2)
SAMPLES = st.lists(SECONDS, min_size=1, max_size=25)
RUNS = st.lists(SAMPLES, min_size=1, max_size=4)
COLUMNS = st.sampled_from(["cold", "warm", "graph", "wall", "eager"])
OPPOSITE = {"worse": "better", "better": "worse", "same": "same", "unclear": "unclear"}


def verdicts(times, threshold=0.05, column="wall", relative=None):
    """Verdicts on pairs of runs that are judged together, and in units of the reference if there are any."""
    alone = compared(times, column)
    found, other = narrower(alone, compared(relative or [((), ())] * len(times), column))
    return [verdict_on(meaning) for meaning in judge(found, holm(found.p), np.log1p(threshold), other)]


@settings(max_examples=30)
@given(RUNS, COLUMNS)
def test_runs_are_never_worse_than_themselves(runs, column):
    found = compared([(runs, runs)], column)
    assert found.value == 0
    assert found.low <= 0 <= found.high
    assert verdicts([(runs, runs)])[0] in ("same", "unclear")


@settings(max_examples=30)
@given(st.lists(st.tuples(RUNS, RUNS), min_size=1, max_size=6), st.floats(0, 1), COLUMNS)
def test_what_is_worse_one_way_round_is_better_the_other(times, threshold, column):
    back = [pair[::-1] for pair in times]
    there = [OPPOSITE[each] for each in verdicts(times, threshold, column)]
    assert there == verdicts(back, threshold, column)


@settings(max_examples=30)
@given(RUNS, RUNS, st.sampled_from([2.0**power for power in (-10, -1, 1, 10)]))
def test_the_unit_of_time_does_not_matter(before, after, factor):
    scaled = [[[factor * sample for sample in run] for run in side] for side in (before, after)]
    there, here = (compared([pair], "wall") for pair in (scaled, (before, after)))
    assert np.ravel(there) == pytest.approx(np.ravel(here), rel=1e-6, abs=1e-9)


@settings(max_examples=30)
@given(st.lists(st.tuples(RUNS, RUNS), min_size=1, max_size=6))
def test_the_change_is_that_of_the_middles_and_lies_in_its_interval(times):
    found = compared(times, "wall")
    for index, (before, after) in enumerate(times):
        assert np.exp(found.value[index]) == pytest.approx(middle(after) / middle(before), rel=1e-9)
        assert found.low[index] <= found.value[index] <= found.high[index]


@settings(max_examples=30)
@given(st.lists(st.tuples(RUNS, RUNS), min_size=1, max_size=4), st.integers(0, 3), SECONDS)
def test_a_slowdown_makes_no_other_time_faster_or_slower(times, number, longer):
    """Changes of other times are noise for a time, but one slowdown is not noise for another: none hides another."""
    number %= len(times)
    before, after = times[number]
    slower = [[sample * (1 + longer) for sample in run] for run in after]
    changed = [*times[:number], (before, slower), *times[number + 1 :]]
    found, then = compared(times, "wall"), compared(changed, "wall")
    if found.value[number] > 0:
        rising = [each for each in range(len(times)) if each != number and found.value[each] > 0]
        assert then.p[rising] == pytest.approx(found.p[rising])


@pytest.mark.parametrize("count", [9, 10, 15])
def test_many_runs_are_judged_by_their_medians_alone(count):
    """By Welch's test, with noise that never decreases, and by the rank test, both compared with scipy."""
    generator = np.random.default_rng(count)
    logarithms = generator.normal([[0], [0.04]], 0.03, (2, count))
    pair = [[[value] * 7 for value in np.exp(side)] for side in logarithms]
    found = compared([pair], "wall")
    welch = ttest_ind(*logarithms, equal_var=False)
    interval = welch.confidence_interval(0.95)
    assert found.low == pytest.approx(-interval.high, rel=0.05)
    assert found.high == pytest.approx(-interval.low, rel=0.05)
    assert found.p == pytest.approx(max(welch.pvalue, mannwhitneyu(*logarithms, method="exact").pvalue), rel=0.1)


@pytest.mark.parametrize("times", [1, 10, 77, 1000, 20_000])
def test_so_many_runs_confirm_that_the_rank_test_has_power(times):
    runs = runs_that_confirm(times)
    apart = float(rank_test(np.arange(runs), np.arange(runs) + runs))
    assert apart * times <= SIGNIFICANCE
    fewer = float(rank_test(np.arange(runs - 1), np.arange(runs - 1) + runs))
    assert fewer * times > SIGNIFICANCE


def test_equal_calls_are_hardly_ever_called_different():
    """At a threshold of 0 only the tests decide: of 300 times, each in 9 runs per side, 3 may be wrong at 1 %."""
    level = 0.01
    generator = np.random.default_rng(1)
    sides = generator.normal(0, 0.03, (2, 300, 1, 9))
    found = changes(*map(of_runs, sides), rank_test(*sides))
    wrong = int((found.p < level).sum())
    # More than 10 of 300 at 1 % each have a probability of less than one in a thousand.
    at_most = sum(comb(300, k) * level**k * (1 - level) ** (300 - k) for k in range(11))
    assert 1 - at_most < 1e-3
    assert wrong <= 10


def test_a_change_below_the_threshold_is_the_same_however_certain():
    quiet = [[[1.0] * 100] * 12] * 3
    assert verdicts([(quiet[0], [[1.04] * 100] * 12)]) == ["same"]
    assert verdicts([(quiet[0], [[1.06] * 100] * 12)]) == ["worse"]


def test_another_mode_within_a_run_is_unclear():
    """A single long sample shows that the call sometimes takes as long; a long tail alone changes nothing."""
    before, after = [[1.0] * 99 + [3.0]], [[3.0] * 100]
    assert verdicts([(before, after)]) == ["unclear"]
    assert verdicts([([[1.0] * 100], after)]) == ["worse"]
    assert verdicts([([[1.0] * 100], [[1.0] * 99 + [50.0]])], column="cold") == ["same"]


def test_a_reference_that_is_slower_too_excuses():
    quiet = [[1.0] * 20] * 12
    twice = [[2.0] * 20] * 12
    assert verdicts([(quiet, twice)], relative=[(quiet, quiet)]) == ["same"]
    assert verdicts([(quiet, twice)], relative=[(quiet, twice)]) == ["worse"]
    # Only the reference became faster.
    assert verdicts([(quiet, quiet)], relative=[(quiet, twice)]) == ["same"]


@given(SAMPLES, SAMPLES)
def test_rounds_beside_the_reference_are_those_that_both_were_in(own, reference):
    ratios = beside(own, reference)
    assert len(ratios) == min(len(own), len(reference))
    assert [ratio * theirs for ratio, theirs in zip(ratios, reference, strict=False)] == pytest.approx(
        own[: len(ratios)]
    )


@pytest.mark.parametrize("count", [3, 4, 5, 40])
def test_calls_in_turns_share_their_drift(count):
    drift = np.linspace(1, 5, count)
    found = changes_in_turns(drift, 1.1 * drift)
    assert judge(found, found.p, np.log1p(0.05)) == 1


@given(st.lists(st.floats(0, 1), max_size=30))
def test_holm(values):
    corrected = holm(np.array(values)).tolist()
    assert all(p <= q <= 1 for p, q in zip(values, corrected, strict=True))
    # It finds whatever a plain correction by the number of tests finds.
    assert all(q <= min(1, len(values) * p) for p, q in zip(values, corrected, strict=True))
    order = sorted(range(len(values)), key=values.__getitem__)
    assert [corrected[i] for i in order] == sorted(corrected)


def test_holm_by_hand():
    assert holm(np.array([0.04, 0.01, 0.03])).tolist() == pytest.approx([0.06, 0.03, 0.06])


def test_a_change_that_the_test_does_not_confirm_is_unclear():
    assert np.isnan(judge(Changes(*np.array([0.7, 0.6, 0.8, 0.5])), np.array(0.5), 0.05))


@pytest.fixture(scope="module")
def simulated():
    return list(simulation.simulate(100, (3, 30), seed=1))


class TestSimulated:
    def test_false_alarms_are_rare_under_every_noise(self, simulated):
        """The aim is at most 1 in 100: more than 5 of 100 at that rate have a probability of one in a thousand."""
        assert len(simulated) == 2 * len(simulation.MODELS)
        for row in simulated:
            assert max(row.in_turns.false_alarms, row.saved.false_alarms) <= 5, row

    def test_a_tenth_is_found_in_turns_or_said_to_be_undecidable(self, simulated):
        """The aim is 95 of 100 if runs differ by 3 % or less: fewer than 88 have a probability of two in a thousand."""
        for row in simulated:
            _, tenth, quarter = row.in_turns.found
            if "modes" not in row.model:
                assert tenth >= 0.88, row
                assert quarter >= 0.95, row
            for outcome in (row.in_turns, row.saved):
                assert outcome.missed[1:] == (0, 0), row

    def test_the_table_has_a_line_for_each(self, simulated):
        lines = simulation.markdown(simulated, 100).splitlines()
        assert len(lines) == 2 + len(simulated)
        assert len({line.count("|") for line in lines}) == 1

    def test_a_seed_gives_the_same(self):
        once, again = (list(simulation.simulate(5, (3,), seed=3)) for _ in range(2))
        assert once == again

    @pytest.mark.parametrize("change", [{"false_alarms": 4}, {"found": (0, 0.94, 1)}, {"missed": (0, 0.06, 0)}])
    @pytest.mark.parametrize("between_runs", [0.03, 0.04])
    def test_the_aim_is_missed_by_as_little(self, change, between_runs):
        """If runs differ by more than 3 %, a slowdown that is not found may be unclear."""
        good = simulation.Outcome(3, (0, 0.95, 1), (0, 0.05, 0))
        assert simulation.meets_aim(simulation.Row("", 3, between_runs, good, replace(good, found=(0, 0, 0))))
        row = simulation.Row("", 3, between_runs, replace(good, **change), good)
        assert simulation.meets_aim(row) == ("found" in change and between_runs > 0.03)
        assert f"| {'yes' if simulation.meets_aim(row) else 'no'} |" in simulation.markdown([row])


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "samples", [pytest.param(each, marks=[pytest.mark.slow] * (each > 3)) for each in simulation.SAMPLES]
)
def test_the_table_of_the_docs_is_what_the_command_prints(samples):
    """The headings and the rows for this number of samples; the text says that every row meets the aim."""
    rows = list(simulation.simulate(samples=(samples,)))
    printed = simulation.markdown(rows).splitlines()
    wanted = (*printed[:2], *(f"| {row.model} | {row.samples} |" for row in rows))
    assert [line for line in DOCS.read_text().splitlines() if line.startswith(wanted)] == printed
    assert all(map(simulation.meets_aim, rows))


def test_the_table_of_the_docs_has_every_row():
    rows = [line for line in DOCS.read_text().splitlines() if line.endswith("| yes |")]
    assert [row.split(" | ")[:2] for row in rows] == [
        [f"| {model}", str(samples)] for model in simulation.MODELS for samples in simulation.SAMPLES
    ]
