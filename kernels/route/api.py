"""Routing with one read of the tokens forward and one pass over them backward.

Forward, the steps are scores of all routes in one read; their relaxed selection by `kernels.coor_descent` or
`kernels.soft_topk`; the largest scores by `kernels.select`; and the tokens of these. Backward, the gradient of the
weights goes through the relaxed selection to the scores, and from there, together with that of the selected tokens, to
all tokens and routing tokens.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels._common.operation import Operation
from kernels._common.tensors import as_rows, has_values, runs_triton
from kernels.coor_descent import descend_rows, descend_rows_backward
from kernels.route import cpu
from kernels.route.triton import launch_gather, launch_spread
from kernels.routing_scores import as_kernels_take, count_flops, score_tokens, score_tokens_backward
from kernels.select import select_rows
from kernels.soft_topk import solve_rows, solve_rows_backward
from reference._shared.arguments import Solver, check_route, first_temperature
from reference._shared.returns import RouteReturn
from reference._shared.sizes import ceil_div, is_certain


def _blocks(n: int, block_size: int | None) -> tuple[int, int]:
    """Number of blocks of n tokens, and number of tokens of each."""
    return (1, n) if block_size is None else (ceil_div(n, block_size), block_size)


def _row_mask(x: Tensor, mask: Tensor | None, routes: int, blocks: int, width: int) -> Tensor | None:
    """The mask of tokens `b n` as rows of `b r blocks`. The padding of the last block is masked."""
    batch, n, _ = x.shape
    missing = blocks * width - n
    if not is_certain(missing == 0):
        there = x.new_ones((1, n), dtype=torch.bool) if mask is None else mask
        mask = F.pad(there, (0, missing))
    if mask is None:
        return None
    return as_rows(mask[:, None].expand(batch, routes, blocks * width).view(batch, routes, blocks, width))


class Choice(NamedTuple):
    """Options of the steps of routing between scores and selected tokens."""

    num_selected: int
    k: float
    n_iters: int
    eps: float
    first: float
    eps_decay: float
    exact: bool
    block_size: int | None

    def choose(
        self,
        x: Tensor,
        scores: Tensor,
        mask: Tensor | None,
        straight_through: bool,
        outputs: tuple[Tensor, Tensor, Tensor],
        slots: Tensor | None,
    ) -> Tensor:
        """Write weights, tokens and indices, and slots if they have entries, from scores `b r blocks*width`. Return the
        state of the relaxed selection."""
        blocks, width = _blocks(x.shape[1], self.block_size)
        rows, row_mask = scores.view(-1, width), _row_mask(x, mask, scores.shape[1], blocks, width)
        if self.exact:
            relaxed, state = solve_rows(rows, row_mask, None, self.k, self.eps)
        else:
            schedule = (self.k, self.n_iters, self.eps, self.first, self.eps_decay)
            relaxed, state = descend_rows(rows, row_mask, None, *schedule, slots is not None)
        selected = select_rows(rows, row_mask, self.num_selected)
        if has_values(selected):
            gather = launch_gather if _runs_kernel(x) else cpu.gather
            gather(x, selected, relaxed, row_mask, blocks, straight_through, *outputs, slots)
        return state

    def grad_scores(
        self,
        grad_weights: Tensor | None,
        x: Tensor,
        scores: Tensor,
        mask: Tensor | None,
        state: Tensor,
        slots: Tensor,
    ) -> Tensor:
        """The gradient of scores `b r blocks*width` from that of weights."""
        if grad_weights is None or not has_values(scores):
            return torch.zeros_like(scores)
        of_relaxed = torch.empty_like(scores)
        spread = launch_spread if _runs_kernel(x) else cpu.spread
        spread(grad_weights if grad_weights.stride(-1) == 1 else grad_weights.contiguous(), slots, of_relaxed)
        blocks, width = _blocks(x.shape[1], self.block_size)
        rows, grad_rows = scores.view(-1, width), of_relaxed.view(-1, width)
        row_mask = _row_mask(x, mask, scores.shape[1], blocks, width)
        if self.exact:
            ds, _ = solve_rows_backward(grad_rows, rows, row_mask, state, self.eps)
        else:
            schedule = (self.k, self.n_iters, self.eps, self.first, self.eps_decay)
            ds, _ = descend_rows_backward(grad_rows, rows, row_mask, None, state, *schedule)
        return ds.view(scores.shape)


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
    straight_through: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weights, tokens and indices, then the tensors for the backward pass: scores, inverse norms, a state per row, and
    slots. Slots have the shape of scores: the index of a token among the selected tokens of its route, or -1."""
    blocks, width = _blocks(x.shape[1], block_size)
    (batch, _, d), routes = x.shape, routing_tokens.shape[1]
    slots = x.new_empty((batch, routes, blocks * width) if save else (0,), dtype=torch.int32)
    kept = slots if save else None
    scores, inverse_norms = score_tokens(x, routing_tokens, cosine, blocks * width, kept)
    shape = (batch, routes, blocks * num_selected)
    outputs = scores.new_empty(shape), x.new_empty((*shape, d)), x.new_empty(shape, dtype=torch.int64)
    choice = Choice(num_selected, k, n_iters, eps, first, eps_decay, exact, block_size)
    state = choice.choose(x, scores, mask, straight_through, outputs, kept)
    weights, tokens, indices = outputs
    return weights, tokens, indices, scores, inverse_norms, state, slots


