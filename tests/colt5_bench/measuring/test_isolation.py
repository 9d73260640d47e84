"""Planted faults: processes that die, hang, and lose their CUDA context."""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from colt5_bench.case import FORWARD, TRAINING
from colt5_bench.loading import load_suite
from colt5_bench.measuring import isolation
from colt5_bench.measuring.conditions import Conditions
from colt5_bench.measuring.failures import BrokenContextError
from colt5_bench.measuring.isolation import Measurer, Task
from colt5_bench.measuring.measure import measure
from colt5_bench.process.settings import SETTINGS, Setting
from colt5_bench.records.results import load
from colt5_bench.suite import Trainee, TrainingSuite
from tests.colt5_bench import toy
from tests.colt5_bench.measuring.test_training import course

ROOT = Path(__file__).parents[3]
CASE = toy.ToyCase(2, 16)
ASSERTED = "AcceleratorError: CUDA error: device-side assert triggered CUDA kernel errors might be ..."


@pytest.fixture(scope="module")
def conditions():
    return Conditions.on(torch.device("cpu"), "abc", max_seconds=0.05)


@pytest.fixture
def task(tmp_path, monkeypatch):
    """The toy case, in a suite that is the same in this process and in another."""
    monkeypatch.chdir(tmp_path)

    def task(source):
        file = tmp_path / "suite_of_this_test.py"
        file.write_text(f"from tests.colt5_bench import toy\nSUITE = {source}\n")
        return Task(load_suite(file), CASE, FORWARD, file, "default")

    return task


@pytest.mark.alone
def test_what_dies_hangs_or_breaks_its_context_is_recorded_and_the_others_are_measured(task, conditions):
    names = ["reference", "dying", "wrong", "breaking", "hanging", "good"]
    measurer = Measurer(isolated=True, time_limit=4)
    given = task("toy.suite(toy.good, toy.dying, toy.hanging, toy.breaking, toy.wrong)")
    records = measurer.measure(given, names, conditions)
    assert [record.implementation for record in records] == names
    assert {record.implementation: (record.status, record.reason) for record in records if record.status != "ok"} == {
        "dying": ("error", "its process was ended by SIGKILL, as the system does when memory runs out"),
        "breaking": ("error", ASSERTED),
        "hanging": ("error", "took longer than the time limit of 4 s"),
        "wrong": ("wrong", records[2].reason),
    }
    assert records[2].reason.startswith("output is off by")
    assert {record.implementation for record in records if record.timings} == {"reference", "good"}
    assert {record.environment for record in records} == {"abc"}
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("hanging").read_text()), 0)


def test_a_broken_context_makes_a_run_go_on_in_other_processes(task, conditions):
    measurer = Measurer(isolated=False)
    records = measurer.measure(task("toy.suite(toy.good, toy.breaking)"), ["reference", "breaking", "good"], conditions)
    assert [record.status for record in records] == ["ok", "error", "ok"]
    assert records[1].reason == ASSERTED
    assert measurer.isolated


def test_where_nobody_knows_what_was_to_blame_each_is_measured_alone(task, conditions):
    given = task("toy.suite(toy.good, truth=lambda case, problem, direction: toy.dying(None))")
    records = Measurer(isolated=True).measure(given, ["reference", "good"], conditions)
    assert {(record.status, record.reason[:35]) for record in records} == {
        ("error", "its process was ended by SIGKILL, a"),
    }


def test_a_process_that_cannot_even_begin_says_why(task, conditions):
    given = task("toy.suite(toy.good)")
    given.file.write_text("import no_such_module")
    (record,) = Measurer(isolated=True).measure(given, ["good"], conditions)
    assert record.status == "error"
    assert record.reason == "its process failed: ModuleNotFoundError: No module named 'no_such_module'"


