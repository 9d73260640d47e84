"""`kernels.windowed_attention` in PyTorch, for tensors that no kernel takes: windows of queries with their neighbours.

Everything is computed in fp32 at least, whatever autocast says.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from reference._shared.autocast import without_autocast


def forward(
    qkv: Tensor, heads: int, window_size: int, causal: bool, mask: Tensor | None, out: Tensor, lse: Tensor
) -> None:
    """Fill in the output `b n (h d)` and the natural lse `b h n`."""
    size = min(window_size, qkv.shape[1])
    with without_autocast(qkv):
        query, key, value = (_split(each, heads, size) for each in qkv.chunk(3, dim=-1))
        p, lse_of_windows = _weights(query, _with_neighbours(key, causal), _allowed(qkv, mask, size, causal))
        out.copy_(_join(p @ _with_neighbours(value, causal), qkv.shape[1]))
        lse.copy_(rearrange(lse_of_windows, "b h w i 1 -> b h (w i)")[..., : qkv.shape[1]])


def backward(
    grad_output: Tensor,
    qkv: Tensor,
    heads: int,
    window_size: int,
    causal: bool,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dqkv: Tensor,
) -> None:
    """Fill in the gradient `b n (3 h d)`."""
    n = qkv.shape[1]
    size = min(window_size, n)
    with without_autocast(qkv):
        query, key, value = (_split(each, heads, size) for each in qkv.chunk(3, dim=-1))
        key, value = _with_neighbours(key, causal), _with_neighbours(value, causal)
        grad_output, out = _split(grad_output, heads, size), _split(out, heads, size)
        # Not from the logarithms: where they are large, their rounding is.
        p, _ = _weights(query, key, _allowed(qkv, mask, size, causal))
        delta = (grad_output * out).sum(dim=-1, keepdim=True)
        dlogits = p * (grad_output @ value.mT - delta) * query.shape[-1] ** -0.5
        gradients = (
            dlogits @ key,
            _from_neighbours(dlogits.mT @ query, size),
            _from_neighbours(p.mT @ grad_output, size),
        )
        for into, gradient in zip(dqkv.chunk(3, dim=-1), gradients, strict=True):
            into.copy_(_join(gradient, n))


def _split(x: Tensor, heads: int, size: int) -> Tensor:
    """`b n (h d)` as windows `b h w i d`, the last one padded with zeros."""
    x = F.pad(x.to(torch.promote_types(x.dtype, torch.float32)), (0, 0, 0, -x.shape[1] % size))
    return rearrange(x, "b (w i) (h d) -> b h w i d", i=size, h=heads)


def _join(x: Tensor, n: int) -> Tensor:
    return rearrange(x, "b h w i d -> b (w i) (h d)")[:, :n]


def _with_neighbours(x: Tensor, causal: bool) -> Tensor:
    """`b h w j d` with the windows before and, unless causal, after it in the dimension of j."""
    offsets = range(2 if causal else 3)
    padded = F.pad(x, (0, 0, 0, 0, 1, len(offsets) - 2))
    return torch.cat([padded[:, :, start : start + x.shape[2]] for start in offsets], dim=3)


def _from_neighbours(x: Tensor, size: int) -> Tensor:
    """The transpose of `_with_neighbours`: each window's share of `b h w j d`, added up."""
    parts = x.split(size, dim=3)
    total = x.new_zeros(*x.shape[:2], x.shape[2] + len(parts) - 1, size, x.shape[4])
    for start, part in enumerate(parts):
        total[:, :, start : start + x.shape[2]] += part
    return total[:, :, 1 : 1 + x.shape[2]]


def _allowed(qkv: Tensor, mask: Tensor | None, size: int, causal: bool) -> Tensor:
    """`b 1 w i j`: which keys of its window and the neighbours a query may attend to."""
    present = qkv.new_ones(qkv.shape[:2], dtype=torch.bool) if mask is None else mask
    present = rearrange(F.pad(present, (0, -qkv.shape[1] % size)), "b (w j) -> b 1 w j 1", j=size)
    query = torch.arange(size, device=qkv.device)[:, None]
    key = torch.arange(size * (2 if causal else 3), device=qkv.device) - size
    within = key <= query if causal else (key - query).abs() <= size
    return within & _with_neighbours(present, causal).mT


def _weights(query: Tensor, key: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Weights `b h w i j`, 0 where there is nothing to attend to, and the lse of each query."""
    logits = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~allowed, -torch.inf)
    max_logit = logits.amax(dim=-1, keepdim=True)
    max_logit = max_logit.masked_fill(max_logit == -torch.inf, 0.0)
    p = (logits - max_logit).exp()
    total = p.sum(dim=-1, keepdim=True)
    return p / total.masked_fill(total == 0, 1.0), max_logit + total.log()
