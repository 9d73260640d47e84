"""Routing by its definition: scores, their relaxed top-k, the choice of the largest, and the selected tokens."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from reference._shared.arguments import Solver, check_route
from reference._shared.autocast import without_autocast
from reference._shared.returns import RouteReturn
from reference._shared.sizes import is_certain, missing
from reference.coor_descent import coor_descent
from reference.routing_scores import routing_scores
from reference.select import select
from reference.soft_topk import soft_topk


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
    """Select tokens by score, with a gradient for the scores of all (CoLT5, 2303.09752, section 3.1).

    Weights and tokens are differentiable with respect to tokens and routing tokens.

    Args:
        x: tokens `b n d`, any float dtype.
        routing_tokens: `b r d`, or `1 r d` for the whole batch.
        num_selected: number of tokens that each route selects, from each block if there are blocks.
        k: sum of the relaxed selection of a route, in each block.
        n_iters, eps, eps_init, eps_decay: as in `reference.coor_descent`.
        solver: `coor_descent`, or `exact`: `reference.soft_topk` at temperature eps.
        cosine_sim_scale: the score is the cosine times this, instead of the product.
        block_size: number of tokens per block, if tokens are selected from each block. A shorter last block is padded
            with masked tokens.
        straight_through: weights are 1, with the gradient of the relaxed selection.
        mask: bool `b n`, False for masked tokens. Tokens with a score of -inf count as masked.

    Raises:
        ValueError: an argument is out of its range, or shapes do not match.
    """
    check_route(x, routing_tokens, num_selected, k, (n_iters, eps, eps_init, eps_decay), solver, block_size, mask)
    scores = routing_scores(x, routing_tokens, cosine_sim_scale=cosine_sim_scale)
    per_route = None if mask is None else rearrange(mask, "b n -> b 1 n")
    relax: Callable[..., Tensor] = partial(soft_topk, k=k, eps=eps)
    if solver == "coor_descent":
        relax = partial(coor_descent, n_iters=n_iters, k=k, eps=eps, eps_init=eps_init, eps_decay=eps_decay)
    options: dict[str, Any] = {"block_size": block_size, "straight_through": straight_through}
    indices, weights = choose(scores, per_route, num_selected, relax, select, **options)
    return RouteReturn(indices, weights, gather_tokens(x, indices))


def choose(
    scores: Tensor,
    mask: Tensor | None,
    num_selected: int,
    relax: Callable[..., Tensor],
    select: Callable[..., Tensor],
    *,
    block_size: int | None,
    straight_through: bool,
) -> tuple[Tensor, Tensor]:
    """Indices and weights `b r s` that `route` chooses by scores `b r n`, with a mask that broadcasts to these.

    Args:
        relax: the solver, with all its options except the mask.
        select: `reference.select`, or its kernel.
        num_selected, block_size, straight_through: as in `route`.
    """
    scores, mask = in_blocks(scores, mask, block_size)
    with without_autocast(scores):
        relaxed = relax(scores, mask=mask)
    indices = select(scores, num_selected=num_selected, mask=mask)
    weights = relaxed.gather(-1, indices)
    if straight_through:
        weights = pass_through(weights)
        if mask is not None:
            weights = weights.masked_fill(~mask.expand(scores.shape).gather(-1, indices), 0.0)
    if block_size is not None:
        indices, weights = positions(indices, block_size), weights.flatten(-2)
    return indices, weights


def pass_through(weights: Tensor) -> Tensor:
    """1 with the gradient of the weights."""
    return weights + (1.0 - weights).detach()


def in_blocks(scores: Tensor, mask: Tensor | None, size: int | None) -> tuple[Tensor, Tensor | None]:
    """Scores `... n` and a mask that broadcasts to them, as blocks `... m size` with masked padding."""
    if size is None:
        return scores, mask
    n = scores.shape[-1]
    more = missing(n, size)
    if not is_certain(more == 0):
        mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand(scores.shape)
        scores, mask = F.pad(scores, (0, more)), F.pad(mask, (0, more))
    if mask is not None:
        mask = rearrange(mask, "... (m w) -> ... m w", w=size)
    return rearrange(scores, "... (m w) -> ... m w", w=size), mask


def positions(indices: Tensor, size: int) -> Tensor:
    """Indices `... m s` within blocks of that size as indices of the whole: `... (m s)`."""
    starts = torch.arange(indices.shape[-2], device=indices.device) * size
    return (indices + starts[:, None]).flatten(-2)


def gather_tokens(x: Tensor, indices: Tensor) -> Tensor:
    """Tokens `b ... k d` of x `b n d` at indices `b ... k`; an index past the end gives the last token.

    Indexing instead of `torch.gather`, whose gradient would have the size of x for each of `...`.
    """
    batch = torch.arange(x.shape[0], device=x.device).view(-1, *(1,) * (indices.dim() - 1))
    return x[batch, indices.clamp(max=x.shape[1] - 1)]
