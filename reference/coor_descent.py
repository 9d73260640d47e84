"""Coordinate descent for the soft top-k, as it is defined."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from reference._arguments import check_k, check_schedule, check_scores, epsilon_schedule


def coor_descent(
    scores: Tensor,
    *,
    n_iters: int,
    k: float | Tensor,
    eps: float = 0.1,
    eps_init: float | None = None,
    eps_decay: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Relax the choice of the k largest scores of each row to numbers in [0, 1].

    Wright 2015, https://arxiv.org/abs/1502.04759; its use for routing: CoLT5, https://arxiv.org/abs/2303.09752,
    section 3.1; epsilon scaling: https://arxiv.org/abs/2304.04947, section 3.2. The definition is DESIGN 3.1 line by
    line, computed in the dtype of the scores.

    Args:
        scores: `... n`, any float dtype.
        n_iters: number of iterations, at least 1.
        k: how many entries a row should sum to. A number, or a tensor that broadcasts to `...`, one k a row; it has a
            gradient.
        eps: last temperature, in units of the scores.
        eps_init: first temperature; None or anything below eps stands for eps.
        eps_decay: factor in (0, 1] on the temperature after each iteration, until it reaches eps.
        mask: bool, broadcasts to `... n`; entries that are False take part in nothing and come out as 0.

    Returns:
        `... n`, in the dtype of the scores. A row with a NaN among its valid scores is NaN, and so is a row whose k
        (from a tensor) is not positive.

    Raises:
        ValueError: an argument is out of its range, or shapes do not match.
    """
    check_scores(scores, mask)
    check_k(k, scores)
    check_schedule(n_iters, eps, eps_init, eps_decay)

    k = k if isinstance(k, Tensor) else torch.full((), k, dtype=scores.dtype, device=scores.device)
    k = rearrange(k.to(scores.dtype), "... -> ... 1")
    log_k = torch.log(torch.where(k > 0, k, torch.nan))

    # A row without a valid entry computes with all of them, so that its gradient is 0 and not 0 times infinity.
    hidden = None if mask is None else ~mask.expand(scores.shape)
    left_out = None if hidden is None else hidden & ~hidden.all(dim=-1, keepdim=True)
    s = scores if hidden is None else scores.masked_fill(hidden, 0.0)

    b = -s
    *temperatures, last_temperature = epsilon_schedule(n_iters, eps, eps_init, eps_decay)
    for temperature in temperatures:
        exponent = (s + b) / temperature
        exponent = exponent if left_out is None else exponent.masked_fill(left_out, -torch.inf)
        a = temperature * (log_k - exponent.logsumexp(dim=-1, keepdim=True))
        b = -F.relu(s + a)

    y = torch.exp((s + a + b) / last_temperature)
    return y if hidden is None else y.masked_fill(hidden, 0.0)
