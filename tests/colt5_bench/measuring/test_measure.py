import json
import os
import random
import re
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from math import nan

import numpy as np
import pytest
import torch
from torch import Tensor

from colt5_bench.case import DIRECTIONS, FORWARD, FORWARD_BACKWARD, Problem, Truth
from colt5_bench.measuring import roofline, static_facts, timing
from colt5_bench.measuring.call import Call
from colt5_bench.measuring.conditions import Conditions
from colt5_bench.measuring.measure import measure
from colt5_bench.measuring.oracle import Oracle
from colt5_bench.measuring.roofline import Ceilings
from colt5_bench.process.settings import SETTINGS, _same
from colt5_bench.records import environment
from colt5_bench.records.results import Timing
from colt5_bench.suite import Implementation, Operation
from tests.colt5_bench import toy

CASE = toy.ToyCase(2, 8)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def conditions():
    return Conditions.on(CPU, "abc")


@pytest.fixture
def timed(monkeypatch):
    """Names of timed calls instead of their times."""
    names = []

    def time_interleaved(calls, *, device, columns, before, after, max_seconds):
        names.extend(calls)
        for name, call in calls.items():
            before[name]()
            after[name](call())
        return {name: {column: Timing(column, [1.0], "confident", 0.0) for column in columns} for name in calls}

    monkeypatch.setattr(timing, "time_interleaved", time_interleaved)
    return names


def run(suite, conditions, direction=FORWARD_BACKWARD, names=None):
    records = measure(suite, CASE, direction, list(names or suite.implementations), conditions)
    return {record.implementation: record for record in records}


def test_a_good_implementation_is_measured_in_full(conditions, timed):
    record = run(toy.suite(toy.good), conditions)["good"]
    assert (record.status, record.reason) == ("ok", "")
    assert record.case == CASE.id
    assert record.fields == {"rows": 2, "n": 8}
    assert record.environment == "abc"
    assert set(record.accuracy) == {"output", "scores"}
    assert set(record.timings) == {"wall"}
    assert record.minimum_bytes == 128
    assert record.limit_seconds > 0
    assert record.peak_bytes >= CASE.rows * CASE.n * 4
    assert record.saved_bytes is not None
    assert timed == ["reference", "good"]


def test_without_a_gpu_kernels_are_compiled_for_those_that_are_named(conditions, timed, monkeypatch):
    launching = []

    @contextmanager
    def launch():
        launching.append(True)
        yield
        launching.pop()

    def compiled_kernels(call, target):
        assert len(call()) == 2
        return [{"name": "kernel", "target": target, "launched": bool(launching)}]

    def unwritten_unless_run(scores):
        """An output has the old content of its memory if kernels were only compiled."""
        return 7 * scores if launching else toy.good(scores)

    monkeypatch.setattr(static_facts, "compiled_kernels", compiled_kernels)
    ours = toy.Implementation("ours", lambda case: unwritten_unless_run, launching=launch)
    suite = toy.suite(implementations={**toy.suite().implementations, "ours": ours})
    records = run(suite, replace(conditions, targets=(80, 90)))
    assert (records["ours"].status, records["ours"].reason) == ("ok", "")
    assert records["ours"].kernels == [{"name": "kernel", "target": each, "launched": True} for each in (80, 90)]
    assert records["reference"].kernels == run(suite, conditions)["ours"].kernels == []


def test_a_kernel_that_does_not_compile_fails_its_implementation(conditions, timed, monkeypatch):
    def compiled_kernels(call, target):
        raise RuntimeError("out of registers")

    monkeypatch.setattr(static_facts, "compiled_kernels", compiled_kernels)
    ours = toy.Implementation("ours", lambda case: toy.good, launching=nullcontext)
    suite = toy.suite(implementations={**toy.suite().implementations, "ours": ours})
    records = run(suite, replace(conditions, targets=(90,)))
    assert (records["ours"].status, records["ours"].reason) == ("error", "RuntimeError: out of registers")
    assert records["reference"].status == "ok"


