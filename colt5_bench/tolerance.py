"""Allowed distance of a correct computation from the truth."""

from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

LEAST_POWER, MOST_POWER = -1073, 1024
"""Powers of two between which fp64 numbers lie."""


@dataclass(frozen=True)
class Tolerance:
    """Allowed distance of each element of a tensor from its fp64 truth."""

    by_magnitude: Tensor
    """Allowed errors in fp64: that of truths in [2**(p - 1), 2**p) at p - LEAST_POWER + 1, that of 0 in front."""

    relative: float
    """The error that is always allowed, as a share of the element."""

    least: float
    """The error that is always allowed."""

    dtype: torch.dtype
    """The dtype that the tensor has to have."""

    most: float = inf
    """The largest error that is ever allowed."""

    def at_least(self, error: float) -> "Tolerance":
        """The same, but each element may be off by `error`."""
        return replace(self, least=max(self.least, error))

    def at_most(self, error: float) -> "Tolerance":
        """The same, but no element may be off by more than `error`."""
        return replace(self, most=min(self.most, error))

    def of(self, truth: Tensor) -> Tensor:
        """The allowed errors of elements with these fp64 truths: 0 where a truth is NaN or infinite."""
        allowed = torch.maximum(self.by_magnitude.to(truth.device)[magnitudes(truth)], self.relative * truth.abs())
        return allowed.clamp(min=self.least).clamp(max=self.most).masked_fill(~truth.isfinite(), 0.0)


def magnitudes(truth: Tensor) -> Tensor:
    """Places of fp64 truths in a table by magnitude."""
    powers = torch.frexp(truth).exponent.clamp(LEAST_POWER, MOST_POWER).long() - LEAST_POWER + 1
    return powers.masked_fill(truth == 0, 0)
