"""How far a tensor is from its fp64 truth, and how far it may be."""

from collections.abc import Iterator
from math import inf, isfinite, isnan, nan, sqrt

import torch
from torch import Tensor

from colt5_bench.results import Divergence

CHUNK = 2**22
"""Elements compared at a time: fp64 copies of a whole long tensor may not fit beside it."""

ROUNDINGS = 4
"""Roundings of the largest value that any implementation may be off by, however exact plain PyTorch happens to be."""


def diverge(actual: Tensor, expected: Tensor, at_kink: Tensor | None = None, bound: float = 1e-3) -> Divergence:
    """The distance of `actual` from `expected`, in fp64, elements `at_kink` (bool) apart.

    Elements agree where both are NaN or the same infinity. Where only one is NaN, `largest` and `relative` are NaN, at
    a kink too.

    Args:
        actual: any shape, any floating dtype.
        expected: the truth, of the same shape.
        at_kink: of the same shape: where the definition has no single derivative; counted and measured apart.
        bound: an element that differs by more counts towards `fraction_above`.

    Raises:
        ValueError: shapes differ.
    """
    if actual.shape != expected.shape or (at_kink is not None and at_kink.shape != expected.shape):
        shapes = [tuple(tensor.shape) for tensor in (actual, expected, at_kink) if tensor is not None]
        raise ValueError(f"actual, expected and at_kink must be of one shape, got {shapes}")
    largest = largest_at_kink = squared_difference = squared_truth = 0.0
    others = above = kinks = 0
    for difference, truth, kink in _differences(actual, expected, at_kink):
        # Any finite value may be right at a kink, nothing else is.
        other = ~(kink & difference.isfinite())
        away = difference[other]
        largest = _larger(largest, away)
        largest_at_kink = _larger(largest_at_kink, difference[kink])
        squared_difference += away.square().sum().item()
        squared_truth += truth[other & truth.isfinite()].square().sum().item()
        others += away.numel()
        above += int((~(away <= bound)).sum())
        kinks += int(kink.sum())
    return Divergence(
        largest=largest,
        relative=_ratio(sqrt(squared_difference), sqrt(squared_truth)),
        fraction_above=above / max(others, 1),
        kinks=kinks,
        largest_at_kink=largest_at_kink,
    )


def budget(plain: Divergence, expected: Tensor, dtype: torch.dtype, factor: float = 1.5) -> float:
    """The largest error allowed in `dtype`: `factor` times that of plain PyTorch on the same inputs.

    It is never below a few roundings of the largest expected value, and it is that where plain PyTorch gives a NaN or
    an infinity that the truth does not have.
    """
    finite = expected[expected.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 0.0
    information = torch.finfo(dtype)
    roundings = max(ROUNDINGS * information.eps * scale, information.tiny)
    return max(factor * plain.largest, roundings) if isfinite(plain.largest) else roundings


def passes(actual: Divergence) -> bool:
    """Whether the largest error is within the budget. NaN never is; without a budget every other error is."""
    return not isnan(actual.largest) and (actual.budget is None or actual.largest <= actual.budget)


def _differences(actual: Tensor, expected: Tensor, at_kink: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Absolute difference, truth and kink of one chunk after the other."""
    kinks = torch.zeros((), dtype=torch.bool, device=expected.device) if at_kink is None else at_kink
    chunks = zip(
        actual.detach().reshape(-1).split(CHUNK),
        expected.detach().reshape(-1).split(CHUNK),
        kinks.expand(expected.shape).reshape(-1).split(CHUNK),
        strict=True,
    )
    for a, e, kink in chunks:
        value, truth = a.to(e.device, torch.float64), e.double()
        agree = (value == truth) | (value.isnan() & truth.isnan())
        yield (value - truth).abs().masked_fill(agree, 0.0), truth, kink.to(e.device)


def _larger(largest: float, differences: Tensor) -> float:
    """The larger one; NaN if either holds a NaN."""
    if not differences.numel():
        return largest
    candidate = differences.max().item()
    return nan if isnan(largest) or isnan(candidate) else max(largest, candidate)


def _ratio(difference: float, truth: float) -> float:
    if difference == truth == 0:
        return 0.0
    return difference / truth if truth else difference * inf
