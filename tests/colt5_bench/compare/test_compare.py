"""Verdicts on figures of constructed records: planted faults, and differences between machines."""

import json
from dataclasses import replace
from io import StringIO
from math import exp, inf, nan
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from colt5_bench.compare import Comparison, Finding, IncomparableError, ThresholdsError, compare, load_rules
from colt5_bench.records.results import STATUSES, Divergence, Run, Timing
from colt5_bench.report.comparison import MOST_ROWS, append_summary, as_json, as_junit, as_markdown, show
from tests.colt5_bench.made import BOTH, record, timed

ROOT = Path(__file__).parents[3]

ENVIRONMENT = {
    "key": "a",
    "torch": "2.13",
    "triton": "3.7.1",
    "threads": 2,
    "gpu": {"name": "Toy GPU"},
    "git": {"revision": "abc", "dirty": False},
}

THRESHOLDS = """
[default]
cold = 0.05
warm = 0.05
graph = 0.05
wall = 0.05
eager = 0.05
speed_up = 0.25
peak = 0
saved = 0
error = 1.0
error_share = 0.25
registers = 0
spilled_bytes = 0
shared_bytes = 0
instructions = 0
"""

KERNEL = {
    "name": "kernel",
    "target": "sm_90",
    "registers": 64,
    "spilled_bytes": 0,
    "shared_bytes": 1024,
    "constants": {"BLOCK": 128},
    "instructions": {"fp32": 100, "global_load_128": 4},
}


@pytest.fixture
def rules(tmp_path):
    """Thresholds, with additions of a test."""

    def rules(more=""):
        path = tmp_path / "thresholds.toml"
        path.write_text(THRESHOLDS + more)
        return load_rules(path)

    return rules


def run_of(*records, path="run", **more):
    environment = {**ENVIRONMENT, **more}
    records = [replace(made, environment=environment["key"]) for made in records]
    return Run(Path(path), {environment["key"]: environment}, records)


def samples(milliseconds, count=12, spread=0.002):
    return [1e-3 * milliseconds * (1 + spread * (i / count - 0.5)) for i in range(count)]


def ours(milliseconds=1.0, implementation="ours", column="cold", **more):
    made = timed(implementation, milliseconds, column)
    made.timings[column].samples = samples(milliseconds)
    return replace(made, **more)


def reference(milliseconds=4.0):
    return ours(milliseconds, "reference")


def verdicts(comparison):
    """Verdicts by metric, for the implementation `ours`, without those that are the same."""
    return {
        finding.metric: finding.verdict
        for finding in comparison.findings
        if finding.implementation == "ours" and finding.verdict != "same"
    }


@pytest.fixture
def against(rules):
    """The verdicts on a record, or on none, against another one in the baseline."""

    def against(before, after, more="", **conditions):
        old, new = ([] if made is None else [made] for made in (before, after))
        comparison = compare(
            run_of(reference(), *old), run_of(reference(), *new, **conditions), rules(more), {"toy": "reference"}
        )
        return verdicts(comparison)

    return against


