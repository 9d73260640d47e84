"""The exact soft top-k by the spread of the scores and the temperature. These decide how hard it is to solve."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

import kernels
import reference
from colt5_bench.case import FORWARD, Case, Cost, Problem, Truth
from colt5_bench.pytest_plugin.replay import replay
from colt5_bench.suite import Implementation, Suite
from suites._descent import HEAVY_SHARE, both_directions, implementations
from suites._ours import by_kernels, guest


@dataclass(frozen=True)
class SoftTopkCase(Case):
    """The soft top-k of `rows n` normally distributed fp32 scores."""

    rows: int
    n: int
    k: int
    eps: float
    std: float
    """Standard deviation of the scores."""


def cases(preset: str, device: torch.device) -> list[SoftTopkCase]:
    spreads, temperatures = [1.0, 5.0, 25.0], [0.02, 0.1, 1.0]
    if preset == "smoke":
        shapes, spreads, temperatures = [(4, 512)], [1.0, 25.0], [0.02, 1.0]
    elif device.type == "cuda":
        shapes = [(1024, 4096)]
    else:
        shapes = [(32, 4096)]
    if preset == "full":
        shapes = [(1024, 4096), (64, 32768), (8, 131072), (1, 1048576)]
    return [
        SoftTopkCase(rows, n, n // HEAVY_SHARE, eps, std)
        for (rows, n), std, eps in product(shapes, spreads, temperatures)
    ]


def problem(case: SoftTopkCase, device: torch.device) -> Problem:
    generator = case.generator()
    scores, upstream = (torch.randn(case.rows, case.n, generator=generator) for _ in range(2))
    return Problem({"scores": (case.std * scores).to(device)}, upstream.to(device))


def relaxing(function: Callable[..., Tensor]) -> Callable[[SoftTopkCase], Callable[..., Tensor]]:
    return lambda case: partial(function, k=case.k, eps=case.eps)


plain = relaxing(reference.soft_topk)


def truth(case: SoftTopkCase, problem: Problem, direction: str) -> Truth:
    """The closed form in fp64, by autograd."""
    scores = problem.inputs["scores"].detach().double().requires_grad_(direction != FORWARD)
    y = plain(case)(scores)
    if direction == FORWARD:
        return Truth(y)
    (gradient,) = torch.autograd.grad(y, scores, problem.upstream.double())
    return Truth(y.detach(), {"scores": gradient})


def cost(case: SoftTopkCase, direction: str) -> Cost:
    """Scores read and output written, with an exponential to solve for the shift and one for the output.

    Backward, the output is what the gradient is made of: it, the upstream gradient and the scores' own, no exponential.
    """
    entries = case.rows * case.n
    return Cost(bytes=entries * 4 * (2 if direction == FORWARD else 5), exponentials=2 * entries)


SUITE = Suite(
    name="soft_topk",
    description="the exact soft top-k by spread of the scores and temperature",
    cases=cases,
    directions=both_directions,
    implementations=implementations(
        Implementation("reference", plain),
        by_kernels(relaxing(kernels.soft_topk)),
    ),
    reference="reference",
    problem=problem,
    truth=truth,
    plain=plain,
    cost=cost,
    guest=guest(relaxing),
    x_axis="std",
)


def test_soft_topk(record, benchmark):
    replay(record, benchmark)
