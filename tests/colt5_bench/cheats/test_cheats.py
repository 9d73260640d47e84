"""Guests that try to look faster or more accurate than they are. None of them gets a time."""

import re
from pathlib import Path

import pytest
import torch

from colt5_bench.case import FORWARD, FORWARD_BACKWARD, Truth
from colt5_bench.loading import invite
from colt5_bench.measuring import call
from colt5_bench.measuring.conditions import Conditions
from colt5_bench.measuring.measure import measure
from colt5_bench.process.functions import Functions
from colt5_bench.process.settings import RANDOM, Settings
from colt5_bench.selection import Guest
from colt5_bench.suite import Implementation
from tests.colt5_bench import toy

FOLDER = Path(__file__).parent

REFUSED = {
    "keeps_by_content": "a second call with the same inputs leaves out .*aten::mul",
    "keeps_by_version": "a second call with the same inputs leaves out .*aten::mul",
    "keeps_what_it_was_given_last": "a second call with the same inputs leaves out .*aten::mul",
    "works_in_a_thread": "its results change after it has returned",
    "leaves_it_to_a_worker": "its results change after it has returned",
    "is_lazy": "it must return plain tensors, got a Lazy",
    "is_lazy_later": "it must return plain tensors, got a Lazy",
    "is_meta": "it must return dense tensors with values, got torch.strided on meta",
    "is_fake": "it must return plain tensors, got a FakeTensor",
    "has_one_buffer": "its output overwrites the results of an earlier call",
    "replaces_the_clock": r"it replaces colt5_bench.measuring.rounds.perf_counter by fast_clock of calls.py:\d+",
    "replaces_the_clock_later": "it replaces colt5_bench.measuring.rounds.perf_counter by .* while it is timed",
    "replaces_the_clock_of_python": "it replaces time.perf_counter by fast_clock",
    "replaces_chance": "it replaces random.SystemRandom.random by fast_clock",
    "replaces_a_function_of_pytorch": "it replaces torch.equal by everything_is_right",
    "replaces_a_method_of_tensors": "it replaces torch.Tensor.isfinite by everything_is_right",
    "replaces_the_judge": "it replaces colt5_bench.measuring.accuracy.passes by everything_is_right",
    "replaces_the_code_of_the_judge": "it replaces colt5_bench.measuring.accuracy.passes by",
    "replaces_the_margin": "it replaces colt5_bench.measuring.accuracy.MARGIN by 1000000000.0",
    "leaves_a_mode_on": "it replaces functions of PyTorch by a Halving",
    "takes_threads_later": "changes settings only while it is timed: threads",
    "takes_precision_later": "changes settings only while it is timed: float32 matmul precision",
    "changes_the_default_dtype_later": "changes settings only while it is timed: default dtype",
    "clock_replaced_at_import": "it replaces time.perf_counter by .* when it is imported",
    "operator_replaced_at_import": "it replaces aten/digamma/CPU of PyTorch when it is imported",
}
WRONG = {
    "keeps_by_address": "(while it is timed|later) output is off .* right result for .* earlier call",
    "keeps_by_shape": "(while it is timed|later) output is off .* right result for .* earlier call",
    "keeps_its_gradient": "(while it is timed|later) gradient of scores is off .*",
    "answers_made_at_import": "(while it is timed|later) output is off .* right result for .* earlier call",
    "does_nothing_later": "(while it is timed|later) output is off",
    "does_nothing_for_the_clock": "(while it is timed|later) output is off",
    "takes_the_truth": "(while it is timed|later) output is off",
    "writes_to_its_input_later": "writes to its input scores",
    "writes_its_output_to_its_input": "writes to its input scores",
}
ON_A_GPU = {
    "works_in_another_stream": "another stream still works on them|results change after it has returned|output is off",
    "is_captured_without_work": "(while it is timed|later|as a CUDA graph) output is off",
}
HONEST_ON_A_GPU = {"has_one_buffer"}
"""CUDA graphs, which are allowed, write all outputs to the same memory."""

FOUND_BY_EITHER_ON_A_GPU = {"works_in_a_thread", "leaves_it_to_a_worker"}
"""A thread writes its results before or after they are compared with their copies."""

EXPECTED = {
    **{name: ("refused", why) for name, why in REFUSED.items()},
    **{name: ("wrong", why) for name, why in WRONG.items()},
}


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def conditions(request):
    return Conditions.on(torch.device(request.param), "abc", max_seconds=0.02)


