"""The scores by which a router selects tokens, by their definition."""

import torch
import torch.nn.functional as F
from torch import Tensor

from reference._shared.arguments import check_routing_tokens, check_scale
from reference._shared.autocast import without_autocast


def routing_scores(x: Tensor, routing_tokens: Tensor, *, cosine_sim_scale: float | None = None) -> Tensor:
    """The product of each token with each routing token (CoLT5, https://arxiv.org/abs/2303.09752, section 3.1).

    Args:
        x: tokens `b n d`, any float dtype.
        routing_tokens: `b r d`, or `1 r d` for the whole batch; any float dtype.
        cosine_sim_scale: the score is the cosine times this, instead of the product.

    Returns:
        `b r n` in fp32 at least, even under autocast: in half precision, too many scores would be equal.

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
