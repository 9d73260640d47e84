"""Kernels of first steps, counted without compiling."""

import subprocess
import sys

import pytest
import torch

from colt5_bench.measuring.call import Call
from colt5_bench.measuring.static_facts import compiled_kernels
from kernels._common.tensors import INTERPRETED
from suites import first_call
from suites.first_call import KINDS, ROOT, SUITE
from suites.training_step import StepCase

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

CPU = torch.device("cpu")

FIRST_STEPS = """
import os, sys
from suites import first_call

first_call.LENGTHS = 0
for kind in sys.argv[1:]:
    if not os.fork():
        print(first_call.steps(first_call.StepCase(kind, "tiny"), "cpu")["kernels"], flush=True)
        os._exit(0)
    os.wait()
"""
"""A process for each kind. Steps at new lengths are covered by test_suites.py and tests/kernels/test_dry_run.py."""


@pytest.fixture(scope="module")
def kernels_of_first_steps():
    """Numbers by kind, from forks of a process that has imported everything and compiled nothing."""
    ended = subprocess.run([sys.executable, "-c", FIRST_STEPS, *KINDS], cwd=ROOT, check=True, stdout=subprocess.PIPE)
    return dict(zip(KINDS, map(int, ended.stdout.split()), strict=True))


@pytest.mark.compiled
@pytest.mark.parametrize("kind", KINDS)
def test_as_many_kernels_are_counted_as_a_step_compiles(kind, kernels_of_first_steps):
    case = StepCase(kind, "tiny")
    ours, problem = SUITE.implementations["ours"], SUITE.problem(case, CPU)
    call = Call(ours.build(case), problem, SUITE.directions(case)[-1])
    with ours.launching():
        compiled = compiled_kernels(call, 90, disassemble=False)
    assert kernels_of_first_steps[kind] == len(compiled)


def test_a_process_that_fails_says_why():
    case = StepCase("attention", "no such model")
    problem = SUITE.problem(StepCase("attention", "tiny"), CPU)
    with pytest.raises(RuntimeError, match="no such model"):
        first_call.metrics(case, problem)
