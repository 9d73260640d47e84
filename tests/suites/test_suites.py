"""Properties of every suite, and its implementations on its smallest cases."""

import json
import re
import subprocess
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

import reference
from colt5_bench.case import DIRECTIONS, FORWARD, FORWARD_BACKWARD
from colt5_bench.loading import invite, load_suites
from colt5_bench.measuring.call import Call
from colt5_bench.measuring.conditions import Conditions
from colt5_bench.measuring.measure import measure
from colt5_bench.measuring.roofline import measure_ceilings
from colt5_bench.measuring.static_facts import compiled_kernels
from colt5_bench.selection import PRESETS, Guest
from colt5_bench.suite import Suite

ROOT = Path(__file__).parents[2]
ALL = load_suites(ROOT)
SUITES = {name: suite for name, suite in ALL.items() if isinstance(suite, Suite)}
"""Suites that measure an operation."""
DEVICES = [torch.device("cpu"), torch.device("cuda")]


def some(cases):
    """The first, the last and some in between. Counting the products of a layer takes a fifth of a second."""
    return [*cases[:-1:12], cases[-1]]


@pytest.fixture(scope="module")
def conditions():
    return Conditions(DEVICES[0], "cpu", "abc", measure_ceilings(DEVICES[0]), max_seconds=0.01)


def test_every_suite_is_found():
    texts = {path.stem: path.read_text() for path in (ROOT / "suites").glob("*.py")}
    assert set(ALL) == {name for name, text in texts.items() if re.search("^SUITE = ", text, re.MULTILINE)}


def test_a_baseline_holds_every_suite():
    planned = ["make", "--dry-run", "--directory", str(ROOT), "baseline", "NAME=any"]
    commands = subprocess.run(planned, check=True, capture_output=True, text=True).stdout
    assert sorted(re.findall(r"--suite (\w+)", commands)) == sorted(SUITES)


WITHOUT_KERNELS = {"flops"}
"""Suites that count products and compute nothing."""


@pytest.mark.compiled
@pytest.mark.parametrize("name", sorted(set(SUITES) - WITHOUT_KERNELS))
def test_kernels_are_compiled_where_there_is_no_gpu(name):
    """Kernels of the first case, whose calls end although no kernel has written anything."""
    suite = SUITES[name]
    case, ours = suite.cases("smoke", DEVICES[0])[0], suite.implementations["ours"]
    call = Call(ours.build(case), suite.problem(case, DEVICES[0]), suite.directions(case)[-1])
    with ours.launching():
        assert compiled_kernels(call, 90, disassemble=False)


@pytest.mark.parametrize("name", ALL)
def test_a_suite_has_the_name_of_its_file_and_a_test(name):
    module = import_module(f"suites.{name}")
    assert module.SUITE.name == name
    assert hasattr(module, f"test_{name}")


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("suite", ALL.values(), ids=ALL.keys())
def test_cases_are_distinct_and_can_be_written_down(suite, preset, device):
    cases = suite.cases(preset, device)
    assert cases
    assert len({case.id for case in cases}) == len(cases)
    for case in cases:
        assert suite.x_axis in json.loads(json.dumps(case.fields()))


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES.keys())
def test_cases_have_directions_a_definition_and_a_cost(suite, preset, device):
    cases = suite.cases(preset, device)
    for case in cases:
        assert set(suite.directions(case)) <= set(DIRECTIONS)
        assert callable(suite.plain(case))
    for case in some(cases):
        assert all(suite.cost(case, direction).bytes > 0 for direction in suite.directions(case))


OPERATIONS = sorted({path.parent.name for path in (ROOT / "kernels").glob("*/api.py")} & {*SUITES})