class TestTimes:
    def test_a_kernel_that_is_a_tenth_slower_is_found(self, against):
        assert against(ours(1.0), ours(1.1)) == {"cold": "worse"}
        assert against(ours(1.1), ours(1.0)) == {"cold": "better"}
        assert against(ours(1.0), ours(1.005)) == {}
        assert against(ours(1.0), ours(1.03)) == {"cold": "unclear"}

    def test_it_is_found_among_a_thousand_others(self, rules):
        before = [ours(1.0, case=f"n={n}", fields={"n": n}) for n in range(300)]
        after = [*before[:-1], replace(before[-1], timings=ours(1.1).timings)]
        comparison = compare(run_of(*before), run_of(*after), rules(), {})
        assert [finding.case for finding in comparison.regressions] == ["n=299"]
        assert comparison.counts.startswith("1 worse, ")

    def test_a_threshold_of_its_own(self, against):
        rule = '[[rule]]\nsuite = "toy"\ncases = "n=512"\nimplementation = ["ours"]\ndevice = "cuda"\ncold = 0.2\n'
        assert against(ours(1.0), ours(1.1), rule) == {}
        for other in ('"toy"', '"n=512"', '["ours"]', '"cuda"'):
            changed = {'"cuda"': '"cpu"'}.get(other, '"none"')
            assert against(ours(1.0), ours(1.1), rule.replace(other, changed)) == {"cold": "worse"}

    def test_a_column_without_samples_is_missing_with_its_reason(self, rules):
        before, after = ours(), ours()
        before.timings["graph"] = Timing("graph", samples(1), "confident", 0.0)
        after.timings["graph"] = Timing("graph", [], "not capturable: synchronises", inf)
        (found,) = compare(run_of(before), run_of(after), rules(), {}).regressions
        assert (found.metric, found.verdict, found.note) == ("graph", "missing", "not capturable: synchronises")

    @pytest.mark.parametrize("sample", [nan, inf, 0.0, -1.0])
    def test_a_sample_that_is_no_time_fails(self, against, sample):
        broken = ours()
        broken.timings["cold"].samples = [*samples(1), sample]
        assert against(ours(), broken) == {"cold": "failed"}
        with pytest.raises(
            IncomparableError, match=f"ours: a cold time must be a number of seconds above 0, got {sample}"
        ):
            against(broken, ours())

    def test_noise_is_unclear_and_says_which_cases_need_more(self, rules):
        noisy = ours()
        noisy.timings["cold"].samples = samples(1, spread=1.0)
        comparison = compare(run_of(ours()), run_of(noisy), rules(), {})
        assert comparison.cases_to_repeat(runs=1) == {"toy": [noisy.case]}
        assert comparison.undecided
        assert not comparison.regressions

    def test_unclear_is_not_undecided_where_it_can_only_be_better(self, rules):
        comparison = compare(run_of(ours(1.0)), run_of(ours(0.94)), rules(), {})
        assert verdicts(comparison) == {"cold": "unclear"}
        assert not comparison.undecided

    @pytest.mark.parametrize("factor", [4, 1000])
    @pytest.mark.parametrize("counts", [(10, 10), (3, 9), (3, 3), (100, 3)])
    @pytest.mark.parametrize("others", [0, 1, 76])
    @pytest.mark.parametrize("column", ["cold", "wall", "eager"])
    def test_a_certain_slowdown_is_found_by_few_samples(self, rules, factor, counts, others, column):
        """For any number of other times, even if all of them became slower."""
        sides = []
        for count, milliseconds in zip(counts, (1.0, factor), strict=True):
            made = [ours(milliseconds, column=column, case=f"n={n}", fields={"n": n}) for n in range(others + 1)]
            for each in made:
                each.timings[column].samples = samples(milliseconds, count, spread=0.02)
            sides.append(made)
        for changed in (1, others + 1):
            comparison = compare(run_of(*sides[0]), run_of(*sides[1][:changed], *sides[0][changed:]), rules(), {})
            assert len(comparison.regressions) == changed

    def test_a_record_that_is_there_twice_is_one_run(self, rules):
        comparison = compare(run_of(ours(), ours()), run_of(ours(1.1), ours(1.1), ours(1.11)), rules(), {})
        (found,) = (finding for finding in comparison.findings if finding.metric == "cold")
        assert found.runs == 2
        once = compare(run_of(ours()), run_of(ours(1.1), ours(1.11)), rules(), {})
        assert once.findings == comparison.findings

    def test_worse_by_few_runs_is_doubtful(self, rules):
        comparison = compare(run_of(ours(1.0)), run_of(ours(1.2)), rules(), {})
        assert verdicts(comparison) == {"cold": "worse"}
        assert comparison.cases_to_repeat(runs=1) == {}
        assert comparison.cases_to_repeat(runs=2) == {"toy": [ours().case]}

    @pytest.mark.parametrize(("factor", "expected"), [(1.0, {}), (1.3, {"cold": "worse"})])
    def test_what_the_reference_shares_is_no_change(self, rules, factor, expected):
        """The machine takes 1.2 times as long as before. The reference itself has no excuse."""
        after = [reference(4.8), ours(1.2 * factor)]
        comparison = compare(run_of(reference(), ours()), run_of(*after), rules(), {"toy": "reference"})
        assert verdicts(comparison) == expected
        assert {finding.implementation for finding in comparison.regressions} == {
            "reference",
            *(["ours"] if expected else []),
        }

    def test_a_drift_that_the_reference_shares_is_no_noise(self, rules):
        """Within a run, round by round."""
        sides = []
        for factor in (1.0, 1.2):
            drift = np.linspace(1, 1.5, 20)
            made = [reference(), ours()]
            made[0].timings["cold"].samples = (4e-3 * drift).tolist()
            made[1].timings["cold"].samples = (factor * 1e-3 * drift).tolist()
            sides.append(made)
        alone = compare(run_of(sides[0][1]), run_of(sides[1][1]), rules(), {})
        assert verdicts(alone) == {"cold": "unclear"}
        beside = compare(run_of(*sides[0]), run_of(*sides[1]), rules(), {"toy": "reference"})
        assert verdicts(beside) == {"cold": "worse"}


