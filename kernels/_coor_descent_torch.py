"""The scalar-state algorithm of `kernels.coor_descent` in vectorised PyTorch: what a CPU tensor gets.

The recurrence runs on one fp64 number a row (DESIGN 3.2); everything elementwise stays in the dtype of the scores, or
fp32 for half precision, and in three buffers of their size.
"""

import torch
from torch import Tensor

MAX_SHIFT = 8.0
"""How far, in temperatures, the threshold may move from the base that the weights were computed at. It bounds the
argument of the exponential, and so the rounding of that argument, for the entries near the threshold."""

LARGEST = 1e30
"""Cap of a weight: well above any k, well below where fp32 overflows."""

LOWEST = -1e30
"""Stands for a score that takes no part: its exponential is 0, and finite arithmetic on it makes no NaN."""


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
    empty = n_valid == 0
    log_k = torch.log(torch.where(k > 0, k, torch.nan))
    highest = s.amax(dim=-1).double().masked_fill_(empty, 0.0)

    weights, work = torch.empty_like(s), torch.empty_like(s)
    *temperatures, last_temperature = temperatures
    base, base_temperature = highest, None

    a = (temperatures[0] * (log_k - torch.log(n_valid))).masked_fill_(empty, 0.0)
    if save:
        trace[:, 0], ratio[:, 0] = a, 0.0
    for t, temperature in enumerate(temperatures[1:], start=1):
        threshold = -a
        # The largest of min(s, -a), which keeps the sum below from under- and overflowing.
        anchor = torch.where(highest < threshold, highest, threshold)
        if temperature != base_temperature or _moved(anchor - base, temperature):
            base, base_temperature = anchor, temperature
            _exp_above(s, base, temperature, work, out=weights)
        ceiling = torch.exp((anchor - base) / temperature).to(s.dtype)
        torch.minimum(weights, ceiling[:, None], out=work)
        # Entries above the threshold count exactly 1 each, whatever the rounding of the ceiling.
        total = (work.sum(dim=-1, dtype=torch.float64) / ceiling).masked_fill_(empty, 1.0)
        a = temperature * (log_k - torch.log(total)) - anchor
        if save:
            trace[:, t], ratio[:, t] = a, _compare(torch.gt, s, threshold, out=work).sum(dim=-1) / total

    y = _exp_above(s, -a, last_temperature, weights, out=work).clamp_(max=1.0)
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

    weights, work, coefficients = torch.empty_like(s), torch.empty_like(s), torch.zeros_like(s)
    ds = _exp_above(s, -a, last_temperature, work, out=weights).clamp_(max=1.0)
    ds = ds.mul(grad).mul_(1.0 / last_temperature).mul_(_compare(torch.le, s, -a, out=work))
    ds = _fill_hidden(ds, mask)
    grad_a = ds.sum(dim=-1, dtype=torch.float64)
    dk = torch.zeros_like(k)

    # Iterations of one temperature whose a are close share the weights exp((s - base) / temperature), and only the
    # coefficients of these add up.
    base, base_temperature = a, None
    for t in range(len(temperatures) - 1, 0, -1):
        temperature, previous = temperatures[t], trace[:, t - 1]
        if temperature != base_temperature or _moved(a + base, temperature):
            if base_temperature is not None:
                ds.addcmul_(weights, coefficients, value=-1.0)
                coefficients.zero_()
            base, base_temperature = -a, temperature
            # At most k for an entry below the threshold; above it the weight is not used and must not overflow.
            _exp_above(s, base, temperature, work, out=weights).clamp_(max=LARGEST)
        coefficient = grad_a / k * torch.exp((a + base) / temperature)
        coefficients.addcmul_(_compare(torch.le, s, -previous, out=work), coefficient[:, None].to(s.dtype))
        dk += grad_a * temperature
        grad_a = grad_a * ratio[:, t]
        a = previous
    ds.addcmul_(weights, coefficients, value=-1.0)
    dk += grad_a * temperatures[0]
    return _fill_hidden(ds, mask).to(scores.dtype), dk / k


def wide_k(scores: Tensor, k_rows: Tensor | None, k: float) -> Tensor:
    """k of each row in fp64."""
    return scores.new_full(scores.shape[:1], k, dtype=torch.float64) if k_rows is None else k_rows.double()


def _working_copy(scores: Tensor, mask: Tensor | None) -> Tensor:
    s = scores.to(torch.promote_types(scores.dtype, torch.float32)).clamp(min=LOWEST)
    return s if mask is None else s.masked_fill_(~mask, LOWEST)


def _count_valid(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Valid entries of each row as fp64; NaN where one of them is NaN."""
    n = scores.shape[-1]
    count = scores.new_full(scores.shape[:1], n, dtype=torch.float64) if mask is None else mask.sum(-1).double()
    nan = scores.isnan() if mask is None else scores.isnan() & mask
    return count.masked_fill_(nan.any(dim=-1), torch.nan)


def _moved(shift: Tensor, temperature: float) -> bool:
    return bool((shift.abs() > MAX_SHIFT * temperature).any())


def _compare(compare, s: Tensor, threshold: Tensor, *, out: Tensor) -> Tensor:
    """1 where s compares so with an fp64 threshold a row, else 0. Exact, since fp32 scores are compared with the
    largest fp32 that is not above the threshold."""
    nearest = threshold.to(s.dtype)
    floor = torch.where(nearest > threshold, torch.nextafter(nearest, nearest.new_tensor(-torch.inf)), nearest)
    return compare(s, floor[:, None], out=out)


def _exp_above(s: Tensor, threshold: Tensor, temperature: float, work: Tensor, *, out: Tensor) -> Tensor:
    """exp((s - threshold) / temperature) for an fp64 threshold a row.

    Threshold and 1 / temperature are used as unevaluated pairs of the dtype of s: rounded, either would shift every
    exponent of a row the same way, and with them the next threshold.
    """
    high = threshold.to(s.dtype)
    low = (threshold - high).to(s.dtype)
    factor = 1.0 / temperature
    factor_high = float(torch.tensor(factor, dtype=s.dtype))
    torch.sub(s, high[:, None], out=work).sub_(low[:, None])
    torch.mul(work, factor_high, out=out)
    return out.add_(work, alpha=factor - factor_high).exp_()


def _fill_hidden(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill_(~mask, 0.0)
