"""The rotations of rotary position embedding (Su et al., 2104.09864)."""

from math import tau

import torch
from torch import Tensor


def rotary_frequencies(dim: int, theta: float, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Frequencies `d / 2` in radians a position: theta^(-2 i / d) for the plane of dimensions i and i + d / 2."""
    return theta ** -(torch.arange(0, dim, 2, device=device, dtype=dtype) / dim)


def rotary_angles(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Angles `n d` of positions `n`, from frequencies `d / 2`: each stands for both dimensions of its plane."""
    angles = positions[:, None] * frequencies
    return torch.cat((angles, angles), dim=-1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x `... d` rotated in the planes of dimensions i and i + d / 2."""
    first, second = x.chunk(2, dim=-1)
    return (x * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()).to(x.dtype)


def rotate_sequence(x: Tensor, theta: float) -> Tensor:
    """x `b n ... d` rotated by the positions of n. Angles are as exact far from the start as near to it."""
    n, dim = x.shape[1], x.shape[-1]
    frequencies = rotary_frequencies(dim, theta, torch.float64, x.device)
    angles = rotary_angles(torch.arange(n, device=x.device, dtype=torch.float64), frequencies).remainder(tau)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return rotate(x, angles.to(dtype).view(n, *[1] * (x.dim() - 3), dim))
