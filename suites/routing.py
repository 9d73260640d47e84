"""The health of a router: does it select the highest scores, and is it trained by the selected tokens?

At the start of training the standard deviation of a router's scores is the norm of its routing token: `score_std`, 22.6
for colt5-attention's randn(512). Metrics, over the rows of a case and for a gradient of the selected weights that is
normally distributed with norm 1:

    sum_error   |sum y - k| of the relaxed selection y, where k is its target sum
    agreement   share of the tokens with the k largest scores, in fp64, that are selected
    saturated   entries of a row that are exactly 1
    carrying    share of the selected tokens whose scores have a gradient, above 1e-6
    gradient    norm of the gradient of the routing token

Weights are not passed straight through, so that outputs show them; their gradients are the same either way.
colt5-attention has no accuracy gate, because its selection of other tokens is what the suite measures.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from itertools import product
from math import ceil, inf
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

import reference
from colt5_bench.case import FORWARD, FORWARD_BACKWARD, Case, Cost, Problem, Truth
from colt5_bench.pytest_plugin.replay import check
from colt5_bench.suite import Implementation, Suite
from suites._descent import HEAVY_SHARE, implementations, lenient
from suites._kinks import undecided_of_tokens
from suites._layers import as_function, truth_of, without_memory
from suites._ours import by_kernels
from suites.peers import colt5_not_installed

FETCH_K_RATIO = 9 / 8
EPS_INIT, EPS_DECAY = 4.0, 0.7
"""Defaults of colt5-attention's README."""

NEGLIGIBLE = 1e-6
"""Smallest gradient of a score that counts as training, for a gradient of the weights with norm 1."""


@dataclass(frozen=True)
class RoutingCase(Case):
    """A router that selects k of n tokens of dimension dim, for each of `rows` rows."""

    rows: int
    n: int
    k: int
    dim: int
    score_std: float
    n_iters: int | None
    """None for the exact solver, which has no iterations."""

    eps: float
    solver: str
    normalize_to: str

    @property
    def selected(self) -> int:
        return self.k if self.normalize_to == "fetched" else ceil(self.k * FETCH_K_RATIO)

    @property
    def sum_to(self) -> float:
        return self.k * FETCH_K_RATIO if self.normalize_to == "fetched" else self.k

    @property
    def schedule(self) -> dict[str, Any]:
        """Schedule of coordinate descent."""
        assert self.n_iters is not None
        return {"n_iters": self.n_iters, "eps": self.eps, "eps_init": EPS_INIT, "eps_decay": EPS_DECAY}


class Weights(nn.Module):
    """A router alone: the weights of the tokens that it selects, in the order of their positions."""

    def __init__(self, router: nn.Module, num_tokens: int) -> None:
        super().__init__()
        self.router = router
        self.num_tokens = num_tokens

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `b n d` to `b k`."""
        routed = self.router(x, num_tokens=self.num_tokens)
        return routed.scores.gather(-1, routed.indices.argsort(dim=-1))


def our_router(case: RoutingCase, use_triton: bool) -> reference.CoordinateDescentRouter:
    options = {"eps": case.eps} if case.n_iters is None else case.schedule
    return reference.CoordinateDescentRouter(
        case.dim,
        straight_through=False,
        fetch_k_ratio=FETCH_K_RATIO,
        solver=cast(Any, case.solver),
        normalize_to=cast(Any, case.normalize_to),
        use_triton=use_triton,
        **options,
    )


def ours(case: RoutingCase, use_triton: bool) -> Callable[..., Tensor]:
    return as_function(without_memory(lambda: Weights(our_router(case, use_triton), case.k)))


def their_router(case: RoutingCase) -> nn.Module:
    colt5 = import_module("colt5_attention")
    return colt5.CoordinateDescentRouter(case.dim, straight_through=False, fetch_k_ratio=FETCH_K_RATIO, **case.schedule)


def their_relaxation(case: RoutingCase) -> Callable[[Tensor], Tensor]:
    colt5 = import_module("colt5_attention")
    return partial(colt5.coor_descent, k=min(case.sum_to, case.n), **case.schedule)


def colt5_missing(case: RoutingCase, device: torch.device) -> str | None:
    if case.solver == "exact" or case.normalize_to == "selected":
        return "has neither the exact solver nor the normalisation to the selected tokens"
    return colt5_not_installed(case, device)


def health(
    case: RoutingCase, problem: Problem, router: nn.Module, relax: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """Figures that the module's docstring describes, of a router and of its relaxed selection from scores `b 1 n`."""
    x, token = problem.inputs["x"].detach(), problem.inputs["router.routing_token"].detach()
    with torch.no_grad():
        indices = functional_call(router, {"routing_token": token}, args=(x,), kwargs={"num_tokens": case.k}).indices
        best = (token.double() @ x.double().mT).squeeze(1).topk(case.k).indices
    scores = (token @ x.mT).requires_grad_()
    y = relax(scores)
    upstream = torch.zeros_like(y).scatter(-1, indices.sort(dim=-1).values.unsqueeze(1), problem.upstream.unsqueeze(1))
    (of_scores,) = torch.autograd.grad(y, scores, upstream)
    found = [torch.isin(row, selected).double().mean() for row, selected in zip(best, indices, strict=True)]
    return {
        "sum_error": (y.double().sum(-1) - case.sum_to).abs().mean().item(),
        "agreement": torch.stack(found).mean().item(),
        "saturated": (y == 1).sum(-1).double().mean().item(),
        "carrying": (of_scores.squeeze(1).gather(-1, indices).abs() > NEGLIGIBLE).double().mean().item(),
        "gradient": (of_scores @ x).sum(0).norm().item(),
    }


