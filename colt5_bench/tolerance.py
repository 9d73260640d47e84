"""Allowed errors of a correct computation."""

from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

LEAST_POWER, MOST_POWER = -1073, 1024
"""Powers of two that bound fp64 numbers."""


@dataclass(frozen=True)
class Tolerance:
    """Allowed error of each element of a tensor, against its fp64 truth."""

    by_magnitude: Tensor
    """Allowed errors in fp64. Index p - LEAST_POWER + 1 is for truths in [2**(p - 1), 2**p), index 0 for truths of
    0."""

    relative: float
    """Error that is always allowed, as a share of the element."""

    least: float
    """Error that is always allowed."""

    dtype: torch.dtype
    """Required dtype of the tensor."""

    most: float = inf
    """Upper bound of allowed errors."""

    def at_least(self, error: float) -> "Tolerance":
        """The same tolerance with at least `error` for each element."""
        return replace(self, least=max(self.least, error))

    def at_most(self, error: float) -> "Tolerance":
        """The same tolerance with at most `error` for each element."""
        return replace(self, most=min(self.most, error))

    def of(self, truth: Tensor) -> Tensor:
        """The allowed errors of elements with these fp64 truths. They are 0 for NaN and infinities."""
        allowed = torch.maximum(self.by_magnitude.to(truth.device)[magnitudes(truth)], self.relative * truth.abs())
        return allowed.clamp(min=self.least).clamp(max=self.most).masked_fill(~truth.isfinite(), 0.0)


def magnitudes(truth: Tensor) -> Tensor:
    """Indices of fp64 truths in a table by magnitude."""
    powers = torch.frexp(truth).exponent.clamp(LEAST_POWER, MOST_POWER).long() - LEAST_POWER + 1
    return powers.masked_fill(truth == 0, 0)
