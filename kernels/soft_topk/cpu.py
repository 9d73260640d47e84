"""`kernels.soft_topk` in PyTorch, for CPU tensors."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NOTHING_AT = 100.0
"""exp(-this), times any number of entries, is negligible relative to 1 in fp64."""


def forward(
    scores: Tensor, mask: Tensor | None, k_rows: Tensor | None, k: float, eps: float, y: Tensor, solution: Tensor
) -> None:
    """The same equation, solved by testing which of the largest scores, in order, is the last one at 1."""
    n_rows, n = scores.shape
    s = _working_copy(scores, mask)
    wide_k = scores.new_full((n_rows, 1), k, dtype=torch.float64) if k_rows is None else k_rows.double()[:, None]
    wide_k = torch.where(wide_k > 0, wide_k, torch.nan)
    n_valid = (s != -torch.inf).sum(dim=-1, keepdim=True)

    depth = n if k_rows is not None else min(math.ceil(k), n)
    ordered = s.topk(depth, dim=-1).values
    exponents, last = _exponents(ordered, eps), ordered[:, -1:]
    # Entries that are not among the largest. Each of the largest contributes exactly 1.
    rest = (s - last).div_(eps).clamp_(max=0.0).exp_().sum(dim=-1, keepdim=True, dtype=torch.float64) - depth
    rest = rest.masked_fill_(last == -torch.inf, 0.0).clamp_(min=0.0).log_()
    # log of the sum of exponentials over an entry and all below it
    tails = torch.cat([rest, exponents.flip(-1)], dim=-1).logcumsumexp(dim=-1)[:, 1:].flip(-1)
    larger = torch.arange(depth, device=scores.device)
    n_at_one = (torch.log((wide_k - larger).clamp(min=0.0)) + exponents > tails).cumprod(dim=-1).sum(-1, keepdim=True)

    # If all entries are at 1, there is no next one.
    following = n_at_one.clamp(max=depth - 1)
    is_number = ordered[:, :1] < torch.inf
    anchor = torch.where((wide_k < n_valid) & is_number, ordered.double().gather(-1, following), torch.nan)
    anchor = torch.where((wide_k >= n_valid) & is_number, -torch.inf, anchor)
    scale = (wide_k - n_at_one) * torch.exp((exponents - tails).gather(-1, following))
    scale = torch.where(wide_k < n_valid, scale, 1.0)
    solution[:, 0], solution[:, 1], solution[:, 2] = anchor[:, 0], scale[:, 0], 1
    selected, at_one = _select_in_pytorch(s, solution, eps)
    y.copy_(selected.masked_fill_(at_one, 1.0))


def _exponents(ordered: Tensor, eps: float) -> Tensor:
    """(s - last) / eps in fp64 for scores in descending order, as a sum of distances. So an outlier does not reduce the
    precision of the others. Distances are limited to the one at which an exponential is negligible relative to
    another."""
    wide, lowest = ordered.double(), ordered == -torch.inf
    distances = (wide[:, :-1] - wide[:, 1:]).div_(eps).clamp_(max=NOTHING_AT).masked_fill_(lowest[:, 1:], 0.0)
    return F.pad(distances, (0, 1)).flip(-1).cumsum(dim=-1).flip(-1).masked_fill_(lowest, -torch.inf)


def backward(
    grad_output: Tensor, scores: Tensor, mask: Tensor | None, solution: Tensor, eps: float, ds: Tensor, dk: Tensor
) -> None:
    s = _working_copy(scores, mask)
    y, at_one = _select_in_pytorch(s, solution, eps)
    idle = at_one | (s == -torch.inf)
    y.masked_fill_(idle, 0.0)
    grad_output = grad_output.to(y.dtype).masked_fill(idle, 0.0)
    weighted = (grad_output * y).sum(dim=-1, dtype=torch.float64)
    total = y.sum(dim=-1, dtype=torch.float64)
    torch.div(weighted, total, out=dk).masked_fill_(total == 0, 0.0)
    ds.copy_(grad_output.sub_(dk[:, None].to(y.dtype)).mul_(y).div_(eps))


def _working_copy(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores in fp32 or fp64, -inf for entries that take no part."""
    s = scores if scores.dtype == torch.float64 else scores.float()
    return s if mask is None else s.masked_fill(~mask, -torch.inf)


def _select_in_pytorch(s: Tensor, solution: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y of the entries that are not at 1, and a mask of these entries."""
    anchor, scale = solution[:, :1].to(s.dtype), solution[:, 1:2].to(s.dtype)
    y = (s - anchor).div_(eps).exp_().mul_(scale).clamp_(max=1.0)
    return y.masked_fill_(s == -torch.inf, 0.0), s > anchor
