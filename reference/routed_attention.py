"""The heavy branch of the attention layers: attention to routed keys and values, and to a learned pair."""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from reference._attention import attend
from reference._shared.arguments import check_routed


def routed_attention(
    query: Tensor,
    key_value: Tensor,
    weights: Tensor,
    null_kv: Tensor,
    *,
    mask: Tensor | None = None,
    multiply_keys_by_score: bool = False,
) -> Tensor:
    """Softmax attention of routed queries to routed keys and values, and to a learned pair (2303.09752, 3.2).

    Each route serves its share of the heads.

    Args:
        query: `b i (h d)`, any float dtype.
        key_value: `b r j (h kv d)`, in the dtype of the queries. Each token has a key and a value side by side, per
            route and head of the route.
        weights: `b r j`, multiplied with values, and with keys if `multiply_keys_by_score`.
        null_kv: `2 h d`: a key and a value that every query also attends to.
        mask: `b r j`, bool; False for masked tokens.

    Returns:
        `b i (h d)`, in the dtype of the queries.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    return attend_to_routed(
        query, key_value, weights, null_kv, mask=mask, multiply_keys_by_score=multiply_keys_by_score
    )


def attend_to_routed(
    query: Tensor,
    key_value: Tensor,
    weights: Tensor,
    null_kv: Tensor,
    *,
    mask: Tensor | None = None,
    multiply_keys_by_score: bool = False,
    use_flash: bool = False,
) -> Tensor:
    """`routed_attention`; with `use_flash` it uses PyTorch's scaled_dot_product_attention."""
    check_routed(query, key_value, weights, null_kv, mask)
    (batch, routes), heads = key_value.shape[:2], null_kv.shape[1]
    query = rearrange(query, "b i (h d) -> b h i d", h=heads)
    key, value = rearrange(key_value, "b r j (h kv d) -> kv b r h j d", kv=2, h=heads // routes)
    weights = rearrange(weights, "b r j -> b r 1 j 1").to(value.dtype)
    value = value * weights
    if multiply_keys_by_score:
        key = key * weights
    null_key, null_value = repeat(null_kv, "kv h d -> kv b h 1 d", b=batch).to(key.dtype)
    key, value = (rearrange(each, "b r h j d -> b (r h) j d") for each in (key, value))
    key, value = torch.cat((null_key, key), dim=-2), torch.cat((null_value, value), dim=-2)
    if mask is not None:
        mask = repeat(F.pad(mask, (1, 0), value=True), "b r j -> b (r h) 1 j", h=heads // routes)
    out = attend(query, key, value, mask, use_flash=use_flash, has_some=True)
    return rearrange(out, "b h i d -> b i (h d)")
