"""Questions to autocast about the device of a tensor. Meta tensors have none: for them autocast is off."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that a linear layer rounds x to under autocast; None where it takes x as it is."""
    device = x.device.type
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Products on the device of x are of the dtypes that they are given."""
    device = x.device.type
    # A program that is exported can be saved only without such a region: it has one under autocast alone.
    if x.is_meta or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
