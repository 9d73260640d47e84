"""Autocast on the device of a tensor. Meta tensors have no such device: for them autocast is off."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which a linear layer rounds x under autocast; None if it uses x without a change."""
    device = x.device.type
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Turn autocast off on the device of x, so that products keep the dtypes of their factors."""
    device = x.device.type
    # An exported program can be saved only without such a region, so it has one only under autocast.
    if x.is_meta or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
