import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep

import pytest
import torch
import torch._dynamo

from colt5_bench.measuring import roofline
from colt5_bench.records.lines import figures
from colt5_bench.records.parts import merge
from colt5_bench.records.provenance import Code
from colt5_bench.records.results import Writer, load
from colt5_bench.report.exchange import export
from colt5_bench.startup import PACKAGES
from tests.colt5_bench.repository import commit

# `pytester` forgets every module that a run in this process imports. PyTorch cannot import its compiler twice, which it
# does on first use: hence the import above.
pytest_plugins = ("pytester",)

ROOT = Path(__file__).parents[3]
TOY = Path(__file__).parents[1] / "toy.py"


@pytest.fixture(scope="module")
def ceilings():
    return roofline.measure_ceilings(torch.device("cpu"))


KNOWN = """
from colt5_bench.records.provenance import Code

Code.of = classmethod(lambda cls, file: cls(file.parents[1], {"revision": 40 * "0", "dirty": False}))
"""
"""Gives all code a known revision, because a run is not resumed if git does not know the harness."""


@pytest.fixture
def run(pytester, monkeypatch, ceilings):
    """Run pytest on the toy suite, in a repository, with some implementations besides the reference."""
    monkeypatch.setattr(Code, "of", Code.of)
    exec(KNOWN)
    # Measured once for all of these runs.
    monkeypatch.setattr(roofline, "measure_ceilings", lambda device: ceilings)
    # pytest-benchmark turns itself off in a worker of pytest-xdist, which this process may be.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    pytester.makepyfile(test_toy=TOY.read_text())
    (pytester.path / ".gitignore").write_text("*\n!*.py\n")
    commit(pytester.path)
    # Other tests of this process may have imported the packages of the real checkout.
    for package in PACKAGES:
        monkeypatch.delitem(sys.modules, package, raising=False)

    def run(implementations, *options):
        monkeypatch.setenv("TOY", implementations)
        plugins = ("-p", "colt5_bench.pytest_plugin.plugin", "-p", "no:cacheprovider")
        return pytester.runpytest_inprocess(*plugins, "--device=cpu", "--preset=smoke", *options)

    return run


def test_every_point_is_a_test_and_a_record(run, pytester):
    result = run("good,wrong,raising", "--out=results", "--benchmark-json=benchmark.json")
    result.assert_outcomes(passed=4, failed=4)
    result.stdout.fnmatch_lines(["*wrong: output is off by*", "*error: RuntimeError: no luck with this*"])

    taken = load(pytester.path / "results" / "toy.jsonl")
    records = taken.records
    assert len({record.key for record in records}) == len(records) == 8
    assert {record.environment for record in records} == set(taken.environments)

    (environment,) = taken.environments.values()
    assert environment["ceilings"]["copy_bandwidth"] > 1e8
    assert set(environment["ceilings"]["products"]) == {"float32", "bfloat16", "float16"}

    # pytest-benchmark has exactly the measured samples, and nothing from failed calls.
    benchmarks = json.loads((pytester.path / "benchmark.json").read_text())["benchmarks"]
    kept = {tuple(map(benchmark["params"].get, ("direction", "implementation"))): benchmark for benchmark in benchmarks}
    measured = {(record.direction, record.implementation): record for record in records if record.status == "ok"}
    assert set(kept) == set(measured)
    for point, record in measured.items():
        assert kept[point]["stats"]["data"] == record.timings["wall"].samples
        assert kept[point]["extra_info"]["column"] == "wall"
        assert kept[point]["extra_info"]["peak_bytes"] == record.peak_bytes
        assert kept[point]["group"] == f"rows=2,n=8 {record.direction}"
    # The same holds for later exports of the records.
    exported = {each["name"]: each for each in json.loads(export(taken, "pytest-benchmark"))["benchmarks"]}
    assert len(exported) == len(benchmarks)
    for benchmark in benchmarks:
        made = exported[benchmark["name"]]
        for entry in ("stats", "extra_info", "group", "param"):
            assert figures(made[entry]) == benchmark[entry]


def test_options_select(run, pytester):
    run("good,wrong", "--preset=default", "--impl=good", "--cases=n=16", "--out=results").assert_outcomes(passed=2)
    records = load(pytester.path / "results" / "toy.jsonl").records
    assert [record.key for record in records] == [
        ("toy", "rows=2,n=16", "forward", "good"),
        ("toy", "rows=2,n=16", "forward+backward", "good"),
    ]


