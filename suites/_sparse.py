"""Sparse attention layers by their papers, in plain PyTorch, with the width of `DenseAttention`.

Each takes tokens `b n d` to `b n d`. Routers use unrounded tokens, in fp32 or more, even under autocast, because many
scores of half precision are equal. Rows of a router are orthogonal at the start, so that `apart` can move the scores of
one head without changing those of the others.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from colt5_bench.case import Problem
from reference.layers.norms import RMSNorm
from suites._dense import Attend, DenseAttention

MARGIN = 1e-3
"""Least distance of scores from the edge of a selection, in units of their spread. A rounding in fp32 is a thousandth
of it."""

CHUNK_ELEMENTS = 2**27
"""Most elements of gathered keys that block attention holds at a time."""


class _Routed(nn.Module):
    """Tokens that routers select, one router for each of the `routes`, with the weights of the selected ones."""

    def __init__(self, attend: Attend, dim: int, routes: int, num_tokens: int, causal: bool) -> None:
        super().__init__()
        self.attend, self.num_tokens, self.causal = attend, num_tokens, causal
        self.router = nn.Linear(dim, routes, bias=False)
        nn.init.orthogonal_(self.router.weight)

    def select(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and indices `b r k` of the selected tokens, in the order of their positions."""
        with torch.autocast(x.device.type, enabled=False):
            scores = rearrange(self.router(x), "b n r -> b r n")
        indices = scores.topk(self.num_tokens, dim=-1).indices.sort(dim=-1).values
        return scores.gather(-1, indices).sigmoid(), indices


