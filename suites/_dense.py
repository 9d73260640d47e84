"""Dense layers that routed layers replace: every token passes through the equivalent of the heavy branch."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from reference.layers.norms import RMSNorm

Attend = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
"""From queries `b h i d`, keys and values `b h j d` and whether attention is causal to `b h i d`."""

CHUNK_SIMILARITIES = 2**26
"""Most logits that plain attention holds at a time."""


def attend_plainly(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Softmax attention by its definition, for a few queries at a time, because the logits of all may not fit."""
    rows = max(1, CHUNK_SIMILARITIES // (query.shape[0] * query.shape[1] * key.shape[2]))
    starts = range(0, query.shape[2], rows)
    parts = zip(query.split(rows, dim=2), starts, strict=True)
    return torch.cat([checkpoint(_attend, q, key, value, s, causal, use_reentrant=False) for q, s in parts], dim=2)


def _attend(query: Tensor, key: Tensor, value: Tensor, start: int, causal: bool) -> Tensor:
    logits = query * query.shape[-1] ** -0.5 @ key.mT
    if causal:
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=query.device).triu(start + 1)
        logits = logits.masked_fill(later, -torch.inf)
    return logits.softmax(dim=-1) @ value


def attend_with_sdpa(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """PyTorch's scaled_dot_product_attention, with the kernel that it picks."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal)


def attend_with_flash(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """PyTorch's scaled_dot_product_attention by its flash kernel, which does not support fp32."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return attend_with_sdpa(query, key, value, causal)


class DenseAttention(nn.Module):
    """Attention of all tokens to all tokens, or to those of a context, with the width of a heavy branch."""

    def __init__(self, attend: Attend, dim: int, heads: int, dim_head: int = 64, causal: bool = False) -> None:
        super().__init__()
        self.attend = attend
        self.heads = heads
        self.causal = causal
        self.norm = RMSNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Tokens `b n d` to `b n d`."""
        x = self.norm(x)
        query = rearrange(self.to_q(x), "b i (h d) -> b h i d", h=self.heads)
        key_value = self.to_kv(x if context is None else self.norm(context))
        key, value = rearrange(key_value, "b j (kv h d) -> kv b h j d", kv=2, h=self.heads)
        return self.to_out(rearrange(self.attend(query, key, value, self.causal), "b h i d -> b i (h d)"))


class DenseFeedForward(nn.Sequential):
    """A feed-forward layer for all tokens, with the width of a heavy branch."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(RMSNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `b n d` to `b n d`."""
        return super().forward(x)


class DenseBlock(nn.Module):
    """Dense attention, then a dense feed-forward layer, both with a residual."""

    def __init__(self, attention: nn.Module, feed_forward: nn.Module) -> None:
        super().__init__()
        self.attention, self.feed_forward = attention, feed_forward

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `b n d` to `b n d`."""
        x = x + self.attention(x)
        return x + self.feed_forward(x)


class OverMap(nn.Module):
    """A layer for tokens over the positions of a feature map `b d h w`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(
            self.layer(rearrange(x, "b d h w -> b (h w) d")), "b (h w) d -> b d h w", h=x.shape[-2], w=x.shape[-1]
        )
