"""Runs in the formats of other tools, checked against their documentation."""

import json
from dataclasses import replace
from math import inf, isnan, nan
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest_benchmark.cli import main as pytest_benchmark_cli

from colt5_bench import cli, commands
from colt5_bench.loading import load_suites
from colt5_bench.records.results import STATUSES, Divergence, Run, Timing, write
from colt5_bench.report.exchange import FORMATS, export
from colt5_bench.report.layout import View
from colt5_bench.selection import SelectionError
from tests.colt5_bench.made import BOTH, FORWARD, record

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {"key": "a", "utc": "2026-11-23T22:05:36+00:00", "torch": "2.13.0", "cuda": None, "packages": {"x": None}}


class Entry(msgspec.Struct, forbid_unknown_fields=True):
    """github-action-benchmark, README, `customSmallerIsBetter`."""

    name: str
    unit: str
    value: float
    range: str = ""
    extra: str = ""


class Metric(msgspec.Struct, forbid_unknown_fields=True):
    """https://bencher.dev/bmf.json"""

    value: float
    lower_value: float | None = None
    upper_value: float | None = None


Metrics = dict[
    Annotated[str, msgspec.Meta(min_length=1, max_length=1024)],
    dict[Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")], Metric],
]

Words = Annotated[str, msgspec.Meta(min_length=1)]
Positive = Annotated[float, msgspec.Meta(ge=0)]


class Scalar(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["scalar"]
    value: int | float | bool


class Workload(msgspec.Struct, forbid_unknown_fields=True):
    axes: dict[str, Annotated[int, msgspec.Meta(ge=0)]]
    inputs: dict[str, Scalar]
    uuid: Words


class Machine(msgspec.Struct, forbid_unknown_fields=True):
    hardware: Words
    libs: dict[str, str]


class Correctness(msgspec.Struct, forbid_unknown_fields=True):
    max_relative_error: Positive | Literal["NaN", "Infinity"]
    max_absolute_error: Positive | Literal["NaN", "Infinity"]
    extra: dict[str, Any]


class Performance(msgspec.Struct, forbid_unknown_fields=True):
    latency_ms: Positive
    reference_latency_ms: Positive
    speedup_factor: Positive


class Evaluation(msgspec.Struct, forbid_unknown_fields=True):
    status: Literal["PASSED", "INCORRECT_NUMERICAL", "RUNTIME_ERROR"]
    environment: Machine
    timestamp: Words
    log: str
    correctness: Correctness | None = None
    performance: Performance | None = None


class Trace(msgspec.Struct, forbid_unknown_fields=True):
    """flashinfer-bench 0.1, `flashinfer_bench.data.Trace`."""

    definition: Words
    workload: Workload
    solution: Words
    evaluation: Evaluation


FIELDS = st.fixed_dictionaries(
    {"n": st.integers(-2, 2**40), "eps": st.floats(0, 1), "ties": st.booleans(), "k": st.none() | st.integers(0, 9)},
    optional={"dtype": st.sampled_from(["float32", "bfloat16"])},
)
SAMPLES = st.lists(st.floats(1e-7, 1e2), min_size=1, max_size=12)
NUMBERS = st.sampled_from([0.0, 1e-7, 3.0, inf, nan])


@st.composite
def runs(draw):
    """Records of all statuses, timed or not, of one machine."""
    made = []
    for fields, direction in draw(
        st.lists(st.tuples(FIELDS, st.sampled_from([FORWARD, BOTH])), min_size=1, max_size=3)
    ):
        for name in ("reference", "ours", "theirs"):
            each = record(name, direction, status=draw(st.sampled_from(STATUSES)), reason="why", **fields)
            if each.status == "ok":
                columns = draw(st.sets(st.sampled_from(["cold", "wall", "eager"])))
                each.timings = {column: Timing(column, draw(SAMPLES), "confident", 0.1) for column in sorted(columns)}
                each.peak_bytes = draw(st.none() | st.integers(0, 2**40))
            each.accuracy = draw(st.just({}) | NUMBERS.map(lambda error: {"output": Divergence(error, error, 0.0)}))
            each.metrics = draw(st.dictionaries(st.sampled_from(["lost", "not_largest", "x" * 99]), NUMBERS))
            each.environment = draw(st.sampled_from(["a", "unknown"]))
            made.append(each)
    return Run("made", {"a": ENVIRONMENT}, list({each.key: each for each in made}.values()))


def decoded(run, form):
    return json.loads(export(run, form), parse_constant=pytest.fail)


def ok(run):
    return [each for each in run.records if each.status == "ok"]


def title(each):
    return " ".join(each.key)


@given(runs())
@settings(max_examples=25, deadline=None)
def test_github_action_benchmark_gets_every_time(run):
    entries = {each.name: each for each in msgspec.convert(decoded(run, "github-action-benchmark"), list[Entry])}
    for each in ok(run):
        for column, timing in each.timings.items():
            assert entries[f"{title(each)} {column}"].value == pytest.approx(1e3 * median(timing.samples))
    assert {name for name in entries if name.endswith(" peak")} == {
        f"{title(each)} peak" for each in ok(run) if each.peak_bytes is not None
    }


@given(runs())
@settings(max_examples=25, deadline=None)
def test_bencher_gets_latencies_with_their_interval(run):
    benchmarks = msgspec.convert(decoded(run, "bencher"), Metrics)
    assert set(benchmarks) == {title(each) for each in ok(run)}
    main = "cold" if any("cold" in each.timings for each in run.records) else "wall"
    for each in ok(run):
        assert ("latency" in benchmarks[title(each)]) == (main in each.timings)
        if main in each.timings:
            latency = benchmarks[title(each)]["latency"]
            assert latency.value == pytest.approx(1e9 * median(each.timings[main].samples))
            assert (latency.lower_value or 0) <= latency.value * 1.000001
            assert (latency.upper_value or inf) >= latency.value * 0.999999
        if not isnan(each.metrics.get("lost", nan)) and each.metrics["lost"] < inf:
            assert benchmarks[title(each)]["lost"].value == each.metrics["lost"]


@given(runs(), st.sampled_from(["reference", "ours", "theirs"]))
@settings(max_examples=25, deadline=None)
def test_flashinfer_bench_gets_a_trace_of_whatever_ran(run, reference_name):
    views = {each.suite: View(reference=reference_name) for each in run.records}
    lines = export(run, "flashinfer-bench", views).splitlines()
    traces = [msgspec.json.decode(line, type=Trace) for line in lines]
    main = "cold" if any("cold" in each.timings for each in run.records) else "wall"
    ran = [e for e in run.records if e.status not in ("ok", "skipped") or (e.status == "ok" and main in e.timings)]
    for each, trace in zip(ran, traces, strict=True):
        evaluation = trace.evaluation
        # Required by its class.
        assert (evaluation.correctness is not None) == (evaluation.status in ("PASSED", "INCORRECT_NUMERICAL"))
        assert (evaluation.performance is not None) == (evaluation.status == "PASSED") == (each.status == "ok")
        assert all(trace.workload.axes[name] == each.fields[name] for name in trace.workload.axes)
        assert trace.solution == each.implementation
    reference = {e.group: e for e in ran if e.implementation == reference_name and e.status == "ok"}
    for each, trace in zip(ran, traces, strict=True):
        if each.status == "ok" and each.group in reference:
            speed_up = reference[each.group].seconds(main) / each.seconds(main)
            assert trace.evaluation.performance.speedup_factor == pytest.approx(speed_up)


@pytest.mark.parametrize("name", ["coor_descent", "segments", "sparse_attention"])
def test_the_command_knows_what_a_suite_is_measured_by(name, tmp_path, capsys):
    reference = load_suites(ROOT)[name].reference
    made = [replace(record(each, times={"wall": 1e-3 * at}), suite=name) for at, each in enumerate((reference, "x"), 1)]
    write(tmp_path / "run.jsonl", [], made)
    assert cli.main(["export", str(tmp_path / "run.jsonl"), "--format", "flashinfer-bench"]) == commands.DONE
    traces = [msgspec.json.decode(line, type=Trace) for line in capsys.readouterr().out.splitlines()]
    assert [each.evaluation.performance.reference_latency_ms for each in traces] == [pytest.approx(1.0)] * 2


def timed_run(path, factor):
    """A run of two implementations, whose times are multiplied by a factor."""
    made = []
    for name, times in (("reference", [8e-3, 9e-3, 8.5e-3]), ("ours", [2e-3, 2.5e-3, 2.25e-3])):
        each = record(name, times={"wall": 1.0})
        each.timings["wall"].samples = [factor * seconds for seconds in times]
        each.environment = "a"
        made.append(each)
    write(path, [ENVIRONMENT], made)
    return path


def test_pytest_benchmark_compares_what_it_gets(tmp_path, capsys, monkeypatch):
    files = [tmp_path / name for name in ("before.json", "after.json")]
    for factor, file in enumerate(files, start=1):
        run = timed_run(tmp_path / f"{file.stem}.jsonl", factor)
        assert cli.main(["export", str(run), "--format", "pytest-benchmark", "--out", str(file)]) == commands.DONE
    capsys.readouterr()
    arguments = ["compare", *map(str, files), "--columns=median", "--group-by=fullname"]
    monkeypatch.setattr("sys.argv", ["pytest-benchmark", *arguments])
    pytest_benchmark_cli()
    shown = capsys.readouterr().out
    assert "suites/toy.py::test_toy[rows=8 n=512 eps=0.1-forward-ours]': 2 tests" in shown
    # Both medians of each, and their ratio.
    assert shown.count("(2.0") >= 2
    assert "2.2500" in shown
    assert "17.0000" in shown


@pytest.mark.parametrize("form", FORMATS)
def test_what_cannot_be_told_apart_is_refused(form, tmp_path):
    one = record(times={"wall": 1e-3})
    with pytest.raises(SelectionError, match="no records"):
        export(Run(tmp_path), form)
    with pytest.raises(SelectionError, match="export the run of one machine"):
        export(Run(tmp_path, {}, [one, replace(one, device="Other GPU")]), form)
    with pytest.raises(SelectionError, match=r"2 records of toy .* ours"):
        export(Run(tmp_path, {}, [one, replace(one)]), form)


def test_it_goes_to_the_standard_output(tmp_path, capsys):
    assert cli.main(["export", str(timed_run(tmp_path / "a.jsonl", 1)), "--format", "bencher"]) == commands.DONE
    assert msgspec.json.decode(capsys.readouterr().out, type=Metrics)
