"""The normalized tokens of one branch and the routed tokens of another, from one read of the tokens.

Both branches of a routed layer begin with all tokens: one normalizes them, the other scores them. The kernels of
`kernels.normalize` do both at once. In the backward pass they write one gradient for each token: the sum of its
gradients through the norm, the scores and a residual, and as a selected token. PyTorch adds no tensors of the size of
all tokens. The steps between scores and selected tokens are those of `kernels.route`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels._common.dry_run import dry_run_of
from kernels._common.operation import Operation, is_traced
from kernels._common.shares import new_arrivals
from kernels._common.tensors import as_rows, has_values, runs_triton
from kernels.normalize import Routes, launch_backward, launch_forward, normalize
from kernels.route import Choice, route
from kernels.routing_scores import count_flops
from reference._shared.arguments import (
    Solver,
    check_normalize,
    check_positive,
    check_route,
    first_temperature,
    result_dtype,
)
from reference._shared.returns import NormalizedRouteReturn

MOST_ROUTES, LONGEST = 4, 2048
"""Most routes and features for which a program has registers; with more, routes are computed separately."""


def _forward(
    x: Tensor,
    routing_tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    center: bool,
    norm_eps: float,
    dtype: torch.dtype,
    num_selected: int,
    k: float,
    n_iters: int,
    eps: float,
    first: float,
    eps_decay: float,
    exact: bool,
    straight_through: bool,
    gives_x: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Normalized tokens, weights, tokens, indices and x, then the tensors for the backward pass. These are mean, scale
    and counters as in `kernels.normalize`, and scores, state and slots as in `kernels.route`."""
    (batch, n, d), routes = x.shape, routing_tokens.shape[1]
    y = x.new_empty(x.shape, dtype=dtype)
    mean = x.new_empty(batch * n if center else 0, dtype=torch.float32)
    scale = x.new_empty(batch * n, dtype=torch.float32)
    scores = x.new_empty((batch, routes, n), dtype=torch.float32)
    slots = x.new_empty((batch, routes, n) if save else (0,), dtype=torch.int32)
    arrivals, kept = new_arrivals(x), slots if save else None
    if has_values(x):
        norm = (weight, bias, center, norm_eps, y, mean, scale, arrivals)
        launch_forward(as_rows(x), *norm, routing_tokens[0], scores, kept)
    choice = Choice(num_selected, k, n_iters, eps, first, eps_decay, exact, None)
    # Each route is contiguous, so the caller gets contiguous tensors after dividing the routes.
    shape = (routes, batch, num_selected)
    routed = scores.new_empty(shape), x.new_empty((*shape, d)), x.new_empty(shape, dtype=torch.int64)
    weights, tokens, indices = (each.transpose(0, 1) for each in routed)
    state = choice.choose(x, scores, mask, straight_through, (weights, tokens, indices), kept)
    same = x if gives_x else x.new_empty(0)
    return y, weights, tokens, indices, same, mean, scale, arrivals, scores, state, slots


