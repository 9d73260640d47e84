"""Distance of a tensor from its fp64 truth, and its bound."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from math import inf, isnan, nan, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from colt5_bench.measuring.rounding import MovedOperands
from colt5_bench.records.results import Divergence
from colt5_bench.tolerance import LEAST_POWER, MOST_POWER, Tolerance, magnitudes

CHUNK = {"cuda": 2**22, "cpu": 2**17}
"""Elements compared at a time, by type of device. The fp64 copies of a whole long tensor may not fit into memory. The
copies of a chunk fit into the cache of a CPU, where this takes a third of the time."""

DRAWS = 3
"""Number of computations with moved operands that set the tolerance, in addition to plain PyTorch itself."""

MARGIN = 8
"""Allowed error of an implementation, in units of the largest error of these computations. The largest of a few is
random, and another formula may round more often."""

ROUNDINGS = 2
"""Allowed error of any element, in roundings of its own value."""

TABLES = {"cuda": 128, "cpu": 1}
"""Number of tables for the largest errors, by type of device. Few magnitudes are common, and threads of a GPU that
write to the same address wait for each other."""

FEWEST = 64
"""Number of elements whose largest error is reliable. If fewer elements are small, larger ones join them."""


def diverge(
    actual: Tensor,
    expected: Tensor,
    at_kink: Tensor | None = None,
    bound: float = 1e-3,
    tolerance: "Tolerance | None" = None,
) -> Divergence:
    """The distance of `actual` from `expected` in fp64, with elements `at_kink` (bool) separate.

    Elements agree if both are NaN or the same infinity. If only one is NaN, `largest` and `relative` are NaN, also at a
    kink.

    Args:
        actual: any shape, any floating dtype.
        expected: the truth, of the same shape.
        at_kink: of the same shape, True if the definition has no unique derivative; such elements are separate.
        bound: an element that differs by more counts towards `fraction_above`.
        tolerance: the allowed error of each element.

    Raises:
        ValueError: shapes differ.
    """
    if actual.shape != expected.shape or (at_kink is not None and at_kink.shape != expected.shape):
        shapes = [tuple(tensor.shape) for tensor in (actual, expected, at_kink) if tensor is not None]
        raise ValueError(f"actual, expected and at_kink must have one shape, got {shapes}")
    largest = largest_at_kink = squared_difference = squared_truth = 0.0
    others = above = kinks = 0
    worst, allowed, budget = 0.0, inf, 0.0
    worst_at, first, off, nan_seen = None, 0, 0, False
    for difference, truth, kink in _differences(actual, expected, at_kink):
        # At a kink any finite value may be right, but no other value.
        excused = kink & difference.isfinite()
        places = None if not excused.any() else (~excused).nonzero().squeeze(1)
        away, expected_there = (each if places is None else each[places] for each in (difference, truth))
        largest = _larger(largest, away)
        largest_at_kink = _larger(largest_at_kink, difference[kink])
        squared_difference += away.square().sum().item()
        squared_truth += expected_there.masked_fill(~expected_there.isfinite(), 0.0).square().sum().item()
        others += away.numel()
        above += int((~(away <= bound)).sum())
        kinks += int(kink.sum())
        if tolerance is not None and away.numel():
            may = tolerance.of(expected_there)
            at = torch.where(away == 0, 0.0, away / may).nan_to_num(nan=inf).argmax()
            budget = max(budget, may.max().item())
            off += int((~(away <= may)).sum())
            is_nan = isnan(away[at].item())
            if away[at].item() * allowed > worst * may[at].item() or (is_nan and not nan_seen):
                place = first + int(at if places is None else places[at])
                worst_at, nan_seen = [int(each) for each in np.unravel_index(place, expected.shape)], is_nan
                if not is_nan:
                    worst, allowed = away[at].item(), may[at].item()
        first += kink.numel()
    gate = {"worst": worst, "allowed": allowed, "budget": budget, "worst_at": worst_at, "off": off}
    judged: dict[str, Any] = gate if tolerance is not None else {}
    return Divergence(
        largest=largest,
        relative=_ratio(sqrt(squared_difference), sqrt(squared_truth)),
        fraction_above=above / max(others, 1),
        kinks=kinks,
        largest_at_kink=largest_at_kink,
        **judged,
    )


def tolerances(
    plain: Callable[[], Mapping[str, Tensor]],
    expected: Mapping[str, Tensor],
    at_kink: Mapping[str, Tensor] | None = None,
) -> dict[str, Tolerance]:
    """The errors that a correct computation of some tensors may have.

    A single error of plain PyTorch would be random. So it computes the tensors once as it is, and several times with
    the operands of each operation moved by a rounding.

    Args:
        plain: computes the tensors with plain PyTorch in the dtype of the implementations.
        expected: their fp64 truths.
        at_kink: as in `diverge`.
    """
    spreads = {name: Spread(truth, (at_kink or {}).get(name)) for name, truth in expected.items()}
    as_it_is: AbstractContextManager[object] = nullcontext()
    for moved in (as_it_is, *(MovedOperands(seed) for seed in range(DRAWS))):
        with moved:
            results = plain()
        for name, spread in spreads.items():
            spread.add(results[name].detach())
        # Freed before the next one takes as much memory.
        del results
    return {name: spread.tolerance() for name, spread in spreads.items()}


class Spread:
    """Errors, against the truth, of results computed with moved operands.

    Elements of similar magnitude are taken together. A small sum has as large an error as a large sum, but a small
    exponential has a smaller error, and the groups show both.

    Args:
        expected: the fp64 truth.
        at_kink: bool, of the same shape: elements that are left out.
    """

    def __init__(self, expected: Tensor, at_kink: Tensor | None = None) -> None:
        self._expected = expected
        self._at_kink = at_kink
        self._size = MOST_POWER - LEAST_POWER + 2
        self._tables = TABLES[expected.device.type]
        self._largest = torch.zeros(self._tables * self._size, dtype=torch.float64, device=expected.device)
        self._counts = torch.zeros_like(self._largest)
        self._scale = torch.zeros((), dtype=torch.float64, device=expected.device)
        self._dtype: torch.dtype | None = None

    def add(self, moved: Tensor) -> None:
        """Take one more result into account, except for its elements that are not finite."""
        is_first, self._dtype = self._dtype is None, moved.dtype
        for difference, truth, kink in _differences(moved, self._expected, self._at_kink):
            # Masked, not indexed: with an index, the host would wait for the GPU to count the elements.
            judged = truth.isfinite() & ~kink
            truth = truth.masked_fill(~judged, 0.0)
            table = torch.arange(truth.numel(), device=truth.device) % self._tables
            places = table * self._size + magnitudes(truth)
            error = difference.masked_fill(~(judged & difference.isfinite()), 0.0)
            self._largest.scatter_reduce_(0, places, error, "amax")
            if is_first:
                self._counts.scatter_add_(0, places, judged.double())
                self._scale = torch.maximum(self._scale, truth.abs().amax()) if truth.numel() else self._scale

    def tolerance(self) -> Tolerance:
        """The errors that an implementation may have."""
        largest, counts = self._largest.view(-1, self._size).amax(0), self._counts.view(-1, self._size).sum(0)
        # A larger element may have the error of a smaller one, because a few errors may be small by chance.
        errors = MARGIN * largest.cummax(0).values
        enough = int((counts[1:].cumsum(0) < FEWEST).sum()) + 1
        small = errors[min(enough, len(errors) - 1)].item()
        errors[1:] = errors[1:].clamp(min=small)
        # A zero that is not exact is a sum whose terms cancel, so it is small by chance, too.
        errors[0] = errors[0].clamp(min=small if errors[0] > 0 else 0.0)
        dtype = self._dtype or self._expected.dtype
        information = torch.finfo(dtype)
        # A rounding of a rounding of the largest element is negligible.
        least = max(information.eps**2 * self._scale.item(), information.tiny)
        return Tolerance(errors, ROUNDINGS * information.eps, least, dtype)


def passes(actual: Divergence) -> bool:
    """True if each element is within its allowed error. NaN is not; without a tolerance, all other values are."""
    if isnan(actual.largest):
        return False
    return actual.worst is None or actual.allowed is None or actual.worst <= actual.allowed


def _differences(actual: Tensor, expected: Tensor, at_kink: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Absolute difference, truth and kink of one chunk after the other."""
    kinks = torch.zeros((), dtype=torch.bool, device=expected.device) if at_kink is None else at_kink
    whole = actual.detach(), expected.detach(), kinks.expand(expected.shape)
    size = CHUNK[expected.device.type]
    chunks = zip(*(each.reshape(-1).split(size) for each in whole), strict=True)
    for a, e, kink in chunks:
        value, truth = a.to(e.device, torch.float64), e.double()
        agree = (value == truth) | (value.isnan() & truth.isnan())
        yield (value - truth).abs().masked_fill(agree, 0.0), truth, kink.to(e.device)


def _larger(largest: float, differences: Tensor) -> float:
    """The larger number; NaN if either one is NaN."""
    if not differences.numel():
        return largest
    candidate = differences.max().item()
    return nan if isnan(largest) or isnan(candidate) else max(largest, candidate)


def _ratio(difference: float, truth: float) -> float:
    if difference == truth == 0:
        return 0.0
    return difference / truth if truth else difference * inf
