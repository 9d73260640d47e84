import json
import re
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch

from colt5_bench import cli, commands
from colt5_bench.measuring import roofline
from colt5_bench.measuring.rounds import GPU_COLUMNS
from colt5_bench.measuring.spin import Spin
from colt5_bench.measuring.static_facts import compiled_kernels
from colt5_bench.records.results import Timing
from colt5_bench.selftest import checks, cuda_bench
from colt5_bench.selftest.checks import Check, Report

pytestmark = pytest.mark.alone

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def scaled(factor):
    """A harness whose times are wrong by a factor."""
    measure = checks.time_interleaved

    def time_interleaved(calls, **options):
        timings = measure(calls, **options)
        for timing in (timing for columns in timings.values() for timing in columns.values()):
            timing.samples = [factor * sample for sample in timing.samples]
        return timings

    return time_interleaved


def said(monkeypatch, samples):
    """A harness that returns these samples by name, and by column if they differ."""

    def time_interleaved(calls, *, columns, **options):
        return {
            name: {column: Timing(column, list(samples(name, column)), "confident", 0.0) for column in columns}
            for name in calls
        }

    monkeypatch.setattr(checks, "time_interleaved", time_interleaved)


class TestVerdict:
    @pytest.mark.parametrize(("factor", "expected"), [(1.05, "worse"), (0.95, "better"), (1.0, "same")])
    def test_finds_what_is_there(self, factor, expected):
        before = [1 + 1e-3 * step for step in range(40)]
        assert checks.verdict(before, [factor * sample for sample in before]) == expected

    def test_a_change_that_is_certain_and_small_is_none(self):
        assert checks.verdict([1.0, 1.001] * 20, [1.01, 1.011] * 20) == "same"

    def test_a_change_that_is_large_and_uncertain_is_unclear(self):
        assert checks.verdict([1.0, 2.0, 3.0], [1.5, 2.5, 3.5]) == "unclear"


class TestDurations:
    def test_are_right_here(self):
        found = checks.check_durations(CPU)
        assert len(found) == len(checks.DURATIONS["cpu"])
        assert {check.outcome for check in found} == {"passed"}
        assert all(abs(check.figure) < checks.DURATION_LIMIT for check in found)

    @pytest.mark.parametrize("factor", [0.97, 1.03])
    def test_a_harness_that_is_off_by_three_percent_fails(self, monkeypatch, factor):
        monkeypatch.setattr(checks, "time_interleaved", scaled(factor))
        assert {check.outcome for check in checks.check_durations(CPU)} == {"failed"}

    def test_every_column_of_a_gpu_is_checked(self, monkeypatch):
        seconds = iter(each for each in checks.DURATIONS["cuda"] for _ in GPU_COLUMNS)
        monkeypatch.setattr(Spin, "durations", lambda spin, count: [spin._seconds] * count)
        said(monkeypatch, lambda name, column: [next(seconds) * (1.05 if column == "graph" else 1.0)])
        found = checks.check_durations(GPU)
        outcomes = ["failed" if column == "graph" else "passed" for column in GPU_COLUMNS]
        assert [check.outcome for check in found] == outcomes * 2
        assert found[2].name == "a spin of 2 ms, graph"

    def test_a_column_without_samples_fails_and_says_why(self, monkeypatch):
        empty = {"spin": {"wall": Timing("wall", [], "throttled", 0.0)}}
        monkeypatch.setattr(checks, "time_interleaved", lambda calls, **options: empty)
        assert {(check.outcome, check.note) for check in checks.check_durations(CPU)} == {("failed", "throttled")}


