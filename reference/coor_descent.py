"""Coordinate descent for the soft top-k, by its definition."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from reference._shared.arguments import (
    check_k,
    check_schedule,
    check_scores,
    epsilon_schedule,
    takes_no_part,
    without_infinities,
)

FAR = 1024.0
"""Distance, in temperatures, beyond which scores are outliers."""


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
    section 3.1; epsilon scaling: https://arxiv.org/abs/2304.04947, section 3.2. The definition is docs/design.md,
    section 1, line by line, computed in the dtype of the scores.

    Args:
        scores: `... n`, any float dtype.
        n_iters: number of iterations, at least 1.
        k: the sum that each row approaches: a number, or a tensor that broadcasts to `...`, with a gradient.
        eps: last temperature, in units of the scores.
        eps_init: first temperature; None, or a value below eps, means eps.
        eps_decay: factor in (0, 1] by which the temperature decays after each iteration, until it reaches eps.
        mask: bool, broadcasts to `... n`; False entries are left out and give 0. So do entries with a score of -inf.

    Returns:
        `... n`, in the dtype of the scores. A row is NaN if a valid score is NaN or +inf, or if its k, from a tensor,
        is not positive.

    Raises:
        ValueError: an argument is out of its range, or shapes do not match.
    """
    check_scores(scores, mask)
    check_k(k, scores)
    check_schedule(n_iters, eps, eps_init, eps_decay)

    k = k if isinstance(k, Tensor) else torch.full((), k, dtype=scores.dtype, device=scores.device)
    k = rearrange(k.to(scores.dtype), "... -> ... 1")
    log_k = torch.log(torch.where(k > 0, k, torch.nan))

    # A row without valid entries computes with 0, so that its gradient is 0, not 0 times infinity.
    hidden = takes_no_part(scores, mask)
    s = without_infinities(scores).masked_fill(hidden, -torch.inf)
    s = s.masked_fill(hidden.all(dim=-1, keepdim=True), 0.0)
    *temperatures, last_temperature = epsilon_schedule(n_iters, eps, eps_init, eps_decay)
    s, start = _without_outliers(s, log_k.detach(), FAR * sum(temperatures))

    b = (start - s).masked_fill(s == -torch.inf, 0.0)
    for temperature in temperatures:
        a = temperature * (log_k - ((s + b) / temperature).logsumexp(dim=-1, keepdim=True))
        b = -F.relu(s + a)

    return torch.exp((s + a + b) / last_temperature).masked_fill(hidden, 0.0)


def _without_outliers(s: Tensor, log_k: Tensor, far: float) -> tuple[Tensor, Tensor]:
    """Move scores for coordinate descent, and remove those that would reduce the precision of others. The second result
    is s + b before the first iteration: 0 for a row whose scores are not all moved.

    Thresholds -a are at most the sum of the temperatures times log(n / k), so scores far above that may be lowered. If
    all scores are far below 0, they may be raised by any number, if s + b starts as far above them.
    """
    with torch.no_grad():
        highest = s.amax(dim=-1, keepdim=True)
        log_n = (s > -torch.inf).sum(dim=-1, keepdim=True).to(s.dtype).log()
        limit = far * (1.0 + F.relu(log_n - log_k))
        shift = torch.where(highest < -far, highest, 0.0)
    return torch.minimum(s, limit) - shift, -shift.clamp(min=-far)
