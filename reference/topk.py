"""Differentiable top-k: a hard selection whose gradient is that of coordinate descent."""

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from reference._arguments import check_integers, check_positive, check_scores, require, takes_no_part
from reference.coor_descent import coor_descent


class TopkReturn(NamedTuple):
    """What `topk` returns, each `... k`; the last two are None where `non_differentiable` was asked for.

    values: the selected entries of x times their gates; indices: int64, where they stand in x, largest first;
    coor_descent_values: the relaxed selection at these indices; gates: 1 in value, with its gradient.
    """

    values: Tensor
    indices: Tensor
    coor_descent_values: Tensor | None
    gates: Tensor | None


def topk(
    x: Tensor,
    k: int,
    coor_descent_k_ratio: float = 9 / 8,
    n_iters: int = 20,
    eps: float = 0.1,
    eps_init: float | None = None,
    eps_decay: float = 1.0,
    mask: Tensor | None = None,
    fused: bool = False,
    non_differentiable: bool = False,
) -> TopkReturn:
    """The k largest entries of each row with gates that carry a gradient.

    Selection is by x itself, of which the relaxed selection is a monotone function: where that function saturates, its
    values tie and x does not. Masked entries, and those of -inf, are selected only where a row has fewer than k others;
    then value, coordinate descent value and gate of the surplus are 0.

    Args:
        x: `... n`, any float dtype.
        k: how many to select, from 1 to n.
        coor_descent_k_ratio: at least 1: coordinate descent sums to `min(k * ratio, n)`, since fetching a few more
            than k gives the next candidates a gradient (CoLT5, https://arxiv.org/abs/2303.09752, section 3.1).
        n_iters, eps, eps_init, eps_decay, mask: as in `coor_descent`.
        fused: compute the relaxation with the fused kernel.
        non_differentiable: skip the relaxation.

    Raises:
        ValueError: an argument is out of its range, or shapes do not match.
    """
    rest = (coor_descent_k_ratio, n_iters, eps, eps_init, eps_decay, mask)
    if fused:
        # The one place where the reference reaches for a kernel, and only when asked to.
        return import_module("kernels.topk").topk(x, k, *rest, fused=True, non_differentiable=non_differentiable)
    return select_topk(coor_descent, largest, x, k, *rest, non_differentiable)


def check_topk(x: Tensor, k: int, coor_descent_k_ratio: float) -> None:
    """k is from 1 to n and the ratio at least 1."""
    check_integers(k=k)
    require(1 <= k <= x.shape[-1], "k", k, "from 1 to n = {}", x.shape[-1])
    check_positive(coor_descent_k_ratio=coor_descent_k_ratio)
    require(coor_descent_k_ratio >= 1, "coor_descent_k_ratio", coor_descent_k_ratio, ">= 1")


def largest(x: Tensor, k: int, mask: Tensor | None) -> Tensor:
    """Indices `... k` of the largest entries, masked ones after all others."""
    candidates = x.detach() if mask is None else x.detach().masked_fill(~mask, -torch.inf)
    return candidates.topk(k, dim=-1).indices


def select_topk(
    descent: Callable[..., Tensor],
    choose: Callable[[Tensor, int, Tensor | None], Tensor],
    x: Tensor,
    k: int,
    coor_descent_k_ratio: float,
    n_iters: int,
    eps: float,
    eps_init: float | None,
    eps_decay: float,
    mask: Tensor | None,
    non_differentiable: bool,
) -> TopkReturn:
    """`topk` on top of any implementation of `coor_descent`, and of the hard top-k, `largest`."""
    check_scores(x, mask)
    check_topk(x, k, coor_descent_k_ratio)

    indices = choose(x, k, mask)
    # Two gradients come together in x, which may cancel each other: they are added before they are rounded.
    dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
    values = x.gather(-1, indices)
    surplus = takes_no_part(values.detach(), None if mask is None else mask.expand(x.shape).gather(-1, indices))
    values = values.masked_fill(surplus, 0.0)
    if non_differentiable:
        return TopkReturn(values.to(dtype), indices, None, None)

    soft = descent(
        x,
        n_iters=n_iters,
        k=min(k * coor_descent_k_ratio, x.shape[-1]),
        eps=eps,
        eps_init=eps_init,
        eps_decay=eps_decay,
        mask=mask,
    ).gather(-1, indices)
    # Straight through: 1 in value, the gradient of the relaxation.
    gates = (soft + (1.0 - soft).detach()).masked_fill(surplus, 0.0)
    return TopkReturn((values * gates).to(dtype), indices, soft.to(dtype), gates.to(dtype))
