"""The scalar-state algorithm of `kernels.coor_descent` in vectorised PyTorch: what a CPU tensor gets.

The recurrence runs on one fp64 number a row (DESIGN 3.2); everything elementwise stays in the dtype of the scores, or
fp32 for half precision.
"""

import torch
from torch import Tensor

MAX_SHIFT = 8.0
"""How far, in temperatures, the threshold may move from the base that the weights were computed at. It bounds the
argument of the exponential, and so the rounding of that argument, for the entries near the threshold."""

MAX_EXPONENT = 60.0
"""Well above log k, well below where fp32 overflows."""


def forward(
    scores: Tensor,  # rows n
    mask: Tensor | None,  # rows n
    k: Tensor,  # rows, fp64
    temperatures: list[float],
    trace: Tensor,  # rows n_iters, fp64: receives a_t; without entries where no gradient is wanted
    ratio: Tensor,  # rows n_iters, fp32: receives the share of the sum that lies above the threshold
) -> Tensor:
    """The relaxed selection `rows n`; see `kernels.coor_descent`."""
    save = trace.numel() > 0
    s = _working_copy(scores, mask)
    n_valid = _count_valid(scores, mask)
    log_k = torch.log(torch.where(k > 0, k, torch.nan))
    highest = s.amax(dim=-1).double().masked_fill_(n_valid == 0, 0.0)

    weights, clipped = torch.empty_like(s), torch.empty_like(s)
    *temperatures, last_temperature = temperatures
    base, base_temperature = None, None

    a = temperatures[0] * (log_k - torch.log(n_valid))
    a.masked_fill_(n_valid == 0, 0.0)
    if save:
        trace[:, 0], ratio[:, 0] = a, 0.0
    for t, temperature in enumerate(temperatures[1:], start=1):
        # The largest of min(s, -a), which keeps the sum below from under- and overflowing.
        anchor = torch.where(highest < -a, highest, -a)
        if base_temperature != temperature or _moved(anchor - base, temperature):
            base, base_temperature = anchor, temperature
            _subtract(s, base, out=weights).mul_(1.0 / temperature).exp_()
        ceiling = torch.exp((anchor - base) / temperature).to(s.dtype)
        torch.minimum(weights, ceiling[:, None], out=clipped)
        # Entries above the threshold count exactly 1 each, whatever the rounding of the ceiling.
        total = clipped.sum(dim=-1, dtype=torch.float64) / ceiling
        total.masked_fill_(n_valid == 0, 1.0)
        threshold = -a
        a = temperature * (log_k - torch.log(total)) - anchor
        if save:
            trace[:, t], ratio[:, t] = a, (s > threshold[:, None]).sum(dim=-1) / total

    y = _subtract(s, -a, out=clipped).clamp_(max=0.0).mul_(1.0 / last_temperature).exp_()
    return _fill_hidden(y, mask).to(scores.dtype)


def backward(
    grad: Tensor,  # rows n
    scores: Tensor,  # rows n
    mask: Tensor | None,  # rows n
    k: Tensor,  # rows, fp64
    temperatures: list[float],
    trace: Tensor,  # rows n_iters, fp64
    ratio: Tensor,  # rows n_iters, fp32
) -> tuple[Tensor, Tensor]:
    """Gradients of the scores `rows n` and of k `rows` (fp64), in closed form (DESIGN 3.3)."""
    s = _working_copy(scores, mask)
    *temperatures, last_temperature = temperatures
    a = trace[:, -1]

    below, y = s <= -a[:, None], _subtract(s, -a).mul_(1.0 / last_temperature).clamp_(max=0.0).exp_()
    ds = torch.where(below, y, 0.0).mul_(grad).mul_(1.0 / last_temperature)
    ds = _fill_hidden(ds, mask)
    grad_a = ds.sum(dim=-1, dtype=torch.float64)
    dk = torch.zeros_like(k)

    p, weights = y, torch.empty_like(s)
    for t in range(len(temperatures) - 1, 0, -1):
        temperature = temperatures[t]
        previous, a = trace[:, t - 1], trace[:, t]
        torch.le(s, -previous[:, None], out=below)
        # At most log k where the entry is below the threshold; above it p is not used and must not overflow.
        _subtract(s, -a, out=p).mul_(1.0 / temperature).clamp_(max=MAX_EXPONENT).exp_()
        torch.mul(p, (grad_a / k)[:, None].to(s.dtype), out=weights)
        ds -= weights.mul_(below)
        dk += grad_a * temperature
        grad_a = grad_a * ratio[:, t]
    dk += grad_a * temperatures[0]
    return _fill_hidden(ds, mask).to(scores.dtype), dk / k


def _working_copy(scores: Tensor, mask: Tensor | None) -> Tensor:
    s = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    return s if mask is None else s.masked_fill(~mask, -torch.inf)


def _count_valid(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Valid entries of each row as fp64; NaN where one of them is NaN."""
    n = scores.shape[-1]
    count = scores.new_full(scores.shape[:1], n, dtype=torch.float64) if mask is None else mask.sum(-1).double()
    nan = scores.isnan() if mask is None else scores.isnan() & mask
    return count.masked_fill_(nan.any(dim=-1), torch.nan)


def _moved(shift: Tensor, temperature: float) -> bool:
    return bool((shift.abs() > MAX_SHIFT * temperature).any())


def _subtract(s: Tensor, threshold: Tensor, out: Tensor | None = None) -> Tensor:
    """s minus an fp64 threshold a row, exact where the two are close: the high part is subtracted first."""
    high = threshold.to(s.dtype)
    low = (threshold - high).to(s.dtype)
    return torch.sub(s, high[:, None], out=out).sub_(low[:, None])


def _fill_hidden(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill_(~mask, 0.0)


def wide_k(scores: Tensor, k_rows: Tensor | None, k: float) -> Tensor:
    """k of each row in fp64."""
    return scores.new_full(scores.shape[:1], k, dtype=torch.float64) if k_rows is None else k_rows.double()
