"""Small layers, and a second implementation of them: one batch element, one head, one token at a time."""

from math import sqrt
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import reference

ATTENTION = {"light_dim_head": 8, "light_heads": 2, "heavy_dim_head": 4, "heavy_heads": 4}
SIZES = {
    "CoordinateDescentRouter": {"dim": 16},
    "ConditionalRoutedFeedForward": {"dim": 16, "num_heavy_tokens": 8},
    "ConditionalRoutedAttention": {
        "dim": 16,
        "num_heavy_tokens_q": 8,
        "num_heavy_tokens_kv": 10,
        "light_window_size": 8,
        **ATTENTION,
    },
    "ConditionalRoutedCrossAttention": {
        "dim": 16,
        "num_tokens_q": 8,
        "num_tokens_kv": 10,
        "dim_head": 4,
        "heads": 4,
    },
    "ConditionalRoutedAutoregressiveAttention": {
        "dim": 16,
        "num_heavy_tokens_q": 3,
        "num_heavy_tokens_kv": 10,
        "light_window_size": 8,
        **ATTENTION,
    },
    "ConditionalRoutedImageAttention": {
        "dim": 16,
        "num_heavy_tokens_q": 8,
        "num_heavy_tokens_kv": 10,
        "light_window_size": 4,
        **ATTENTION,
    },
    "ConditionalRoutedTransformerBlock": {
        "dim": 16,
        "num_heavy_attn_tokens_q": 8,
        "num_heavy_attn_tokens_kv": 10,
        "num_heavy_ff_tokens": 6,
        "light_window_size": 8,
        **ATTENTION,
    },
    "ConditionalRoutedViT": {
        "image_size": 32,
        "patch_size": 4,
        "num_classes": 5,
        "dim": 16,
        "depth": 2,
        "attn_num_heavy_tokens_q": 8,
        "attn_num_heavy_tokens_kv": 10,
        "attn_light_window_size": 4,
        "ff_num_heavy_tokens": 6,
        "ff_heavy_mult": 2,
        "ff_light_mult": 0.5,
        **{f"attn_{name}": size for name, size in ATTENTION.items()},
    },
}


def build(name, package=reference, spread=0.1, **options):
    """A small layer whose scores have about this standard deviation on standard normal tokens.

    It is so small that coordinate descent leaves at most a few entries at 1.
    """
    layer = getattr(package, name)(**{**SIZES[name], **options})
    with torch.no_grad():
        for parameter_name, parameter in layer.named_parameters():
            if parameter_name.endswith("routing_token"):
                parameter.mul_(spread / sqrt(parameter.shape[-1]))
    return layer


def route(router, token, tokens, valid, count):
    """Weights and indices of the tokens `n d` of one route."""
    if len(tokens) <= count:
        return torch.ones(int(valid.sum()), dtype=tokens.dtype), valid.nonzero()[:, 0]
    scores = tokens @ token
    k = min(count * router.fetch_k_ratio, len(tokens))
    schedule = {"n_iters": router.n_iters, "eps": router.eps, "eps_init": router.eps_init}
    relaxed = reference.coor_descent(scores, k=k, mask=valid, eps_decay=router.eps_decay, **schedule)
    indices = scores.masked_fill(~valid, -torch.inf).topk(min(count, int(valid.sum()))).indices
    weights = relaxed[indices]
    return (weights / weights.detach() if router.straight_through else weights), indices


def rms_norm(tokens, gamma):
    return tokens / tokens.norm(dim=-1, keepdim=True) * sqrt(tokens.shape[-1]) * gamma


def turn(vectors, positions):
    """Rotary embedding as a product with complex numbers."""
    half = vectors.shape[-1] // 2
    coordinates = positions.view(len(positions), -1).T
    share = half // len(coordinates)
    frequencies = 10000.0 ** -(torch.arange(share, dtype=torch.float64) / share)
    angles = torch.cat([each[:, None] * frequencies for each in coordinates], dim=-1)
    turned = torch.complex(vectors[:, :half], vectors[:, half:]) * torch.exp(1j * angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


def heavy(layer, x, context, num_q, num_kv, valid_q=None, valid_kv=None, first=0, where=None, **options):
    """The heavy branch for the queries `n d` of one batch element; `first` is the position of the first query. `where`
    gives positions with several coordinates."""
    everything = torch.ones(len(x), dtype=torch.bool), torch.ones(len(context), dtype=torch.bool)
    valid_q, valid_kv = (e if v is None else v for e, v in zip(everything, (valid_q, valid_kv), strict=True))
    attention = layer.heavy_attn
    heads, dim_head = attention.null_kv.shape[1:]
    routes = layer.kv_router.num_routing_tokens
    weights_q, places = route(layer.q_router, layer.q_router.routing_token[0], x, valid_q, num_q)
    queries = rms_norm(x[places], attention.norm.gamma) @ attention.to_q.weight.T
    if options.get("multiply_queries_by_score"):
        queries = queries * weights_q[:, None]

    outs = []
    for head in range(heads):
        token = layer.kv_router.routing_token[head * routes // heads]
        weights, chosen = route(layer.kv_router, token, context, valid_kv, num_kv)
        rows = attention.to_kv.weight[2 * dim_head * head : 2 * dim_head * (head + 1)]
        key, value = (rms_norm(context[chosen], attention.norm.gamma) @ rows.T).chunk(2, dim=-1)
        value = value * weights[:, None]
        if options.get("multiply_keys_by_score"):
            key = key * weights[:, None]
        query = queries[:, dim_head * head : dim_head * (head + 1)]
        if options.get("rotary_emb"):
            place = torch.arange(len(context) + len(x)) if where is None else where
            query, key = turn(query, place[places + first]), turn(key, place[chosen])
        key = torch.cat((attention.null_kv[0, head, None], key))
        value = torch.cat((attention.null_kv[1, head, None], value))
        outs.append((query @ key.T / sqrt(dim_head)).softmax(dim=-1) @ value)
    out = torch.zeros_like(x) if layer.null_q_token is None else layer.null_q_token.expand_as(x).clone()
    out[places] = torch.cat(outs, dim=-1) @ attention.to_out.weight.T * weights_q[:, None]
    return out


def light(attention, x, reachable, positions=None):
    """Dense attention of tokens `n d`; `reachable` `n n` is True if a token attends to another one. If there are
    positions, queries and keys are rotated by them."""
    size = attention.to_qkv.out_features // 3
    query, key, value = (attention.norm(x) @ attention.to_qkv.weight.T).split(size, dim=-1)
    dim_head = size // attention.heads
    outs = []
    for part in torch.arange(size).split(dim_head):
        q, k = (each[:, part] if positions is None else turn(each[:, part], positions) for each in (query, key))
        weights = (q @ k.T / sqrt(dim_head)).masked_fill(~reachable, -torch.inf).softmax(-1)
        outs.append(weights.nan_to_num() @ value[:, part])
    return torch.cat(outs, dim=-1) @ attention.to_out.weight.T


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads do not help for tensors this small, and wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(name="build")
def _build():
    return build


@pytest.fixture
def by_hand():
    return SimpleNamespace(route=route, heavy=heavy, light=light, rms_norm=rms_norm)


class Casts(TorchDispatchMode):
    """Counts the operators that convert a tensor, or several."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "_foreach_copy_"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def count_casts() -> type[Casts]:
    return Casts