class TestEndings:
    @pytest.mark.parametrize("status", ["wrong", "out_of_memory", "error"])
    def test_what_fails_now_is_a_regression(self, rules, status):
        failing = record(status=status, reason="off by 3")
        (found,) = compare(run_of(ours()), run_of(failing), rules(), {}).regressions
        assert (found.verdict, found.now, found.note) == ("failed", status.replace("_", " "), "off by 3")

    def test_what_was_measured_and_is_skipped_is_missing(self, against):
        assert against(ours(), record(status="skipped", reason="no compiler")) == {"status": "missing"}

    def test_a_renamed_case_is_missing_and_new(self, rules):
        renamed = ours(case="rows=8,n=513", fields={"rows": 8, "n": 513})
        comparison = compare(run_of(ours()), run_of(renamed), rules(), {})
        assert [(finding.verdict, finding.case) for finding in comparison.findings] == [
            ("missing", ours().case),
            ("new", "rows=8,n=513"),
        ]
        assert len(comparison.regressions) == 1

    @pytest.mark.parametrize("status", ["ok", "wrong"])
    def test_what_is_new_is_summed_up(self, rules, status):
        new = [ours(case=f"n={n}", fields={"n": n}, status=status) for n in range(2000)]
        comparison = compare(run_of(ours()), run_of(ours(), *new), rules(), {})
        assert comparison.notable() == []
        assert comparison.summary_lines() == ["new, so not in the baseline and not listed: 2,000 of toy"]
        assert as_markdown(comparison).count("\n") < 10

    @pytest.mark.parametrize("before", [None, *STATUSES])
    @pytest.mark.parametrize("after", [None, *STATUSES])
    def test_every_pair_of_endings(self, against, before, after):
        failing = ("wrong", "refused", "out_of_memory", "error")
        expected = {}
        if after == "refused" or (after in failing and before in ("ok", "skipped")):
            expected = {"status": "failed"}
        elif before == "ok" and after in (None, "skipped"):
            expected = {"status": "missing"}
        elif after == "ok" and before in failing:
            expected = {"status": "better"}
        elif (after == "ok" and before in (None, "skipped")) or (before is None and after in failing):
            expected = {"status": "new"}
        made = [status and (ours() if status == "ok" else record(status=status)) for status in (before, after)]
        assert against(*made) == expected

    def test_a_point_that_failed_once_failed(self, rules):
        comparison = compare(run_of(ours()), run_of(ours(), record(status="error", reason="once")), rules(), {})
        assert verdicts(comparison) == {"status": "failed"}


