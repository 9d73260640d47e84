"""Rotary position embedding (Su et al., 2104.09864)."""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from reference._shared.arguments import require


class RotaryEmbedding(nn.Module):
    """Angles `n d` of rotary position embedding (Su et al., 2104.09864), in fp32 at least."""

    inv_freq: Tensor

    def __init__(self, dim: int, theta: float = 10000) -> None:
        super().__init__()
        require(dim % 2 == 0, "heavy_dim_head", dim, "even for a rotary embedding")
        self.dim = dim
        self.theta = theta
        self.register_buffer("inv_freq", self._frequencies(torch.get_default_dtype()))

    def _frequencies(self, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        return self.theta ** -(torch.arange(0, self.dim, 2, device=device, dtype=dtype) / self.dim)

    def forward(self, seq_len: int) -> Tensor:
        # A module in half precision has its buffer rounded, by which later positions would be off by several turns.
        dtype = torch.promote_types(self.inv_freq.dtype, torch.float32)
        frequencies = self._frequencies(dtype, self.inv_freq.device)
        positions = torch.arange(seq_len, device=frequencies.device, dtype=dtype)
        angles = positions[:, None] * frequencies
        return torch.cat((angles, angles), dim=-1)


def angles_at(angles: Tensor, indices: Tensor | None) -> Tensor:
    """Angles `n d` at indices `... k`, with a dimension for heads: `... 1 k d`. Past the end, those of the last."""
    return (
        angles if indices is None else rearrange(angles[indices.clamp(max=angles.shape[0] - 1)], "... k d -> ... 1 k d")
    )


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x `... d` rotated in the planes of dimensions i and i + d / 2."""
    first, second = x.chunk(2, dim=-1)
    return (x * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()).to(x.dtype)


class Rotations(NamedTuple):
    """Angles of rotary position embedding, broadcastable to queries `b h i d` and keys `b r h j d`."""

    query: Tensor
    key: Tensor
