"""The first training step of a layer, and its first steps at new lengths, with nothing compiled before.

Each case has its own process, with an empty cache of Triton. Metrics are those of `steps`. If there is no GPU they come
from dry runs: kernels are counted, and none is compiled.
"""

import copy
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import triton
from torch import Tensor, nn

import kernels
from colt5_bench.case import FORWARD_BACKWARD, Problem
from colt5_bench.measuring.static_facts import driver_for
from colt5_bench.pytest_plugin.replay import replay
from colt5_bench.suite import Suite
from kernels._common.dry_run import announced, launches_of_layer
from kernels._common.launch import Launch, compile_side_by_side
from kernels._common.tensors import triton_for_cpu_tensors
from suites._descent import implementations
from suites._layers import OURS, REFERENCE, LayerCase, cost, plain, problem, truth
from suites.training_step import StepCase

ROOT = Path(__file__).parents[1]

KINDS = ("attention", "feed_forward", "block", "autoregressive", "cross_attention")

LENGTHS = 20
"""Number of new lengths, drawn between SHORTEST and LONGEST."""

SHORTEST, LONGEST = 2048, 60000

MOST_SECONDS = 300
"""Time limit in seconds for the steps of a case."""


def cases(preset: str, device: torch.device) -> list[StepCase]:
    if preset == "smoke":
        return [StepCase(kind, "tiny") for kind in ("attention", "autoregressive")]
    return [StepCase(kind, "document" if device.type == "cuda" else "document-2k") for kind in KINDS]


def metrics(case: LayerCase, problem: Problem) -> dict[str, float]:
    """The results of `steps` in a process that has compiled nothing.

    Raises:
        RuntimeError: the process has failed.
    """
    assert isinstance(case, StepCase)
    command = [sys.executable, "-m", "suites.first_call", case.kind, case.model, problem.upstream.device.type]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache, "TRITON_INTERPRET": "0"}
        ended = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=MOST_SECONDS, check=False
        )
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)}: {ended.stderr[-2000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def steps(case: StepCase, device: str) -> dict[str, float]:
    """Take steps at the length of the case and at new ones.

    Returns:
        kernels: number compiled for the first step. stalls: steps at new lengths that compile. later_kernels: number of
        kernels that these compile. On a GPU also first_seconds, of the first step, and longest_stall, the seconds of
        the longest of these steps; 0 if there is none.
    """
    compiled: list[object] = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **given: compiled.append(given)
    layer = case.layer.make(kernels, True)
    take_step = _on_a_gpu(layer.cuda()) if device == "cuda" else _without_a_gpu(layer)
    numbers, seconds = [], []
    rng = random.Random(case.id)
    for length in (None, *(rng.randint(SHORTEST, LONGEST) for _ in range(LENGTHS))):
        before, start = len(compiled), time.perf_counter()
        take_step(_inputs(case, length, device))
        numbers.append(len(compiled) - before)
        seconds.append(time.perf_counter() - start)
    stalls = [duration for number, duration in zip(numbers[1:], seconds[1:], strict=True) if number]
    found: dict[str, float] = {"kernels": numbers[0], "stalls": len(stalls), "later_kernels": sum(numbers[1:])}
    if device == "cuda":
        found |= {"first_seconds": seconds[0], "longest_stall": max(stalls, default=0.0)}
    return found


def _inputs(case: StepCase, length: int | None, device: str) -> dict[str, Tensor]:
    """Tensors of the case, or of another length. On a CPU their memory is never accessed."""
    make = torch.randn if device == "cuda" else torch.empty
    shapes = {name: (b, length or n, d) for name, (b, n, d) in case.layer.inputs.items()}
    return {name: make(shape, device=device, requires_grad=True) for name, shape in shapes.items()}


def _on_a_gpu(layer: nn.Module) -> Callable[[dict[str, Tensor]], None]:
    # The library of matrix products is loaded before.
    torch.ones(64, 64, device="cuda").mm(torch.ones(64, 64, device="cuda"))

    def take_step(inputs: dict[str, Tensor]) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            output = layer(**inputs)
        output.backward(torch.ones_like(output))
        torch.cuda.synchronize()

    return take_step


def _without_a_gpu(layer: nn.Module) -> Callable[[dict[str, Tensor]], None]:
    """Make Triton assume that it compiles. This process launches nothing, so it has no effect on results."""
    triton.compiler.compile = lambda *_, **__: object()

    def told(module: nn.Module, inputs: dict[str, Tensor]) -> list[Launch]:
        with torch.autocast("cpu", torch.bfloat16), announced(module, type(module).forward, **inputs):
            return [*launches_of_layer()()]

    def take_step(inputs: dict[str, Tensor]) -> None:
        with triton_for_cpu_tensors(), driver_for(90):
            # A copy has no earlier lengths, and so no expected ones.
            own = told(copy.deepcopy(layer), inputs)
            compile_side_by_side(own, lambda: told(layer, inputs), device=-1)

    return take_step


SUITE = Suite(
    name="first_call",
    description="kernels that the first step of a layer compiles, and stalls at new lengths",
    cases=cases,
    directions=lambda case: (FORWARD_BACKWARD,),
    implementations=implementations(REFERENCE, replace(OURS, metrics=metrics)),
    reference="reference",
    problem=problem,
    truth=truth,
    plain=plain,
    cost=cost,
    x_axis="kind",
)


def test_first_call(record, benchmark):
    replay(record, benchmark)


if __name__ == "__main__":
    kind, model, device = sys.argv[1:]
    print(json.dumps(steps(StepCase(kind, model), device)))
