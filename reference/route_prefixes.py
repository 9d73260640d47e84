"""Routing for autoregressive attention: each window of a sequence selects from all tokens before it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from reference._shared.arguments import check_prefixes, check_schedule
from reference._shared.returns import PrefixSelection
from reference._shared.sizes import mask_of_prefixes
from reference.coor_descent import coor_descent
from reference.route import pass_through


def route_prefixes(
    scores: Tensor,
    *,
    window_size: int,
    num_selected: int,
    k: float,
    n_iters: int,
    eps: float = 0.1,
    eps_init: float | None = None,
    eps_decay: float = 1.0,
    straight_through: bool = False,
) -> PrefixSelection:
    """Select, for each window except the first, the largest scores before it, weighted by coordinate descent over
    these.

    A row of coordinate descent is a prefix of the scores, window by window (CoLT5, https://arxiv.org/abs/2303.09752,
    section 3.1, with a mask of the tokens before a window). Of equal scores the first is selected. If a window selects
    a token, so do all windows between the token and that window: later tokens can only displace it.

    Args:
        scores: `b r n`, any float dtype.
        window_size: tokens of a window; the last one may be shorter.
        num_selected: s, number of tokens to select, from 1 to n.
        k: the sum that each row of coordinate descent approaches, for any length.
        n_iters, eps, eps_init, eps_decay: as in `reference.coor_descent`.
        straight_through: weights are 1, with the gradient of the relaxed selection.

    Returns:
        Indices, weights and mask, `b w r s` for the w = ceil(n / window_size) - 1 windows after the first. Weights have
        a gradient; weight and gradient of a score of -inf are 0. All weights of a window are NaN if a score before it
        is NaN or +inf; NaN counts as the largest score.

    Raises:
        ValueError: an argument is out of its range, or shapes do not match.
    """
    check_prefixes(scores, window_size, num_selected, k)
    check_schedule(n_iters, eps, eps_init, eps_decay)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    n = scores.shape[-1]
    following = torch.arange(num_selected, device=scores.device)
    # There may be no window after the first.
    weights = [scores[:, None, :, :1][:, :0].expand(-1, -1, -1, num_selected)]
    indices = [weights[0].long()]
    for length in range(window_size, n, window_size):
        prefix = scores[..., :length]
        y = coor_descent(prefix, n_iters=n_iters, k=k, eps=eps, eps_init=eps_init, eps_decay=eps_decay)
        largest = prefix.detach().sort(dim=-1, descending=True, stable=True).indices[..., :num_selected]
        rest = following[length:].expand(*largest.shape[:-1], -1)
        indices.append(torch.cat((largest, rest), dim=-1)[:, None])
        of_largest = y.gather(-1, largest)
        of_largest = pass_through(of_largest) if straight_through else of_largest
        weights.append(F.pad(of_largest, (0, rest.shape[-1]))[:, None])
    return PrefixSelection(
        torch.cat(indices, dim=1), torch.cat(weights, dim=1), mask_of_prefixes(scores, window_size, num_selected)
    )