def _backward(
    grad_y: Tensor | None,
    grad_weights: Tensor | None,
    grad_tokens: Tensor | None,
    grad_same: Tensor | None,
    x: Tensor,
    routing_tokens: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    mean: Tensor,
    scale: Tensor,
    arrivals: Tensor,
    scores: Tensor,
    state: Tensor,
    slots: Tensor,
    center: bool,
    has_bias: bool,
    norm_eps: float,
    dtype: torch.dtype,
    num_selected: int,
    k: float,
    n_iters: int,
    eps: float,
    first: float,
    eps_decay: float,
    exact: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient of tokens, and in fp32 those of the parameters, as rows of one tensor. These are weight, bias, which
    gets 0 if there is none, and all routing tokens."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not has_values(x):
        return dx, x.new_zeros((2 + routing_tokens.shape[1], x.shape[2]), dtype=torch.float32)
    choice = Choice(num_selected, k, n_iters, eps, first, eps_decay, exact, None)
    grad_scores = choice.grad_scores(grad_weights, x, scores, mask, state, slots)
    grad_y = x.new_zeros(x.shape, dtype=dtype) if grad_y is None else grad_y
    if grad_tokens is not None and not grad_tokens[0, 0].is_contiguous():
        grad_tokens = grad_tokens.contiguous()
    grad_same = None if grad_same is None else as_rows(grad_same)
    routes = Routes(routing_tokens[0], grad_scores, slots, grad_tokens, grad_same)
    rows = as_rows(grad_y), as_rows(x)
    return dx, launch_backward(*rows, weight, mean, scale, arrivals, center, has_bias, norm_eps, dx, routes)


def _hand_back(
    grad_y: Tensor | None,
    grad_weights: Tensor | None,
    grad_tokens: Tensor | None,
    grad_same: Tensor | None,
    dx: Tensor,
    sums: Tensor,
) -> tuple[Tensor, ...]:
    return dx, sums[0], sums[1], sums[2:].unsqueeze(0)


_operation = Operation(
    "normalize_and_route",
    _forward,
    _backward,
    outputs=("y", "weights", "tokens", "indices", "same", "mean", "scale", "arrivals", "scores", "state", "slots"),
    gradients=("x", "weight", "bias", "routing_tokens"),
    chosen={"has_bias": lambda bias: bias is not None},
    hand_back=_hand_back,
)


register_flop_formula(torch.ops.colt5.normalize_and_route)(count_flops)


@register_flop_formula(torch.ops.colt5.normalize_and_route_backward)
def _count_backward_flops(*arguments: Any, **_: object) -> int:
    return 2 * count_flops(*arguments[4:6])


def normalize_and_route(
    x: Tensor,
    routing_tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    num_selected: int,
    k: float,
    n_iters: int,
    eps: float = 0.1,
    eps_init: float | None = None,
    eps_decay: float = 1.0,
    solver: Solver = "coor_descent",
    straight_through: bool = False,
    mask: Tensor | None = None,
    center: bool = False,
    norm_eps: float = 1e-12,
    dtype: torch.dtype | None = None,
) -> NormalizedRouteReturn:
    """`reference.normalize_and_route` with one read of each token, and one more for all gradients.

    Results are bitwise equal from run to run. `kernels.route` and `kernels.normalize` compute CPU tensors, fp64, tokens
    of more than 2048 features, more than 4 routes, and routing tokens that differ within a batch, with the same
    results.

    Args:
        x: tokens `b n d`, any float dtype, any strides.
        routing_tokens: `b r d`, or `1 r d` for the whole batch; any float dtype.
        weight, bias: `d`, of the norm.
        num_selected, k, n_iters, eps, eps_init, eps_decay, solver, straight_through, mask: as in `kernels.route`.
        center, norm_eps, dtype: as in `kernels.normalize`.

    Returns:
        indices, weights and tokens as in `kernels.route`, normalized tokens `b n d`, and x.

    Raises:
        ValueError: an argument is out of its range, or shapes do not match.
        NotImplementedError: for a second derivative or forward mode, except on the CPU.
    """
    check_positive(norm_eps=norm_eps)
    check_normalize(x, weight, bias, norm_eps, dtype)
    check_route(x, routing_tokens, num_selected, k, (n_iters, eps, eps_init, eps_decay), solver, None, mask)
    if not _is_one(x, routing_tokens):
        routed = route(
            x,
            routing_tokens,
            num_selected=num_selected,
            k=k,
            n_iters=n_iters,
            eps=eps,
            eps_init=eps_init,
            eps_decay=eps_decay,
            solver=solver,
            straight_through=straight_through,
            mask=mask,
        )
        normalized = normalize(x, weight, bias, center=center, eps=norm_eps, dtype=dtype)
        return NormalizedRouteReturn(*routed, normalized, x)
    tensors = (
        x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous(),
        routing_tokens.contiguous(),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        mask,
    )
    # An operator must not return an input. But an autograd function may, and so it adds up the gradients itself.
    gives_x = not is_traced(tensors) or dry_run_of(x) is not None
    normalized, weights, tokens, indices, same, *_ = _operation(
        *tensors,
        center,
        norm_eps,
        result_dtype(dtype, x, weight, bias),
        num_selected,
        float(k),
        n_iters,
        eps,
        first_temperature(eps, eps_init),
        eps_decay,
        solver == "exact",
        straight_through,
        gives_x,
    )
    return NormalizedRouteReturn(indices, weights, tokens, normalized, same if gives_x else x)


def _is_one(x: Tensor, routing_tokens: Tensor) -> bool:
    """True if the kernels can compute all of it."""
    shared, routes, d = routing_tokens.shape
    return runs_triton(x) and x.dtype != torch.float64 and d <= LONGEST and shared == 1 and routes <= MOST_ROUTES