class TestEqualCalls:
    def test_are_told_to_be_equal_here(self):
        check, noise = checks.check_equal(CPU)
        assert check.outcome == "passed", check
        assert 0 < noise < 10

    @pytest.mark.parametrize(("alarms", "outcome"), [(0, "passed"), (1, "passed"), (2, "failed")])
    def test_one_false_alarm_in_a_hundred_is_allowed(self, monkeypatch, alarms, outcome):
        said(monkeypatch, lambda name, column: [1.0, 2.0, 3.0])
        verdicts = iter(["worse", "better"][:alarms] + ["same"] * 100)
        monkeypatch.setattr(checks, "verdict", lambda before, after: next(verdicts))
        check, noise = checks.check_equal(CPU)
        assert (check.outcome, check.figure) == (outcome, alarms)
        assert noise == 1.0

    def test_a_harness_that_favours_one_of_them_fails(self, monkeypatch):
        said(
            monkeypatch, lambda name, column: [(1.0 if name == "before" else 1.04) + 1e-3 * step for step in range(40)]
        )
        assert checks.check_equal(CPU)[0].outcome == "failed"


class TestPlanted:
    def test_is_found_here(self):
        assert checks.check_planted(CPU).outcome in ("passed", "unclear")

    def test_a_harness_that_does_not_see_it_fails(self, monkeypatch):
        said(monkeypatch, lambda name, column: [1 + 1e-3 * step for step in range(40)])
        check = checks.check_planted(CPU)
        assert (check.outcome, check.figure) == ("failed", 0)

    def test_a_machine_that_hides_it_is_too_noisy(self, monkeypatch):
        random = Random(0)
        said(monkeypatch, lambda name, column: [random.uniform(1, 3) for _ in range(40)])
        check = checks.check_planted(CPU)
        assert check.outcome == "unclear"
        assert "too uncertain" in check.note


class TestCopy:
    @pytest.fixture
    def copies(self, monkeypatch):
        def set_to(ceilings, timed):
            ceilings, timed = iter(ceilings), iter(timed)
            monkeypatch.setattr(roofline, "copy_bandwidth", lambda device: next(ceilings))
            monkeypatch.setattr(checks, "_timed_copy_bandwidth", lambda device: next(timed))
            return checks.check_copy(CPU)

        return set_to

    def test_has_the_bandwidth_of_a_copy(self, copies):
        assert copies([10e9] * 5, [10.5e9] * 5).outcome == "passed"

    def test_another_one_on_a_quiet_machine_fails(self, copies):
        check = copies([10e9] * 5, [8e9] * 5)
        assert (check.outcome, check.figure) == ("failed", pytest.approx(-0.2))

    def test_another_one_on_a_machine_that_differs_from_itself_is_unclear(self, copies):
        check = copies([10e9, 10e9, 14e9, 10e9, 10e9], [8e9] * 5)
        assert check.outcome == "unclear"
        assert "10.0 to 14.0 GB/s" in check.note

    def test_one_that_is_not_always_off_is_unclear(self, copies):
        assert copies([10e9] * 5, [8e9, 8e9, 8e9, 10e9, 8e9]).outcome == "unclear"

    def test_what_no_noise_explains_fails_there_too(self, copies):
        assert copies([10e9, 14e9, 10e9, 10e9, 10e9], [4e9] * 5).outcome == "failed"

    def test_is_timed_for_real(self, monkeypatch):
        monkeypatch.setattr(roofline, "CPU_COPY_BYTES", 2**22)
        assert 1e8 < checks._timed_copy_bandwidth(CPU) < 1e13


class TestCold:
    @pytest.fixture
    def cold(self, monkeypatch):
        """A GPU with a megabyte of L2 that copies a gigabyte per second."""
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=2**20))
        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda size, device: zeros(size))
        ceilings = roofline.Ceilings(1e9, 1e9, {}, "toy", True)
        monkeypatch.setattr(roofline, "measure_ceilings", lambda device: ceilings)

        def check(**seconds):
            said(monkeypatch, lambda name, column: [seconds[column]] if column in seconds else [])
            return checks.check_cold(GPU)

        return check

    def test_is_slower_than_a_warm_one(self, cold):
        assert cold(cold=6e-4, warm=3e-4, graph=6e-4).outcome == "passed"

    @pytest.mark.parametrize("column", ["cold", "graph"])
    def test_one_that_was_not_flushed_fails(self, cold, column):
        assert cold(**{"cold": 6e-4, "graph": 6e-4, "warm": 3e-4, column: 3e-4}).outcome == "failed"

    def test_a_graph_that_was_not_captured_fails(self, cold):
        check = cold(cold=6e-4, warm=3e-4)
        assert (check.outcome, check.note) == ("failed", "graph: confident")

    def test_there_is_none_on_a_cpu(self):
        assert checks.check_cold(CPU).outcome == "skipped"