def test_ceilings_of_the_same_device_are_taken_and_others_measured(monkeypatch):
    measured = Ceilings(1.0, 2.0, {"float32": 3.0}, environment.device_name(CPU), True)
    monkeypatch.setattr(roofline, "measure_ceilings", lambda device: measured)
    given = replace(measured, copy_bandwidth=7.0)
    assert Conditions.on(CPU, "abc").ceilings == measured
    assert Conditions.on(CPU, "abc", json.dumps(asdict(given))).ceilings == given
    others = json.dumps(asdict(replace(given, device="another")))
    assert Conditions.on(CPU, "abc", others).ceilings == measured


def test_operations_of_a_point_get_the_same_other_values_and_another_point_others(conditions, timed, monkeypatch):
    made = []

    def problem(case, device):
        made.extend(case.normal(device, (case.rows, case.n)))
        return toy.problem(case, device)

    other = Operation(problem, toy.truth, lambda case: toy.good)
    suite = toy.suite(
        problem=problem,
        implementations={
            "one": toy.Implementation("one", lambda case: toy.good),
            "two": toy.Implementation("two", lambda case: toy.good, operation=other),
        },
    )
    for _ in range(2):
        run(suite, conditions)
    (first, others, *same), (_, again, *_) = made[:4], made[4:]
    assert all(map(torch.equal, same, (first, others)))
    assert not torch.equal(others, first)
    assert not torch.equal(again, others)


def test_forward_alone_has_no_gradient_and_saves_nothing(conditions, timed):
    record = run(toy.suite(toy.good), conditions, FORWARD)["good"]
    assert set(record.accuracy) == {"output"}
    assert record.saved_bytes is None


@pytest.mark.parametrize(
    ("function", "status", "reason"),
    [
        (toy.wrong, "wrong", "output is off by"),
        (toy.wrong_gradient, "wrong", "gradient of scores is off by"),
        (toy.spoiling, "wrong", "writes to its input scores"),
        (toy.raising, "error", "RuntimeError: no luck with this"),
        (toy.out_of_memory, "out_of_memory", "RuntimeError: "),
    ],
)
def test_a_failure_is_recorded_and_not_timed_and_the_others_go_on(conditions, timed, function, status, reason):
    records = run(toy.suite(function, toy.good), conditions)
    record = records[function.__name__]
    assert record.status == status
    assert record.reason.startswith(reason)
    assert "\n" not in record.reason
    assert record.timings == {}
    assert records["reference"].status == records["good"].status == "ok"
    assert timed == ["reference", "good"]


def test_a_wrong_gradient_is_right_forward(conditions, timed):
    assert run(toy.suite(toy.wrong_gradient), conditions, FORWARD)["wrong_gradient"].status == "ok"


def test_an_oracle_that_fails_fails_every_implementation(conditions, timed):
    def truth(case, problem, direction):
        raise MemoryError("too large")

    records = run(toy.suite(toy.good, truth=truth), conditions)
    assert {record.status for record in records.values()} == {"error"}
    assert {record.reason for record in records.values()} == {"fp64 truth: MemoryError: too large"}
    assert timed == []


def test_a_timer_that_fails_fails_what_it_timed(conditions, monkeypatch):
    def time_interleaved(calls, **_):
        raise RuntimeError("lost the device")

    monkeypatch.setattr(timing, "time_interleaved", time_interleaved)
    records = run(toy.suite(toy.good, toy.wrong), conditions)
    assert records["good"].reason == "timing: RuntimeError: lost the device"
    assert records["wrong"].status == "wrong"


def test_of_several_that_are_timed_the_one_that_fails_fails_alone(conditions, timed, monkeypatch):
    time_interleaved, together = timing.time_interleaved, []

    def failing(calls, **options):
        together.append(list(calls))
        if "late" in calls:
            raise torch.OutOfMemoryError("of the graph's pool")
        return time_interleaved(calls, **options)

    monkeypatch.setattr(timing, "time_interleaved", failing)
    late = toy.Implementation("late", lambda case: toy.good)
    records = run(toy.suite(implementations={**toy.suite(toy.good).implementations, "late": late}), conditions)
    assert (records["late"].status, records["late"].reason) == (
        "out_of_memory",
        "timing: OutOfMemoryError: of the graph's pool",
    )
    assert {name for name, record in records.items() if record.timings} == {"reference", "good"}
    assert together == [["reference", "good", "late"], ["reference"], ["good"], ["late"]]