class TestFigures:
    @pytest.mark.parametrize(("metric", "field"), [("peak", "peak_bytes"), ("saved", "saved_bytes")])
    def test_a_byte_of_memory_is_real(self, against, metric, field):
        assert against(ours(**{field: 1000}), ours(**{field: 1001})) == {metric: "worse"}
        assert against(ours(**{field: 1001}), ours(**{field: 1000})) == {metric: "better"}
        assert against(ours(**{field: 1000}), ours(**{field: None})) == {metric: "missing"}
        assert (
            against(ours(**{field: 1000}), ours(**{field: 1001}), f"[[rule]]\n{metric.replace(' ', '_')} = 0.01") == {}
        )

    @pytest.mark.parametrize(
        ("before", "after", "verdict"),
        [
            (1e-6, 2.1e-6, "worse"),
            (1e-6, 1.9e-6, None),
            (2.1e-6, 1e-6, "better"),
            (1e-8, 9e-7, None),  # below a quarter of the allowed error, changes do not count
            (1e-8, 1.1e-6, "worse"),
            (1e-6, nan, "failed"),
            (1e-6, inf, "failed"),
            (nan, 1e-6, "new"),
        ],
    )
    def test_errors_have_bounds_of_their_own(self, against, before, after, verdict):
        def diverging(largest):
            return ours(accuracy={"output": Divergence(largest, 1e-7, 0, budget=4e-6)})

        assert against(diverging(before), diverging(after)) == ({"output error": verdict} if verdict else {})

    @pytest.mark.parametrize("budgets", [(4e-6, 4e-3), (4e-6, inf), (4e-6, None), (None, 4e-3), (4e-6, 4e-6)])
    @pytest.mark.parametrize("growth", [2.1, 10, 1000])
    def test_a_budget_that_grew_with_the_error_excuses_nothing(self, against, budgets, growth):
        before, after = (
            ours(accuracy={"output": Divergence(largest, 1e-7, 0, budget=budget)})
            for largest, budget in zip((1e-6, growth * 1e-6), budgets, strict=True)
        )
        assert against(before, after) == {"output error": "worse"}

    @pytest.mark.parametrize(
        ("bound", "before", "after", "verdict"),
        [
            ('{ better = "lower", relative = 0.1 }', 1.0, 1.2, "worse"),
            ('{ better = "lower", relative = 0.1 }', 1.0, 1.05, None),
            ('{ better = "lower", relative = 0.1, absolute = 0.5 }', 1.0, 1.2, None),
            ('{ better = "higher", absolute = 0.1 }', 1.0, 0.8, "worse"),
            ('{ better = "higher" }', 1.0, 1.2, "better"),
            ('{ better = "equal" }', 1.0, 0.9, "worse"),
            ('{ better = "equal" }', 1.0, nan, "failed"),
            ('{ better = "equal" }', 1.0, None, "missing"),
            ('{ better = "equal" }', nan, nan, None),
            ('{ better = "equal" }', nan, 1.0, "new"),
            ('{ better = "equal" }', inf, nan, "failed"),
            (None, 1.0, 2.0, None),
            (None, 1.0, nan, "failed"),
        ],
    )
    def test_metrics_of_a_suite(self, against, bound, before, after, verdict):
        def counted(value):
            return ours(metrics={} if value is None else {"lost": value})

        rule = f"[[rule]]\n[rule.metrics]\nlost = {bound}\n" if bound else ""
        assert against(counted(before), counted(after), rule) == ({"lost": verdict} if verdict else {})

    @pytest.mark.parametrize(
        ("changed", "found"),
        [
            ({"registers": 65}, {"kernel sm_90 registers": "worse"}),
            ({"spilled_bytes": 8}, {"kernel sm_90 spilled_bytes": "worse"}),
            ({"shared_bytes": 0}, {"kernel sm_90 shared_bytes": "better"}),
            (
                {"instructions": {"fp32": 100, "global_load_32": 16}},
                {
                    "kernel sm_90 global_load_32 instructions": "worse",
                    "kernel sm_90 global_load_128 instructions": "better",
                },
            ),
            ({"name": "another"}, {"kernel sm_90": "missing", "another sm_90": "new"}),
            ({"constants": {"BLOCK": 256}}, {}),
        ],
    )
    def test_what_the_compiler_made_of_a_kernel(self, against, changed, found):
        assert against(ours(kernels=[KERNEL]), ours(kernels=[{**KERNEL, **changed}])) == found

    def test_kernels_of_one_name_are_taken_in_order(self, against):
        two = [KERNEL, {**KERNEL, "registers": 80}]
        assert against(ours(kernels=two), ours(kernels=[KERNEL, {**KERNEL, "registers": 81}])) == {
            "kernel sm_90 #2 registers": "worse"
        }
        assert against(ours(kernels=two), ours(kernels=[KERNEL])) == {"kernel sm_90 #2": "missing"}


