"""The differentiable top-k on top of any implementation of `coor_descent` and of the hard top-k."""

from collections.abc import Callable

import torch
from torch import Tensor

from reference._shared.arguments import check_scores, check_topk, takes_no_part
from reference._shared.returns import TopkReturn


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
    # Two gradients of x may cancel each other, so they are added before they are rounded.
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