class TestBrokenMeasurements:
    @pytest.fixture
    def on_gpu(self, conditions, monkeypatch):
        """The record of a call with a given time on a GPU that copies 1 GB/s."""
        slow = replace(conditions.ceilings, copy_bandwidth=1e9)

        def take(**seconds):
            timings = {column: Timing(column, [value], "confident", 0.0) for column, value in seconds.items()}
            monkeypatch.setattr(timing, "time_interleaved", lambda calls, **_: dict.fromkeys(calls, timings))
            return run(toy.suite(), replace(conditions, ceilings=slow), FORWARD)["reference"]

        return take

    @pytest.mark.parametrize("column", ["cold", "graph"])
    def test_a_time_that_memory_does_not_allow_is_refused_and_kept(self, on_gpu, column):
        record = on_gpu(**{"cold": 1e-6, "graph": 1e-6, column: 1e-9})
        assert record.status == "refused"
        assert record.reason.startswith(f"{column} time: 64 GB/s from a cold cache")
        assert record.seconds(column) is None
        assert record.timings[column].refused == [1e-9]
        assert record.timings[column].stopped.startswith("refused: ")

    def test_a_warm_cache_allows_it(self, on_gpu):
        record = on_gpu(cold=1e-6, warm=1e-9)
        assert (record.status, record.seconds("warm")) == ("ok", 1e-9)


def test_what_cannot_run_here_is_skipped_with_its_reason(conditions, timed):
    absent = toy.Implementation("absent", lambda case: toy.raising, lambda case, device: f"needs more than {device}")
    forward = toy.Implementation("forward", lambda case: toy.good, directions=(FORWARD,))
    suite = toy.suite(toy.good)
    suite = toy.suite(implementations={**suite.implementations, "absent": absent, "forward": forward})
    records = run(suite, conditions)
    assert (records["absent"].status, records["absent"].reason) == ("skipped", "needs more than cpu")
    assert (records["forward"].status, records["forward"].reason) == ("skipped", "has no forward+backward")
    assert run(suite, conditions, FORWARD)["forward"].status == "ok"


def test_a_lower_bound_has_no_limit(conditions, timed):
    less = toy.Implementation("less", lambda case: toy.good, partial=True)
    records = run(toy.suite(implementations={**toy.suite(toy.good).implementations, "less": less}), conditions)
    assert records["less"].status == "ok"
    assert records["less"].limit_seconds is records["less"].minimum_bytes is None
    assert records["good"].limit_seconds > 0


class TestAnotherOperation:
    @staticmethod
    def suite(**more):
        def truth(case, problem, direction):
            answer = toy.truth(case, problem, direction)
            return Truth(1.25 * answer.output, {name: 1.25 * gradient for name, gradient in answer.gradients.items()})

        operation = Operation(problem=toy.problem, truth=truth, plain=lambda case: toy.wrong)
        implementations = {
            function.__name__: toy.Implementation(
                function.__name__, lambda case, function=function: function, operation=replace(operation, **more)
            )
            for function in (toy.wrong, toy.raising)
        }
        return toy.suite(implementations={**toy.suite(toy.good).implementations, **implementations})

    def test_is_judged_by_its_own_truth_and_timed_beside_the_suites(self, conditions, timed):
        records = run(self.suite(), conditions)
        assert {name: record.status for name, record in records.items()} == {
            "reference": "ok",
            "good": "ok",
            "wrong": "ok",
            "raising": "error",
        }
        assert timed == ["reference", "good", "wrong"]

    def test_has_not_the_cost_of_the_suites(self, conditions, timed):
        records = run(self.suite(), conditions)
        assert records["wrong"].limit_seconds is records["wrong"].minimum_bytes is None
        assert records["good"].limit_seconds > 0

    def test_without_a_truth_fails_alone(self, conditions, timed):
        def truth(case, problem, direction):
            raise MemoryError("too large")

        records = run(self.suite(truth=truth), conditions)
        assert records["wrong"].reason == "fp64 truth: MemoryError: too large"
        assert records["good"].status == "ok"

    def test_of_the_suite_is_what_an_implementation_computes_otherwise(self, conditions, timed):
        assert run(toy.suite(toy.wrong), conditions)["wrong"].status == "wrong"


