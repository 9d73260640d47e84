"""The differentiable top-k of colt5-attention's README, compared with the hard one, a bound for its speed."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kernels
import reference
from colt5_bench.case import FORWARD, Cost, Problem, Truth
from colt5_bench.pytest_plugin.replay import replay
from colt5_bench.suite import Implementation, Suite
from suites import _descent
from suites._descent import CONSTANT, DescentCase, both_directions, implementations, lenient, problem
from suites._ours import by_kernels, guest
from suites.peers import colt5_not_installed, colt5_topk, in_triton_missing

COOR_DESCENT_K_RATIO = 9 / 8
"""The default of colt5-attention's README: coordinate descent sums to 9 / 8 of the number of selected entries."""


def cases(preset: str, device: torch.device) -> list[DescentCase]:
    """The example in colt5-attention's README is 1024 x 512 with k = 10."""
    document = replace(DescentCase.at(1024, 512, 20, CONSTANT), k=10)
    if preset == "smoke":
        return [replace(document, rows=16), replace(document, rows=15, n=511)]
    shapes = [(1024, 512, 10)]
    if preset == "full" or device.type == "cuda":
        shapes += [(64, 32768, 1024), (8, 131072, 1024), (1023, 4095, 100)]
    return [replace(document, rows=rows, n=n, k=k) for rows, n, k in shapes]


def selected_values(
    function: Callable[..., tuple[Any, ...]], *, fused: bool
) -> Callable[[DescentCase], Callable[..., Tensor]]:
    """The selected values times their gates: the part of the result that depends on both forward and gradient."""

    def build(case: DescentCase) -> Callable[..., Tensor]:
        settings = {**case.arguments, "coor_descent_k_ratio": COOR_DESCENT_K_RATIO, "fused": fused}
        return lambda scores: function(scores, **settings)[0]

    return build


plain = selected_values(reference.topk, fused=False)


def selection_problem(case: DescentCase, device: torch.device) -> Problem:
    """The gradient of the output has k values per row."""
    whole = problem(case, device)
    return Problem(whole.inputs, whole.upstream[:, : case.k].contiguous())


def truth(case: DescentCase, problem: Problem, direction: str) -> Truth:
    """The definition in fp64. Rows at a kink are those of its coordinate descent."""
    scores = problem.inputs["scores"].detach().double().requires_grad_(direction != FORWARD)
    values = plain(case)(scores)
    if direction == FORWARD:
        return Truth(values)
    (gradient,) = torch.autograd.grad(values, scores, problem.upstream.double())
    sums_to = min(case.k * COOR_DESCENT_K_RATIO, case.n)
    at_kink = _descent.entries_at_kink(case, scores.detach(), k=sums_to)
    return Truth(values.detach(), {"scores": gradient}, {"scores": at_kink})


def cost(case: DescentCase, direction: str) -> Cost:
    """Scores read, and a value and its index written for each selected entry; then the same again for the gradient."""
    whole, size = _descent.cost(case, direction), getattr(torch, case.dtype).itemsize
    entries, selected = case.rows * case.n, case.rows * case.k
    bytes_forward = entries * size + selected * (size + 8)
    backward = 0 if direction == FORWARD else 2 * entries * size + selected * size
    return Cost(bytes=bytes_forward + backward, exponentials=whole.exponentials)


SUITE = Suite(
    name="topk",
    description="differentiable top-k beside the hard one",
    cases=cases,
    directions=both_directions,
    implementations=implementations(
        Implementation("reference", plain),
        by_kernels(selected_values(kernels.topk, fused=True), bound=_descent.promised),
        Implementation[DescentCase](
            "colt5_plain",
            lambda case: selected_values(colt5_topk(), fused=False)(case),
            colt5_not_installed,
            bound=lenient,
        ),
        Implementation[DescentCase](
            "colt5_triton",
            lambda case: selected_values(colt5_topk(), fused=True)(case),
            in_triton_missing,
            bound=lenient,
        ),
        Implementation[DescentCase](
            "torch_topk",
            lambda case: lambda scores: scores.topk(case.k, dim=-1).values,
            directions=(FORWARD,),
            partial=True,
        ),
    ),
    reference="reference",
    problem=selection_problem,
    truth=truth,
    plain=plain,
    cost=cost,
    guest=guest(partial(selected_values, fused=True), bound=lenient),
)


def test_topk(record, benchmark):
    replay(record, benchmark)
