"""Attention to keys and values that are projected once for a sequence, and gathered by index."""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from reference._attention import attend
from reference._shared.arguments import check_gathered


def gathered_attention(
    query: Tensor,
    key_value: Tensor,
    indices: Tensor,
    weights: Tensor,
    null_kv: Tensor,
    *,
    mask: Tensor | None = None,
    multiply_keys_by_score: bool = False,
) -> Tensor:
    """Softmax attention of the queries of each window to a list of tokens, and to a learned pair.

    This is the heavy branch of CoLT5's attention (2303.09752, 3.2), if each window of a sequence has its own routed
    keys and values. Each route serves an equal share of the heads. A window with an empty list attends only to the
    learned key.

    Args:
        query: `b w h i d`, any float dtype: the queries of w windows, h heads of d dimensions.
        key_value: `b r n (h kv d)`, in the dtype of the queries. Each token has a key and a value side by side, per
            route and head of the route.
        indices: `b w r s`, integers: the tokens that the window attends to. Masked entries may have any value; all
            other entries of a list are different, and within the sequence.
        weights: `b w r s`, any float dtype: multiplied with values, and with keys if `multiply_keys_by_score`.
        null_kv: `2 h d`, any float dtype: a key and a value that every query also attends to.
        mask: `b w r s`, bool; False for masked entries.

    Returns:
        `b w h i d`, in the dtype of the queries.

    Raises:
        ValueError: an argument is of a wrong dtype, or shapes do not match.
    """
    return gather_and_attend(
        query, key_value, indices, weights, null_kv, mask=mask, multiply_keys_by_score=multiply_keys_by_score
    )


def gather_and_attend(
    query: Tensor,
    key_value: Tensor,
    indices: Tensor,
    weights: Tensor,
    null_kv: Tensor,
    *,
    mask: Tensor | None = None,
    multiply_keys_by_score: bool = False,
    use_flash: bool = False,
) -> Tensor:
    """`gathered_attention`; with `use_flash` it uses PyTorch's scaled_dot_product_attention."""
    check_gathered(query, key_value, indices, weights, null_kv, mask)
    (batch, windows, heads, _, _), routes = query.shape, key_value.shape[1]
    indices = indices if mask is None else indices.masked_fill(~mask, 0)
    batches = torch.arange(batch, device=query.device)[:, None, None, None]
    route = torch.arange(routes, device=query.device)[:, None]
    # Indexing instead of `torch.gather`, whose gradient would have the size of the sequence for each window.
    key_value = key_value[batches, route, indices.long()]
    key, value = rearrange(key_value, "b w r s (h kv d) -> kv (b w) r h s d", kv=2, h=heads // routes)

    weights = rearrange(weights, "b w r s -> (b w) r 1 s 1").to(value.dtype)
    value = value * weights
    if multiply_keys_by_score:
        key = key * weights
    null_key, null_value = repeat(null_kv, "kv h d -> kv b h 1 d", b=batch * windows).to(key.dtype)
    key, value = (rearrange(each, "b r h s d -> b (r h) s d") for each in (key, value))
    key, value = torch.cat((null_key, key), dim=-2), torch.cat((null_value, value), dim=-2)
    if mask is not None:
        mask = repeat(F.pad(mask, (1, 0), value=True), "b w r s -> (b w) (r h) 1 s", h=heads // routes)
    out = attend(rearrange(query, "b w h i d -> (b w) h i d"), key, value, mask, use_flash=use_flash)
    return out.unflatten(0, (batch, windows))