class TestCudaBench:
    @pytest.fixture
    def theirs(self, monkeypatch):
        """cuda-bench with a measured second for each call, and a harness that has measured the given seconds."""
        monkeypatch.setattr(cuda_bench, "unavailable", lambda device: None)
        monkeypatch.setattr(cuda_bench, "CALLS", dict.fromkeys(cuda_bench.CALLS, lambda device: lambda: None))
        monkeypatch.setattr(cuda_bench, "measure", lambda device: dict.fromkeys(cuda_bench.CALLS, 1.0))
        return lambda seconds: said(monkeypatch, lambda name, column: [seconds])

    @pytest.mark.parametrize(("seconds", "outcome"), [(1.04, "passed"), (0.94, "failed"), (1.06, "failed")])
    def test_agrees_to_five_percent(self, theirs, seconds, outcome):
        theirs(seconds)
        found = checks.check_cuda_bench(GPU)
        assert [check.outcome for check in found] == [outcome] * 3

    def test_that_fails_is_told_of(self, theirs, monkeypatch):
        def fail(device):
            raise RuntimeError("no luck")

        monkeypatch.setattr(cuda_bench, "measure", fail)
        (check,) = checks.check_cuda_bench(GPU)
        assert (check.outcome, check.note) == ("failed", "no luck")

    def test_is_left_out_where_it_is_not(self):
        (check,) = checks.check_cuda_bench(CPU)
        assert (check.outcome, check.note) == ("skipped", "needs a GPU")


class TestCommand:
    @pytest.fixture
    def bench(self, monkeypatch, capsys):
        monkeypatch.chdir(Path(__file__).parents[3])
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)

        def bench(outcome, *options):
            found = [
                Check("a spin", "passed", 0.001, 0.02, "of the duration"),
                Check("equal calls", outcome, 3, 1, "false alarms in 100", "[they] differ"),
            ]
            monkeypatch.setattr(checks, "run", lambda device: Report("toy", 0.05, found))
            return cli.main(["selftest", "--device", "cpu", *options]), capsys.readouterr().out

        return bench

    @pytest.mark.parametrize(
        ("outcome", "status"),
        [("passed", commands.DONE), ("unclear", commands.DONE), ("failed", commands.FAILURE)],
    )
    def test_the_status_says_whether_a_check_failed(self, bench, outcome, status):
        got, output = bench(outcome)
        assert got == status
        assert re.search(rf"equal calls +3 +1 +false alarms in 100 +{outcome}", output)
        assert "+0.10%" in output
        assert "equal calls: [they] differ" in output
        assert "5.0% apart" in output

    def test_programs_get_json(self, bench):
        status, output = bench("failed", "--json")
        report = json.loads(output)
        assert status == commands.FAILURE
        assert (report["passed"], report["noise"]) == (False, 0.05)
        assert report["checks"][1]["figure"] == 3


def test_all_checks_are_run(monkeypatch):
    monkeypatch.setattr(roofline, "CPU_COPY_BYTES", 2**24)
    report = checks.run(CPU)
    names = [check.name for check in report.checks]
    assert len(names) == len(set(names)) == len(checks.DURATIONS["cpu"]) + 6
    assert report.passed, report


@pytest.mark.compiled
@pytest.mark.parametrize("target", [80, 90])
def test_the_spin_compiles_for_gpus_that_need_not_be_here(target):
    (facts,) = compiled_kernels(lambda: Spin(1e-3, GPU)(), target=target)
    assert facts["spilled_bytes"] == 0


@pytest.mark.gpu
def test_it_passes_on_a_gpu():
    report = checks.run(GPU)
    assert report.passed, report