def test_metrics_are_recorded_whatever_the_verdict(conditions, timed):
    def metrics(case, problem):
        return {"largest": problem.inputs["scores"].max().item(), "n": case.n}

    counted = toy.Implementation("counted", lambda case: toy.wrong, metrics=metrics)
    records = run(toy.suite(implementations={**toy.suite().implementations, "counted": counted}), conditions)
    largest = toy.problem(CASE, CPU).inputs["scores"].max().item()
    assert records["counted"].status == "wrong"
    assert records["counted"].metrics == {"largest": largest, "n": 8}
    assert records["reference"].metrics == {}


def test_the_oracle_is_not_asked_when_everything_is_skipped(conditions, timed):
    def truth(case, problem, direction):
        raise AssertionError

    absent = toy.Implementation("absent", lambda case: toy.raising, lambda case, device: "absent")
    records = run(toy.suite(implementations={"absent": absent}, truth=truth), conditions)
    assert records["absent"].status == "skipped"


def test_a_bound_of_its_own_changes_the_tolerance(conditions, timed):
    seen = []

    def bound(case, tensor, expected, tolerance):
        seen.append((case, tensor, expected.dtype, tolerance))
        return tolerance.at_least(10.0)

    lax = toy.Implementation("lax", lambda case: toy.wrong, bound=bound)
    record = run(toy.suite(implementations={"lax": lax}), conditions)["lax"]
    assert record.status == "ok"
    assert record.accuracy["scores"].budget == 10.0
    assert [(case, tensor, dtype) for case, tensor, dtype, _ in seen[:2]] == [
        (CASE, "output", torch.float64),
        (CASE, "scores", torch.float64),
    ]


def after_the_first_call(then):
    """A function that is right at first and does something else in all later calls."""

    def build(case):
        calls = []

        def function(scores):
            calls.append(2 * scores)
            return calls[0] if len(calls) == 1 else then(scores, calls[0])

        return function

    return build


def spoil_input(scores, first):
    y = 2 * scores
    scores.zero_()
    return y


def by_address(case):
    known = {}

    def function(scores):
        if scores.data_ptr() not in known:
            known[scores.data_ptr()] = 2 * scores
        return known[scores.data_ptr()].clone()

    return function


LATE_FAULTS = {
    "spoils its input": (after_the_first_call(spoil_input), "writes to its input scores"),
    "is right once": (after_the_first_call(lambda scores, first: 2.5 * scores), "right at first"),
    "is empty later": (after_the_first_call(lambda scores, first: torch.zeros_like(scores)), "right at first"),
    "gives the first output again": (
        after_the_first_call(lambda scores, first: first.clone()),
        "right result for the values of an earlier call",
    ),
    "caches by address": (by_address, "right result for the values of an earlier call"),
    "widens": (lambda case: lambda scores: 2 * scores.double(), "output must have dtype float32, got float64"),
    "widens later": (after_the_first_call(lambda scores, first: 2 * scores.double()), "right at first"),
}


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("fault", LATE_FAULTS)
def test_what_goes_wrong_after_the_first_call_is_found_and_the_others_stay_right(conditions, timed, fault, position):
    build, reason = LATE_FAULTS[fault]
    listed = [("good", toy.Implementation("good", lambda case: toy.good))]
    listed.insert(position, ("faulty", toy.Implementation("faulty", build)))
    records = run(toy.suite(implementations=dict(listed)), conditions, FORWARD)
    assert records["faulty"].status == "wrong"
    assert reason in records["faulty"].reason
    assert records["faulty"].timings == {}
    assert records["good"].status == "ok"
    assert records["good"].timings


@pytest.mark.parametrize("position", [0, 1])
def test_an_input_that_is_spoilt_while_it_is_timed_and_never_else_is_found(conditions, monkeypatch, position):
    """The culprit is not simply the next one."""
    being_timed = []

    def spoiling(scores):
        y = 2 * scores
        if being_timed:
            scores.zero_()
        return y

    def time_interleaved(calls, *, device, columns, before, after, max_seconds):
        being_timed.append(None)
        for name, call in calls.items():
            before[name]()
            after[name](call())
        being_timed.clear()
        return {name: {column: Timing(column, [1.0], "confident", 0.0) for column in columns} for name in calls}

    monkeypatch.setattr(timing, "time_interleaved", time_interleaved)
    listed = [("good", toy.Implementation("good", lambda case: toy.good))]
    listed.insert(position, ("spoiling", toy.Implementation("spoiling", lambda case: spoiling)))
    records = run(toy.suite(implementations=dict(listed)), conditions, FORWARD)
    assert (records["good"].status, bool(records["good"].timings)) == ("ok", True)
    assert records["spoiling"].reason == "writes to its input scores while it is timed"
    assert (records["spoiling"].status, records["spoiling"].timings) == ("wrong", {})