class MixtureOfSparseAttention(_Routed):
    """Each head attends among the tokens that it selects: MoSA, 2505.00315, section 2.2."""

    def __init__(
        self, attend: Attend, dim: int, heads: int, num_tokens: int, dim_head: int = 64, causal: bool = False
    ) -> None:
        super().__init__(attend, dim, heads, num_tokens, causal)
        self.norm = RMSNorm(dim)
        self.to_qkv = nn.Parameter(torch.randn(3, heads, dim, dim_head) * dim**-0.5)
        self.to_out = nn.Parameter(torch.randn(heads, dim_head, dim) * (heads * dim_head) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.select(x)
        batch = torch.arange(len(x), device=x.device)[:, None, None]
        tokens = self.norm(x)[batch, indices]
        query, key, value = einsum(tokens, self.to_qkv, "b h k d, three h d e -> three b h k e")
        attended = self.attend(query, key, value, self.causal)
        out = einsum(attended * weights.unsqueeze(-1).to(attended), self.to_out, "b h k e, h e d -> b h k d")
        places = rearrange(indices, "b h k -> b (h k) 1").expand(-1, -1, x.shape[-1])
        return torch.zeros_like(x).scatter_add(1, places, rearrange(out, "b h k d -> b (h k) d").to(x))


class MixtureOfDepths(_Routed):
    """Dense attention among the tokens that one router selects; others bypass it: 2404.02258, section 3.4."""

    def __init__(
        self, attend: Attend, dim: int, heads: int, num_tokens: int, dim_head: int = 64, causal: bool = False
    ) -> None:
        super().__init__(attend, dim, 1, num_tokens, causal)
        self.attention = DenseAttention(attend, dim, heads, dim_head, causal)

    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.select(x)
        places = rearrange(indices, "b 1 k -> b k 1").expand(-1, -1, x.shape[-1])
        out = self.attention(x.gather(1, places))
        return torch.zeros_like(x).scatter(1, places, (out * rearrange(weights, "b 1 k -> b k 1").to(out)).to(x))


def apart(problem: Problem, num_tokens: int) -> Problem:
    """Move tokens near the edge of a selection along their router, until no rounding changes the selection."""
    x, routers = (problem.inputs[name].double() for name in ("x", "router.weight"))
    scores = x @ routers.mT
    beyond = scores - scores.topk(num_tokens + 1, dim=1).values[:, -2:].mean(dim=1, keepdim=True)
    shift = torch.where(beyond.abs() < MARGIN, MARGIN * beyond.sign(), 0.0)
    return replace(problem, inputs={**problem.inputs, "x": (x + shift @ routers).to(problem.inputs["x"].dtype)})


class NativeSparseAttention(nn.Module):
    """Gated sum of attention to means of blocks, to selected blocks and to a window: NSA, 2502.11089, section 3.3.

    All heads share a key and a value. Means replace the paper's learned compression, as in flash-linear-attention.
    """

    def __init__(self, attend: Callable[..., Tensor], dim: int, heads: int, dim_head: int = 64) -> None:
        super().__init__()
        self.attend, self.heads = attend, heads
        self.norm = RMSNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim_head, bias=False)
        self.to_gates = nn.Linear(dim, 3 * heads, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        query = rearrange(self.to_q(x), "b n (h d) -> b h n d", h=self.heads)
        key, value = rearrange(self.to_kv(x), "b n (two d) -> two b 1 n d", two=2)
        gates = rearrange(self.to_gates(x).sigmoid(), "b n (three h) -> three b h n 1", three=3)
        return self.to_out(rearrange(self.attend(query, key, value, gates), "b h n d -> b n (h d)"))


class SharedKeyAttention(nn.Module):
    """Attention of all heads to one key for each token, which is also its value."""

    def __init__(self, attend: Callable[[Tensor, Tensor], Tensor], dim: int, heads: int, dim_head: int = 64) -> None:
        super().__init__()
        self.attend, self.heads = attend, heads
        self.norm = RMSNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_key = nn.Linear(dim, dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        query = rearrange(self.to_q(x), "b n (h d) -> b h n d", h=self.heads)
        key = rearrange(self.to_key(x), "b n d -> b 1 n d")
        return self.to_out(rearrange(self.attend(query, key), "b h n d -> b n (h d)"))


def to_blocks(query: Tensor, key: Tensor, value: Tensor, causal: bool, *, size: int, blocks: int) -> Tensor:
    """Causal attention of each query to its own block of keys and to the best earlier ones.

    This is MoBA, 2502.13189, section 2.2. The score of a block is that of the mean of its keys.

    Args:
        query, key, value: `b h n d`, of whole blocks.
        causal: has to be True.
        size: tokens per block.
        blocks: number of blocks that a query attends to, including its own.
    """
    assert causal
    means = key.unflatten(2, (-1, size)).mean(dim=3)

    def attend(part: Tensor, position: Tensor) -> Tensor:
        chosen = _best(part @ means.mT, position // size, blocks, always=(0,))
        return attend_at(part, key, value, _tokens(chosen, size, position))

    return _by_rows(attend, query, key, blocks * size)


def native_sparse(
    query: Tensor, key: Tensor, value: Tensor, gates: Tensor, *, size: int, blocks: int, window: int
) -> Tensor:
    """The three attentions of `NativeSparseAttention`.

    Args:
        query: `b h n d`.
        key, value: `b 1 n d`, of whole blocks.
        gates: `3 b h n 1`, of the means, the selected blocks and the window.
        size: tokens per block.
        blocks: number of blocks that a query attends to. They include the first, its own and the one before.
        window: number of last keys that a query attends to.
    """
    mean_keys, mean_values = (each.unflatten(2, (-1, size)).mean(dim=3) for each in (key, value))
    scale, block = query.shape[-1] ** -0.5, torch.arange(mean_keys.shape[2], device=query.device)

    def attend(part: Tensor, position: Tensor) -> Tensor:
        ended = (block + 1) * size <= position + 1
        # Not -inf: a query in the first block has no keys here, and its gradient would be NaN.
        logits = (scale * part @ mean_keys.mT).masked_fill(~ended, torch.finfo(part.dtype).min)
        weights = logits.softmax(dim=-1).masked_fill(~ended, 0.0)
        importance = weights.sum(dim=1, keepdim=True)
        chosen = _best(importance, position // size, blocks, always=(0, 1), first=True)
        near = _last(position, window).expand(len(part), 1, -1, -1)
        gate = gates[..., position[0, 0] : position[-1, 0] + 1, :]
        return (
            gate[0] * (weights @ mean_values)
            + gate[1] * attend_at(part, key, value, _tokens(chosen, size, position))
            + gate[2] * attend_at(part, key, value, near)
        )

    return _by_rows(attend, query, key, blocks * size + window + len(block))


def to_selected(query: Tensor, key: Tensor, *, window: int, selected: int) -> Tensor:
    """Attention of each query `b h n d` to the last keys `b 1 n d` and to others, see `selection`; keys are values."""

    def attend(part: Tensor, position: Tensor) -> Tensor:
        places = torch.cat([_last(position, window), selection(position, window, selected)], dim=-1)
        return attend_at(part, key, key, places.expand(len(part), 1, -1, -1))

    return _by_rows(attend, query, key, window + selected)


def selection(position: Tensor, window: int, selected: int) -> Tensor:
    """Places `i m` of keys before the windows of queries at positions `i 1`, evenly spread; -1 means none."""
    before, place = (position - window + 1).clamp(min=0), torch.arange(selected, device=position.device)
    spread = torch.where(before > selected, place * before // selected, place)
    return spread.masked_fill(place >= before, -1)


def attend_at(query: Tensor, key: Tensor, value: Tensor, places: Tensor) -> Tensor:
    """Softmax attention of each query to the keys at its places.

    Args:
        query: `b (g r) i d`.
        key, value: `b g j d`, for r heads each.
        places: `b g i m`, at least one of which is not negative; negative ones mean no key.
    """
    batch, group = (torch.arange(length, device=query.device) for length in key.shape[:2])
    at = batch[:, None, None, None], group[:, None, None], places.clamp(min=0)
    heads = rearrange(query, "b (g r) i d -> b g r i d", g=key.shape[1])
    logits = einsum(heads, key[at], "b g r i d, b g i m d -> b g r i m") * query.shape[-1] ** -0.5
    weights = logits.masked_fill((places < 0).unsqueeze(2), -torch.inf).softmax(dim=-1)
    return rearrange(einsum(weights, value[at], "b g r i m, b g i m d -> b g r i d"), "b g r i d -> b (g r) i d")


def _by_rows(attend: Callable[[Tensor, Tensor], Tensor], query: Tensor, key: Tensor, keys: int) -> Tensor:
    """Attention of some queries at a time, each of which gathers its keys. The backward pass computes it again."""
    rows = max(1, CHUNK_ELEMENTS // (key.shape[0] * key.shape[1] * key.shape[3] * keys))
    positions = torch.arange(query.shape[2], device=query.device)[:, None].split(rows)
    parts = zip(query.split(rows, dim=2), positions, strict=True)
    return torch.cat([checkpoint(attend, part, position, use_reentrant=False) for part, position in parts], dim=2)


def _best(scores: Tensor, own: Tensor, blocks: int, *, always: tuple[int, ...], first: bool = False) -> Tensor:
    """The best blocks up to a query's own, by scores `... i m`; -1 if there are fewer.

    Args:
        own: the blocks of the queries, `i 1`.
        blocks: number of blocks.
        always: distances from the own block of blocks that are always included.
        first: whether the first block is always included, too.
    """
    block = torch.arange(scores.shape[-1], device=scores.device)
    kept = torch.isin(own - block, torch.tensor(always, device=scores.device)) | (first & (block == 0))
    scores = scores.masked_fill(kept, torch.inf).masked_fill(block > own, -torch.inf)
    best = scores.topk(min(blocks, scores.shape[-1]), dim=-1)
    return best.indices.masked_fill(best.values.isneginf(), -1)


def _tokens(chosen: Tensor, size: int, position: Tensor) -> Tensor:
    """Places of the keys in chosen blocks `... i m` up to the query's own; -1 for others."""
    places = (chosen.unsqueeze(-1) * size + torch.arange(size, device=chosen.device)).flatten(-2)
    return places.masked_fill((places > position) | (places < 0), -1)


def _last(position: Tensor, window: int) -> Tensor:
    """Places `i m` of the last keys of queries at positions `i 1`, their own first; negative before the first."""
    return position - torch.arange(window, device=position.device)


def entmax(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Attention `b h n d` with the 1.5-entmax instead of the softmax: 1905.05702. Its small weights are exactly 0."""
    everywhere = torch.arange(key.shape[2], device=key.device)

    def attend(part: Tensor, position: Tensor) -> Tensor:
        logits = part @ key.mT * query.shape[-1] ** -0.5
        return entmax_15(logits.masked_fill(everywhere > position, -torch.inf) if causal else logits) @ value

    return _by_rows(attend, query, key, key.shape[2])


def entmax_15(logits: Tensor) -> Tensor:
    """Weights (x / 2 - t)^2 of the entries of `... n` above 2 t, with the t for which they sum to 1.

    If the largest m entries are above it, t is their mean minus the root of (1 - their squared distances from it) / m.
    The right m is the last one for which the m-th entry is above its t.
    """
    half = logits / 2
    with torch.no_grad():
        ordered = half.sort(dim=-1, descending=True).values
        seen = ordered.masked_fill(ordered.isneginf(), 0.0)
        m = torch.arange(1, half.shape[-1] + 1, device=half.device, dtype=half.dtype)
        mean = seen.cumsum(-1) / m
        spread = seen.square().cumsum(-1) - m * mean.square()
        threshold = mean - ((1 - spread).clamp(min=0) / m).sqrt()
        count = (ordered >= threshold).sum(dim=-1, keepdim=True)
        inside = half >= ordered.gather(-1, count - 1)
    taken = half.masked_fill(~inside, 0.0)
    size = inside.sum(dim=-1, keepdim=True)
    mean = taken.sum(dim=-1, keepdim=True) / size
    spread = (taken - mean).masked_fill(~inside, 0.0).square().sum(dim=-1, keepdim=True)
    weights = (taken - mean + ((1 - spread).clamp(min=0) / size).sqrt()).clamp(min=0).square()
    return weights.masked_fill(~inside, 0.0)
