"""The exact soft top-k: the solution that coordinate descent converges to."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from reference._shared.arguments import check_k, check_positive, check_scores, takes_no_part, without_infinities

NOTHING_AT = 100.0
"""exp(-this), times any number of entries, is negligible relative to 1 in fp64."""


def soft_topk(scores: Tensor, *, k: float | Tensor, eps: float, mask: Tensor | None = None) -> Tensor:
    """Relax the choice of the k largest scores of each row. The result is y_i = min(1, exp((s_i + a) / eps)) with sum y
    = k.

    This is the fixed point of coordinate descent at a constant temperature (Wright 2015,
    https://arxiv.org/abs/1502.04759; CoLT5, https://arxiv.org/abs/2303.09752, section 3.1). The entries at 1 are the m
    largest for some m < k; sorting finds m, and then a = eps (log(k - m) - logsumexp of the others / eps). The gradient
    is that of this closed form; where an entry is exactly at the kink, it counts among the others. m is found in fp64,
    the closed form is computed in the dtype of the scores.

    Args:
        scores: `... n`, any float dtype.
        k: the sum of each row: a number, or a tensor that broadcasts to `...`, with a gradient.
        eps: temperature, in units of the scores.
        mask: bool, broadcasts to `... n`; False entries are left out and give 0. So do entries with a score of -inf.

    Returns:
        `... n`, in the dtype of the scores. In a row with no more than k valid entries each of them is 1, with a
        gradient of 0. The valid entries of a row are NaN if one of their scores is NaN or +inf, or if its k, from a
        tensor, is not positive.

    Raises:
        ValueError: an argument is out of its range, or shapes do not match.
    """
    check_scores(scores, mask)
    check_k(k, scores)
    check_positive(eps=eps)

    k = rearrange(torch.as_tensor(k, dtype=scores.dtype, device=scores.device), "... -> ... 1")
    k = torch.where(k > 0, k, torch.nan)

    hidden = takes_no_part(scores, mask)
    s = without_infinities(scores).masked_fill(hidden, 0.0)
    full = (k >= (~hidden).sum(dim=-1, keepdim=True)) & ~s.isnan().any(dim=-1, keepdim=True)

    with torch.no_grad():
        # A NaN sorts first, before any entry that could be at 1.
        ordered = s.masked_fill(hidden, -torch.inf).sort(dim=-1, descending=True).values
        exponent = _exponents(ordered, eps)
        # log of the sum of exp(s / eps) over an entry and all below it
        tails = exponent.flip(-1).logcumsumexp(dim=-1).flip(-1)
        larger = torch.arange(scores.shape[-1], device=scores.device)
        # An entry is at 1 if it would be above 1 when only the entries before it are at 1.
        at_one = torch.log((k.double() - larger).clamp(min=0)) + exponent > tails
        n_at_one = at_one.cumprod(dim=-1).sum(dim=-1, keepdim=True)
        largest_below_one = ordered.gather(-1, n_at_one.clamp(max=scores.shape[-1] - 1))
        saturated = (s > largest_below_one) & ~hidden

    # Rows without an equation to solve compute one with all their entries, so that their gradient is 0 and not NaN.
    others = ~saturated & ~hidden | full
    # Relative to the kink, exponents are exact where they matter. The shift cancels, so it needs no gradient.
    exponent = (s - torch.where(full, 0.0, largest_below_one)) / eps
    lse = exponent.masked_fill(~others, -torch.inf).logsumexp(dim=-1, keepdim=True)
    log_y = exponent + torch.log(torch.where(full, 1.0, k - n_at_one)) - lse
    return torch.exp(log_y.masked_fill(saturated | full | hidden, 0.0)).masked_fill(hidden, 0.0)


def _exponents(ordered: Tensor, eps: float) -> Tensor:
    """s / eps in fp64, shifted by one number per row, for scores in descending order.

    Distances of neighbours are added up, limited to one at which an exponential is negligible relative to another. So
    an outlier does not reduce the precision of the others.
    """
    ordered = ordered.double()
    lowest = ordered == -torch.inf
    distances = ((ordered[..., :-1] - ordered[..., 1:]) / eps).clamp(max=NOTHING_AT).masked_fill(lowest[..., 1:], 0.0)
    return F.pad(distances, (0, 1)).flip(-1).cumsum(dim=-1).flip(-1).masked_fill(lowest, -torch.inf)