class TestOtherConditions:
    def test_on_another_gpu_speed_ups_take_the_place_of_times(self, rules):
        """A GPU of half the speed is no regression. A kernel that is a third slower relative to the reference is."""

        def on_another(factor):
            slower = [replace(made, device="Another GPU") for made in (reference(8.0), ours(2.0 * factor))]
            slower[1].peak_bytes = 10**9
            after = run_of(*slower, key="b")
            return compare(run_of(reference(), ours()), after, rules(), {"toy": "reference"})

        assert verdicts(on_another(1.0)) == {}
        assert verdicts(on_another(1.4)) == {"speed-up, cold": "worse"}
        (note,) = on_another(1.0).notes
        assert "the baseline was measured on Toy GPU and this run on Another GPU" in note
        assert "memory is not compared" in note

    def test_so_they_do_where_machines_of_one_name_are_not_the_same(self, rules):
        runs = [run_of(reference(ms), ours(ms / 4)) for ms in (4.0, 8.0)]
        slower = compare(*runs, rules(), {"toy": "reference"}).regressions
        assert [finding.implementation for finding in slower] == ["reference"]
        comparison = compare(*runs, rules(), {"toy": "reference"}, any_machine=True)
        assert not comparison.regressions
        assert verdicts(comparison) == {}
        assert "as with --any-machine" in comparison.notes[0]

    def test_with_other_threads_a_cpu_says_nothing_about_speed(self, rules):
        runs = [run_of(reference(), ours(ms), gpu=None, threads=threads) for ms, threads in ((1.0, 2), (3.0, 1))]
        comparison = compare(*runs, rules(), {"toy": "reference"})
        assert verdicts(comparison) == {}
        assert comparison.notes == [
            "the baseline was measured with 2 threads and this run with 1: neither times nor speed-ups are compared"
        ]

    def test_memory_of_cpus_is_comparable(self, rules):
        before, after = ours(peak_bytes=10), ours(peak_bytes=11, device="Another CPU")
        comparison = compare(run_of(before, gpu=None), run_of(after, gpu=None), rules(), {})
        assert verdicts(comparison) == {"peak": "worse"}

    def test_another_compiler_makes_other_kernels(self, against, rules):
        changed = ours(kernels=[{**KERNEL, "registers": 65}])
        assert against(ours(kernels=[KERNEL]), changed, triton="3.8") == {}
        comparison = compare(run_of(ours()), run_of(ours(), triton="3.8", torch="2.14"), rules(), {})
        assert len(comparison.notes) == 2

    def test_a_baseline_of_gpus_has_nothing_to_say_about_a_cpu(self, rules):
        comparison = compare(run_of(ours()), run_of(ours(column="wall"), gpu=None, key="b"), rules(), {})
        assert [finding.verdict for finding in comparison.findings] == ["new"]
        assert not comparison.compared
        assert comparison.notes == [
            "1 records of the baseline are left out: they were measured on Toy GPU, this run was not"
        ]

    def test_where_nothing_was_measured_everything_is_missing(self, rules):
        comparison = compare(run_of(ours()), Run(Path("run")), rules(), {})
        assert [finding.verdict for finding in comparison.findings] == ["missing"]
        assert comparison.compared

    def test_a_file_that_was_cut_off_is_told_of(self, rules):
        cut_off = replace(run_of(reference()), cut_off=[Path("run.jsonl")])
        comparison = compare(run_of(reference(), ours()), cut_off, rules(), {})
        assert [finding.verdict for finding in comparison.regressions] == ["missing"]
        assert comparison.notes == ["the last line of run.jsonl is cut off, so its record is missing"]

    def test_what_is_out_of_scope_is_not_missing(self, rules):
        comparison = compare(run_of(ours()), Run(Path("run")), rules(), {}, scope=lambda made: made.suite != "toy")
        assert comparison.findings == []

    def test_runs_of_several_revisions_are_no_side(self, rules):
        mixed = run_of(ours())
        other = {**ENVIRONMENT, "key": "b", "git": {"revision": "def", "dirty": False}}
        mixed.environments["b"] = other
        mixed.records.append(replace(ours(), environment="b"))
        with pytest.raises(IncomparableError, match="from more than one revision"):
            compare(mixed, run_of(ours()), rules(), {})