def test_what_pytest_deselects_is_not_measured(run, pytester):
    run("good,raising", "-k", "good and not backward", "--out=results").assert_outcomes(passed=1, deselected=5)
    assert len(load(pytester.path / "results" / "toy.jsonl").records) == 1


def test_without_a_place_for_results_nothing_is_written(run, pytester):
    before = set(pytester.path.rglob("*.jsonl"))
    run("good").assert_outcomes(passed=4)
    assert set(pytester.path.rglob("*.jsonl")) == before


def test_no_case_is_no_failure_of_pytest(run):
    run("good", "--cases=n=17").assert_outcomes(skipped=1)


def test_what_is_expected_and_not_recorded_fails_the_run(run, pytester):
    pytester.makeconftest(
        """
        import pytest

        @pytest.hookimpl(tryfirst=True)
        def pytest_runtest_protocol(item):
            return True if "reference" in item.name else None
        """
    )
    pytester.makepyfile(
        test_toy=TOY.read_text().replace("def suite(", "def _suite(").replace("SUITE = suite", "SUITE = _suite")
    )
    result = run("good", "--impl=reference")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*expected and not measured*", "toy rows=2,n=8 forward reference"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--device=tpu", "*--device must be auto, cpu, cuda or cuda:<index>, got 'tpu'*"),
        ("--preset=huge", "*invalid choice: 'huge'*"),
        ("--cases=n=8 and and", "*-k must join parts of case ids*got 'n=8 and and'*"),
        ("--shard=0/2", "*--shard must be I/N with I from 1 to N, such as 1/4, got '0/2'*"),
        ("--time-limit=0", "*--time-limit must be a number of seconds above 0, such as 600, got '0'*"),
        ("--resume", "*--resume needs --out DIR, the directory of the run to complete.*"),
    ],
)
def test_a_wrong_option_is_a_usage_error(run, option, message):
    result = run("good", option)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])


def test_suites_are_not_spread_over_workers(run):
    pytest.importorskip("xdist")
    result = run("good", "-n", "1")
    assert result.ret != pytest.ExitCode.OK
    assert "leave out -n" in result.stdout.str() + result.stderr.str()


def test_collecting_alone_misses_nothing(run):
    result = run("good", "--collect-only")
    assert result.ret == pytest.ExitCode.OK
    result.stdout.no_fnmatch_line("*expected and not measured*")


def results(pytester, directory="results"):
    return load(pytester.path / directory / "toy.jsonl")


def wait_for(condition, seconds=120):
    until = monotonic() + seconds
    while not condition():
        assert monotonic() < until
        sleep(0.05)