def measured(name, conditions, file="calls"):
    """Records of the toy suite with a guest, added as by `--impl NAME=FILE:FUNCTION`."""
    own = FOLDER / f"{name}.py"
    place = f"{own}:double" if own.exists() else f"{FOLDER}/{file}.py:{name}"
    suite = invite(toy.suite(), [Guest.parse(f"{name}={place}")])
    direction = FORWARD_BACKWARD if name == "keeps_its_gradient" else FORWARD
    records = measure(suite, toy.ToyCase(2, 8), direction, [name, "reference"], conditions)
    return {record.implementation: record for record in records}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_cheat_is_found_and_costs_nobody_else_anything(conditions, name):
    functions, settings = Functions(), Settings(left_out=RANDOM)
    records = measured(name, conditions)
    status, why = EXPECTED[name]
    if conditions.device.type == "cuda":
        if name in HONEST_ON_A_GPU:
            assert records[name].status == "ok", records[name].reason
            return
        if name in FOUND_BY_EITHER_ON_A_GPU:
            status, why = records[name].status, f"{why}|output is off"
            assert status in ("refused", "wrong"), records[name].reason
    assert (records[name].status, records[name].timings) == (status, {}), records[name].reason
    assert re.search(why, records[name].reason)
    assert (records["reference"].status, records["reference"].reason) == ("ok", "")
    # A registered kernel stays registered.
    assert functions.restore() in ("", "aten/digamma/CPU of PyTorch")
    assert settings.restore() == []


@pytest.mark.parametrize("name", ["memory", "Call", "a_new_one"])
def test_a_second_look_starts_from_how_things_are_then(name, monkeypatch):
    """The second one takes over observations of the first one that are still true, and nothing else."""
    Functions()
    now, later = (lambda: 1), (lambda: 2)
    monkeypatch.setattr(call, name, now, raising=False)
    functions = Functions()
    assert functions.restore() == ""
    assert getattr(call, name) is now
    setattr(call, name, later)
    assert f"colt5_bench.measuring.call.{name}" in functions.restore()
    assert getattr(call, name) is now


def test_a_clock_that_is_replaced_once_gives_nobody_a_time(conditions):
    """The culprit among several is unknown. Each is timed again separately, by the true clock."""
    records = measured("replaces_the_clock_once", conditions)
    assert records["replaces_the_clock_once"].status in ("ok", "refused")
    assert records["reference"].status == "ok"
    assert all(0 < sample < 1 for each in records.values() for t in each.timings.values() for sample in t.samples)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_A_GPU)
def test_a_cheat_on_a_gpu_is_found(name):
    """Results of another stream may be late for the first judgement, or only for a later one."""
    records = measured(name, Conditions.on(torch.device("cuda"), "abc", max_seconds=0.02))
    assert records[name].status in ("refused", "wrong")
    assert records[name].timings == {}
    assert re.search(ON_A_GPU[name], records[name].reason)
    assert records["reference"].status == "ok"


HONEST = re.findall(r"^def (\w+)\(scores\)", (FOLDER / "honest.py").read_text(), re.MULTILINE)


@pytest.mark.filterwarnings("ignore:slow path")
@pytest.mark.parametrize("name", HONEST)
def test_nobody_who_is_honest_is_refused(conditions, name):
    records = measured(name, conditions, "honest")
    assert {each: (record.status, record.reason) for each, record in records.items()} == {
        name: ("ok", ""),
        "reference": ("ok", ""),
    }


def test_no_cheat_is_forgotten():
    """Covers each function with a scores tensor, and each file with an effect at import."""
    written = re.findall(r"^def (\w+)\(scores\)", (FOLDER / "calls.py").read_text(), re.MULTILINE)
    assert {*written, *(file.stem for file in FOLDER.glob("*_at_import.py"))} == {
        *EXPECTED,
        *ON_A_GPU,
        "replaces_the_clock_once",
    }


def copied(scores):
    return scores.clone()


def given(scores):
    return scores


@pytest.mark.parametrize("plain", [copied, given])
def test_an_output_in_the_memory_of_an_input_is_for_those_whose_operation_is_a_view(conditions, plain):
    """The same rule as for plain PyTorch."""

    def truth(case, problem, direction):
        return Truth(problem.inputs["scores"].double())

    functions = {each.__name__: Implementation(each.__name__, lambda case, each=each: each) for each in (copied, given)}
    suite = toy.suite(implementations=functions, truth=truth, plain=lambda case: plain, reference="copied")
    made, view = measure(suite, toy.ToyCase(2, 8), FORWARD, [*functions], conditions)
    assert made.status == "ok", made.reason
    assert view.status == ("ok" if plain is given else "refused"), view.reason
    assert view.reason == ("" if plain is given else "its output shares memory with its input scores")


def test_a_setting_that_an_import_changes_is_put_back_and_said(conditions, tmp_path):
    """It may be an accident: scripts often begin like this."""
    (tmp_path / "mine.py").write_text("""
import torch

torch.manual_seed(12345)
torch.set_default_dtype(torch.float64)
torch.set_float32_matmul_precision("high")
torch.set_num_threads(torch.get_num_threads() + 1)


def double(scores):
    return 2 * scores
""")
    settings = Settings()
    suite = invite(toy.suite(), [Guest.parse(f"mine={tmp_path}/mine.py:double")])
    assert settings.restore() == []
    (record,) = measure(suite, toy.ToyCase(2, 8), FORWARD, ["mine"], conditions)
    assert (record.status, record.reason) == ("ok", "")
    random_numbers = {"torch's random numbers"} | (
        {"random numbers of CUDA"} if conditions.device.type == "cuda" else set()
    )
    assert set(record.changed_settings) == {"threads", "default dtype", "float32 matmul precision", *random_numbers}
