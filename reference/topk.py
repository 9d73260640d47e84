"""Differentiable top-k: a hard selection whose gradient is that of coordinate descent."""

from torch import Tensor

from reference._kernels import kernel
from reference._shared.returns import TopkReturn
from reference._shared.topk import largest, select_topk
from reference.coor_descent import coor_descent


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

    Entries are selected by x itself. The relaxed selection is a monotone function of x; where it saturates, its values
    tie and x does not. Masked entries, and those of -inf, are selected only if a row has fewer than k others. Their
    value, coordinate descent value and gate are 0.

    Args:
        x: `... n`, any float dtype.
        k: number of entries to select, from 1 to n.
        coor_descent_k_ratio: at least 1. Coordinate descent sums to `min(k * ratio, n)`, because a sum above k gives
            the next candidates a gradient (CoLT5, https://arxiv.org/abs/2303.09752, section 3.1).
        n_iters, eps, eps_init, eps_decay, mask: as in `coor_descent`.
        fused: compute the relaxation with the fused kernel.
        non_differentiable: skip the relaxation.

    Raises:
        ValueError: an argument is out of its range, or shapes do not match.
    """
    rest = (coor_descent_k_ratio, n_iters, eps, eps_init, eps_decay, mask)
    if fused:
        return kernel("topk")(x, k, *rest, fused=True, non_differentiable=non_differentiable)
    return select_topk(coor_descent, largest, x, k, *rest, non_differentiable)
