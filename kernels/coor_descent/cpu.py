"""The scalar-state algorithm of `kernels.coor_descent`, vectorised, for CPU tensors.

The recurrence runs on one fp64 number per row (docs/design.md, section 2). Elementwise operations stay in the dtype of
the scores, or fp32 for half precision. They use as few buffers of that size as possible, because the first access to
memory takes longer than the computation of its values.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from math import log2

import numpy as np
import torch
from torch import Tensor

from kernels.coor_descent.constants import FAR, LARGEST, MAX_SHIFT

Sums = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray | float]]
"""A function from thresholds and anchors of rows to the sums of an iteration, and the counts of entries above."""

ENTRIES_OF_A_THREAD = 32768
"""Fewest entries that PyTorch gives to a thread in elementwise operations."""


def forward(
    scores: Tensor,  # rows n
    mask: Tensor | None,  # rows n
    k: Tensor,  # rows, fp64
    temperatures: list[float],
    kept: Sequence[Tensor] | None,  # fp64, outputs: a_t and share of the sum above, rows n_iters; origins, rows 1
) -> Tensor:
    """The relaxed selection `rows n`; see `kernels.coor_descent`.

    Scores and a are relative to the origin of a row, which is 0 unless all scores are far below.
    """
    rows, n = scores.shape
    s = _working_copy(scores, mask)
    work = torch.empty_like(s)
    *temperatures, last_temperature = temperatures
    is_ordered = False

    # NumPy for numbers per row: with few rows, a call of PyTorch takes several times as long.
    with np.errstate(all="ignore"):
        max_score = s.amax(dim=-1).double().numpy()
        n_valid = np.where(max_score < np.inf, _count_above(s, -np.inf, work), np.nan)
        empty = n_valid == 0
        max_score = np.where(empty, 0.0, max_score)
        origin = np.where(max_score < -FAR * last_temperature, max_score, 0.0)
        max_score = max_score - origin
        origins = torch.from_numpy(origin[:, None])
        _move(s, origins)
        log_k = np.log(np.where(k.numpy() > 0, k.numpy(), np.nan))
        a = np.where(empty, 0.0, temperatures[0] * (log_k - np.log(n_valid)) + origin)
        trace, ratios = [a], [np.zeros_like(a)]
        for temperature, repeated in groupby(temperatures[1:]):
            stretch = len(list(repeated))
            sums: Sums
            if sorting_pays(stretch, rows, n):
                if not is_ordered:
                    s.numpy().sort(axis=-1)
                    is_ordered = True
                sums = _sums_of_ordered(s, work, temperature)
            else:
                sums = partial(_sums_of_all, s, work, temperature, kept is not None)
            for _ in range(stretch):
                # The largest min(s, -a) protects the sum from underflow and overflow.
                anchor = np.minimum(max_score, -a)
                total, above = sums(-a, anchor)
                total = np.where(empty, 1.0, total)
                a = temperature * (log_k - np.log(total)) - anchor
                trace.append(a)
                ratios.append(above / total)
    if kept is not None:
        for state, numbers in zip(kept, (trace, ratios, [origin]), strict=True):
            state.copy_(torch.from_numpy(np.stack(numbers, axis=1)))

    if is_ordered:
        s = _move(_working_copy(scores, mask, out=work), origins)
    y = _exp_above(s, torch.from_numpy(-a), last_temperature, out=work).clamp_(max=1.0)
    return _fill_hidden(y, mask).to(scores.dtype)


def sorting_pays(stretch: int, rows: int, n: int) -> bool:
    """True if iterations of one temperature take less time with sorted scores, on any CPU.

    A sort of n scores takes up to log2(n) passes over them. It takes a fraction of that where NumPy sorts with wide
    instructions, but not on each CPU that has them. PyTorch divides a pass among its threads, with at least
    `ENTRIES_OF_A_THREAD` entries each; NumPy sorts in one thread.
    """
    threads = max(min(torch.get_num_threads(), rows * n // ENTRIES_OF_A_THREAD), 1)
    return stretch >= log2(max(n, 2)) * threads


def _sums_of_all(
    s: Tensor, work: Tensor, temperature: float, counts: bool, threshold: np.ndarray, anchor: np.ndarray
) -> tuple[np.ndarray, np.ndarray | float]:
    """Sums of exp((min(s, threshold) - anchor) / temperature) by row, and, if asked for, counts above the threshold.

    Each call is a pass over all entries."""
    terms = _exp_above(s, torch.from_numpy(anchor), temperature, out=work).clamp_(max=1.0)
    total = terms.sum(dim=-1, dtype=torch.float64).numpy()
    return total, _count_above(s, threshold, work) if counts else 0.0


def _sums_of_ordered(ordered: Tensor, work: Tensor, temperature: float) -> Sums:
    """The same sums for scores in ascending order and one temperature. With running sums of their exponentials, only
    the place of a threshold among them is searched for."""
    rows, n = ordered.shape
    running = torch.empty(rows, n + 1, dtype=torch.float64, device=ordered.device)
    row, base = np.arange(rows), np.full(rows, np.inf)

    def sums(threshold: np.ndarray, anchor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        nonlocal base
        shift = (anchor - base) / temperature
        if (np.abs(shift) > MAX_SHIFT).any():
            base, shift = anchor, np.zeros(rows)
            _exp_above(ordered, torch.from_numpy(base), temperature, out=work).clamp_(max=LARGEST)
            running[:, 0], running[:, 1:] = 0.0, work
            running.cumsum_(dim=-1)
        floor = torch.from_numpy(_round_down(threshold, ordered.numpy().dtype))
        below = torch.searchsorted(ordered, floor[:, None], right=True).numpy()[:, 0]
        above = n - below
        return above + running.numpy()[row, below] * np.exp(-shift), above

    return sums


def backward(
    grad_output: Tensor,  # rows n
    scores: Tensor,  # rows n
    mask: Tensor | None,  # rows n
    k: Tensor,  # rows, fp64
    temperatures: list[float],
    trace: Tensor,  # rows n_iters, fp64
    ratio: Tensor,  # rows n_iters, fp64
    origins: Tensor,  # rows 1, fp64
) -> tuple[Tensor, Tensor]:
    """Gradients of the scores `rows n` and of k `rows` (fp64), in closed form (docs/design.md, section 3)."""
    s = _move(_working_copy(scores, mask), origins)
    *temperatures, last_temperature = temperatures
    thresholds = torch.from_numpy(_round_down(-trace.numpy(), s.numpy().dtype))

    work = torch.empty_like(s)
    ds = _exp_above(s, -trace[:, -1], last_temperature, out=torch.empty_like(s)).clamp_(max=1.0)
    ds.mul_(grad_output).mul_(1.0 / last_temperature).mul_(torch.le(s, thresholds[:, -1:], out=work))
    # Also if the incoming gradient is infinite there.
    ds.masked_fill_(s == -torch.inf, 0.0)

    # The gradient of each a passes to the a before, times the share of the sum above the threshold.
    handed_on = torch.cat([ratio[:, 1:], torch.ones_like(ratio[:, :1])], dim=1)
    grad_a = handed_on.flip(1).cumprod(dim=1).flip(1) * ds.sum(dim=-1, dtype=torch.float64)[:, None]

    # Iterations of one temperature with close a share the weights exp((s - base) / temperature). Only their
    # coefficients add up.
    weights, coefficients = torch.empty_like(s), torch.empty_like(s)
    for start, stop in _runs(trace, temperatures):
        temperature, base = temperatures[start], -trace[:, stop - 1]
        # At most k for an entry below the threshold. Above it the weight is not used but must not overflow.
        _exp_above(s, base, temperature, out=weights).clamp_(max=LARGEST)
        shares = torch.exp((trace[:, start:stop] + base[:, None]) / temperature)
        shares = (grad_a[:, start:stop] / k[:, None] * shares).to(s.dtype)
        coefficients.zero_()
        for t in range(start, stop):
            passes = torch.le(s, thresholds[:, t - 1, None], out=work)
            coefficients.addcmul_(passes, shares[:, t - start, None])
        ds.addcmul_(weights, coefficients, value=-1.0)

    dk = (grad_a * grad_a.new_tensor(temperatures)).sum(dim=-1) / k
    return _fill_hidden(ds, mask).to(scores.dtype), dk


def _runs(trace: Tensor, temperatures: list[float]) -> Iterator[tuple[int, int]]:
    """Ranges of iterations, without the first one, of one temperature and with all a near the last; last range
    first."""
    stop = len(temperatures)
    while stop > 1:
        temperature, start = temperatures[stop - 1], stop - 1
        while start > 1 and temperatures[start - 1] == temperature:
            start -= 1
        distances = (trace[:, start:stop] - trace[:, stop - 1, None]).abs()
        far = (distances > MAX_SHIFT * temperature).any(dim=0).nonzero()
        if len(far):
            start += int(far[-1]) + 1
        yield start, stop
        stop = start


def wide_k(scores: Tensor, k_rows: Tensor | None, k: float) -> Tensor:
    """k of each row in fp64."""
    return scores.new_full(scores.shape[:1], k, dtype=torch.float64) if k_rows is None else k_rows.double()


def _working_copy(scores: Tensor, mask: Tensor | None, *, out: Tensor | None = None) -> Tensor:
    """The scores in the dtype of the computation, -inf for entries that take no part."""
    if out is None:
        wide = torch.promote_types(scores.dtype, torch.float32)
        out = torch.empty(scores.shape, dtype=wide, device=scores.device)
    out.copy_(scores)
    return out if mask is None else out.masked_fill_(~mask, -torch.inf)


def _move(s: Tensor, origins: Tensor) -> Tensor:
    """Scores `rows n` in a working copy, relative to the origins of their rows."""
    return s.sub_(origins.to(s.dtype)) if origins.any() else s


def _round_down(threshold: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The largest number of a dtype that is not above an fp64 threshold. It compares with scores of that dtype as the
    threshold does."""
    nearest = threshold.astype(dtype)
    return np.where(nearest > threshold, np.nextafter(nearest, nearest.dtype.type(-np.inf)), nearest)


def _count_above(s: Tensor, threshold: np.ndarray | float, work: Tensor) -> np.ndarray:
    """The number of entries of each row above an fp64 threshold."""
    floor = torch.from_numpy(_round_down(np.reshape(threshold, (-1, 1)), s.numpy().dtype))
    return torch.gt(s, floor, out=work).sum(dim=-1, dtype=torch.float64).numpy()


def _exp_above(s: Tensor, threshold: Tensor, temperature: float, *, out: Tensor) -> Tensor:
    """exp((s - threshold) / temperature) for an fp64 threshold per row; out may be s.

    The threshold is an unevaluated pair of numbers in the dtype of s: if rounded, it would shift every exponent of a
    row in the same direction, and so the next threshold.
    """
    wide = threshold.numpy()[:, None]
    high = wide.astype(s.numpy().dtype)
    low = (wide - high).astype(high.dtype)
    return torch.sub(s, torch.from_numpy(high), out=out).sub_(torch.from_numpy(low)).mul_(1.0 / temperature).exp_()


def _fill_hidden(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill_(~mask, 0.0)
