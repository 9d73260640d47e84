"""Random calls of all operations and layers, for tests of their common properties."""

import inspect
import random
import typing

import torch
from torch import Tensor, nn

import kernels
import reference
from tests.reference.conftest import SIZES, build

LAYERS = sorted(SIZES)
REFERENCES = [name for name in reference.__all__ if inspect.isfunction(getattr(reference, name))]
KERNELS = [name for name in kernels.__all__ if inspect.isfunction(getattr(kernels, name))]
OPERATIONS = [("reference", name) for name in REFERENCES] + [("kernels", name) for name in KERNELS]
"""Package and name of each operation."""


def operation(package, name):
    return getattr({"kernels": kernels, "reference": reference}[package], name)


def arguments_of(name, rng: random.Random):
    """Arguments of an operation, by name: small tensors, and options."""
    return globals()[f"_{name}"](rng)


def tensor_arguments(name) -> set[str]:
    """Names of arguments that may be tensors, by the signature of the operation of `kernels`."""
    parameters = inspect.signature(getattr(kernels, name)).parameters.values()
    return {each.name for each in parameters if Tensor in (each.annotation, *typing.get_args(each.annotation))}


def all_tensors_of(name, rng: random.Random) -> tuple[dict[str, Tensor], dict]:
    """Arguments, with a tensor for each one that may be a tensor, and the others."""
    for _ in range(1000):
        arguments = arguments_of(name, rng)
        tensors = {key: arguments.pop(key) for key in [*arguments] if isinstance(arguments[key], Tensor)}
        if set(tensors) == tensor_arguments(name):
            return tensors, arguments
    raise AssertionError(f"tests.calls never draws all of {name}'s tensors, {tensor_arguments(name)}")


def _maybe(rng, tensor):
    return tensor if rng.random() < 0.5 else None


def _mask(rng, *shape):
    return _maybe(rng, torch.rand(shape) < 0.8)


def _schedule(rng):
    return {"n_iters": rng.randint(1, 4), "eps": 0.3, "eps_init": rng.choice([None, 2.0]), "eps_decay": 0.7}


def _rows(rng):
    return rng.choice([(), (3,), (2, 3)])


def _coor_descent(rng):
    rows, n = _rows(rng), rng.randint(4, 40)
    k = rng.choice([2.5, torch.full(rows, 2.5)])
    return {"scores": torch.randn(*rows, n), "k": k, "mask": _mask(rng, n), **_schedule(rng)}


def _segmented_coor_descent(rng):
    return {**_coor_descent(rng), "checkpoint_segments": 1}


def _soft_topk(rng):
    arguments = _coor_descent(rng)
    return {name: arguments[name] for name in ("scores", "k", "mask", "eps")}


def _select(rng):
    rows, n = _rows(rng), rng.randint(4, 40)
    return {"scores": torch.randn(*rows, n), "num_selected": rng.randint(1, 4), "mask": _mask(rng, n)}


def _topk(rng):
    rows, n = _rows(rng), rng.randint(4, 40)
    flags = {"fused": rng.random() < 0.5, "non_differentiable": rng.random() < 0.3}
    return {"x": torch.randn(*rows, n), "k": rng.randint(1, 4), "mask": _mask(rng, n), **_schedule(rng), **flags}


def _normalize(rng):
    d = rng.randint(1, 20)
    dtype = rng.choice([None, torch.bfloat16])
    flags = {"center": rng.random() < 0.5, "eps": 1e-5, "dtype": dtype}
    x = torch.randn(*rng.choice([(), (3,), (2, 3)]), d)
    return {"x": x, "weight": torch.randn(d), "bias": _maybe(rng, torch.randn(d)), **flags}


def _biased_gelu(rng):
    d = rng.randint(1, 20)
    return {"x": torch.randn(*_rows(rng), d), "bias": torch.randn(d)}


def _routing_scores(rng):
    b, n, d = rng.randint(1, 3), rng.randint(1, 20), rng.randint(1, 8)
    routing_tokens = torch.randn(rng.choice([1, b]), rng.randint(1, 3), d)
    return {"x": torch.randn(b, n, d), "routing_tokens": routing_tokens, "cosine_sim_scale": rng.choice([None, 8.0])}


def _route(rng):
    b, n, r, d = rng.randint(1, 3), rng.randint(8, 40), rng.randint(1, 3), rng.randint(1, 8)
    return {
        "x": torch.randn(b, n, d),
        "routing_tokens": torch.randn(rng.choice([1, b]), r, d),
        "num_selected": rng.randint(1, 4),
        "k": 2.5,
        "solver": rng.choice(["coor_descent", "exact"]),
        "cosine_sim_scale": rng.choice([None, 8.0]),
        "block_size": rng.choice([None, 6]),
        "mask": _mask(rng, b, n),
        **_schedule(rng),
    }


def _normalize_and_route(rng):
    arguments = _route(rng)
    del arguments["cosine_sim_scale"], arguments["block_size"]
    d = arguments["x"].shape[-1]
    norm = {"weight": torch.randn(d), "bias": _maybe(rng, torch.randn(d)), "center": rng.random() < 0.5}
    return {**arguments, **norm, "norm_eps": 1e-5, "dtype": rng.choice([None, torch.bfloat16])}


def _route_prefixes(rng):
    b, r, n = rng.randint(1, 3), rng.randint(1, 3), rng.randint(8, 40)
    sizes = {"window_size": rng.randint(3, 50), "num_selected": rng.randint(1, 8)}
    return {"scores": torch.randn(b, r, n), "k": 2.5, **sizes, **_schedule(rng)}