class TestABrokenContext:
    def test_leaves_what_was_finished_and_what_broke_it(self, conditions):
        suite = toy.suite(toy.good, toy.wrong, toy.out_of_memory, toy.breaking)
        names = ["wrong", "good", "out_of_memory", "breaking", "reference"]
        begun = []
        with pytest.raises(BrokenContextError, match="device-side assert") as broken:
            measure(suite, CASE, FORWARD, names, conditions, begun.append)
        assert {record.implementation: record.status for record in broken.value.finished} == {
            "wrong": "wrong",
            "out_of_memory": "out_of_memory",
            "breaking": "error",
        }
        assert begun == names[:4]

    def test_leaves_models_that_are_trained(self, conditions):
        """Otherwise they would be trained again."""

        def build(case, trainee, device, corpus):
            if trainee.name == "breaking":
                raise RuntimeError(ASSERTED)
            return course()

        suite = TrainingSuite(
            name="lines",
            description="",
            cases=toy.cases,
            implementations={name: Trainee(name, lambda case: None) for name in ("first", "breaking", "last")},
            reference="first",
            data=lambda corpus: "",
            course=build,
        )
        with pytest.raises(BrokenContextError, match="device-side assert") as broken:
            measure(suite, CASE, TRAINING, list(suite.implementations), conditions)
        assert {record.implementation: (record.status, bool(record.curves)) for record in broken.value.finished} == {
            "first": ("ok", True),
            "breaking": ("error", False),
        }

    def test_leaves_what_is_right_if_nothing_is_timed(self, conditions):
        suite = toy.suite(toy.good, toy.breaking, timed=False)
        with pytest.raises(BrokenContextError, match="device-side assert") as broken:
            measure(suite, CASE, FORWARD, ["good", "breaking", "reference"], conditions)
        good, breaking = broken.value.finished
        assert (good.implementation, good.status, {*good.accuracy}) == ("good", "ok", {"output"})
        assert (breaking.implementation, breaking.status) == ("breaking", "error")

    def test_while_several_are_timed_blames_none(self, conditions, monkeypatch):
        def time_interleaved(calls, **_):
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

        monkeypatch.setattr("colt5_bench.measuring.timing.time_interleaved", time_interleaved)
        with pytest.raises(BrokenContextError, match="timing: RuntimeError: Triton Error") as broken:
            measure(toy.suite(toy.good, toy.wrong), CASE, FORWARD, ["reference", "wrong", "good"], conditions)
        assert [record.implementation for record in broken.value.finished] == ["wrong"]

    @pytest.mark.parametrize("at_once", [True, False])
    def test_is_noticed_although_no_setting_of_the_gpu_can_be_read(self, conditions, monkeypatch, at_once):
        """An error of a kernel may be raised by the call, or later by any use of the GPU."""
        is_broken, threads = False, torch.get_num_threads()

        def read():
            if is_broken:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

        def breaking(scores):
            nonlocal is_broken
            is_broken = True
            torch.set_num_threads(threads + 1)
            if at_once:
                read()
            return toy.good(scores)

        monkeypatch.setitem(SETTINGS, "random numbers of CUDA", Setting(read, lambda value: None))
        listed = {"breaking": toy.Implementation("breaking", lambda case: breaking)}
        with pytest.raises(BrokenContextError, match="illegal memory access") as broken:
            measure(toy.suite(implementations=listed), CASE, FORWARD, ["breaking"], conditions)
        ((name, status),) = ((record.implementation, record.status) for record in broken.value.finished)
        assert (name, status) == ("breaking", "error")
        assert torch.get_num_threads() == threads

    def test_is_no_ordinary_error(self, conditions):
        records = measure(
            toy.suite(toy.raising, toy.out_of_memory), CASE, FORWARD, ["raising", "out_of_memory"], conditions
        )
        assert [record.status for record in records] == ["error", "out_of_memory"]

    def test_lets_go_of_the_gpu_and_never_of_an_object(self, monkeypatch):
        """Neither objects in the frames of its error, nor those that were garbage by then."""
        called, seen = [], []
        driver = SimpleNamespace(
            cuDeviceGet=lambda handle, index: called.append(index),
            cuDevicePrimaryCtxReset_v2=lambda handle: called.append("reset"),
        )
        monkeypatch.setattr(isolation.ctypes, "CDLL", lambda name: driver)

        class Held:
            def __init__(self):
                seen.append(weakref.ref(self))

        def leave_garbage():
            garbage = Held()
            garbage.cycle = garbage

        def fail():
            held = Held()
            raise BrokenContextError(f"lost with {held}")

        leave_garbage()
        try:
            fail()
        except BrokenContextError as error:
            isolation._reset_context(torch.device("cuda", 1), error)
        gc.collect()
        assert [each() is not None for each in seen] == [True, True]
        assert called == [1, "reset"]

    @pytest.mark.gpu
    @pytest.mark.alone
    def test_of_a_real_gpu(self, tmp_path):
        """In a separate run, because this process would lose its context. The memory of the lost context is free for
        later calls."""
        (tmp_path / "test_toy.py").write_text(Path(toy.__file__).read_text())
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "colt5_bench.pytest_plugin.plugin",
            "test_toy.py",
            "--device=cuda",
            "--preset=smoke",
        ]
        run = subprocess.run(
            [*command, "--out=results"],
            cwd=tmp_path,
            env={**environment, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "TOY": "breaking,greedy"},
            capture_output=True,
            text=True,
            check=False,
            timeout=250,
        )
        # The remains of the context do not end the run at exit.
        assert run.returncode == pytest.ExitCode.TESTS_FAILED, run.stdout + run.stderr
        records = load(tmp_path / "results" / "toy.jsonl").records
        assert [record.implementation for record in records] == ["reference", "breaking", "greedy"] * 2, run.stdout
        for record in records:
            assert record.status == ("error" if record.implementation == "breaking" else "ok"), record.reason
            assert "device-side assert triggered" in record.reason or record.status == "ok"
