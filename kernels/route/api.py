"""Routing in one read of the tokens forward and one pass over them backward.

Scores of all routes in one read; their relaxed selection by `kernels.coor_descent` or `kernels.soft_topk`; the largest
by `kernels.select`; and the tokens that these are. Backward, the gradient of the weights goes through the relaxed
selection to the scores, and from there, together with that of the selected tokens, to all tokens and routing tokens.
"""

from collections.abc import Callable
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels._common.launch import as_rows, is_traced, runs_triton
from kernels._common.operation import backward_of, define, define_backward, define_gradient, eager
from kernels.coor_descent import descend_rows, descend_rows_backward
from kernels.route import cpu
from kernels.route.triton import launch_gather
from kernels.routing_scores import (
    allocate_gradients,
    allocate_scores,
    as_kernels_take,
    count_flops,
    gradients,
    score_tokens,
)
from kernels.select import select_rows
from kernels.soft_topk import solve_rows, solve_rows_backward
from reference._shared.arguments import Solver, check_route, first_temperature
from reference._shared.returns import RouteReturn

_NUMBERS = (
    "int num_selected, float k, int n_iters, float eps, float first, float eps_decay, bool exact, bool cosine, "
    "int? block_size"
)


def _blocks(n: int, block_size: int | None) -> tuple[int, int]:
    """How many blocks of n tokens, and how many tokens of each."""
    return (1, n) if block_size is None else (ceil(n / block_size), block_size)


def _row_mask(x: Tensor, mask: Tensor | None, routes: int, blocks: int, width: int) -> Tensor | None:
    """The mask of tokens `b n` as rows of `b r blocks`, masked where the last block had to be filled up."""
    batch, n, _ = x.shape
    missing = blocks * width - n
    if missing:
        there = x.new_ones((1, n), dtype=torch.bool) if mask is None else mask
        mask = F.pad(there, (0, missing))
    if mask is None:
        return None
    return as_rows(mask[:, None].expand(batch, routes, blocks * width).view(batch, routes, blocks, width))


