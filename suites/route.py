"""Routing from tokens to tokens: scores, their relaxed top-k, selection and gathering, and their gradient.

The compared result is the sum of the routed tokens of each route times their weights. It does not depend on the order
of selected tokens, because rounding may exchange two of almost equal scores.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import kernels
import reference
from colt5_bench.case import FORWARD, Case, Cost, Problem, Truth
from colt5_bench.pytest_plugin.replay import replay
from colt5_bench.suite import Implementation, Suite
from reference._shared.arguments import epsilon_schedule
from suites._descent import DECAYING, both_directions, implementations, lenient
from suites._kinks import undecided_of_tokens
from suites._layers import SCORE_STD, truth_of
from suites._ours import by_kernels, guest

FETCH_K_RATIO = 9 / 8
"""The default of colt5-attention's router: the relaxed selection sums to 9 / 8 of the number of selected tokens."""

N_ITERS = 20
"""The default number of iterations of colt5-attention's router."""


@dataclass(frozen=True)
class RouteCase(Case):
    """Routing of k of n normally distributed tokens of size dim."""

    n: int
    dim: int
    routes: int
    k: int
    solver: str
    block_size: int | None
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of every implementation, besides the tokens."""
        each = self.k // (1 if self.block_size is None else self.n // self.block_size)
        return {
            "num_selected": each,
            "k": each * FETCH_K_RATIO,
            "n_iters": N_ITERS,
            "eps": DECAYING.eps,
            "eps_init": DECAYING.eps_init,
            "eps_decay": DECAYING.eps_decay,
            "solver": self.solver,
            "block_size": self.block_size,
        }


def cases(preset: str, device: torch.device) -> list[RouteCase]:
    if preset == "smoke":
        return [RouteCase(509, 31, 2, 64, "coor_descent", None, "float32")]
    if device.type == "cpu":
        return [RouteCase(2**14, 64, 2, 1024, "coor_descent", None, "float32")]
    made = [
        RouteCase(2**20, 512, 2, 1024, "coor_descent", None, "float32"),
        RouteCase(2**15, 512, 1, 4096, "coor_descent", None, "bfloat16"),
    ]
    if preset == "full":
        made += [
            RouteCase(2**20, 512, 2, 1024, "exact", None, "float32"),
            RouteCase(2**20, 512, 2, 1024, "coor_descent", 131072, "float32"),
            RouteCase(2**20, 512, 2, 1024, "coor_descent", None, "bfloat16"),
        ]
    return made


def routed(function: Callable[..., reference.RouteReturn]) -> Callable[[RouteCase], Callable[..., Tensor]]:
    def build(case: RouteCase) -> Callable[..., Tensor]:
        def weighted(x: Tensor, routing_tokens: Tensor) -> Tensor:
            _, weights, tokens = function(x, routing_tokens, **case.options)
            return torch.einsum("brk,brkd->brd", weights, tokens.to(weights.dtype))

        return weighted

    return build


def problem(case: RouteCase, device: torch.device) -> Problem:
    x, routing_tokens, upstream = case.normal(
        device, (1, case.n, case.dim), (1, case.routes, case.dim), (1, case.routes, case.dim)
    )
    inputs = {"x": x.to(case.torch_dtype), "routing_tokens": SCORE_STD * routing_tokens / case.dim**0.5}
    return Problem(inputs, upstream / case.k**0.5, tuple(inputs))


def truth(case: RouteCase, problem: Problem, direction: str) -> Truth:
    found = truth_of(routed(reference.route)(case), problem, direction)
    if direction == FORWARD or case.solver != "exact":
        return found
    assert case.block_size is None
    x, routing_tokens = (each.detach().double() for each in problem.inputs.values())
    selected = (routing_tokens @ x.mT).topk(case.k).indices
    of_all = problem.upstream.double() @ x.mT
    of_weights = torch.zeros_like(of_all).scatter(-1, selected, of_all.gather(-1, selected))
    k, eps = case.options["k"], case.options["eps"]
    return replace(found, at_kink=undecided_of_tokens(problem.inputs, found.gradients, of_weights, k, eps))


def cost(case: RouteCase, direction: str) -> Cost:
    """Tokens read and the routed ones written, with an exponential for each score and temperature after the first
    iteration. Then the same again for the gradient, and the gradient of the tokens written."""
    size = case.torch_dtype.itemsize
    tokens, kept = case.n * case.dim * size, case.routes * case.k * (case.dim * size + 12)
    _, *later, _ = epsilon_schedule(N_ITERS, DECAYING.eps, DECAYING.eps_init, DECAYING.eps_decay)
    exponentials = case.n * case.routes * (len(set(later)) if case.solver == "coor_descent" else 2)
    forward = tokens + kept
    if direction == FORWARD:
        return Cost(bytes=forward, exponentials=exponentials)
    return Cost(bytes=2 * forward + tokens, exponentials=2 * exponentials)


SUITE = Suite(
    name="route",
    description="from tokens to routed tokens and back",
    cases=cases,
    directions=both_directions,
    implementations=implementations(
        Implementation("reference", routed(reference.route)),
        by_kernels(routed(kernels.route), bound=lenient),
    ),
    reference="reference",
    problem=problem,
    truth=truth,
    plain=routed(reference.route),
    cost=cost,
    guest=guest(routed, bound=lenient),
)


def test_route(record, benchmark):
    replay(record, benchmark)
