"""The softmax of rows, as an example of a suite. Replace it by your own operation."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from colt5_bench.case import DIRECTIONS, FORWARD, Case, Cost, Problem, Truth
from colt5_bench.pytest_plugin.replay import replay
from colt5_bench.records.results import Record
from colt5_bench.suite import Implementation, Suite


@dataclass(frozen=True)
class RowsCase(Case):
    """Its fields make the id of the case, by which `-k` selects cases and results are compared."""

    rows: int
    n: int
    dtype: str


def cases(preset: str, device: torch.device) -> list[RowsCase]:
    """`smoke` shows that everything runs, `default` is for daily use, and `full` has all cases."""
    if preset == "smoke":
        return [RowsCase(4, 33, "float32")]
    lengths = [1000, 4096] if preset == "default" else [64, 1000, 4096, 65536]
    return [RowsCase(1024, n, dtype) for n in lengths for dtype in ("float32", "bfloat16")]


def problem(case: RowsCase, device: torch.device) -> Problem:
    """The arguments by name, the gradient of the output, and the arguments that have one. The generator is seeded by
    the case, so the numbers are always the same."""
    generator, dtype = case.generator(), getattr(torch, case.dtype)
    x, upstream = (torch.randn(case.rows, case.n, generator=generator).to(device, dtype) for _ in range(2))
    return Problem({"x": x}, upstream, ("x",))


def plain(case: RowsCase) -> Callable[..., Tensor]:
    """Plain PyTorch in the dtype of the case. It sets the allowed errors of implementations."""
    return lambda x: (x - x.amax(-1, keepdim=True)).exp() / (x - x.amax(-1, keepdim=True)).exp().sum(-1, keepdim=True)


def truth(case: RowsCase, problem: Problem, direction: str) -> Truth:
    """The output in fp64, and the gradients by name if the direction has a backward pass."""
    x = problem.inputs["x"].detach().double().requires_grad_()
    output = plain(case)(x)
    if direction == FORWARD:
        return Truth(output.detach())
    (gradient,) = torch.autograd.grad(output, x, problem.upstream.double())
    return Truth(output.detach(), {"x": gradient})


def cost(case: RowsCase, direction: str) -> Cost:
    """The fewest bytes that have to be read and written. The limit in the table follows from it."""
    size = case.rows * case.n * getattr(torch, case.dtype).itemsize
    return Cost(bytes=2 * size if direction == FORWARD else 5 * size, exponentials=case.rows * case.n)


def calling(function: Callable[..., Tensor]) -> Callable[[RowsCase], Callable[..., Tensor]]:
    """Make a function of the arguments of a problem from one with the arguments of the operation, for a case."""
    return lambda case: lambda x: function(x, dim=-1)


SUITE = Suite(
    # The name of the file.
    name=Path(__file__).stem,
    description="speed and divergence of the softmax of rows",
    cases=cases,
    directions=lambda case: DIRECTIONS,
    implementations={
        "reference": Implementation("reference", plain),
        "torch": Implementation("torch", calling(torch.softmax)),
    },
    # The others are compared with this one.
    reference="reference",
    problem=problem,
    truth=truth,
    plain=plain,
    cost=cost,
    # With it, `--impl mine=file.py:function` puts `function(x, dim=-1)` beside the others.
    guest=lambda function: Implementation("guest", calling(function)),
    # A field of the case, against which plots are drawn.
    x_axis="n",
)


def test_suite(record: Record, benchmark: BenchmarkFixture) -> None:
    """For `pytest FILE`, which also measures the suite."""
    replay(record, benchmark)
