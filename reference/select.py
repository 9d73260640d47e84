"""The hard top-k by its definition: the indices of the largest scores of a row."""

import torch
from torch import Tensor

from reference._shared.arguments import check_select


def select(scores: Tensor, *, num_selected: int, mask: Tensor | None = None) -> Tensor:
    """Indices of the largest scores of each row, the largest first, equal ones in the order of their indices.

    NaN counts as larger than any number, as in torch.topk; zeros of either sign are equal.

    Args:
        scores: `... n`, any float dtype.
        num_selected: number of entries to select, from 1 to n.
        mask: bool, broadcasts to `... n`; False entries come last, in the order of their indices, and entries of -inf
            just before them.

    Returns:
        int64 `... num_selected`; it has no gradient.

    Raises:
        ValueError: an argument is out of its range, or shapes do not match.
    """
    check_select(scores, num_selected, mask)
    # A GPU sorts by bits: NaNs with different signs would be first and last.
    scores = scores.detach().masked_fill(scores.isnan(), torch.nan)
    if mask is None:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :num_selected]
    order = scores.masked_fill(~mask, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    # A score of -inf is equal to the fill value of a masked entry.
    is_valid = mask.expand(scores.shape).gather(-1, order).to(torch.int8)
    return order.gather(-1, is_valid.sort(dim=-1, descending=True, stable=True).indices[..., :num_selected])
