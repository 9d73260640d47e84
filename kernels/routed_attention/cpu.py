"""`kernels.routed_attention` in PyTorch, for CPU tensors."""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from reference._shared.sdpa import scaled_dot_product_attention


def routed_attention(
    query: Tensor, key_value: Tensor, weights: Tensor, null_kv: Tensor, mask: Tensor | None, multiply_keys: bool
) -> Tensor:
    routes, heads = key_value.shape[1], null_kv.shape[1]
    query = rearrange(query, "b i (h d) -> b h i d", h=heads)
    key, value = rearrange(key_value, "b r j (h kv d) -> kv b r h j d", kv=2, h=heads // routes)
    weights = rearrange(weights, "b r j -> b r 1 j 1").to(value.dtype)
    key, value = key * weights if multiply_keys else key, value * weights
    null = repeat(null_kv, "kv h d -> kv b h 1 d", b=query.shape[0]).to(key.dtype)
    key, value = (
        torch.cat((first, rearrange(rest, "b r h j d -> b (r h) j d")), dim=2)
        for first, rest in zip(null, (key, value), strict=True)
    )
    if mask is not None:
        mask = repeat(F.pad(mask, (1, 0), value=True), "b r j -> b (r h) 1 j", h=heads // routes)
    # PyTorch's kernels, with the derivatives that they lack.
    out = scaled_dot_product_attention(query, key, value, mask)
    return rearrange(out, "b h i d -> b i (h d)")