FAULTS = {
    "": lambda right: right,
    "must have dtype float32, got float64": Tensor.double,
    "is off by nan at [0, 0], and 16 of 16": lambda right: right * nan,
    "is off by up to": lambda right: right + 1,
}
"""Results by the beginning of the fault that is found in them."""


class TestReason:
    def judge(self, scores, results):
        """The reason for results, which are allowed an error of some roundings of each element."""
        scores = torch.tensor(scores).expand(2, 8)
        suite = toy.suite(problem=lambda case, device: Problem({"scores": scores}, torch.ones(2, 8)))
        oracle = Oracle.consult(suite, CASE, FORWARD_BACKWARD, CPU, None)
        strict = replace(
            suite.implementations["reference"],
            bound=lambda case, tensor, expected, plain: replace(plain, by_magnitude=0 * plain.by_magnitude),
        )
        return oracle.judge(strict, results(2 * scores))[1]

    @pytest.mark.parametrize("of_output", FAULTS)
    @pytest.mark.parametrize("of_gradient", FAULTS)
    def test_names_all_that_is_wrong(self, of_output, of_gradient):
        gradient = torch.full((2, 8), 2.0)
        reason = self.judge(
            [1.0] * 8, lambda right: {"output": FAULTS[of_output](right), "scores": FAULTS[of_gradient](gradient)}
        )
        named = {"output": of_output, "gradient of scores": of_gradient}
        first = next((f"{name} {fault}" for name, fault in named.items() if fault), "")
        assert reason.startswith(first)
        assert bool(reason) == bool(first)
        assert reason.endswith("; also wrong: gradient of scores") is bool(of_output and of_gradient)
        assert "\n" not in reason

    @pytest.mark.parametrize(("small", "large"), [(1e-3, 0.25), (0.25, 0.5), (1e-4, 3.0)])
    def test_names_the_largest_error_and_the_one_that_exceeds_its_bound_most(self, small, large):
        def results(right):
            output = right.clone()
            output[1, 2] += small
            output[0, 5] += large
            return {"output": output}

        reason = self.judge([200.0, 200.0, 1e-3, *[200.0] * 5], results)
        pattern = (
            r"output is off by up to (\S+): 2 of 16 elements are wrong, most at \[1, 2\], by (\S+) where (\S+) is .*"
        )
        found = [float(each) for each in re.match(pattern, reason).groups()]
        assert found[:2] == pytest.approx([large, small], rel=1e-2)
        assert found[2] < small


def test_an_input_that_is_spoilt_after_it_was_timed_is_found(conditions, timed):
    """In the calls that look for work that is left out, which follow the times and the judgement."""

    def spoiling(scores):
        y = 2 * scores
        if timed and torch.autograd._profiler_enabled():
            scores.zero_()
        return y

    sly = toy.Implementation("sly", lambda case: spoiling)
    record = run(toy.suite(implementations={"sly": sly}), conditions, FORWARD)["sly"]
    assert (record.status, record.timings) == ("wrong", {})
    assert record.reason == "writes to its input scores, but not at first"


def test_a_timed_output_is_judged(conditions, monkeypatch):
    """Any of the timed calls may be judged, so no call is safe to be wrong."""
    being_timed = []

    def wrong_while_it_is_timed(scores):
        return (2.5 if being_timed else 2) * scores

    def time_interleaved(calls, *, device, columns, before, after, max_seconds):
        being_timed.append(True)
        for _ in range(190):
            before["sly"]()
            after["sly"](calls["sly"]())
        being_timed.clear()
        return {"sly": {column: Timing(column, [1.0], "confident", 0.0) for column in columns}}

    monkeypatch.setattr(timing, "time_interleaved", time_interleaved)
    sly = toy.Implementation("sly", lambda case: wrong_while_it_is_timed)
    record = run(toy.suite(implementations={"sly": sly}), conditions, FORWARD)["sly"]
    assert (record.status, record.timings) == ("wrong", {})
    assert record.reason.startswith("right at first, while it is timed output is off by")


