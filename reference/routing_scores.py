"""The scores that a router selects tokens by, as they are defined."""

import torch
import torch.nn.functional as F
from torch import Tensor

from reference._arguments import check_float, check_scale, require
from reference._autocast import without_autocast


def routing_scores(x: Tensor, routing_tokens: Tensor, *, cosine_sim_scale: float | None = None) -> Tensor:
    """The product of each token with each routing token (CoLT5, https://arxiv.org/abs/2303.09752, section 3.1).

    Args:
        x: tokens `b n d`, any float dtype.
        routing_tokens: `b r d`, or `1 r d` for all of a batch; any float dtype.
        cosine_sim_scale: score by the cosine times this, instead of by the product.

    Returns:
        `b r n` in fp32 at least, autocast or not: rounded to half precision, too many would be equal.

    Raises:
        ValueError: shapes do not match.
    """
    check_routing_tokens(x, routing_tokens)
    check_scale(cosine_sim_scale)
    wide = torch.promote_types(x.dtype, torch.float32)
    x, routing_tokens = x.to(wide), routing_tokens.to(wide)
    with without_autocast(x):
        if cosine_sim_scale is None:
            return routing_tokens @ x.mT
        return F.normalize(routing_tokens, dim=-1) @ F.normalize(x, dim=-1).mT * cosine_sim_scale


def check_routing_tokens(x: Tensor, routing_tokens: Tensor) -> None:
    """Tokens are a float tensor (b, n, d), routing tokens one of (b, r, d) or (1, r, d)."""
    check_float("x", x)
    require(x.ndim == 3 and x.shape[-1] >= 1, "x", x.shape, "of shape (b, n, d) with d >= 1")
    check_float("routing_tokens", routing_tokens)
    (batch, _, d), shape = x.shape, routing_tokens.shape
    fits = len(shape) == 3 and (shape[0] == 1 or shape[0] == batch) and shape[1] >= 1 and shape[2] == d
    require(fits, "routing_tokens", shape, "of shape ({0}, r, {1}) or (1, r, {1}) with r >= 1", batch, d)
    same = routing_tokens.device == x.device
    require(same, "routing_tokens", routing_tokens.device, "on {} as x is", x.device)
