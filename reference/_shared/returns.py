"""Results of operations that return several tensors, the same for the plain and the fused ones."""

from typing import NamedTuple

from torch import Tensor


class TopkReturn(NamedTuple):
    """Results of `topk`, each `... k`; the last two are None with `non_differentiable`.

    values: the selected entries of x times their gates; indices: int64, their indices in x, largest first;
    coor_descent_values: the relaxed selection at these indices; gates: 1 in value, with the gradient of the relaxed
    selection.
    """

    values: Tensor
    indices: Tensor
    coor_descent_values: Tensor | None
    gates: Tensor | None


class RouteReturn(NamedTuple):
    """Routed tokens of `b n d`: s for each of r routes, block after block, the largest score first."""

    indices: Tensor
    """int64 `b r s`. It is n or more if a padded last block has no more tokens to select."""

    weights: Tensor
    """`b r s`: the relaxed selection at the selected entries, or 1 with its gradient. It is in the dtype of the scores,
    and 0 for masked tokens."""

    tokens: Tensor
    """`b r s d`; the last token for an index past the end."""


class NormalizedRouteReturn(NamedTuple):
    """Routed tokens, as in `RouteReturn`, and all tokens normalized."""

    indices: Tensor
    weights: Tensor
    tokens: Tensor
    normalized: Tensor
    """`b n d`."""

    x: Tensor
    """The input tokens, for a residual, so that its gradient is added with the others."""


class PrefixSelection(NamedTuple):
    """Tokens that each window except the first selects from those before it, the largest score first: each
    `b w r s`."""

    indices: Tensor
    """int64. If a window has fewer than s tokens before it, all of these, then the ones that follow."""

    weights: Tensor
    """The relaxed selection, or 1 with its gradient, in fp32 at least; 0 for tokens that are not before the window."""

    mask: Tensor | None
    """False for tokens that are not before the window; None if every window has s tokens before it."""