CHANGES = {
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "default device": lambda: torch.set_default_device("meta"),
    "grad mode": lambda: torch._C._set_grad_enabled(False),
    "deterministic algorithms": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "float32 matmul precision": lambda: torch.set_float32_matmul_precision("medium"),
    "cudnn.benchmark": lambda: setattr(torch.backends.cudnn, "benchmark", True),
    "cudnn.allow_tf32": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "allocator": lambda: torch._C._accelerator_setAllocatorSettings("max_split_size_mb:100"),
    "flush denormal": lambda: torch.set_flush_denormal(True),
    "torch's random numbers": lambda: torch.manual_seed(7),
    "numpy's random numbers": lambda: np.random.seed(7),  # noqa: NPY002
    "Python's random numbers": lambda: random.seed(7),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_that_an_implementation_changes_is_put_back_and_recorded(conditions, timed, name):
    def leaking(scores):
        y = 2 * scores
        CHANGES[name]()
        return y

    before = {name: setting.read() for name, setting in SETTINGS.items()}
    listed = {each.__name__: toy.Implementation(each.__name__, lambda case, f=each: f) for each in (leaking, toy.good)}
    records = run(toy.suite(implementations=listed), conditions)
    assert records["good"].status == "ok"
    # Its own second call fails if there are no gradients.
    assert records["leaking"].status == ("error" if name == "grad mode" else "ok"), records["leaking"].reason
    assert records["leaking"].changed_settings == [name]
    assert records["good"].changed_settings == []
    after = {name: setting.read() for name, setting in SETTINGS.items()}
    assert all(_same(after[name], before[name]) for name in SETTINGS)
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize("status", ["ok", "wrong"])
def test_elements_at_a_kink_are_not_gated(conditions, timed, status):
    def truth(case, problem, direction):
        answer = toy.truth(case, problem, direction)
        answer.at_kink["scores"] = torch.full((case.rows, case.n), status == "ok")
        return answer

    record = run(toy.suite(toy.wrong_gradient, truth=truth), conditions)["wrong_gradient"]
    assert record.status == status
    assert record.accuracy["scores"].kinks == (CASE.rows * CASE.n if status == "ok" else 0)


def test_a_suite_that_is_not_timed_reports_accuracy_only(conditions, timed):
    record = run(toy.suite(toy.good, timed=False), conditions)["good"]
    assert record.status == "ok"
    assert record.accuracy["scores"].largest == 0
    assert record.timings == {}
    assert timed == []


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_only_what_was_asked_for_is_recorded(conditions, timed, direction):
    assert list(run(toy.suite(toy.good, toy.raising), conditions, direction, ["good"])) == ["good"]
    assert timed == ["good"]


def test_what_a_call_has_to_read_is_what_it_is_given():
    problem = toy.problem(CASE, CPU)
    assert Call(toy.good, problem, FORWARD).read_bytes() == 64
    assert Call(toy.good, problem, FORWARD_BACKWARD).read_bytes() == 128
    problem.upstream = torch.ones(1).expand(2, 8)
    assert Call(toy.good, problem, FORWARD_BACKWARD).read_bytes() == 68


def test_the_call_that_is_timed_leaves_no_gradient_behind():
    problem = toy.problem(CASE, CPU)
    call = Call(toy.good, problem, FORWARD_BACKWARD)
    first, second = call(), call()
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[1], 2 * problem.upstream)
    assert problem.inputs["scores"].grad is None


class OwnError(BaseException):
    pass


class UnsayableError(RuntimeError):
    def __str__(self):
        raise SystemExit("nobody may know")


class HostileError(RuntimeError):
    def __str__(self):
        return "\x1b[2J out of memory \ud800\u2028 in this text"


def leave(error):
    os._exit(0)


def throw(error):
    raise error


