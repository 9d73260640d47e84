"""Windowed attention: each token attends to those around it, in memory linear in the number of tokens."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from reference._arguments import check_counts, check_windows
from reference._attention import LayerNorm, attend
from reference._operations import choose, path
from reference._sizes import ceil_div, window_for, without_padding


def windowed_attention(
    qkv: Tensor, *, heads: int, window_size: int, causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    """Softmax attention of each token to those near it: the light branch of CoLT5 (2303.09752, section 3.2).

    Without `causal` a token at i attends to those at j with |i - j| <= window_size. With it tokens are in windows of
    that size, and one attends to what is not after it in its window and to all of the window before. Windows of
    queries see their neighbours, by PyTorch's scaled_dot_product_attention, which autocast lowers to its dtype.

    Args:
        qkv: `b n (3 h d)`, any float dtype: queries, keys and values, each with the heads one after the other.
        heads: number of heads h.
        window_size: at least 1, in tokens.
        causal: whether a token attends to nothing after it.
        mask: bool, `b n`, False for tokens that nothing attends to.

    Returns:
        `b n (h d)`, in the dtype of qkv. A token that may attend to nothing gives 0, with gradient 0.

    Raises:
        ValueError: an argument is out of its range, or shapes do not match.
    """
    check_windows(qkv, heads, window_size, mask)
    batch, n, _ = qkv.shape
    size = window_for(n, window_size)
    windows = ceil_div(n, size)
    padded = F.pad(qkv, (0, 0, 0, windows * size - n))
    query, key, value = rearrange(padded, "b (w i) (qkv h d) -> qkv b w i h d", qkv=3, h=heads, i=size)
    key, value = _with_neighbours(key, causal), _with_neighbours(value, causal)

    # What padding there is at either end is masked as what is not there.
    present = torch.ones(batch, n, dtype=torch.bool, device=qkv.device) if mask is None else mask
    present = rearrange(F.pad(present, (0, windows * size - n)), "b (w j) -> b w j", j=size)
    present = rearrange(_with_neighbours(present, causal), "b w j -> (b w) 1 1 j")
    allowed = _within_reach(size, causal, qkv.device) & present

    query, key, value = (rearrange(each, "b w i h d -> (b w) h i d") for each in (query, key, value))
    out = attend(query, key, value, allowed, use_flash=True)
    return without_padding(rearrange(out, "(b w) h i d -> b (w i) (h d)", b=batch, w=windows), n)


def _with_neighbours(x: Tensor, causal: bool) -> Tensor:
    """`b w j ...` with the windows before and, unless causal, after it in the dimension of j."""
    after = 0 if causal else 1
    padded = F.pad(x, (*(0, 0) * (x.dim() - 2), 1, after))
    return torch.cat([padded[:, start : start + x.shape[1]] for start in range(2 + after)], dim=2)


def _within_reach(size: int, causal: bool, device: torch.device) -> Tensor:
    """`i j`: which of the positions in its window and the neighbours a query may attend to."""
    query = torch.arange(size, device=device)[:, None]
    key = torch.arange(size * (2 if causal else 3), device=device) - size
    return key <= query if causal else (key - query).abs() <= size


class WindowedAttention(nn.Module):
    """The light branch: each token attends to those around it, in memory linear in the number of tokens.

    Args:
        window_size: if causal, the size of windows, and a token attends to what is before it in its window and to all
            of the window before; else the radius: a token attends to those at most so far away.
        use_triton: as in `CoordinateDescentRouter`.
    """

    def __init__(
        self,
        dim: int,
        window_size: int,
        dim_head: int = 64,
        heads: int = 8,
        causal: bool = False,
        use_triton: bool | None = False,
    ) -> None:
        super().__init__()
        check_counts(light_dim_head=dim_head, light_heads=heads, light_window_size=window_size)
        self.window_size = window_size
        self.heads = heads
        self.causal = causal
        self.use_triton = use_triton
        self.norm = LayerNorm(dim, use_triton)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self._attend = choose("windowed_attention", windowed_attention, use_triton)

    def extra_repr(self) -> str:
        way = path("windowed_attention", self.use_triton)
        return f"window_size={self.window_size}, causal={self.causal}, {way}"

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens `b n d`; mask `b n`, False for tokens that nothing attends to."""
        qkv = self.to_qkv(self.norm(x))
        options = {"heads": self.heads, "window_size": self.window_size, "causal": self.causal}
        return self.to_out(self._attend(qkv, mask=mask, **options))
