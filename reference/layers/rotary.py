"""Rotary position embedding (Su et al., 2104.09864)."""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from reference._shared.arguments import require
from reference._shared.rotary import rotary_angles


class RotaryEmbedding(nn.Module):
    """Angles `n d` of rotary position embedding (Su et al., 2104.09864), in fp32 at least."""

    inv_freq: Tensor

    def __init__(self, dim: int, theta: float = 10000, name: str = "heavy_dim_head") -> None:
        super().__init__()
        require(dim % 2 == 0, name, dim, "even for a rotary embedding")
        self.dim = dim
        self.theta = theta
        self.register_buffer("inv_freq", self._frequencies(torch.get_default_dtype()))

    def _frequencies(self, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        return self.theta ** -(torch.arange(0, self.dim, 2, device=device, dtype=dtype) / self.dim)

    def frequencies(self) -> Tensor:
        """Frequencies `d / 2` in radians a position."""
        # A module in half precision has its buffer rounded, by which later positions would be off by several turns.
        dtype = torch.promote_types(self.inv_freq.dtype, torch.float32)
        return self._frequencies(dtype, self.inv_freq.device)

    def forward(self, seq_len: int) -> Tensor:
        return rotary_angles(self.frequencies(), seq_len)


def angles_at(angles: Tensor, indices: Tensor | None) -> Tensor:
    """Angles `n d` at indices `... k`, with a dimension for heads: `... 1 k d`. Past the end, those of the last."""
    return (
        angles if indices is None else rearrange(angles[indices.clamp(max=angles.shape[0] - 1)], "... k d -> ... 1 k d")
    )


class Rotations(NamedTuple):
    """Angles of rotary position embedding, broadcastable to queries `b h i d` and keys `b r h j d`."""

    query: Tensor
    key: Tensor