def test_a_killed_run_loses_the_case_under_way_and_is_completed(run, pytester, monkeypatch):
    """With an incomplete last line, and without remaining processes."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    options = ["-p", "colt5_bench.pytest_plugin.plugin", "--device=cpu", "--out=results"]
    # The server that forks processes needs a shorter path for its socket.
    temporary = pytester.path / ("long" * 25)
    temporary.mkdir()
    killed = subprocess.Popen(
        [sys.executable, "-c", f"{KNOWN}\nimport pytest\npytest.main({[*options, '--isolate', 'test_toy.py']!r})"],
        env={
            **environment,
            "PYTHONPATH": str(ROOT),
            "TOY": "good,hanging",
            "TMPDIR": str(temporary),
            # The same as in this process, which completes the run.
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        },
        stdout=subprocess.DEVNULL,
    )
    hanging = pytester.path / "hanging"
    wait_for(lambda: hanging.exists() and hanging.read_text())
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    wait_for(lambda: not Path("/proc", hanging.read_text()).exists())

    before = results(pytester).records
    assert [record.key[1:] for record in before] == [
        ("rows=2,n=8", direction, name)
        for direction in ("forward", "forward+backward")
        for name in ("reference", "good", "hanging")
    ]
    with (pytester.path / "results" / "toy.jsonl").open("a") as file:
        file.write('{"kind": "record", "suite": "toy", "cas')
    assert results(pytester).cut_off

    Path("released").touch()
    run("good,hanging", "--preset=default", "--out=results", "--resume").assert_outcomes(passed=12)
    completed = results(pytester)
    assert not completed.cut_off
    assert completed.records[:6] == before
    assert len({record.key for record in completed.records}) == len(completed.records) == 12
    assert {record.status for record in completed.records} == {"ok"}
    assert len(completed.environments) == len({record.environment for record in completed.records}) == 2


def test_resuming_measures_errors_again_and_keeps_what_is_a_result(run, pytester):
    run("raising,wrong", "--impl=raising", "--impl=wrong", "--out=both").assert_outcomes(failed=4)
    run("raising,wrong", "--impl=wrong", "--out=wrong").assert_outcomes(failed=2)
    before = {name: results(pytester, name) for name in ("both", "wrong")}
    run("raising,wrong", "--impl=raising", "--impl=wrong", "--out=both", "--resume").assert_outcomes(failed=4)
    run("raising,wrong", "--impl=wrong", "--out=wrong", "--resume").assert_outcomes(failed=2)
    assert results(pytester, "wrong") == before["wrong"]
    again = results(pytester, "both").records
    assert [record.key for record in again] == [record.key for record in before["both"].records]
    assert {record.environment for record in again}.isdisjoint(before["both"].environments)


def test_what_is_there_is_neither_written_over_nor_mixed_with_what_is_not_like_it(run, pytester):
    run("good", "--impl=good", "--out=results")
    kept = results(pytester)
    for options, message in {
        (): "*exists already: complete it with --resume, or choose a directory without results with --out.",
        (
            "--resume",
            "--impl=reference",
        ): "*cannot be completed, because that run and this one differ in options.implementations*",
        ("--resume", "--preset=default"): "*differ in options.preset 'smoke' and 'default': start a new run*",
    }.items():
        result = run("good", "--impl=good", "--out=results", *options)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines([message])
    assert results(pytester) == kept


def test_shards_are_the_whole_run_and_a_shard_without_a_case_is_there(run, pytester):
    run("good", "--preset=default", "--out=whole").assert_outcomes(passed=8)
    run("good", "--preset=default", "--shard=1/3", "--out=1").assert_outcomes(passed=4)
    run("good", "--preset=default", "--shard=2/3", "--out=2").assert_outcomes(passed=4)
    run("good", "--preset=default", "--shard=3/3", "--out=3").assert_outcomes(skipped=1)
    merged = merge([pytester.path / name for name in "312"], pytester.path / "merged.jsonl")
    assert [record.key for record in merged.records] == [record.key for record in results(pytester, "whole").records]
    assert load(merged.path).records == merged.records
    assert len(merged.environments) == 3


def test_what_is_measured_can_neither_leave_nor_take_the_results_elsewhere(run, pytester):
    run("leaving,good", "--preset=default", "--out=results").assert_outcomes(passed=8, failed=4)
    taken = results(pytester)
    assert len(taken.records) == 12
    assert {record.reason for record in taken.records if record.status != "ok"} == {"SystemExit: called os._exit(0)"}
    assert ["current directory"] in [record.changed_settings for record in taken.records]


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_where_another_run_writes_none_begins(run, pytester, resume):
    path = pytester.path / "results" / "toy.jsonl"
    if resume:
        run("good", "--impl=good", "--out=results")
    writer = Writer(path)
    before = path.read_bytes()
    result = run("good", "--impl=good", "--out=results", *resume)
    writer.close()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*cannot use *results/toy.jsonl: another run is writing to it"])
    assert not resume or path.read_bytes() == before


FAILING_FILES = [
    ("open_exclusively", errno.EACCES, pytest.ExitCode.USAGE_ERROR),
    ("open_exclusively", errno.EROFS, pytest.ExitCode.USAGE_ERROR),
    ("atomic_write", errno.EACCES, pytest.ExitCode.USAGE_ERROR),
    ("atomic_write", errno.ENOSPC, pytest.ExitCode.USAGE_ERROR),
    ("append", errno.ENOSPC, pytest.ExitCode.INTERNAL_ERROR),
    ("append", errno.EIO, pytest.ExitCode.INTERNAL_ERROR),
]


@pytest.mark.parametrize(("step", "number", "status"), FAILING_FILES)
def test_where_results_cannot_be_written_a_line_says_why(run, pytester, monkeypatch, step, number, status):
    run("good", "--impl=good", "--out=results")
    before = (pytester.path / "results" / "toy.jsonl").read_bytes()

    def fail(*arguments):
        raise OSError(number, os.strerror(number), "results/toy.jsonl")

    monkeypatch.setattr(f"colt5_bench.records.results.{step}", fail)
    options = ["--out=results", "--resume"] if step != "append" else ["--out=other"]
    result = run("good", "--impl=good", *options)
    assert result.ret == status
    output = result.outlines + result.errlines
    assert len([line for line in output if f"cannot use results/toy.jsonl: {os.strerror(number)}" in line]) == 1
    assert not any("Traceback" in line for line in output)
    assert (pytester.path / "results" / "toy.jsonl").read_bytes() == before
