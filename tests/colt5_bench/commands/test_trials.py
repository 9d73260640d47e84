"""Comparisons with known outcomes: how they are counted, and how they end."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colt5_bench import cli
from colt5_bench.commands import DONE, FAILURE, INTERRUPTED, UNDECIDED, UNMEASURED, USAGE, _trials
from colt5_bench.commands._trials import Trial, status_of, summary_lines
from colt5_bench.compare import Comparison, Finding
from colt5_bench.compare.findings import VERDICTS
from colt5_bench.compare.revisions import MeasuringError
from colt5_bench.measuring.rounds import CPU_COLUMNS, GPU_COLUMNS, GPU_TIME_COLUMNS

ROOT = Path(__file__).parents[3]
ON_TIMES = ("worse", "unclear", "better", "same")


def time(verdict, implementation="ours", metric="wall", high=1.3):
    interval = (0.9, high)
    return Finding(verdict, "combine", "n=8", "forward", implementation, metric, 1.0, 1.1, "s", interval, 0.2, runs=3)


def other(verdict, implementation="ours", metric="status"):
    return Finding(verdict, "combine", "n=8", "forward", implementation, metric, "ok", "ok")


FINDINGS = st.lists(
    st.one_of(
        st.builds(
            time,
            st.sampled_from(ON_TIMES),
            st.sampled_from(("ours", "reference")),
            st.sampled_from(GPU_COLUMNS),
            st.sampled_from((1.1, 1.3)),
        ),
        st.builds(other, st.sampled_from(VERDICTS), st.sampled_from(("ours", "reference"))),
    ),
    max_size=20,
)


class TestTrial:
    @given(FINDINGS)
    def test_equal_code_has_no_regression(self, findings):
        comparison = Comparison(findings)
        trial = Trial.of(comparison, ())
        assert (trial.outcome == "false alarm") == bool(comparison.regressions)
        assert trial.alarms == len(comparison.regressions)
        assert trial.verdicts == Counter(finding.verdict for finding in findings if finding.interval)
        if not trial.alarms:
            assert trial.outcome == ("undecided" if comparison.undecided else "quiet")

    @given(FINDINGS, st.sampled_from((CPU_COLUMNS, GPU_TIME_COLUMNS)))
    def test_a_slower_copy_is_found_by_its_own_times(self, findings, columns):
        trial = Trial.of(Comparison(findings), columns)
        innocent = [each for each in findings if each.implementation != "ours" and each.is_regression]
        own = [
            each.verdict
            for each in findings
            if each.interval and each.implementation == "ours" and each.metric in columns
        ]
        assert trial.verdicts == Counter(own)
        if innocent:
            assert trial.outcome == "false alarm"
        elif "worse" in own:
            assert trial.outcome == "found"
        else:
            assert trial.outcome == ("undecided" if "unclear" in own else "missed")


def trials(**outcomes):
    named = {name.replace("_", " "): number for name, number in outcomes.items()}
    return [Trial(name, int(name == "false alarm"), Counter()) for name, number in named.items() for _ in range(number)]


@pytest.mark.parametrize(
    ("made", "planted", "status"),
    [
        (trials(quiet=30), False, DONE),
        (trials(quiet=20, undecided=10), False, DONE),
        (trials(quiet=29, false_alarm=1), False, FAILURE),
        (trials(quiet=99, false_alarm=1), False, DONE),
        (trials(found=10), True, DONE),
        (trials(found=19, undecided=1), True, DONE),
        (trials(found=9, undecided=1), True, UNDECIDED),
        (trials(found=9, missed=1), True, FAILURE),
        (trials(found=9, false_alarm=1), True, FAILURE),
    ],
)
def test_the_status_is_what_was_found(made, planted, status):
    assert status_of(made, planted=planted) == status


@given(st.lists(st.sampled_from(("quiet", "undecided", "false alarm")), max_size=30))
def test_the_summary_counts_each(outcomes):
    first, _ = summary_lines([Trial(outcome, 0, Counter()) for outcome in outcomes], None)
    assert first.startswith(f"{len(outcomes)} comparisons of HEAD with itself")
    for outcome in ("quiet", "undecided", "false alarm"):
        assert f"{outcomes.count(outcome)} {outcome}" in first


class TestCommand:
    @pytest.fixture
    def bench(self, monkeypatch, tmp_path, capsys):
        """The command with given outcomes of comparisons, in order; an exception is raised."""
        monkeypatch.chdir(ROOT)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        asked = []

        def bench(said, *options):
            says = iter(said)

            def compare(options, checkout, comparer, revisions, directory):
                asked.append(revisions)
                directory.mkdir(parents=True)
                comparison = next(says)
                if isinstance(comparison, BaseException):
                    raise comparison
                return comparison

            monkeypatch.setattr(_trials, "compare_in_turns", compare)
            monkeypatch.setattr(_trials, "with_appended", lambda checkout, commit, texts: f"{commit} {texts}")
            command = ["selftest", "--suite", "combine", "--device", "cpu", "--out", str(tmp_path / "out"), *options]
            return cli.main(command), capsys.readouterr(), asked

        return bench

    @pytest.mark.parametrize("count", [1, 3])
    def test_has_a_line_for_each_and_keeps_it(self, bench, tmp_path, count):
        said = [Comparison([time("same"), time("unclear", high=1.1)])] * count
        status, printed, asked = bench(said, "--comparisons", str(count))
        assert status == DONE
        assert printed.out.count("quiet ") == count
        assert f"{count} comparisons of HEAD with itself: {count} quiet, 0 undecided, 0 false alarm" in printed.out
        assert f"{2 * count} times: 0 worse, {count} unclear, 0 better, {count} same" in printed.out
        assert all(before == after for before, after in asked)
        kept = sorted((tmp_path / "out").glob("*/comparison.json"))
        assert [len(json.loads(each.read_text())["findings"]) for each in kept] == [2] * count

    def test_a_slower_copy_is_another_revision(self, bench):
        status, printed, asked = bench([Comparison([time("worse")])] * 2, "--comparisons", "2", "--planted", "0.5")
        assert status == DONE
        assert "2 comparisons with 50% planted: 2 found" in printed.out
        ((before, after),) = set(asked)
        assert after.startswith(before)
        assert "slowed(SUITE, 'ours', 0.5)" in after
        assert "suites/combine.py" in after

    def test_a_suite_of_ones_own_has_no_slower_copy(self, bench, tmp_path):
        assert cli.main(["new-suite", str(tmp_path / "rows.py")]) == DONE
        own = ("--suite", str(tmp_path / "rows.py"), "--preset", "smoke", "--comparisons", "1")
        assert bench([Comparison([time("same")])], *own)[0] == DONE
        status, printed, _ = bench([], *own, "--planted", "0.5")
        assert status == USAGE
        assert "name a suite of the checkout, or leave out --planted" in printed.err

    def test_on_a_gpu_its_own_times_have_to_show_it(self, bench, monkeypatch):
        """The host's clock has a wider threshold, which a longer kernel need not reach."""
        monkeypatch.setattr(_trials, "choose_device", lambda name: torch.device("cuda"))
        said = [Comparison([*(time("worse", metric=column) for column in GPU_TIME_COLUMNS), time("same")])]
        status, printed, _ = bench(said, "--comparisons", "1", "--planted", "0.1")
        assert status == DONE
        assert "3 slowed times: 3 worse" in printed.out

    @pytest.mark.parametrize(
        ("raised", "status"), [(KeyboardInterrupt(), INTERRUPTED), (MeasuringError("no"), UNMEASURED)]
    )
    @pytest.mark.parametrize("after", [0, 2])
    def test_an_end_before_time_keeps_what_is_known(self, bench, raised, status, after):
        got, printed, _ = bench([*[Comparison([time("same")])] * after, raised], "--comparisons", "5")
        assert got == status
        assert f"{after} comparisons of HEAD with itself: {after} quiet" in printed.out

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--comparisons", "0"), "--comparisons must be at least 1, got 0"),
            (("--comparisons", "1", "--rounds", "0"), "--rounds must be at least 1, got 0"),
            (("--comparisons", "1", "--suite", "topc"), "no suite 'topc'"),
            (("--comparisons", "1", "--planted", "0.1"), "suites/thresholds.toml allows for times of ours in suite"),
            (("--comparisons", "1", "--planted", "inf"), "suites/thresholds.toml allows for times of ours in suite"),
            (("--comparisons", "1", "--planted", "nan"), "suites/thresholds.toml allows for times of ours in suite"),
            (
                ("--comparisons", "1", "--planted", "0.5", "--impl", "reference"),
                "--impl must name ours, too, got reference",
            ),
            (("--comparisons", "1", "--planted", "0.5", "--suite", "flops"), "suite flops takes no times of ours"),
            ((), "need --comparisons N"),
            (("--planted", "0.5"), "need --comparisons N"),
        ],
    )
    def test_what_cannot_be_done_is_a_usage_error(self, bench, options, message):
        status, printed, asked = bench([], *options)
        assert (status, asked) == (USAGE, [])
        assert message in printed.err
