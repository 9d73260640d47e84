"""`kernels.combine` in PyTorch, for CPU tensors."""

import torch
from torch import Tensor


def combine(
    routed: Tensor,
    scores: Tensor,
    indices: Tensor,
    n: int,
    null: Tensor | None,
    light: Tensor | None,
    residual: Tensor | None,
    bias: Tensor | None,
    routed_bias: Tensor | None,
    start: int,
    dtype: torch.dtype,
) -> Tensor:
    """The sum of the terms that exist for all tokens, to which routed ones are added."""
    (batch, _, d), device = routed.shape, routed.device
    wide = torch.promote_types(dtype, torch.float32)
    out = torch.zeros(1, 1, d, dtype=wide, device=device)
    if null is not None:
        is_routed = torch.zeros(batch, n + 1, dtype=torch.bool, device=device)
        is_routed = is_routed.scatter(1, indices.long().clamp(max=n), True)[:, :n]
        is_null = ~is_routed & (torch.arange(n, device=device) >= start)
        out = null.to(wide) * is_null.unsqueeze(-1)
    for each in (light, residual, bias):
        out = out if each is None else out + each.to(wide)
    heavy = routed.to(wide) if routed_bias is None else routed.to(wide) + routed_bias.to(wide)
    heavy = (heavy * scores.unsqueeze(-1).to(wide)).masked_fill((indices >= n).unsqueeze(-1), 0.0)
    places = torch.arange(batch, device=device)[:, None] * n + indices.clamp(max=n - 1)
    out = out.expand(batch, n, d).reshape(-1, d).index_add(0, places.flatten(), heavy.flatten(0, 1))
    return out.view(batch, n, d).to(dtype)
