"""Rotary position embedding (Su et al., 2104.09864)."""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from reference._shared.arguments import require
from reference._shared.rotary import places, rotary_angles

THETA = 10000.0
"""The slowest plane of 64 dimensions turns once in 47,000 positions."""


def check_even(**dims: int) -> None:
    """Dimensions of heads that are rotated in pairs."""
    for name, dim in dims.items():
        require(dim % 2 == 0, name, dim, "even for a rotary embedding")


def check_fourfold(**dims: int) -> None:
    """Dimensions of heads, half of which are rotated by rows and the other half by columns."""
    for name, dim in dims.items():
        require(dim % 4 == 0, name, dim, "a multiple of 4 for a rotary embedding of rows and columns")


class RotaryEmbedding(nn.Module):
    """Angles `n d` of rotary position embedding (Su et al., 2104.09864), in fp32 at least."""

    inv_freq: Tensor

    def __init__(self, dim: int, theta: float = THETA) -> None:
        super().__init__()
        check_even(heavy_dim_head=dim)
        self.dim = dim
        self.theta = theta
        # As published, for its checkpoints.
        exponents = torch.arange(0, dim, 2, dtype=torch.get_default_dtype()) / dim
        self.register_buffer("inv_freq", theta**-exponents)

    def forward(self, seq_len: int, start: int = 0) -> Tensor:
        # A module in half precision has its buffer rounded, which would shift later positions by several turns.
        dtype = torch.promote_types(self.inv_freq.dtype, torch.float32)
        return rotary_angles(places(seq_len, self.inv_freq.device, start), self.dim, self.theta, dtype)


def angles_at(angles: Tensor, indices: Tensor | None) -> Tensor:
    """Angles `n d` at indices `... k`, with a dimension for heads: `... 1 k d`. Past the end, the last angles."""
    return (
        angles if indices is None else rearrange(angles[indices.clamp(max=angles.shape[0] - 1)], "... k d -> ... 1 k d")
    )


class Rotations(NamedTuple):
    """Angles of rotary position embedding, broadcastable to queries `b h i d` and keys `b r h j d`."""

    query: Tensor
    key: Tensor
