"""The end of `kernels.route` in PyTorch: a CPU tensor gets this."""

import torch
from torch import Tensor


def gather(
    x: Tensor, selected: Tensor, relaxed: Tensor, blocks: int, weights: Tensor, tokens: Tensor, indices: Tensor
) -> None:
    """As `launch_gather`."""
    weights.copy_(relaxed.gather(-1, selected).view(weights.shape))
    in_blocks = selected.view(*indices.shape[:2], blocks, -1)
    starts = torch.arange(blocks, device=x.device)[:, None] * relaxed.shape[1]
    indices.copy_((in_blocks + starts).view(indices.shape))
    batch = torch.arange(x.shape[0], device=x.device)[:, None, None]
    tokens.copy_(x[batch, indices.clamp(max=x.shape[1] - 1)])
