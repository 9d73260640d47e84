"""Windowed attention: each token attends to tokens near it, in memory linear in the number of tokens."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from reference._attention import attend
from reference._shared.arguments import check_windows
from reference._shared.rotary import places, rotate_heads
from reference._shared.sizes import ceil_div, window_for, without_padding


def windowed_attention(
    qkv: Tensor,
    *,
    heads: int,
    window_size: int,
    causal: bool = False,
    mask: Tensor | None = None,
    rotary_theta: float | None = None,
    position_bias: Tensor | None = None,
) -> Tensor:
    """Softmax attention of each token to tokens near it: the light branch of CoLT5 (2303.09752, section 3.2).

    A token at i attends to those at j with |i - j| <= window_size. With `causal`, tokens are in windows of that size
    instead. A token attends to its own window, up to itself, and to the whole window before. PyTorch's
    scaled_dot_product_attention computes it per window of queries; autocast converts it to its dtype.

    Args:
        qkv: `b n (3 h d)`, any float dtype: queries, keys and values, each as consecutive heads.
        heads: number of heads h.
        window_size: at least 1, in tokens.
        causal: whether attention is causal.
        mask: bool, `b n`, False for masked tokens, which are not attended to.
        rotary_theta: theta of rotary position embedding (2104.09864), None for no embedding. Dimensions i and i + d / 2
            of queries and keys rotate by theta^(-2 i / d) radians per position. d must be even.
        position_bias: `h (2 r + 1)`, any float dtype: entry r + j - i of its head is added to the logit of a query at i
            and a key at j; distances beyond r use the entries of r.

    Returns:
        `b n (h d)`, in the dtype of qkv. A token that attends to nothing gives 0, with gradient 0.

    Raises:
        ValueError: an argument is out of its range, or shapes do not match.
    """
    check_windows(qkv, heads, window_size, mask, rotary_theta, position_bias)
    batch, n, _ = qkv.shape
    if rotary_theta is not None:
        qkv = rotate_heads(qkv, heads, places(n, qkv.device), rotary_theta)
    size = window_for(n, window_size)
    windows = ceil_div(n, size)
    padded = F.pad(qkv, (0, 0, 0, windows * size - n))
    query, key, value = rearrange(padded, "b (w i) (qkv h d) -> qkv b w i h d", qkv=3, h=heads, i=size)
    key, value = _with_neighbours(key, causal), _with_neighbours(value, causal)

    # Padding at either end is masked, like absent tokens.
    present = torch.ones(batch, n, dtype=torch.bool, device=qkv.device) if mask is None else mask
    present = rearrange(F.pad(present, (0, windows * size - n)), "b (w j) -> b w j", j=size)
    present = rearrange(_with_neighbours(present, causal), "b w j -> (b w) 1 1 j")
    allowed = _within_reach(size, causal, qkv.device) & present

    query, key, value = (rearrange(each, "b w i h d -> (b w) h i d") for each in (query, key, value))
    bias = None if position_bias is None else _of_pairs(position_bias, size, causal)
    out = attend(query, key, value, allowed, use_flash=True, bias=bias)
    return without_padding(rearrange(out, "(b w) h i d -> b (w i) (h d)", b=batch, w=windows), n)


def _with_neighbours(x: Tensor, causal: bool) -> Tensor:
    """`b w j ...` with the windows before and, unless causal, after each window in the dimension of j."""
    after = 0 if causal else 1
    padded = F.pad(x, (*(0, 0) * (x.dim() - 2), 1, after))
    return torch.cat([padded[:, start : start + x.shape[1]] for start in range(2 + after)], dim=2)


def _distances(size: int, causal: bool, device: torch.device) -> Tensor:
    """Distances `i j` from queries of a window to keys in it and in its neighbours."""
    query = torch.arange(size, device=device)[:, None]
    key = torch.arange(size * (2 if causal else 3), device=device) - size
    return key - query


def _within_reach(size: int, causal: bool, device: torch.device) -> Tensor:
    """`i j`: True for positions, in its window and the neighbours, that a query may attend to."""
    distances = _distances(size, causal, device)
    return distances <= 0 if causal else distances.abs() <= size


def _of_pairs(position_bias: Tensor, size: int, causal: bool) -> Tensor:
    """The bias `h i j` of queries of a window and keys."""
    reach = position_bias.shape[1] // 2
    return position_bias[:, _distances(size, causal, position_bias.device).clamp(-reach, reach) + reach]


def attend_to_all(qkv: Tensor, *, heads: int, window_size: int, mask: Tensor | None) -> Tensor:
    """`windowed_attention` of `b n (3 h d)` if one window contains all tokens."""
    query, key, value = rearrange(qkv, "b n (qkv h d) -> qkv b h n d", qkv=3, h=heads)
    mask = None if mask is None else rearrange(mask, "b n -> b 1 1 n")
    return rearrange(attend(query, key, value, mask, use_flash=True), "b h n d -> b n (h d)")
