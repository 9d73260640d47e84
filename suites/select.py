"""The hard top-k of a router by the length of its rows, beside torch.topk.

What is compared is the values at the indices, which ours has to gather first: of equal scores torch.topk may give any.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
import reference
from colt5_bench.case import FORWARD, Case, Cost, Problem, Truth
from colt5_bench.pytest_plugin.replay import replay
from colt5_bench.suite import Implementation, Suite
from suites._descent import implementations
from suites._ours import by_kernels, guest


@dataclass(frozen=True)
class SelectCase(Case):
    """The k largest of each of `rows n` normally distributed fp32 scores."""

    rows: int
    n: int
    k: int


def cases(preset: str, device: torch.device) -> list[SelectCase]:
    if preset == "smoke":
        return [SelectCase(4, 512, 64)]
    shapes = [(1024, 512, 10), (64, 32768, 1024), (2, 2**20, 1024)]
    if preset == "full":
        shapes += [(1, 2**20, 1024), (1, 2**20, 16384), (8, 131072, 4096), (4, 2**22, 1024)]
    return [SelectCase(*shape) for shape in shapes]


def values(select: Callable[..., Tensor]) -> Callable[[SelectCase], Callable[..., Tensor]]:
    return lambda case: lambda scores: scores.gather(-1, select(scores, num_selected=case.k))


def problem(case: SelectCase, device: torch.device) -> Problem:
    scores = torch.randn(case.rows, case.n, generator=case.generator()).to(device)
    return Problem({"scores": scores}, scores.new_zeros(case.rows, case.k), ())


def truth(case: SelectCase, problem: Problem, direction: str) -> Truth:
    return Truth(values(reference.select)(case)(problem.inputs["scores"].double()))


def cost(case: SelectCase, direction: str) -> Cost:
    """Scores read, and for each of the selected an index and a value written."""
    return Cost(bytes=4 * case.rows * case.n + 12 * case.rows * case.k)


SUITE = Suite(
    name="select",
    description="the hard top-k by the length of the rows",
    cases=cases,
    directions=lambda case: (FORWARD,),
    implementations=implementations(
        Implementation("reference", values(reference.select)),
        by_kernels(values(kernels.select)),
        Implementation[SelectCase]("torch_topk", lambda case: lambda scores: scores.topk(case.k, dim=-1).values),
    ),
    reference="reference",
    problem=problem,
    truth=truth,
    plain=values(reference.select),
    cost=cost,
    guest=guest(values),
)


def test_select(record, benchmark):
    replay(record, benchmark)