class TestMoreRuns:
    """Runs of the new side can settle a time only if the noise of the baseline alone is small enough."""

    @pytest.mark.parametrize(
        ("interval", "baseline_runs", "runs", "settles"),
        [
            ((0.97, 1.06), 1, 3, True),
            ((0.70, 1.50), 1, 3, False),
            ((1.04, 1.30), 1, 3, True),
            ((0.90, 1.12), 1, 30, False),
            ((0.90, 1.12), 10, 3, False),
            ((0.90, 1.12), 10, 30, True),
        ],
    )
    def test_may_settle(self, interval, baseline_runs, runs, settles):
        assert finding(interval, baseline_runs, 1).may_settle(runs) == settles

    @given(
        low=st.floats(-1, 1),
        width=st.floats(0, 1),
        baseline_runs=st.integers(1, 20),
        runs=st.integers(1, 20),
        more=st.integers(0, 20),
    )
    def test_more_of_them_never_harm(self, low, width, baseline_runs, runs, more):
        unclear = finding((exp(low), exp(low + width)), baseline_runs, runs)
        assert not unclear.may_settle(runs) or unclear.may_settle(runs + more)

    def test_a_figure_without_an_interval_has_no_noise(self):
        assert not finding(None, None, None).may_settle(3)


def finding(interval, baseline_runs, runs):
    """An unclear time with a threshold of 5 %."""
    by = "toy", "n=8", "forward", "ours", "cold"
    return Finding(
        "unclear", *by, 1.0, 1.0, "s", interval=interval, threshold=0.05, baseline_runs=baseline_runs, runs=runs
    )


class TestThresholds:
    def test_those_of_the_suites_can_be_read(self):
        of_cpu, of_gpu = (
            load_rules(ROOT / "suites" / "thresholds.toml").of(ours(), device) for device in ("cpu", "cuda")
        )
        assert of_cpu.speed_up > of_gpu.speed_up
        assert of_gpu.peak == of_gpu.registers == 0

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_times_of_the_reference_on_a_gpu_have_nothing_beside_them(self, device):
        """A CUDA graph launches without the host, so its times need nothing."""
        rules = load_rules(ROOT / "suites" / "thresholds.toml")
        of_ours, of_reference = rules.of(ours(), device), rules.of(replace(ours(), implementation="reference"), device)
        for column in ("cold", "warm", "graph", "wall", "eager"):
            wider = device == "cuda" and column != "graph"
            assert (getattr(of_reference, column) > getattr(of_ours, column)) == wider, column

    def test_metrics_that_they_name_are_there(self):
        """Otherwise a renamed metric would have no threshold."""
        rules = load_rules(ROOT / "suites" / "thresholds.toml")
        for suite in ("routing", "sequence_length", "flops"):
            source = (ROOT / "suites" / f"{suite}.py").read_text()
            metrics = rules.of(replace(ours(), suite=suite), "cpu").metrics
            assert metrics
            assert all(f'"{name}"' in source for name in metrics)

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ("typo = 1", r"\[default\]: the key must be one of cold.*, got 'typo'"),
            ("[[rule]]\ncolds = 1", r"\[\[rule\]\] 1: the key must be one of .*, got 'colds'"),
            ("[[rule]]\ncold = -1", r"cold must be a finite number of at least 0, got -1"),
            ("[[rule]]\ncold = true", r"cold must be a finite number"),
            ('[[rule]]\ndevice = "tpu"', r"device must be cpu or cuda, got 'tpu'"),
            ("[[rule]]\nsuite = 1", r"suite must be a string or a list of strings, got 1"),
            ('[[rule]]\ncases = "(n"', r"-k must join parts of case ids"),
            ("[metrics]\nlost = 1", r"the key must be one of default, rule, unchecked, got 'metrics'"),
            (
                "[[rule]]\nmetrics.lost = 1",
                r"metrics.lost must be a table with better = 'lower' or 'higher' or 'equal', got 1",
            ),
            ('[[rule]]\nmetrics.lost = { better = "lower", most = 1 }', r"the key must be one of .*, got 'most'"),
            ("[[rule", r"is not valid TOML"),
        ],
    )
    def test_what_is_wrong_with_them_is_said(self, rules, more, message):
        with pytest.raises(ValueError, match=message):
            rules(more)

    def test_none_is_left_out(self, tmp_path):
        path = tmp_path / "thresholds.toml"
        path.write_text(THRESHOLDS.replace("graph = 0.05\n", ""))
        with pytest.raises(ThresholdsError, match=r"lacks graph\."):
            load_rules(path)
        with pytest.raises(ThresholdsError, match="cannot read the thresholds"):
            load_rules(tmp_path / "none.toml")