def _allocate_routed(
    x: Tensor, scores: Tensor, num_selected: int, block_size: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, tokens and indices."""
    (batch, n, d), routes = x.shape, scores.shape[1]
    shape = (batch, routes, _blocks(n, block_size)[0] * num_selected)
    return scores.new_empty(shape), x.new_empty((*shape, d)), x.new_empty(shape, dtype=torch.int64)


def _allocate(
    x: Tensor,
    routing_tokens: Tensor,
    mask: Tensor | None,
    num_selected: int,
    k: float,
    n_iters: int,
    eps: float,
    first: float,
    eps_decay: float,
    exact: bool,
    cosine: bool,
    block_size: int | None,
    save: bool,
) -> tuple[Tensor, ...]:
    """Weights, tokens and indices, then what the backward pass needs: scores, inverse norms, and a state a row."""
    blocks, width = _blocks(x.shape[1], block_size)
    scores, inverse_norms = allocate_scores(x, routing_tokens, cosine, blocks * width)
    rows = scores.shape[0] * scores.shape[1] * blocks
    shape: tuple[int, ...] = (rows, 3)
    if not exact:
        shape = (rows + 1, 2, n_iters + 1) if save else (0,)
    routed = _allocate_routed(x, scores, num_selected, block_size)
    return *routed, scores, inverse_norms, x.new_empty(shape, dtype=torch.float64)


def _forward(
    x: Tensor,
    routing_tokens: Tensor,
    mask: Tensor | None,
    num_selected: int,
    k: float,
    n_iters: int,
    eps: float,
    first: float,
    eps_decay: float,
    exact: bool,
    cosine: bool,
    block_size: int | None,
    save: bool,
) -> tuple[Tensor, ...]:
    blocks, width = _blocks(x.shape[1], block_size)
    scores, inverse_norms = score_tokens(x, routing_tokens, cosine, blocks * width)
    rows, row_mask = scores.view(-1, width), _row_mask(x, mask, scores.shape[1], blocks, width)
    if exact:
        relaxed, state = solve_rows(rows, row_mask, None, k, eps)
    else:
        relaxed, state = descend_rows(rows, row_mask, None, k, n_iters, eps, first, eps_decay, save)
    selected = select_rows(rows, row_mask, num_selected)
    routed = _allocate_routed(x, scores, num_selected, block_size)
    if selected.numel():
        gather = launch_gather if x.dtype != torch.float64 and runs_triton(x) else cpu.gather
        gather(x, selected, relaxed, blocks, *routed)
    return *routed, scores, inverse_norms, state


def _allocate_gradients(
    grad_weights: Tensor | None,
    grad_tokens: Tensor | None,
    x: Tensor,
    routing_tokens: Tensor,
    mask: Tensor | None,
    indices: Tensor,
    scores: Tensor,
    inverse_norms: Tensor,
    state: Tensor,
    num_selected: int,
    k: float,
    n_iters: int,
    eps: float,
    first: float,
    eps_decay: float,
    exact: bool,
    cosine: bool,
    block_size: int | None,
    needs_x: bool,
) -> tuple[Tensor, Tensor]:
    return allocate_gradients(grad_weights, x, routing_tokens, scores, inverse_norms, needs_x)


def _backward(
    grad_weights: Tensor | None,
    grad_tokens: Tensor | None,
    x: Tensor,
    routing_tokens: Tensor,
    mask: Tensor | None,
    indices: Tensor,
    scores: Tensor,
    inverse_norms: Tensor,
    state: Tensor,
    num_selected: int,
    k: float,
    n_iters: int,
    eps: float,
    first: float,
    eps_decay: float,
    exact: bool,
    cosine: bool,
    block_size: int | None,
    needs_x: bool,
) -> tuple[Tensor, Tensor]:
    blocks, width = _blocks(x.shape[1], block_size)
    grad_scores = torch.zeros_like(scores)
    if grad_weights is not None and scores.numel():
        grad_scores.scatter_(2, indices, grad_weights.to(scores.dtype))
        rows, grad_rows = scores.view(-1, width), grad_scores.view(-1, width)
        row_mask = _row_mask(x, mask, scores.shape[1], blocks, width)
        if exact:
            ds, _ = solve_rows_backward(grad_rows, rows, row_mask, state, eps)
        else:
            ds, _ = descend_rows_backward(grad_rows, rows, row_mask, None, k, n_iters, eps, first, eps_decay, state)
        grad_scores = ds.view(scores.shape)

    gathered, past_the_end = None, None
    if grad_tokens is not None and needs_x and scores.numel():
        # A last block with fewer tokens than are selected from it has selected all of them, and then past the end.
        missing = blocks * width - x.shape[1]
        kept = indices.shape[2] - max(num_selected - (width - missing), 0)
        past_the_end = grad_tokens[:, :, kept:] if kept < indices.shape[2] else None
        gathered = indices[:, :, :kept], grad_tokens[:, :, :kept].contiguous()
    dx, dr = gradients(x, routing_tokens, scores, inverse_norms, grad_scores, gathered, needs_x)
    if past_the_end is not None:
        dx[:, -1] += past_the_end.sum(dim=(1, 2), dtype=scores.dtype)
    return dx, dr


define(
    f"route(Tensor x, Tensor routing_tokens, Tensor? mask, {_NUMBERS}, bool save) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _allocate,
)
define_backward(
    "route_backward(Tensor? grad_weights, Tensor? grad_tokens, Tensor x, Tensor routing_tokens, Tensor? mask, "
    f"Tensor indices, Tensor scores, Tensor inverse_norms, Tensor state, {_NUMBERS}, bool needs_x) -> (Tensor, Tensor)",
    _backward,
    _allocate_gradients,
)

register_flop_formula(torch.ops.colt5.route)(count_flops)


@register_flop_formula(torch.ops.colt5.route_backward)
def _count_backward_flops(*arguments: Any, **_: object) -> int:
    needs_x = arguments[-1]
    return count_flops(*arguments[2:4]) * (2 if needs_x else 1)


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    x, routing_tokens, mask, *numbers, _ = inputs
    _, _, indices, scores, inverse_norms, state = output
    ctx.save_for_backward(x, routing_tokens, mask, indices, scores, inverse_norms, state)
    ctx.mark_non_differentiable(indices, scores, inverse_norms, state)
    ctx.numbers = numbers
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_weights: Tensor | None, grad_tokens: Tensor | None, *_: None) -> tuple:
    nothing = (None,) * 13
    grads = [grad for grad in (grad_weights, grad_tokens) if grad is not None]
    if not grads:
        return nothing
    needs_x = ctx.needs_input_grad[0]
    backward = backward_of(grads[0], torch.ops.colt5.route_backward, _backward)
    dx, dr = backward(grad_weights, grad_tokens, *ctx.saved_tensors, *ctx.numbers, needs_x)
    return dx if needs_x else None, dr, *nothing[2:]


define_gradient("route", _setup_context, _differentiate)


_eager = eager(_forward, _setup_context, _differentiate)


def route(
    x: Tensor,
    routing_tokens: Tensor,
    *,
    num_selected: int,
    k: float,
    n_iters: int,
    eps: float = 0.1,
    eps_init: float | None = None,
    eps_decay: float = 1.0,
    solver: Solver = "coor_descent",
    cosine_sim_scale: float | None = None,
    block_size: int | None = None,
    mask: Tensor | None = None,
) -> RouteReturn:
    """`reference.route` with each token read once, and once more for the gradients of tokens and routing tokens.

    The backward pass needs tokens and scores, and 16 bytes a row of scores and iteration. Results are bitwise equal
    from run to run. A CPU tensor gets the same mathematics in PyTorch.

    Args:
        x: tokens `b n d`, any float dtype, any strides.
        routing_tokens: `b r d`, or `1 r d` for all of a batch; any float dtype.
        num_selected: how many tokens each route selects, from each block if there are blocks.
        k: what the relaxed selection of a route sums to, in each block.
        n_iters, eps, eps_init, eps_decay: of coordinate descent; `kernels.coor_descent` explains them.
        solver: `coor_descent`, or `exact`: `kernels.soft_topk` at temperature eps.
        cosine_sim_scale: score by the cosine times this, instead of by the product.
        block_size: select from blocks of so many tokens. A last one that is shorter is filled up with masked tokens.
        mask: bool `b n`, False for tokens that take part in nothing.

    Returns:
        indices int64 `b r s`, weights `b r s` in fp32 at least, and tokens `b r s d`; `reference.route.RouteReturn`
        says more.

    Raises:
        ValueError: an argument is out of its range, or shapes do not match.
        NotImplementedError: a second derivative or forward mode is asked for.
    """
    check_route(x, routing_tokens, num_selected, k, (n_iters, eps, eps_init, eps_decay), solver, block_size, mask)
    save = torch.is_grad_enabled() and (x.requires_grad or routing_tokens.requires_grad)
    operation: Callable[..., tuple[Tensor, ...]] = _eager if save else _forward
    if is_traced(x):
        operation = torch.ops.colt5.route
    weights, tokens, indices, *_ = operation(
        *as_kernels_take(x, routing_tokens, cosine_sim_scale),
        mask,
        num_selected,
        float(k),
        n_iters,
        eps,
        first_temperature(eps, eps_init),
        eps_decay,
        solver == "exact",
        cosine_sim_scale is not None,
        block_size,
        save,
    )
    return RouteReturn(indices, weights, tokens)
