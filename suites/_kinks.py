"""Kinks of relaxed selections that are solved exactly: gradients that fp32 cannot decide."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import reference
from suites._descent import LENIENT_SHARE, UNIT_ROUNDOFF

ROUNDINGS = 4
"""Unit roundoffs within which fp32 cannot decide the side of a kink. They are those of the score and of this number of
temperatures, because an exponential is exact to 4 roundings."""


@dataclass(frozen=True)
class Kinks:
    """Where a relaxed selection y of scores has no derivative, and what it is next to it.

    Entries between 0 and 1 have the derivative weight / temperature by their own score.
    """

    places: Callable[[Tensor, Tensor, float], list[Tensor]]
    """From the score of an entry between 0 and 1, its y, and the temperature, to the scores of the row's kinks."""

    weights: Callable[[Tensor], Tensor]
    """From y to the weights."""

    def distances(self, scores: Tensor, y: Tensor, eps: float) -> Tensor:
        """Distances of fp64 scores `... n` from the closest kink; infinite in a row with no entry between 0 and 1."""
        largest, index = y.masked_fill(y == 1, 0.0).max(dim=-1, keepdim=True)
        distances = [(scores - place).abs() for place in self.places(scores.gather(-1, index), largest, eps)]
        return torch.stack(distances).amin(0).masked_fill(largest == 0, torch.inf)

    def near(self, scores: Tensor, y: Tensor, eps: float, size: Tensor | None = None) -> Tensor:
        """bool: True for entries of fp64 scores `... n` whose side of a kink fp32 cannot decide.

        Args:
            size: size of the terms of a score, if it is a sum. Otherwise it is the score itself.
        """
        size = scores.abs() if size is None else size
        return self.distances(scores, y, eps) <= ROUNDINGS * UNIT_ROUNDOFF * (size + ROUNDINGS * eps)

    def gradient(self, y: Tensor, between: Tensor, upstream: Tensor, eps: float) -> Tensor:
        """The gradient of the scores if the entries of a mask are those between 0 and 1."""
        weights = self.weights(y).masked_fill(~between, 0.0)
        mean = (upstream * weights).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
        return (upstream - mean.nan_to_num()) * weights / eps

    def undecided(self, scores: Tensor, y: Tensor, upstream: Tensor, eps: float) -> Tensor:
        """bool: True for entries of fp64 scores `... n` whose gradient depends on a side that fp32 cannot decide.

        The side of a score decides whether its entry has a gradient. The gradients of its whole row depend on that.
        """
        near, between = self.near(scores, y, eps), (y > 0) & (y < 1)
        one, other = (self.gradient(y, each, upstream, eps) for each in (between | near, between & ~near))
        return (one - other).abs() > UNIT_ROUNDOFF * upstream.abs().amax(dim=-1, keepdim=True) / eps


SATURATION = Kinks(lambda score, y, eps: [score - eps * y.log()], weights=lambda y: y)
"""The kink of the exact soft top-k, where it reaches 1."""

ENDS = Kinks(lambda score, y, eps: [score - eps * y, score + eps * (1 - y)], weights=torch.ones_like)
"""The kinks of the projection, where it reaches 0 and 1."""


def undecided_routes(x: Tensor, routing_tokens: Tensor, k: float, eps: float) -> Tensor:
    """bool `b r`: True for routes by the exact soft top-k whose gradients depend on a side that fp32 cannot decide.

    Scores are products of tokens `b n d` with routing tokens `b r d` or `1 r d`. The side of an entry changes gradients
    in proportion to the sum of the entries below 1.
    """
    x, routing_tokens = x.detach().double(), routing_tokens.detach().double()
    scores = routing_tokens @ x.mT
    y = reference.soft_topk(scores, k=k, eps=eps)
    # Roundings of the terms of a sum are independent, so their squares add up.
    near = SATURATION.near(scores, y, eps, (routing_tokens.square() @ x.square().mT).sqrt())
    others = y.masked_fill(near | (y == 1), 0.0).sum(dim=-1)
    return near.any(dim=-1) & (others > LENIENT_SHARE)
