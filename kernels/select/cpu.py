"""`kernels.select` in PyTorch, for CPU tensors."""

import torch
from torch import Tensor

from kernels.select.constants import LAST_INDEX


def select_rows(scores: Tensor, mask: Tensor | None, num_selected: int) -> Tensor:
    if scores.dtype == torch.float64:
        # fp64 scores and indices do not fit into one integer.
        order = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).sort(descending=True, stable=True)
        if mask is None:
            return order.indices[:, :num_selected].contiguous()
        is_valid = mask.gather(-1, order.indices).to(torch.int8)
        valid_first = is_valid.sort(descending=True, stable=True).indices
        return order.indices.gather(-1, valid_first[:, :num_selected])

    # The same keys as in the kernels.
    scores = scores.float()
    bits = scores.masked_fill(scores == 0, 0.0).view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).masked_fill_(scores.isnan(), 2**31 - 1)
    if mask is not None:
        ordered.masked_fill_(~mask, -(2**31))
    keys = (ordered.long() << 31) | torch.arange(scores.shape[1] - 1, -1, -1, device=scores.device)
    return scores.shape[1] - 1 - (keys.topk(num_selected, dim=-1).values & LAST_INDEX)
