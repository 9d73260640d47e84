"""Norm and routers of a layer that read its tokens together."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from reference._shared.arguments import check_counts, check_tokens
from reference._shared.autocast import autocast_dtype
from reference._shared.returns import NormalizedRouteReturn
from reference.layers.linear import is_plain
from reference.layers.norms import LayerNorm, RMSNorm
from reference.layers.router import CoordinateDescentRouter, is_selected


class Together(NamedTuple):
    """Normalized tokens, and routed tokens of all routes of all routers, with routes first."""

    normalized: Tensor
    """`b n d`."""

    indices: Tensor
    """`r b k`, like scores and mask; these are as in `RouterReturn`."""

    scores: Tensor
    tokens: Tensor
    """`r b k d`."""

    mask: Tensor | None

    x: Tensor
    """The input tokens, for a residual."""


def route_together(
    x: Tensor,
    norm: nn.Module,
    routers: Sequence[CoordinateDescentRouter],
    num_tokens: Sequence[int],
    mask: Tensor | None,
    routing_tokens: Sequence[Tensor | None],
) -> Together | None:
    """Normalize and route tokens `b n d` in one operation, which reads them once and writes their gradient once.

    Args:
        norm: the norm of all tokens.
        num_tokens: number of tokens that each router routes.
        mask: `b n`, False for tokens that are not routed.
        routing_tokens: those of each router; None for its own.

    Returns:
        None if an observer needs to see one of the modules, or if routers differ in more than their routing tokens or
        have options that the operation lacks. Then each module has to be called separately.
    """
    router = routers[0]
    check_tokens(x, router.dim, mask)
    check_counts(num_tokens=num_tokens[0])
    if not isinstance(norm, RMSNorm | LayerNorm) or not is_plain(norm, type(norm)):
        return None
    if not all(is_plain(each, CoordinateDescentRouter) for each in routers):
        return None
    if any(each is not None for each in routing_tokens):
        return None
    n, is_whole = router.operations.length(x), router.operations.shards_of is None
    choices = [each.choice_of_all(n, count) for each, count in zip(routers, num_tokens, strict=True)]
    if choices[0] is None or any(each != choices[0] for each in choices):
        return None
    own: list[Tensor] = [each.routing_token for each in routers if each.routing_token is not None]
    together: NormalizedRouteReturn = router.operations.normalize_and_route(
        x,
        (own[0] if len(own) == 1 else torch.cat(own)).unsqueeze(0),
        **choices[0],
        mask=mask,
        dtype=autocast_dtype(x),
        **{"norm_eps" if name == "eps" else name: each for name, each in norm.options().items()},
    )
    indices, scores, tokens, normalized, x = together
    selected = is_selected(x, mask, indices, more=0 if is_whole else 1)
    return Together(
        normalized,
        indices.transpose(0, 1),
        scores.to(x.dtype).transpose(0, 1),
        tokens.transpose(0, 1),
        None if selected is None else selected.transpose(0, 1),
        x,
    )
