"""The exact soft top-k by the spread of the scores and the temperature. These decide how hard it is to solve.

Next to it are other relaxations of the top-k, whose k entries are soft in another way, with the temperature as their
softness. Each is judged by itself in fp64, entmax by its closed form:

    entmax        the projection of scores / eps to the k-subsets (budget_bisect)
    softtorch     the sum of the k rows of SoftTorch's top-k (2602.08824), by SoftSort (2006.16038): its other methods
                  hold n x n matrices

difftopk and torchsort are not included: difftopk holds n x n matrices for each layer of a sorting network and has no
fp64, and torchsort gives ranks and no selection.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import product

import torch
from torch import Tensor

import kernels
import reference
from colt5_bench.case import FORWARD, Case, Cost, Problem, Truth
from colt5_bench.pytest_plugin.replay import replay
from colt5_bench.suite import Implementation, Operation, Suite
from suites._descent import HEAVY_SHARE, both_directions, implementations, lenient
from suites._kinks import ENDS, SATURATION, Kinks
from suites._ours import by_kernels, guest
from suites.peers import ENTMAX, SOFTTORCH

HALVINGS = 100
"""More steps than fp64 numbers have bits."""

MOST_OF_MATRICES = {"cuda": 2**30, "cpu": 2**26}
"""Most elements of k x n matrices, for all rows, for SoftTorch, by type of device."""


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
        shapes, spreads, temperatures = [(4, 511)], [1.0, 25.0], [0.02, 1.0]
    elif device.type == "cuda":
        shapes = [(1024, 4096), (1023, 4095)]
    else:
        shapes = [(32, 4096)]
    if preset == "full":
        shapes = [(1024, 4096), (64, 32768), (8, 131072), (1, 1048576)]
    return [
        SoftTopkCase(rows, n, n // HEAVY_SHARE, eps, std)
        for (rows, n), std, eps in product(shapes, spreads, temperatures)
    ]


def problem(case: SoftTopkCase, device: torch.device) -> Problem:
    scores, upstream = case.normal(device, (case.rows, case.n), (case.rows, case.n))
    return Problem({"scores": case.std * scores}, upstream)


Relax = Callable[[SoftTopkCase], Callable[..., Tensor]]
"""From a case to a function from scores to the relaxed selection, both `rows n`."""


def relaxing(function: Callable[..., Tensor]) -> Relax:
    return lambda case: partial(function, k=case.k, eps=case.eps)


plain = relaxing(reference.soft_topk)


def truth(
    case: SoftTopkCase, problem: Problem, direction: str, plain: Relax = plain, kinks: Kinks | None = SATURATION
) -> Truth:
    """A closed form in fp64, by autograd."""
    scores = problem.inputs["scores"].detach().double().requires_grad_(direction != FORWARD)
    y = plain(case)(scores)
    if direction == FORWARD:
        return Truth(y)
    upstream = problem.upstream.double()
    (gradient,) = torch.autograd.grad(y, scores, upstream)
    at_kink = {} if kinks is None else {"scores": kinks.undecided(scores.detach(), y.detach(), upstream, case.eps)}
    return Truth(y.detach(), {"scores": gradient}, at_kink)


def cost(case: SoftTopkCase, direction: str) -> Cost:
    """Scores read and output written, with an exponential to solve for the shift and one for the output.

    The gradient is computed from the output: output and grad_output read, the gradient of scores written, no
    exponential.
    """
    entries = case.rows * case.n
    return Cost(bytes=entries * 4 * (2 if direction == FORWARD else 5), exponentials=2 * entries)


def projected(case: SoftTopkCase) -> Callable[..., Tensor]:
    """The nearest point to scores / eps with entries from 0 to 1 that sum to k: (s / eps - t) between 0 and 1."""

    def function(scores: Tensor) -> Tensor:
        scaled = scores / case.eps
        with torch.no_grad():
            low, high = scaled.amin(-1, keepdim=True) - 1, scaled.amax(-1, keepdim=True)
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                too_many = (scaled - middle).clamp(0, 1).sum(-1, keepdim=True) > case.k
                low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
            whole, inside = scaled - high >= 1, (scaled - high > 0) & (scaled - high < 1)
        # The mean of the entries between 0 and 1, minus their share of the sum, is t.
        count = inside.sum(-1, keepdim=True)
        rest = case.k - whole.sum(-1, keepdim=True)
        t = (scaled.masked_fill(~inside, 0).sum(-1, keepdim=True) - rest) / count.clamp(min=1)
        return torch.where(inside, scaled - t, whole.to(scaled))

    return function


def by_entmax(case: SoftTopkCase) -> Callable[..., Tensor]:
    budget_bisect = import_module("entmax").budget_bisect
    return lambda scores: budget_bisect(scores / case.eps, budget=case.k)


def by_softtorch(case: SoftTopkCase) -> Callable[..., Tensor]:
    topk = import_module("softtorch").topk
    options = {"softness": case.eps, "standardize": False, "method": "softsort"}
    return lambda scores: topk(scores, case.k, **options)[1].sum(dim=-2)


def softtorch_missing(case: SoftTopkCase, device: torch.device) -> str | None:
    elements = case.rows * case.n * case.k
    if elements > MOST_OF_MATRICES[device.type]:
        return f"computes k x n matrices, which take too long with {elements} elements"
    return SOFTTORCH(case, device)


def _relaxation(
    name: str,
    build: Relax,
    missing: Callable[..., str | None],
    define: Relax | None = None,
    kinks: Kinks | None = None,
) -> Implementation[SoftTopkCase]:
    """Another relaxation, judged by its definition in fp64, or by itself in fp64 if it has none."""
    define = build if define is None else define
    operation = Operation(problem, partial(truth, plain=define, kinks=kinks), define)
    return Implementation(name, build, missing, bound=lenient, operation=operation)


SUITE = Suite(
    name="soft_topk",
    description="the exact soft top-k by spread of the scores and temperature",
    cases=cases,
    directions=both_directions,
    implementations=implementations(
        Implementation("reference", plain),
        by_kernels(relaxing(kernels.soft_topk)),
        _relaxation("entmax", by_entmax, ENTMAX, projected, ENDS),
        _relaxation("softtorch", by_softtorch, softtorch_missing),
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