def _routed_attention(rng):
    b, i, j, r, d = rng.randint(1, 3), rng.randint(1, 9), rng.randint(1, 9), rng.randint(1, 3), rng.randint(1, 8)
    heads = r * rng.randint(1, 2)
    return {
        "query": torch.randn(b, i, heads * d),
        "key_value": torch.randn(b, r, j, 2 * heads // r * d),
        "weights": torch.rand(b, r, j),
        "null_kv": torch.randn(2, heads, d),
        "mask": _mask(rng, b, r, j),
        "multiply_keys_by_score": rng.random() < 0.5,
    }


def _gathered_attention(rng):
    b, w, i, n, r, d = rng.randint(1, 2), rng.randint(1, 3), rng.randint(1, 5), 12, rng.randint(1, 3), rng.randint(1, 8)
    heads, s = r * rng.randint(1, 2), rng.randint(1, 5)
    return {
        "query": torch.randn(b, w, heads, i, d),
        "key_value": torch.randn(b, r, n, 2 * heads // r * d),
        "indices": torch.rand(b, w, r, n).argsort(dim=-1)[..., :s],
        "weights": torch.rand(b, w, r, s),
        "null_kv": torch.randn(2, heads, d),
        "mask": _mask(rng, b, w, r, s),
        "multiply_keys_by_score": rng.random() < 0.5,
    }


def _windowed_attention(rng):
    b, n, h, d = rng.randint(1, 3), rng.randint(1, 20), rng.randint(1, 3), rng.randint(1, 8)
    options = {"heads": h, "window_size": rng.randint(1, 12), "causal": rng.random() < 0.5}
    kind = rng.choice([None, "rotary", "bias"])
    if kind == "rotary" and d % 2 == 0:
        options["rotary_theta"] = 10000.0
    if kind == "bias":
        options["position_bias"] = torch.randn(h, 2 * rng.randint(0, 15) + 1)
    return {"qkv": torch.randn(b, n, 3 * h * d), "mask": _mask(rng, b, n), **options}


def _combine(rng):
    b, n, k, d = rng.randint(1, 3), rng.randint(5, 20), rng.randint(1, 5), rng.randint(1, 8)
    return {
        "routed": torch.randn(b, k, d),
        "scores": torch.rand(b, k),
        "indices": torch.rand(b, n).argsort(dim=-1)[:, :k],
        "length": n,
        "null": _maybe(rng, torch.randn(d)),
        "light": _maybe(rng, torch.randn(b, n, d)),
        "residual": _maybe(rng, torch.randn(b, n, d)),
        "bias": _maybe(rng, torch.randn(d)),
        "routed_bias": _maybe(rng, torch.randn(d)),
        "start": rng.randint(0, n),
        "dtype": rng.choice([None, torch.bfloat16]),
    }


def layer_of(name, rng: random.Random, use_triton=False, block_sizes=(None, 16), **fixed) -> nn.Module:
    """A small layer with random options, except for given ones; it routes in blocks of one of these sizes."""
    router = {
        "n_iters": 2,
        "solver": rng.choice(["coor_descent", "exact"]),
        "normalize_to": rng.choice(["fetched", "selected"]),
        "cosine_sim_routing": rng.random() < 0.3,
        "route_block_size": rng.choice(block_sizes),
    }
    wanted = {
        "use_triton": use_triton,
        "router_use_triton": use_triton,
        "num_routed_kv": rng.choice([1, 2]),
        "attn_num_routed_kv": rng.choice([1, 2]),
        "kv_routing_tokens": rng.choice([1, 2]),
        "router_kwargs": router,
    }
    flags = ("multiply_keys_by_score", "multiply_queries_by_score", "use_null_q_tokens", "use_flash_attn", "flash_attn")
    flags += ("rotary_emb", "causal_query_routing", "channel_first", "router_straight_through", "has_light_attn")
    flags += ("light_rotary_emb", "attn_rotary_emb", "attn_light_rotary_emb")
    wanted |= {flag: rng.random() < 0.5 for flag in flags}
    if name == "CoordinateDescentRouter":
        wanted |= router | {"num_routing_tokens": rng.choice([1, 2])}
    wanted["position_bias"] = not wanted["light_rotary_emb"] and rng.random() < 0.5
    taken = inspect.signature(getattr(reference, name)).parameters
    return build(name, **{key: value for key, value in wanted.items() if key in taken} | fixed)


def inputs_of(name, layer: nn.Module, batch=2, length=60, context=70) -> tuple[tuple[Tensor, ...], dict]:
    """Tensors of these sizes for a layer, and other arguments of its `forward`. For an image, length is the width."""
    if name == "ConditionalRoutedViT":
        return (torch.randn(batch, 3, 32, length // 4 * 4),), {}
    if name == "ConditionalRoutedImageAttention":
        return (torch.randn((batch, 16, 7, length) if layer.channel_first else (batch, 7, length, 16)),), {}
    x = torch.randn(batch, length, 16)
    if name == "ConditionalRoutedCrossAttention":
        return (x, torch.randn(batch, context, 16)), {}
    return (x,), {"num_tokens": 8} if name == "CoordinateDescentRouter" else {}


def results(output) -> list[Tensor]:
    """The tensors that a call returns."""
    return [output] if isinstance(output, Tensor) else [each for each in output if each is not None]
