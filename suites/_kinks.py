"""Kinks of relaxed selections that are solved exactly: gradients that fp32 cannot decide.

At a kink, the side of a score decides whether its entry has a gradient, and the gradients of its whole row depend on
that. So a correct computation in fp32 may differ from fp64 by much more than a rounding.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import reference
from suites._descent import LENIENT_SHARE, UNIT_ROUNDOFF

OF_A_SCORE, OF_AN_EXPONENT = 4, 16
"""Unit roundoffs within which fp32 cannot decide the side of a kink: of the score, and of the temperature. A kernel's
exponentials, their sum, its last bracket and its scale may each be off by four."""


@dataclass(frozen=True)
class Kinks:
    """Where a relaxed selection y of scores has no derivative, and what it is next to it.

    While the shift of a row is fixed, an entry between 0 and 1 has the derivative weight / temperature by its score.
    """

    places: Callable[[Tensor, Tensor, float], list[Tensor]]
    """From the score of an entry between 0 and 1, its y, and the temperature, to the scores of the row's kinks."""

    weights: Callable[[Tensor], Tensor]
    """From y to the weights."""

    def distances(self, scores: Tensor, y: Tensor, eps: float) -> Tensor:
        """Distances of fp64 scores `... n` from the closest kink; infinite in a row with no entry between 0 and 1.

        Such a row is at a kink of the projection if a gap between its scores is one temperature. That is left out.
        """
        largest, index = y.masked_fill(y == 1, 0.0).max(dim=-1, keepdim=True)
        distances = [(scores - place).abs() for place in self.places(scores.gather(-1, index), largest, eps)]
        return torch.stack(distances).amin(0).masked_fill(largest == 0, torch.inf)

    def near(self, scores: Tensor, y: Tensor, eps: float, size: Tensor | None = None) -> Tensor:
        """bool: True for entries of fp64 scores `... n` whose side of a kink fp32 cannot decide.

        Args:
            size: size of the terms of a score, if it is a sum. Otherwise it is the score itself.
        """
        size = scores.abs() if size is None else size
        return self.distances(scores, y, eps) <= UNIT_ROUNDOFF * (OF_A_SCORE * size + OF_AN_EXPONENT * eps)

    def change(self, scores: Tensor, y: Tensor, upstream: Tensor, eps: float, size: Tensor | None = None) -> Tensor:
        """A bound on how much the gradients of fp64 scores `... n` change with sides that fp32 cannot decide.

        Each side of each such entry is possible, because equal scores may be on different sides.

        Args:
            upstream: gradient of y.
            size: as in `near`.
        """
        near = self.near(scores, y, eps, size)
        weights = self.weights(y)
        some, rest = weights.masked_fill(~near, 0.0), weights.masked_fill(near | (y == 0) | (y == 1), 0.0)
        every, total = some + rest, rest.sum(-1, keepdim=True)
        # The mean that the gradients of a row are relative to, without the undecided entries if there are others.
        mean = (upstream * torch.where(total > 0, rest, every)).sum(-1, keepdim=True)
        mean = (mean / torch.where(total > 0, total, every.sum(-1, keepdim=True))).nan_to_num()
        off = (upstream - mean).abs()
        # The mean of any sides is at most this far away.
        shift = ((some * off).sum(-1, keepdim=True) / total).nan_to_num(posinf=torch.inf)
        shift = torch.minimum(shift, 2 * off.masked_fill(~near, 0.0).amax(-1, keepdim=True))
        # An undecided entry has no gradient on one side. On the other side it is part of the mean.
        apart = (total + some.sum(-1, keepdim=True) - 2 * some) * off + (some * off).sum(-1, keepdim=True)
        return torch.where(near, some * apart / (total + some), rest * shift) / eps

    def undecided(self, scores: Tensor, y: Tensor, upstream: Tensor, eps: float) -> Tensor:
        """bool: True for entries of fp64 scores `... n` whose gradient changes with sides that fp32 cannot decide.

        Small gradients are judged by their own size. So any change counts that is more than a rounding of the largest
        possible gradient with the weight 1.
        """
        return self.change(scores, y, upstream, eps) > UNIT_ROUNDOFF * upstream.abs().amax(-1, keepdim=True) / eps


SATURATION = Kinks(lambda score, y, eps: [score - eps * y.log()], weights=lambda y: y)
"""The kink of the exact soft top-k, where it reaches 1."""

ENDS = Kinks(lambda score, y, eps: [score - eps * y, score + eps * (1 - y)], weights=torch.ones_like)
"""The kinks of the projection, where it reaches 0 and 1."""


def undecided_of_tokens(
    inputs: Mapping[str, Tensor], gradients: Mapping[str, Tensor], of_weights: Tensor, k: float, eps: float
) -> dict[str, Tensor]:
    """Gradients of an exact router that change, with sides that fp32 cannot decide, by more than `lenient` allows.

    Args:
        inputs: tokens `b n d`, then routing tokens `1 r d` or `r d`, by name. Scores are their products.
        gradients: their fp64 gradients, by name.
        of_weights: gradient of the relaxed selection, `b r n`.
        k, eps: of the soft top-k.

    Returns:
        bool, in the shapes of the inputs, by name.
    """
    x, routing_tokens = (each.detach().double() for each in inputs.values())
    scores = routing_tokens @ x.mT
    y = reference.soft_topk(scores, k=k, eps=eps)
    # Roundings of the terms of a score are independent, so their squares add up.
    size = (routing_tokens.square() @ x.square().mT).sqrt()
    change = SATURATION.change(scores, y, of_weights, eps, size)
    changes = change.mT @ routing_tokens.abs(), (change @ x.abs()).sum(0)
    return {
        name: each.view(gradient.shape) > LENIENT_SHARE / 2 * gradient.abs().max()
        for (name, gradient), each in zip(gradients.items(), changes, strict=True)
    }
