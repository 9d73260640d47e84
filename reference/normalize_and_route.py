"""The tokens of a routed layer, normalized for its light branch and routed to its heavy one."""

import torch
from torch import Tensor

from reference._shared.arguments import Solver, check_positive
from reference._shared.returns import NormalizedRouteReturn
from reference.normalize import normalize
from reference.route import route


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
    """`normalize` and `route` of the same tokens.

    Args:
        x: tokens `b n d`, any float dtype.
        routing_tokens: `b r d`, or `1 r d` for the whole batch.
        weight, bias: `d`, of the norm.
        num_selected, k, n_iters, eps, eps_init, eps_decay, solver, straight_through, mask: as in `route`.
        center, norm_eps, dtype: as in `normalize`.

    Raises:
        ValueError: an argument is out of its range, or shapes do not match.
    """
    check_positive(norm_eps=norm_eps)
    normalized = normalize(x, weight, bias, center=center, eps=norm_eps, dtype=dtype)
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
    return NormalizedRouteReturn(*routed, normalized, x)