def _runs_kernel(x: Tensor) -> bool:
    """fp64 stays fp64, which the kernels do not support."""
    return x.dtype != torch.float64 and runs_triton(x)


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
    slots: Tensor,
    num_selected: int,
    k: float,
    n_iters: int,
    eps: float,
    first: float,
    eps_decay: float,
    exact: bool,
    block_size: int | None,
    needs_x: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of tokens, of size 0 if they need none, and of routing tokens."""
    choice = Choice(num_selected, k, n_iters, eps, first, eps_decay, exact, block_size)
    grad_scores = choice.grad_scores(grad_weights, x, scores, mask, state, slots)
    blocks, width = _blocks(x.shape[1], block_size)
    gathered, past_the_end = None, None
    if grad_tokens is not None and needs_x and has_values(scores):
        # All tokens of a last block with fewer tokens than are selected from it are selected. Its other indices are
        # past the end.
        missing = blocks * width - x.shape[1]
        kept = indices.shape[2] - max(num_selected - (width - missing), 0)
        past_the_end = grad_tokens[:, :, kept:] if kept < indices.shape[2] else None
        gathered = indices[:, :, :kept], slots, grad_tokens[:, :, :kept].contiguous()
    dx, dr = score_tokens_backward(x, routing_tokens, scores, inverse_norms, grad_scores, gathered, needs_x)
    if past_the_end is not None:
        dx[:, -1] += past_the_end.sum(dim=(1, 2), dtype=scores.dtype)
    return dx, dr


_operation = Operation(
    "route",
    _forward,
    _backward,
    outputs=("weights", "tokens", "indices", "scores", "inverse_norms", "state", "slots"),
    gradients=("x", "routing_tokens"),
)


register_flop_formula(torch.ops.colt5.route)(count_flops)


@register_flop_formula(torch.ops.colt5.route_backward)
def _count_backward_flops(*arguments: Any, **_: object) -> int:
    needs_x = arguments[-1]
    return count_flops(*arguments[2:4]) * (2 if needs_x else 1)


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
    straight_through: bool = False,
    mask: Tensor | None = None,
) -> RouteReturn:
    """`reference.route` with one read of each token, and one more for the gradients of tokens and routing tokens.

    The backward pass needs tokens and scores, and 16 bytes per row of scores and iteration. Results are bitwise equal
    from run to run. PyTorch computes a CPU tensor by the same mathematics.

    Args:
        x: tokens `b n d`, any float dtype, any strides.
        routing_tokens: `b r d`, or `1 r d` for the whole batch; any float dtype.
        num_selected: number of tokens that each route selects, from each block if there are blocks.
        k: sum of the relaxed selection of a route, in each block.
        n_iters, eps, eps_init, eps_decay: as in `kernels.coor_descent`.
        solver: `coor_descent`, or `exact`: `kernels.soft_topk` at temperature eps.
        cosine_sim_scale: the score is the cosine times this, instead of the product.
        block_size: number of tokens per block, if tokens are selected from each block. A shorter last block is padded
            with masked tokens.
        straight_through: weights are 1, with the gradient of the relaxed selection.
        mask: bool `b n`, False for masked tokens.

    Returns:
        indices int64 `b r s`, weights `b r s` in fp32 at least, and tokens `b r s d`: a `RouteReturn`.

    Raises:
        ValueError: an argument is out of its range, or shapes do not match.
        NotImplementedError: for a second derivative or forward mode.
    """
    check_route(x, routing_tokens, num_selected, k, (n_iters, eps, eps_init, eps_decay), solver, block_size, mask)
    weights, tokens, indices, *_ = _operation(
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
        straight_through,
    )
    return RouteReturn(indices, weights, tokens)
