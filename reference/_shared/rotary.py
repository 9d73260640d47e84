"""The rotations of rotary position embedding (Su et al., 2104.09864)."""

import torch
from torch import Tensor


def rotary_angles(frequencies: Tensor, n: int) -> Tensor:
    """Angles `n d` of the first n positions, from frequencies `d / 2`: each stands for the planes of two halves."""
    dtype = torch.promote_types(frequencies.dtype, torch.float32)
    positions = torch.arange(n, device=frequencies.device, dtype=dtype)
    angles = positions[:, None] * frequencies.detach().to(dtype)
    return torch.cat((angles, angles), dim=-1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x `... d` rotated in the planes of dimensions i and i + d / 2."""
    first, second = x.chunk(2, dim=-1)
    return (x * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()).to(x.dtype)
