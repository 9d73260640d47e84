"""Tests of figures over repeats."""

from io import StringIO
from math import inf, nan
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy.stats import ttest_1samp

from colt5_bench.records.repeats import Estimate, equal_seconds, repeats
from colt5_bench.records.results import Record
from colt5_bench.report.curves import curves
from colt5_bench.report.plots import write_plots
from colt5_bench.report.table import summary

numbers = st.lists(st.floats(-100, 100), min_size=2, max_size=8).filter(lambda values: len({*values}) > 1)


def record(implementation, seed, bits, seconds=(1.0, 2.0), n=64):
    return Record(
        *("quality", f"n={n},seed={seed}", {"n": n, "seed": seed}, implementation, "training", "cpu", "ok"),
        metrics={"bits": bits},
        curves={"seconds": list(seconds), "validation_bits": [bits + 1, bits]},
    )


@given(numbers)
def test_intervals_are_those_of_the_t_distribution(values):
    estimate = Estimate.of(values)
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    assert estimate.mean == pytest.approx(fmean(values))
    assert (estimate.mean - estimate.reach, estimate.mean + estimate.reach) == pytest.approx((low, high), abs=1e-9)
    assert estimate.is_zero == (ttest_1samp(values, 0).pvalue >= 0.05)


def test_of_one_run_no_interval_is_known():
    assert Estimate.of([2.0]) == Estimate(2.0, inf)


@pytest.mark.parametrize("missing", [False, True])
def test_differences_are_taken_seed_by_seed(missing):
    light = [record("light", seed, bits) for seed, bits in ((1, 1.0), (2, 5.0), (3, 9.0))]
    ours = [record("zero", seed, bits) for seed, bits in ((3, 8.9), (1, 0.91), (2, 4.9))]
    ((reference, own),) = repeats([*light, *ours[missing:]])
    found = own.difference(reference, "bits")
    assert found.mean == pytest.approx(-0.095 if missing else -0.0967, abs=1e-3)
    assert not own.of("bits").is_zero or own.of("bits").reach > 4
    assert found.reach < 0.1


def test_cases_are_apart():
    groups = repeats([record("light", seed, 1.0, n=n) for n in (64, 128) for seed in (1, 2)])
    assert [len(each.records) for group in groups for each in group] == [2, 2]


def test_curves_are_compared_where_all_had_the_time():
    (group,) = repeats([record("light", 1, 1.0, (0.5, 1.5)), record("zero", 1, 1.0, (1.0, 2.0))])
    assert equal_seconds(group) == 1.5
    assert [each.at(1.5, "validation_bits").mean for each in group] == [1.0, 1.5]
    assert group[1].at(0.9, "validation_bits") is None


def printed(records):
    console = Console(file=StringIO(), width=200)
    summary(records, "light", console)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("others", "said"),
    [([1.01, 1.99], "none"), ([1.5, 2.51], "+0.505"), ([nan, nan], "nan"), ([1.5], "+0.500±?")],
)
def test_a_difference_inside_its_interval_is_called_none(others, said):
    records = [record("light", seed, float(seed)) for seed in (1, 2)]
    records += [record("zero", seed, bits) for seed, bits in enumerate(others, start=1)]
    (row,) = [line for line in printed(records).splitlines() if line.split()[:1] == ["zero"]]
    assert said in row


def test_a_run_that_failed_is_counted():
    failed = record("zero", 2, 1.0)
    failed.status, failed.reason, failed.metrics, failed.curves = "error", "the loss is nan at step 3", {}, {}
    text = printed([record("light", 1, 1.0), record("zero", 1, 1.0), failed])
    assert "1 of 2" in text
    assert "the loss is nan at step 3" in text


def test_curves_are_means_over_seeds_with_a_panel_for_each_case(tmp_path):
    runs = [("light", 1.0), ("zero", 0.5)]
    sizes = (64, 128, 256, 512)
    records = [record(name, seed, bits * seed, n=n) for n in sizes for name, bits in runs for seed in (1, 2)]
    figure = curves(records)
    lines = [line for ax in figure.axes if ax.get_visible() for line in ax.get_lines()]
    assert [line.get_label() for line in lines] == ["light", "zero"] * 4
    for line, (_, bits) in zip(lines, runs * 4, strict=True):
        assert list(line.get_xdata()) == [1.0, 2.0]
        assert list(line.get_ydata()) == [1.5 * bits + 1, 1.5 * bits]
    assert {path.name for path in write_plots(records, tmp_path)} >= {"curves.png", "curves.svg"}


def test_without_curves_there_is_no_figure_of_them():
    untrained = record("light", 1, 1.0)
    untrained.curves = {}
    assert curves([untrained]) is curves([]) is None
