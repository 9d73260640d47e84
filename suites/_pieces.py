"""Plain layers in pieces, so that the fp64 truth for a long sequence fits into memory. The mathematics is the same, a
few windows at a time. Only the result is kept for the backward pass."""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import reference
from reference.layers.light_attention import SelfAttention, WindowedAttention
from reference.layers.linear import Rounded
from reference.layers.router import RouterReturn

TOKENS = 2**16
"""Approximate number of tokens that are attended to at a time in a light branch."""


def in_pieces(module: nn.Module) -> Callable[..., Tensor]:
    """A plain layer whose light branch attends piece by piece."""
    for part in module.modules():
        if isinstance(part, WindowedAttention):
            part.forward = _Windowed(part)  # type: ignore[assignment,method-assign]
        elif isinstance(part, SelfAttention):
            part.forward = _EachWindow(part)  # type: ignore[method-assign]
    return module


class _Windowed:
    """Windowed attention of some windows, with the tokens within their reach."""

    def __init__(self, attention: WindowedAttention) -> None:
        # Not the module itself, because a copy of it would belong to the original.
        self.whole = type(attention).forward
        self.attention = attention

    def __call__(self, x: Tensor, mask: Tensor | None = None, rounded: Rounded | None = None) -> Tensor:
        """Tokens `b n d`; mask `b n`. Each piece rounds its weights."""
        n, size = x.shape[1], self.attention.window_size
        # Causal windows begin at multiples of their size.
        length = max(TOKENS // size, 1) * size
        if n <= length:
            return self.whole(self.attention, x, mask)
        return torch.cat([_checkpoint(self._piece, x, mask, start, length) for start in range(0, n, length)], dim=1)

    def _piece(self, x: Tensor, mask: Tensor | None, start: int, length: int) -> Tensor:
        size = self.attention.window_size
        first, last = max(start - size, 0), min(start + length + size, x.shape[1])
        part = None if mask is None else mask[:, first:last]
        return self.whole(self.attention, x[:, first:last], part)[:, start - first :][:, :length]


class _EachWindow:
    """Attention within windows, which are the batch."""

    def __init__(self, attention: SelfAttention) -> None:
        self.whole = type(attention).forward
        self.attention = attention

    def __call__(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        rounded: Rounded | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """Windows `b n d`; mask `b n`; places `n 2`. Each piece rounds its weights."""
        rows = max(TOKENS // 8 // x.shape[1], 1)
        if x.shape[0] <= rows:
            return self.whole(self.attention, x, mask, places=places)
        masks = [None] * x.shape[0] if mask is None else mask.split(rows)
        parts = zip(x.split(rows), masks, strict=False)
        return torch.cat([_checkpoint(self.whole, self.attention, part, mask, None, places) for part, mask in parts])


def by_window(layer: nn.Module) -> Callable[..., Tensor]:
    """`ConditionalRoutedAutoregressiveAttention` of sequences of whole windows, with its default options. Plain PyTorch
    on rows of all windows would keep every iteration of every window's descent."""
    assert isinstance(layer, reference.ConditionalRoutedAutoregressiveAttention)
    in_pieces(layer)

    def function(x: Tensor) -> Tensor:
        n, size = x.shape[1], layer.heavy_window_size
        light = layer.light_attn(x)
        if n <= size:
            return light
        routes = layer.kv_router.num_routing_tokens
        scores_q = rearrange(layer.q_router.score(x), "b 1 (w i) -> b w i", i=size)
        q = layer.q_router.select(scores_q, layer.num_heavy_tokens_q)
        scores_kv = layer.kv_router.score(x)
        key_value = layer.heavy_attn.project(rearrange(x, "b n d -> b 1 n d"), routes, rounded={})
        heavy = [
            _checkpoint(_window, layer, x, q.indices[:, w], q.weights[:, w], scores_kv, key_value, w * size)
            for w in range(1, n // size)
        ]
        return torch.cat((light[:, :size], light[:, size:] + torch.cat(heavy, dim=1)), dim=1)

    return function


def _window(
    layer: reference.ConditionalRoutedAutoregressiveAttention,
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    scores: Tensor,
    key_value: Tensor,
    start: int,
) -> Tensor:
    """The heavy branch of the window at `start`, whose routed queries are `b k`."""
    tokens = x[:, start : start + layer.heavy_window_size]
    batch = torch.arange(len(x), device=x.device)[:, None]
    q = RouterReturn(indices, weights.to(x.dtype), tokens[batch, indices], None)

    # The row is padded to the target sum of its relaxed selection, if there are fewer tokens before the window.
    num_tokens, n = layer.num_heavy_tokens_kv, x.shape[1]
    length = min(max(start, 2 * num_tokens), n)
    before = None if length == start else torch.arange(length, device=x.device) < start
    kv = layer.kv_router.select(scores[..., :length], num_tokens, before)
    route = torch.arange(scores.shape[1], device=x.device)[:, None]
    routed = key_value[batch[..., None], route, kv.indices]
    return layer.attend_routed(tokens, q, RouterReturn(kv.indices, kv.weights.to(x.dtype), routed, kv.mask), rounded={})


def _checkpoint(function: Callable[..., Tensor], *arguments: object) -> Tensor:
    result: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result