class TestOutput:
    @pytest.fixture
    def comparison(self, rules):
        before = [ours(), ours(case="n=2", fields={"n": 2}, direction=BOTH)]
        after = [ours(1.2), record(status="wrong", reason="off | by 3", n=2)]
        after[1].case, after[1].fields, after[1].direction = "n=2", {"n": 2}, BOTH
        return compare(run_of(*before), run_of(*after, torch="2.14"), rules(), {})

    def test_people_get_a_table_and_the_counts(self, comparison):
        console = Console(width=60, record=True, file=StringIO())
        show(comparison, console)
        console.file.close()
        text = console.export_text()
        assert "1 failed, 1 worse, " in text
        assert "+20.0 %" in text
        assert "note: the baseline was measured with torch 2.13, this run with torch 2.14" in text
        lines = text.splitlines()
        at = next(at for at, line in enumerate(lines) if "1.2 ms" in line)
        assert "ours" in lines[at - 1]
        assert "95 % interval +15" in lines[at + 1]

    def test_programs_get_everything(self, comparison):
        content = json.loads(as_json(comparison))
        assert content["regressions"] == 2
        assert len(content["findings"]) == len(comparison.findings)
        worse = next(finding for finding in content["findings"] if finding["verdict"] == "worse")
        assert worse["now"] == pytest.approx(1.2e-3, rel=1e-3)
        assert worse["interval"][0] > 1.1

    def test_json_has_no_nan(self, rules):
        lost = [ours(metrics={"lost": value}) for value in (1.0, nan)]
        text = as_json(compare(*map(run_of, lost), rules(), {}))
        assert '"now": "nan"' in text

    def test_a_pull_request_gets_markdown(self, comparison):
        text = as_markdown(comparison)
        assert text.startswith("### 2 regressions against the baseline\n")
        rows = [line for line in text.splitlines() if line.startswith("| **")]
        assert [row.split("|")[1].strip() for row in rows] == ["**failed**", "**worse**"]
        assert "off \\| by 3" in rows[0]
        assert as_markdown(Comparison([])).startswith("### No regression")

    def test_a_long_table_is_cut_off_and_says_so(self, comparison):
        text = as_markdown(Comparison(comparison.regressions * 100))
        assert text.count("\n| **") == MOST_ROWS
        assert "and 100 more" in text

    def test_junit_has_a_test_for_each_finding(self, comparison):
        root = ElementTree.fromstring(as_junit(comparison))
        (suite,) = root
        tests = suite.findall("testcase")
        assert len(tests) == len(comparison.findings) == int(suite.get("tests"))
        failures = [test for test in tests if test.find("failure") is not None]
        assert len(failures) == int(suite.get("failures")) == 2
        assert {failure.find("failure").get("type") for failure in failures} == {"failed", "worse"}
        assert len({(test.get("classname"), test.get("name")) for test in tests}) == len(tests)

    def test_a_job_gets_a_summary(self, comparison, tmp_path, monkeypatch):
        monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
        append_summary(comparison)
        summary = tmp_path / "summary.md"
        summary.write_text("before\n")
        monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
        append_summary(comparison)
        assert summary.read_text() == "before\n" + as_markdown(comparison)