ENDINGS = [
    (throw, SystemExit(0), "SystemExit: 0"),
    (throw, SystemExit(), "SystemExit: "),
    (throw, GeneratorExit("no"), "GeneratorExit: no"),
    (throw, StopIteration(1), "StopIteration: 1"),
    (throw, OwnError("own"), "OwnError: own"),
    (throw, UnsayableError(), "UnsayableError: its text cannot be read"),
    (throw, HostileError(), r"HostileError: \x1b[2J out of memory \ud800 in this text"),
    (throw, pytest.skip.Exception("skip"), "Skipped: skip"),
    (throw, pytest.exit.Exception("exit"), "Exit: exit"),
    (throw, RecursionError("deep"), "RecursionError: deep"),
    (leave, None, "SystemExit: called os._exit(0)"),
]

MOMENTS = ("unavailable", "build", "call", "gradient", "later", "bound", "metrics", "truth", "cost")


def ending_at(moment, end):
    """A suite whose `ending` raises an exception at a moment of its measurement; if that moment is shared, all do."""

    class Ending(torch.autograd.Function):
        @staticmethod
        def forward(ctx, scores):
            return 2 * scores

        @staticmethod
        def backward(ctx, upstream):
            end()

    calls = []

    def ending(scores):
        calls.append(scores)
        if moment == "call" or (moment == "later" and len(calls) > 3):
            end()
        return Ending.apply(scores) if moment == "gradient" else 2 * scores

    def at(name, value):
        return (lambda *_: end()) if moment == name else (lambda *_: value)

    implementation = Implementation(
        "ending",
        at("build", ending),
        unavailable=at("unavailable", None),
        bound=(lambda *_: end()) if moment == "bound" else (lambda case, tensor, truth, tolerance: tolerance),
        metrics=at("metrics", {}),
    )
    suite = toy.suite(toy.good)
    shared = {name: at(name, None) for name in ("truth", "cost") if name == moment}
    return replace(suite, implementations={**suite.implementations, "ending": implementation}, **shared)


@pytest.mark.parametrize(
    ("moment", "how", "error", "said"),
    # Each moment with three exceptions, each exception at two moments or three.
    [
        (moment, *ENDINGS[(3 * place + step) % len(ENDINGS)])
        for place, moment in enumerate(MOMENTS)
        for step in range(3)
    ],
)
def test_however_and_whenever_an_implementation_ends_it_costs_its_record(conditions, timed, moment, how, error, said):
    suite = ending_at(moment, lambda: how(error))
    given = run(suite, conditions, names=["ending", "good"])
    assert given["ending"].status == "error"
    assert said.rstrip() in given["ending"].reason
    assert given["ending"].reason.isprintable()
    assert given["good"].status == ("error" if moment in ("truth", "cost") else "ok"), given["good"].reason


@pytest.mark.parametrize(
    ("metric", "status"),
    [(torch.tensor(2.5), "ok"), (np.float32(2.5), "ok"), (torch.ones(2), "error"), ("many", "error"), (None, "error")],
)
def test_a_metric_is_a_number_whatever_holds_it(conditions, timed, metric, status):
    suite = toy.suite(toy.good)
    odd = replace(suite.implementations["good"], metrics=lambda case, problem: {"odd": metric})
    records = run(replace(suite, implementations={**suite.implementations, "good": odd}), conditions)
    assert {name: record.status for name, record in records.items()} == {"reference": "ok", "good": status}
    assert status == "error" or (records["good"].metrics, type(records["good"].metrics["odd"])) == ({"odd": 2.5}, float)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors"), "out_of_memory"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "out_of_memory"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"
            ),
            "out_of_memory",
        ),
        (RuntimeError("shapes differ, which is not out of memory"), "error"),
        (RuntimeError("the file /tmp/out of memory is missing"), "error"),
        (RuntimeError("there is not enough memory in shapes of this kind"), "error"),
        (ValueError("CUDA error: out of memory"), "error"),
    ],
)
def test_a_lack_of_memory_is_known_by_how_its_error_begins(conditions, timed, error, status):
    assert run(ending_at("call", lambda: throw(error)), conditions)["ending"].status == status


def test_a_forked_process_of_an_implementation_may_leave(conditions, timed):
    def forking(scores):
        if not (child := os.fork()):
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        return 2 * scores

    assert run(toy.suite(forking), conditions, FORWARD)["forking"].status == "ok"
