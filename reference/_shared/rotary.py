"""The rotations of rotary position embedding (Su et al., 2104.09864)."""

from math import tau

import torch
from torch import Tensor

from reference._shared.autocast import autocast_dtype


def rotary_angles(positions: Tensor, dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Angles `n d` of positions `n p` with p coordinates; each coordinate rotates an equal share of the d / 2 planes.

    Plane i of a share rotates by theta^(-2 i p / d) radians per position. Both dimensions of a plane get its angle.
    Angles are within one turn, so that they are equally exact at all positions.
    """
    dim_share = dim // positions.shape[-1]
    exponents = torch.arange(0, dim_share, 2, device=positions.device, dtype=torch.float64) / dim_share
    angles = (positions[..., None] * theta**-exponents).flatten(-2).remainder(tau).to(dtype)
    return torch.cat((angles, angles), dim=-1)


def places(n: int, device: torch.device, start: int = 0) -> Tensor:
    """Positions `n 1` of a sequence, counted from `start`."""
    return torch.arange(start, start + n, device=device)[:, None]


def places_of_map(height: int, width: int, device: torch.device) -> Tensor:
    """Positions `(height width) 2` of a map: row and column."""
    return torch.cartesian_prod(*(torch.arange(each, device=device) for each in (height, width)))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x `... d` rotated in the planes of dimensions i and i + d / 2."""
    first, second = x.chunk(2, dim=-1)
    return (x * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()).to(x.dtype)


def rotate_heads(qkv: Tensor, heads: int, positions: Tensor, theta: float) -> Tensor:
    """`b n (3 h d)` with queries and keys rotated by positions `n p`. Autocast converts it to its dtype."""
    lowered = autocast_dtype(qkv)
    qkv = qkv if lowered is None else qkv.to(lowered)
    query_key, value = qkv.unflatten(-1, (3, heads, -1)).split((2, 1), dim=2)
    angles = rotary_angles(
        positions, qkv.shape[-1] // (3 * heads), theta, torch.promote_types(qkv.dtype, torch.float32)
    )
    return torch.cat((rotate(query_key, angles[:, None, None]), value), dim=2).flatten(2)
