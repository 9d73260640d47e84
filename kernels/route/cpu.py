"""The steps of `kernels.route` after the selection, in PyTorch, for CPU tensors."""

import torch
from torch import Tensor


def gather(
    x: Tensor,
    selected: Tensor,
    relaxed: Tensor,
    mask: Tensor | None,
    blocks: int,
    straight_through: bool,
    weights: Tensor,
    tokens: Tensor,
    indices: Tensor,
    slots: Tensor | None,
) -> None:
    """The same as `launch_gather`."""
    at_selected = relaxed.gather(-1, selected)
    if straight_through:
        at_selected = torch.where(at_selected.isnan(), at_selected, 1.0)
        at_selected = at_selected if mask is None else at_selected.masked_fill(~mask.gather(-1, selected), 0.0)
    weights.copy_(at_selected.view(weights.shape))
    in_blocks = selected.view(*indices.shape[:2], blocks, -1)
    starts = torch.arange(blocks, device=x.device)[:, None] * relaxed.shape[1]
    indices.copy_((in_blocks + starts).view(indices.shape))
    batch = torch.arange(x.shape[0], device=x.device)[:, None, None]
    tokens.copy_(x[batch, indices.clamp(max=x.shape[1] - 1)])
    if slots is not None:
        slot = torch.arange(indices.shape[2], dtype=torch.int32, device=x.device)
        slots.scatter_(2, indices, slot.expand(indices.shape))


def spread(grad_weights: Tensor, slots: Tensor, grad_scores: Tensor) -> None:
    """The same as `launch_spread`."""
    at_slots = grad_weights.gather(2, slots.long().clamp(min=0))
    grad_scores.copy_(at_slots.masked_fill(slots < 0, 0.0))
