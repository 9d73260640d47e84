"""Scores of tokens for several routes, products or cosines, compared with a matrix product."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import kernels
import reference
from colt5_bench.case import FORWARD, Case, Cost, Problem, Truth
from colt5_bench.pytest_plugin.replay import replay
from colt5_bench.suite import Implementation, Suite
from suites._descent import both_directions, implementations
from suites._layers import truth_of
from suites._ours import by_kernels, guest

COSINE_SIM_SCALE = 8.0
"""The default of colt5-attention's router."""


@dataclass(frozen=True)
class ScoresCase(Case):
    """Scores of n normally distributed tokens of size dim."""

    n: int
    dim: int
    routes: int
    cosine: bool
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def scale(self) -> float | None:
        return COSINE_SIM_SCALE if self.cosine else None


def cases(preset: str, device: torch.device) -> list[ScoresCase]:
    if preset == "smoke":
        return [ScoresCase(509, 31, 2, cosine, "float32") for cosine in (False, True)]
    if device.type == "cpu":
        return [ScoresCase(2**16, 64, 2, cosine, "float32") for cosine in (False, True)]
    made = [ScoresCase(2**20, 512, 2, cosine, "float32") for cosine in (False, True)]
    made += [ScoresCase(2**16, 512, 1, False, "bfloat16")]
    if preset == "full":
        made += [ScoresCase(2**20, 512, routes, False, dtype) for routes in (1, 8) for dtype in ("float32", "bfloat16")]
    return made


def problem(case: ScoresCase, device: torch.device) -> Problem:
    x, routing_tokens, upstream = case.normal(
        device, (1, case.n, case.dim), (1, case.routes, case.dim), (1, case.routes, case.n)
    )
    inputs = {"x": x.to(case.torch_dtype), "routing_tokens": routing_tokens / case.dim**0.5}
    return Problem(inputs, upstream / case.n**0.5, tuple(inputs))


def scoring(function: Callable[..., Tensor]) -> Callable[[ScoresCase], Callable[..., Tensor]]:
    return lambda case: partial(function, cosine_sim_scale=case.scale)


plain = scoring(reference.routing_scores)


def truth(case: ScoresCase, problem: Problem, direction: str) -> Truth:
    return truth_of(plain(case), problem, direction)


def cost(case: ScoresCase, direction: str) -> Cost:
    """Tokens read and scores written; then tokens and the gradient of scores read, and the gradient of tokens
    written."""
    tokens, scores = case.n * case.dim * case.torch_dtype.itemsize, 4 * case.n * case.routes
    forward = tokens + scores
    return Cost(bytes=forward if direction == FORWARD else 2 * forward + tokens)


SUITE = Suite(
    name="routing_scores",
    description="scores of tokens for several routes",
    cases=cases,
    directions=both_directions,
    implementations=implementations(
        Implementation("reference", plain),
        by_kernels(scoring(kernels.routing_scores)),
    ),
    reference="reference",
    problem=problem,
    truth=truth,
    plain=plain,
    cost=cost,
    guest=guest(scoring),
)


def test_routing_scores(record, benchmark):
    replay(record, benchmark)
