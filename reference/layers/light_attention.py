"""The light branch of the attention layers: each token attends to tokens near it."""

import torch
from torch import Tensor, nn

from reference._shared.arguments import check_counts, require
from reference._shared.rotary import rotate_heads
from reference.layers.linear import Rounded, linear, round_weights
from reference.layers.norms import LayerNorm, RMSNorm
from reference.layers.operations import Operations, UseTriton
from reference.layers.position_bias import BUCKETS, FARTHEST, buckets_of_distances
from reference.layers.rotary import THETA, check_even


class WindowedAttention(nn.Module):
    """The light branch: each token attends to tokens near it, in memory linear in the number of tokens.

    Args:
        window_size: if causal, the size of windows: a token attends to its window, up to itself, and to the whole
            window before. Otherwise the radius: a token attends to tokens at a distance of at most this.
        rotary_emb: rotary position embedding. It has no parameters, and counts positions from 0.
        position_bias: T5's relative position bias instead of rotary_emb, learned for each head and bucket of distances,
            initially 0.
        use_triton: as in `CoordinateDescentRouter`.
    """

    buckets: Tensor

    def __init__(
        self,
        dim: int,
        window_size: int,
        dim_head: int = 64,
        heads: int = 8,
        causal: bool = False,
        use_triton: UseTriton = False,
        rotary_emb: bool = False,
        position_bias: bool = False,
    ) -> None:
        super().__init__()
        check_counts(light_dim_head=dim_head, light_heads=heads, light_window_size=window_size)
        if rotary_emb:
            check_even(light_dim_head=dim_head)
        require(not (rotary_emb and position_bias), "position_bias", True, "False if light_rotary_emb is True")
        self.rotary_theta = THETA if rotary_emb else None
        self.position_bias = None
        if position_bias:
            reach = min(2 * window_size - 1 if causal else window_size, FARTHEST)
            self.position_bias = nn.Parameter(torch.zeros(heads, BUCKETS))
            self.register_buffer("buckets", torch.tensor(buckets_of_distances(reach, causal)), persistent=False)
        self.window_size = window_size
        self.heads = heads
        self.causal = causal
        self.operations = Operations.of(use_triton)
        self.norm = LayerNorm(dim, self.operations)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def extra_repr(self) -> str:
        way = self.operations.path("windowed_attention")
        positions = f"rotary_theta={self.rotary_theta}, position_bias={self.position_bias is not None}"
        return f"window_size={self.window_size}, causal={self.causal}, {positions}, {way}"

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        rounded: Rounded | None = None,
        normalized: bool = False,
    ) -> Tensor:
        """Tokens `b n d`, which may be normalized. Mask `b n` is False for masked tokens, which are not attended to;
        weights are rounded already."""
        rounded = round_weights(x, *self.children()) if rounded is None else rounded
        qkv = linear(self.to_qkv, x if normalized else self.norm(x), rounded)
        options = {"window_size": self.window_size, "causal": self.causal, "rotary_theta": self.rotary_theta}
        bias = None if self.position_bias is None else self.position_bias[:, self.buckets]
        out = self.operations.windowed_attention(qkv, heads=self.heads, mask=mask, position_bias=bias, **options)
        return linear(self.to_out, out, rounded)


class SelfAttention(nn.Module):
    """Dense self-attention within the windows of the image layer.

    Args:
        use_triton: as in `CoordinateDescentRouter`.
    """

    def __init__(self, dim: int, dim_head: int = 64, heads: int = 8, use_triton: UseTriton = False) -> None:
        super().__init__()
        check_counts(light_dim_head=dim_head, light_heads=heads)
        self.heads = heads
        self.operations = Operations.of(use_triton)
        self.norm = RMSNorm(dim, self.operations)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def extra_repr(self) -> str:
        return self.operations.path("windowed_attention")

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        rounded: Rounded | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """Tokens `b n d`. Mask `b n` is False for masked tokens, which are not attended to; weights are rounded
        already.

        Rows and columns `n 2` of tokens switch rotary position embedding on.
        """
        rounded = round_weights(x, *self.children()) if rounded is None else rounded
        qkv = linear(self.to_qkv, self.norm(x), rounded)
        if places is not None:
            qkv = rotate_heads(qkv, self.heads, places, THETA)
        options = {"heads": self.heads, "window_size": max(x.shape[1], 1)}
        return linear(self.to_out, self.operations.attend_to_all(qkv, mask=mask, **options), rounded)