@pytest.mark.parametrize("name", [*OPERATIONS, "gradients", "segments", "layers"])
def test_an_implementation_that_is_wrong_for_odd_sizes_is_found(name, conditions):
    """By the smallest cases already: the gate of a guest sees no other sizes than those of the suite."""
    suite = replace(SUITES[name], timed=False)
    plain = suite.implementations[suite.reference]

    def build(case):
        function = plain.build(case)

        def spoilt(**inputs):
            output = function(**inputs)
            # Images have three channels.
            is_odd = any(size > 3 and size % 2 for tensor in inputs.values() for size in tensor.shape)
            return torch.where(torch.arange(output.shape[-1]) == 0, 1.1 * output, output) if is_odd else output

        return spoilt

    suite = replace(suite, implementations={suite.reference: replace(plain, build=build)})
    records = [
        record
        for case in suite.cases("smoke", DEVICES[0])
        for record in measure(suite, case, FORWARD, [suite.reference], conditions)
    ]
    assert "wrong" in {record.status for record in records} <= {"ok", "wrong"}


@pytest.mark.parametrize("suite", ALL.values(), ids=ALL.keys())
def test_implementations_go_by_their_names(suite):
    assert suite.reference in suite.implementations
    assert "ours" in suite.implementations or suite.name not in SUITES
    assert all(name == implementation.name for name, implementation in suite.implementations.items())


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES.keys())
def test_backward_costs_more_than_forward(suite):
    cases = [case for case in some(suite.cases("default", DEVICES[0])) if FORWARD_BACKWARD in suite.directions(case)]
    assert cases or suite.name in ("flops", "select"), "a backward pass is measured"
    for case in cases:
        forward, both = (suite.cost(case, direction) for direction in (FORWARD, FORWARD_BACKWARD))
        assert forward.bytes < both.bytes
        assert forward.exponentials <= both.exponentials


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES.keys())
def test_problems_are_the_same_each_time(suite):
    case = suite.cases("smoke", DEVICES[0])[0]
    first, second = (suite.problem(case, DEVICES[0]) for _ in range(2))
    assert first.inputs.keys() == second.inputs.keys()
    assert all(torch.equal(tensor, second.inputs[name]) for name, tensor in first.inputs.items())
    assert torch.equal(first.upstream, second.upstream)


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, suite in SUITES.items() for case in suite.cases("smoke", DEVICES[0])[::5]]
)
def test_every_implementation_that_runs_here_passes_its_gate(name, case, conditions):
    """The first case of each suite is also timed: no honest implementation is refused."""
    is_first = case == SUITES[name].cases("smoke", DEVICES[0])[0]
    suite = replace(SUITES[name], timed=is_first and SUITES[name].timed)
    # Ours runs everywhere, except for cases of several processes.
    of_several = getattr(case, "ranks", 1) > 1
    for direction in suite.directions(case):
        records = measure(suite, case, direction, list(suite.implementations), conditions)
        statuses = {record.implementation: (record.status, record.reason) for record in records}
        assert {status for status, _ in statuses.values()} <= {"ok", "skipped"}, statuses
        assert statuses["ours"][0] == ("skipped" if of_several else "ok")


OWN = {
    "gradients": "coor_descent",
    **dict.fromkeys(
        ("layers", "heads", "sequence_length", "sparse_attention", "training_step"), "ConditionalRoutedAttention"
    ),
}
"""Names in `kernels` of our own implementations of suites, if they differ from those of the suites."""


@pytest.mark.parametrize("name", [name for name, suite in SUITES.items() if suite.guest])
def test_our_own_function_is_right_as_a_guest(name, conditions):
    guest = Guest.parse(f"mine=kernels:{OWN.get(name, name)}")
    suite = replace(invite(SUITES[name], [guest]), timed=False)
    cases = suite.cases("smoke", DEVICES[0])
    case = next(case for case in cases if getattr(case, "kind", "attention") in ("attention", "self_attention"))
    for direction in suite.directions(case):
        (record,) = measure(suite, case, direction, ["mine"], conditions)
        assert record.status == "ok", record.reason


@pytest.mark.parametrize("changed", [{"heavy_dim_head": 8}, {"num_routed_kv": 2}, {"use_null_q_tokens": False}])
def test_a_layer_with_other_parameters_is_told_which(changed):
    def other(*args, **given):
        return reference.ConditionalRoutedAttention(*args, **{**given, **changed})

    case = next(case for case in SUITES["layers"].cases("smoke", DEVICES[0]) if case.kind == "attention")
    with pytest.raises(TypeError, match=r"must have the parameters of the layer that it replaces: .* of shape"):
        SUITES["layers"].guest(other).build(case)