def our_health(use_triton: bool) -> Callable[[RoutingCase, Problem], dict[str, float]]:
    def metrics(case: RoutingCase, problem: Problem) -> dict[str, float]:
        router = our_router(case, use_triton)
        return health(case, problem, router, lambda scores: router.relax(scores, case.k))

    return metrics


def their_health(case: RoutingCase, problem: Problem) -> dict[str, float]:
    return health(case, problem, their_router(case), their_relaxation(case))


def problem(case: RoutingCase, device: torch.device) -> Problem:
    """Normally distributed tokens, and a routing token of length score_std."""
    generator = case.generator()
    x = torch.randn(case.rows, case.n, case.dim, generator=generator)
    token = torch.randn(1, case.dim, generator=generator)
    upstream = torch.randn(case.rows, case.selected, generator=generator)
    return Problem(
        {"x": x.to(device), "router.routing_token": (case.score_std * token / token.norm()).to(device)},
        (upstream / upstream.norm()).to(device),
        ("x", "router.routing_token"),
    )


def plain(case: RoutingCase) -> Callable[..., Tensor]:
    return ours(case, use_triton=False)


def truth(case: RoutingCase, problem: Problem, direction: str) -> Truth:
    found = truth_of(plain(case), problem, direction)
    if direction == FORWARD or case.solver != "exact":
        return found
    x, token = (each.detach().double() for each in problem.inputs.values())
    scores = token @ x.mT
    selected = scores.topk(case.selected).indices.sort(dim=-1).values
    of_weights = torch.zeros_like(scores).scatter(-1, selected, problem.upstream.double()[:, None])
    at_kink = undecided_of_tokens(problem.inputs, found.gradients, of_weights, case.sum_to, case.eps)
    return replace(found, at_kink=at_kink)


def cost(case: RoutingCase, direction: str) -> Cost:
    """Tokens read and weights written; then tokens read again and their gradient written."""
    tokens, weights = case.rows * case.n * case.dim, case.rows * case.selected
    if direction != FORWARD_BACKWARD:
        return Cost(bytes=4 * (tokens + weights), flops=2 * tokens)
    return Cost(bytes=4 * (3 * tokens + 2 * weights), flops=6 * tokens)


def cases(preset: str, device: torch.device) -> list[RoutingCase]:
    """A sixteenth of 4096 tokens is selected. The exact solver has no iterations to vary."""
    spreads, iterations, temperatures, n = [0.5, 2.0, 8.0, 22.6], [20, 50, 200], [0.03, 0.3, 1.0], 4096
    if preset == "smoke":
        spreads, iterations, temperatures, n = [0.5, 22.6], [20], [0.03], 1024
    elif preset == "default":
        iterations, temperatures = [20, 50], [0.03, 1.0]
    solvers = [("exact", None), *(("coor_descent", n_iters) for n_iters in iterations)]
    return [
        RoutingCase(4, n, n // HEAVY_SHARE, 64, std, n_iters, eps, solver, normalize_to)
        for normalize_to, eps, (solver, n_iters), std in product(
            ("fetched", "selected"), temperatures, solvers, spreads
        )
    ]


SUITE = Suite(
    name="routing",
    description="settings with which a router selects the highest scores, and trains",
    cases=cases,
    directions=lambda case: (FORWARD_BACKWARD,),
    implementations=implementations(
        Implementation("reference", plain, metrics=our_health(use_triton=False)),
        by_kernels(lambda case: ours(case, use_triton=True), bound=lenient, metrics=our_health(use_triton=True)),
        Implementation[RoutingCase](
            "colt5_plain",
            lambda case: as_function(without_memory(lambda: Weights(their_router(case), case.k))),
            colt5_missing,
            bound=lambda case, tensor, expected, tolerance: tolerance.at_least(inf),
            metrics=their_health,
        ),
    ),
    reference="reference",
    problem=problem,
    truth=truth,
    plain=plain,
    cost=cost,
    x_axis="score_std",
    lines=("solver", "n_iters"),
    timed=False,
)


def test_routing(record):
    check(record)
