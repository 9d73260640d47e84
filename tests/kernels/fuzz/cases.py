"""Random cases of all operations and layers: what is called, with which options, on which tensors.

A case is plain data. `str(case)` is one line from which `Case.parse` makes the same case, whose tensors are the same on
every machine. `cases(seed, scale)` never ends; its names alternate, so that any part of it covers all of them.
"""

import inspect
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import log2, prod
from typing import Any, Self

import torch
from torch import Tensor

import reference
from tests.calls import KERNELS, LAYERS

NAMES = [*KERNELS, *LAYERS]

EXCLUDED = {
    "use_triton": "is what is compared: True for ours, False for the plain one",
    "router_use_triton": "the same",
    "ranks": "is for several processes",
}
"""Options that are not drawn, with reasons."""


@dataclass(frozen=True)
class Scale:
    """Limits on the size of cases."""

    cells: int
    """Scores times iterations, for which plain PyTorch in fp64 keeps about six tensors."""

    longest: int
    """Entries of a row."""

    tokens: int
    """Tokens of a layer, of all sequences together."""

    products: int
    """Logits, of all heads together."""

    features: tuple[int, ...]
    """Sizes of a token, and of a head: each is a separate compilation."""

    dtypes: tuple[str, ...]
    half: tuple[str, ...]
    """Half-precision dtypes of attention and layers."""

    many: int
    """Rows of a case with many small ones: more than the limit of a grid dimension, on a GPU."""


SCALES = {
    "gpu": Scale(
        2**26,
        400_000,
        2**14,
        2**23,
        (16, 32, 64, 20),
        ("float32", "bfloat16", "float16"),
        ("bfloat16", "float16"),
        70_000,
    ),
    "cpu": Scale(
        2**15, 3000, 256, 2**14, (16, 20), ("float32", "bfloat16", "float16", "float64"), ("bfloat16", "float16"), 300
    ),
    # Triton's interpreter multiplies the bits of bf16.
    "interpreter": Scale(2**11, 300, 40, 2**9, (16, 20), ("float32", "bfloat16", "float16"), ("float16",), 40),
}


@dataclass(frozen=True)
class Case:
    """A call of an operation or a layer."""

    name: str
    """Name of the operation or layer in `kernels` or `reference`."""

    seed: int
    """Seed of the numbers in its tensors."""

    dtype: str
    autocast: str | None
    grad: bool
    """True for gradients, False for a run under `torch.no_grad`."""

    layout: str
    """Layout of tensors in memory."""

    data: dict[str, Any]
    """Description of tensors: shapes, presence, spreads, kinds of masks."""

    options: dict[str, Any]
    """Arguments that are not tensors; for a layer those of its constructor."""

    def __str__(self) -> str:
        return json.dumps(asdict(self))

    def arguments(self) -> dict[str, Any]:
        """The options in the form of arguments."""
        return {name: _as_argument(name, value) for name, value in self.options.items()}

    def is_tensor(self, name: str) -> bool:
        """True if the argument of that name is a tensor."""
        return name.endswith("mask") or "routing_tokens" in name or name == "residual"

    @classmethod
    def parse(cls, line: str) -> Self:
        return cls(**json.loads(line))


def _as_argument(name: str, value: Any) -> Any:
    """Values that JSON lacks: dtypes and tuples."""
    if name == "dtype" and value is not None:
        return getattr(torch, value)
    return tuple(value) if isinstance(value, list) else value


class Draw:
    """Random choices of one case."""

    def __init__(self, seed: int, index: int, scale: Scale) -> None:
        self.random = random.Random(f"{seed} {index}")
        self.scale = scale

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def pick(self, *values: Any) -> Any:
        return self.random.choice(values)

    def size(self, most: int, least: int = 1) -> int:
        """Uniform in its logarithm: a power of two, a neighbour of one, or any."""
        exponent = self.random.uniform(log2(least), log2(max(most, least)))
        power = 2 ** round(exponent)
        size = self.pick(power, power - 1, power + 1, round(2**exponent), round(2**exponent))
        return min(max(size, least), most)

    def shape(self, cells: int) -> list[int]:
        """Shape of rows: up to three dimensions before the last."""
        cells = max(cells, 1)
        n = self.size(min(self.scale.longest, cells))
        if self.chance(0.03):
            return [0, n]
        most = max(cells // n, 1)
        dims = self.pick(0, 1, 1, 2, 3)
        if dims == 0:
            return [n]
        lead = [self.pick(1, 2, 3) if most >= 9 else 1 for _ in range(dims - 1)]
        return [*lead, self.size(max(most // prod(lead), 1)), n]

    def schedule(self) -> dict[str, Any]:
        """Schedule of coordinate descent."""
        return {
            "n_iters": self.pick(1, 2, 3, 5, 10, 20, 50),
            "eps": self.pick(0.03, 0.1, 0.3, 1.0),
            "eps_init": self.pick(None, 4.0),
            "eps_decay": self.pick(1.0, 0.7, 0.9),
        }

    def number_of(self, n: int) -> float:
        """k, from n."""
        return self.pick(max(n // 16, 1), max(n // 2, 1), round(self.random.uniform(0.5, n), 2))

    def mask(self, *more: str) -> str | None:
        return self.pick(None, None, "random", "rows", "all", *more)

    def spread(self) -> dict[str, Any]:
        return {"std": self.pick(0.1, 1.0, 1.0, 5.0, 25.0), "ties": self.chance(0.2)}


Drawn = tuple[dict[str, Any], dict[str, Any]]


def _descent(draw: Draw) -> Drawn:
    options = draw.schedule()
    shape = draw.shape(draw.scale.cells // options["n_iters"] // 4)
    data = {"scores": shape, "mask": draw.mask("broadcast", "nothing"), **draw.spread()}
    if draw.chance(0.3):
        data["k"] = draw.pick([], shape[:-1], [1] * (len(shape) - 1))
        data["k_of"] = draw.number_of(shape[-1])
    else:
        options["k"] = draw.number_of(shape[-1])
    return data, options


def _segmented(draw: Draw) -> Drawn:
    data, options = _descent(draw)
    data["scores"][-1] = min(data["scores"][-1], 131072)
    options["checkpoint_segments"] = draw.random.randint(1, options["n_iters"])
    return data, options


def _soft_topk(draw: Draw) -> Drawn:
    data, options = _descent(draw)
    return data, {name: value for name, value in options.items() if name in ("k", "eps")}


def _select(draw: Draw) -> Drawn:
    shape = draw.shape(draw.scale.cells // 16)
    data = {"scores": shape, "mask": draw.mask("broadcast", "nothing"), **draw.spread()}
    return data, {"num_selected": draw.size(shape[-1])}


def _topk(draw: Draw) -> Drawn:
    options = draw.schedule()
    shape = draw.shape(draw.scale.cells // options["n_iters"] // 4)
    data = {"x": shape, "mask": draw.mask("broadcast", "nothing"), **draw.spread()}
    options |= {
        "k": draw.pick(draw.size(min(shape[-1], 32)), draw.size(shape[-1])),
        "coor_descent_k_ratio": draw.pick(1.0, 9 / 8, 1.5),
        "fused": not draw.chance(0.05),
        "non_differentiable": draw.chance(0.1),
    }
    return data, options


def _routed_tokens(draw: Draw, share: int = 1) -> tuple[list[int], int]:
    """Shape of tokens and number of routes."""
    d, routes = draw.pick(*draw.scale.features), draw.pick(1, 1, 2, 3)
    n = draw.size(max(draw.scale.longest // 4, 1))
    if draw.chance(0.05):
        return [draw.scale.many, draw.pick(1, 2, 3), d], 1
    batch = draw.size(max(draw.scale.cells // share // 8 // (n * d), 1))
    return [0 if draw.chance(0.03) else batch, n, d], routes


def _routing_scores(draw: Draw) -> Drawn:
    x, routes = _routed_tokens(draw)
    data = {"x": x, "routing_tokens": [draw.pick(1, x[0]), routes, x[2]], "std": draw.pick(0.25, 1.0, 5.0)}
    return data, {"cosine_sim_scale": draw.pick(None, 8, 1.5)}


def _route(draw: Draw) -> Drawn:
    options = draw.schedule()
    x, routes = _routed_tokens(draw)
    x[1] = min(x[1], max(draw.scale.cells // options["n_iters"] // 4 // (routes * max(x[0], 1)), 1))
    data = {"x": x, "routing_tokens": [draw.pick(1, x[0]), routes, x[2]], "std": draw.pick(0.05, 0.25, 1.0)}
    data["mask"] = draw.mask("nothing")
    block = draw.pick(None, None, draw.size(x[1]))
    width = x[1] if block is None else block
    options |= {
        "num_selected": draw.size(max(width // 4, 1)) if draw.chance(0.8) else draw.size(width),
        "solver": draw.pick("coor_descent", "coor_descent", "exact"),
        "cosine_sim_scale": draw.pick(None, None, 8),
        "block_size": block,
        "straight_through": draw.chance(0.3),
    }
    options["k"] = draw.pick(options["num_selected"], min(options["num_selected"] * 9 / 8, width))
    return data, options


def _route_prefixes(draw: Draw) -> Drawn:
    options = draw.schedule()
    n = draw.size(min(draw.scale.longest, 2**14))
    window = max(draw.size(n), n // (64 if n > 1000 else 16), 1)
    rows = max(draw.scale.cells // options["n_iters"] // 8 // (n * (n // window + 1)), 1)
    routes = draw.pick(1, 2) if rows > 1 else 1
    data = {"scores": [0 if draw.chance(0.03) else draw.size(max(rows // routes, 1)), routes, n], **draw.spread()}
    options |= {"window_size": window, "num_selected": draw.size(n), "straight_through": draw.chance(0.3)}
    options["k"] = draw.pick(options["num_selected"], options["num_selected"] * 9 / 8)
    return data, options


def _normalize(draw: Draw) -> Drawn:
    d = draw.pick(draw.size(2048), *draw.scale.features)
    lead = draw.shape(draw.scale.cells // 8 // d)
    data = {"x": [*lead, d], "weight": draw.pick("float32", None), "bias": draw.pick(None, "float32", "same")}
    data["std"] = draw.pick(1e-3, 1.0, 30.0)
    return data, {
        "center": draw.chance(0.5),
        "eps": draw.pick(1e-12, 1e-5, 0.1),
        "dtype": draw.pick(None, *draw.scale.dtypes[:3]),
    }


def _biased_gelu(draw: Draw) -> Drawn:
    d = draw.pick(draw.size(2048), *draw.scale.features)
    data = {"x": [*draw.shape(draw.scale.cells // 8 // d), d], "bias": draw.pick("float32", None)}
    return data | {"std": draw.pick(1e-3, 1.0, 30.0)}, {}


def _normalize_and_route(draw: Draw) -> Drawn:
    routing, options = _route(draw)
    del options["cosine_sim_scale"], options["block_size"]
    norm, of_norm = _normalize(draw)
    n = routing["x"][1]
    options["num_selected"] = draw.size(max(n // 4, 1)) if draw.chance(0.8) else draw.size(n)
    options["k"] = draw.pick(options["num_selected"], min(options["num_selected"] * 9 / 8, n))
    options |= {"center": of_norm["center"], "norm_eps": of_norm["eps"], "dtype": of_norm["dtype"]}
    return {**routing, "weight": norm["weight"], "bias": norm["bias"]}, options


def _combine(draw: Draw) -> Drawn:
    d = draw.pick(draw.size(300), *draw.scale.features)
    length = draw.size(min(draw.scale.longest, max(draw.scale.cells // 8 // d, 1)))
    batch = draw.size(max(draw.scale.cells // 8 // (d * length), 1))
    if draw.chance(0.05):
        batch, length = draw.scale.many, draw.pick(1, 2, 3)
    k = 0 if draw.chance(0.03) else draw.size(length)
    data = {"routed": [batch, k, d], "length": length, "past": draw.chance(0.3), "index": draw.pick("int64", "int32")}
    data["power"] = draw.pick(1, 1, 8)
    data |= {
        name: draw.pick(None, "same", "float32")
        for name in ("null", "light", "residual", "bias", "routed_bias", "scores")
    }
    start = draw.pick(0, 0, draw.size(length))
    return data, {"length": length, "start": start, "dtype": draw.pick(None, None, *draw.scale.dtypes[:3])}


def _heads(draw: Draw) -> tuple[int, int, int]:
    """Number of routes, number of heads and their size."""
    routes = draw.pick(1, 1, 2)
    return routes, routes * draw.pick(1, 2, 3), draw.pick(*draw.scale.features)


def _routed_attention(draw: Draw) -> Drawn:
    routes, heads, d = _heads(draw)
    queries, keys = draw.size(2**11), draw.size(2**11)
    batch = draw.size(max(draw.scale.products // heads // (queries * keys), 1))
    most = max(draw.scale.products // heads // batch, 1)
    queries = min(queries, most)
    keys = min(keys, max(most // queries, 1))
    if draw.chance(0.05):
        batch, queries, keys = draw.scale.many // heads + 1, draw.pick(1, 2), draw.pick(1, 3)
    if draw.chance(0.03):
        keys = 0
    data = {"b": batch, "i": queries, "j": keys, "r": routes, "h": heads, "d": d, "mask": draw.mask("nothing")}
    data["wide"] = draw.chance(0.5)
    return data, {"multiply_keys_by_score": draw.chance(0.5)}


def _gathered_attention(draw: Draw) -> Drawn:
    routes, heads, d = _heads(draw)
    n = draw.size(2**12 if draw.scale.longest > 10_000 else draw.scale.tokens)
    windows, queries, listed = draw.size(16), draw.size(256), draw.size(n)
    most = max(draw.scale.products // heads, 1)
    windows = min(windows, most)
    queries = min(queries, max(most // windows, 1))
    listed = min(listed, max(most // (windows * queries), 1))
    batch = draw.pick(1, 2) if windows * queries * listed * 2 <= most else 1
    data = {"b": batch, "w": windows, "i": queries, "s": listed, "n": n, "r": routes, "h": heads, "d": d}
    return data | {"mask": draw.mask("nothing"), "wide": draw.chance(0.5), "index": draw.pick("int64", "int32")}, {
        "multiply_keys_by_score": draw.chance(0.5)
    }


def _windowed_attention(draw: Draw) -> Drawn:
    _, heads, d = _heads(draw)
    n = draw.size(draw.scale.tokens)
    window = draw.size(max(draw.scale.products // (3 * n * heads), 1))
    tokens = min(draw.scale.products // window, draw.scale.cells // (4 * d)) // (3 * heads)
    batch = draw.size(max(tokens // n, 1))
    if draw.chance(0.05):
        batch, n = draw.scale.many // heads + 1, draw.pick(1, 2)
    data = {"qkv": [batch, n, 3 * heads * d], "mask": draw.mask("nothing")}
    kind = draw.pick(None, "rotary", "bias")
    theta = draw.pick(10000.0, 100.0) if kind == "rotary" and d % 2 == 0 else None
    data["bias"] = [heads, 2 * draw.size(300) + 1] if kind == "bias" else None
    data["wide"] = draw.chance(0.5)
    return data, {"heads": heads, "window_size": window, "causal": draw.chance(0.5), "rotary_theta": theta}


OPERATIONS: dict[str, Callable[[Draw], Drawn]] = {
    "biased_gelu": _biased_gelu,
    "combine": _combine,
    "coor_descent": _descent,
    "gathered_attention": _gathered_attention,
    "normalize": _normalize,
    "normalize_and_route": _normalize_and_route,
    "route": _route,
    "route_prefixes": _route_prefixes,
    "routed_attention": _routed_attention,
    "routing_scores": _routing_scores,
    "segmented_coor_descent": _segmented,
    "select": _select,
    "soft_topk": _soft_topk,
    "topk": _topk,
    "windowed_attention": _windowed_attention,
}

UNDER_AUTOCAST = {
    "windowed_attention",
    "routing_scores",
    "coor_descent",
    "select",
    "soft_topk",
    "route_prefixes",
    *LAYERS,
}
"""Operations that are the same function under autocast, or document their behaviour there."""


@dataclass
class _Sizes:
    """Sizes of a layer that is being drawn."""

    batch: int
    n: int
    context: int
    routes: int

    def most_routed(self, draw: Draw) -> int:
        """The limit by which the logits of this many queries and keys fit."""
        return max(round((draw.scale.products / self.batch) ** 0.5), 2)


def _tokens(draw: Draw, sizes: _Sizes) -> int:
    most = draw.pick(sizes.n + 1, max(sizes.n // 3, 1), max(sizes.n // 3, 1))
    return draw.size(min(most, sizes.most_routed(draw)))


def _window(draw: Draw, sizes: _Sizes) -> int:
    return draw.size(max(min(sizes.n, 2 * draw.scale.products // (3 * sizes.n * sizes.batch * 4)), 4), 2)


def _head(draw: Draw, sizes: _Sizes) -> int:
    return draw.pick(*draw.scale.features[:3])


def _two_or_four(draw: Draw, sizes: _Sizes) -> int:
    return draw.pick(2, 4)


def _flag(draw: Draw, sizes: _Sizes) -> bool:
    return draw.chance(0.5)


def _rarely(draw: Draw, sizes: _Sizes) -> bool:
    return draw.chance(0.1)


def _router_kwargs(draw: Draw, sizes: _Sizes) -> dict[str, Any] | None:
    if draw.chance(0.1):
        return None
    names = [name for name in ROUTER if name in inspect.signature(reference.CoordinateDescentRouter).parameters]
    own = {"straight_through", "num_routing_tokens", "learned_routing_tokens"}
    options = {name: ROUTER[name](draw, sizes) for name in names if name not in own}
    if options["triton_checkpoint_segments"] is not None:
        options["triton_checkpoint_segments"] = min(options["triton_checkpoint_segments"], options["n_iters"])
    return options


ROUTER: dict[str, Callable[[Draw, _Sizes], Any]] = {
    "straight_through": _flag,
    "n_iters": lambda draw, sizes: draw.pick(2, 5, 20),
    "fetch_k_ratio": lambda draw, sizes: draw.pick(1.0, 9 / 8, 1.5),
    "eps": lambda draw, sizes: draw.pick(0.1, 0.3, 1.0),
    "eps_decay": lambda draw, sizes: draw.pick(1.0, 0.7),
    "eps_init": lambda draw, sizes: draw.pick(None, 4.0),
    "num_routing_tokens": lambda draw, sizes: sizes.routes,
    "learned_routing_tokens": _rarely,
    "cosine_sim_routing": _rarely,
    "cosine_sim_scale": lambda draw, sizes: draw.pick(8, 1.5),
    "route_block_size": lambda draw, sizes: None if draw.chance(0.8) else draw.size(sizes.n),
    "triton_checkpoint_segments": lambda draw, sizes: None if draw.chance(0.8) else draw.pick(1, 2, 4),
    "solver": lambda draw, sizes: draw.pick("coor_descent", "coor_descent", "exact"),
    "normalize_to": lambda draw, sizes: draw.pick("fetched", "selected"),
}

CONSTRUCTOR: dict[str, Callable[[Draw, _Sizes], Any]] = {
    **ROUTER,
    "dim": lambda draw, sizes: draw.pick(*draw.scale.features),
    "num_heavy_tokens": _tokens,
    "num_heavy_tokens_q": _tokens,
    "num_heavy_tokens_kv": _tokens,
    "num_heavy_attn_tokens_q": _tokens,
    "num_heavy_attn_tokens_kv": _tokens,
    "num_heavy_ff_tokens": _tokens,
    "num_tokens_q": _tokens,
    "num_tokens_kv": _tokens,
    "num_routed_kv": lambda draw, sizes: sizes.routes,
    "kv_routing_tokens": lambda draw, sizes: sizes.routes,
    "num_sets_kv": lambda draw, sizes: draw.pick(1, sizes.routes),
    "has_light_attn": lambda draw, sizes: not draw.chance(0.2),
    "light_dim_head": _head,
    "light_heads": _two_or_four,
    "light_window_size": _window,
    "heavy_window_size": lambda draw, sizes: draw.pick(None, max(draw.size(sizes.n), sizes.n // 16, 1)),
    "heavy_dim_head": _head,
    "heavy_heads": _two_or_four,
    "dim_head": _head,
    "heads": _two_or_four,
    "light_ff_mult": lambda draw, sizes: draw.pick(0.5, 1),
    "heavy_ff_mult": lambda draw, sizes: draw.pick(2, 4),
    "router_straight_through": _flag,
    "router_kwargs": _router_kwargs,
    "multiply_keys_by_score": _flag,
    "multiply_queries_by_score": _flag,
    "use_null_q_tokens": lambda draw, sizes: not draw.chance(0.3),
    "use_flash_attn": _flag,
    "init": lambda draw, sizes: "zero" if draw.chance(0.2) else "published",
    "rotary_emb": _flag,
    "light_rotary_emb": _flag,
    "position_bias": _flag,
    "causal_query_routing": _flag,
    "channel_first": _flag,
    # For a vision transformer.
    "num_classes": lambda draw, sizes: draw.pick(2, 5),
    "channels": lambda draw, sizes: draw.pick(1, 3),
    "image_size": lambda draw, sizes: (
        draw.pick([16, 24], [20, 20]) if draw.scale.tokens > 100 else draw.pick([8, 12], 12)
    ),
    "patch_size": lambda draw, sizes: draw.pick(4, [2, 4]),
    "depth": lambda draw, sizes: 1 if draw.chance(0.7) else 2,
    "attn_num_heavy_tokens_q": lambda draw, sizes: draw.pick(3, 8),
    "attn_num_heavy_tokens_kv": lambda draw, sizes: draw.pick(5, 8),
    "attn_heavy_dim_head": _head,
    "attn_heavy_heads": _two_or_four,
    "attn_light_dim_head": _head,
    "attn_light_heads": _two_or_four,
    "attn_light_window_size": lambda draw, sizes: draw.pick(2, 3, 4),
    "attn_rotary_emb": _flag,
    "attn_light_rotary_emb": _flag,
    "attn_num_routed_kv": lambda draw, sizes: sizes.routes,
    "ff_num_heavy_tokens": lambda draw, sizes: draw.pick(3, 8),
    "ff_heavy_mult": lambda draw, sizes: draw.pick(2, 4),
    "ff_light_mult": lambda draw, sizes: draw.pick(0.5, 1),
    "flash_attn": _flag,
    "default_coor_descent_eps": lambda draw, sizes: draw.pick(0.3, 1.0),
}
"""Random choices for options of layers. A layer uses those of its signature."""

FORWARD: dict[str, Callable[[Draw, _Sizes], Any]] = {
    "num_tokens": _tokens,
    **{
        name: lambda draw, sizes: None if draw.chance(0.7) else _tokens(draw, sizes)
        for name in (
            "num_heavy_tokens",
            "num_heavy_tokens_q",
            "num_heavy_tokens_kv",
            "num_heavy_attn_tokens_q",
            "num_heavy_attn_tokens_kv",
            "num_heavy_ff_tokens",
            "num_tokens_q",
            "num_tokens_kv",
        )
    },
    "mask": lambda draw, sizes: draw.mask(),
    "context_mask": lambda draw, sizes: draw.mask(),
    **{
        name: lambda draw, sizes: draw.chance(0.2)
        for name in (
            "routing_tokens",
            "routing_tokens_q",
            "routing_tokens_kv",
            "attn_routing_tokens_q",
            "attn_routing_tokens_kv",
            "ff_routing_tokens",
            "residual",
        )
    },
    "random_route": _rarely,
    "keep_one_route_dim": _flag,
}
"""Random choices for arguments of a layer besides tokens: for tensors, their presence, or the kind of mask."""


def pair(size: int | list[int]) -> list[int]:
    """Height and width."""
    return size if isinstance(size, list) else [size, size]


def _layer(draw: Draw, name: str) -> Drawn:
    layer = getattr(reference, name)
    small = name.endswith(("Block", "AutoregressiveAttention"))
    n = draw.size(draw.scale.tokens // (8 if small else 1), 2)
    batch = draw.size(max(min(draw.scale.tokens // n, 4), 1))
    if draw.chance(0.03):
        batch, n = draw.scale.many // 8, draw.pick(2, 3)
    sizes = _Sizes(batch, n, draw.size(max(draw.scale.tokens // batch, 3)), draw.pick(1, 1, 2))
    if name.endswith("ImageAttention"):
        height = draw.size(max(n // 2, 1))
        width = max(n // height, 1)
        sizes.n = height * width
    options = {
        option: CONSTRUCTOR[option](draw, sizes)
        for option in inspect.signature(layer).parameters
        if option not in EXCLUDED
    }
    if options.get("triton_checkpoint_segments"):
        options["triton_checkpoint_segments"] = min(options["triton_checkpoint_segments"], options["n_iters"])
    # Only one kind of positions is allowed.
    if options.get("light_rotary_emb") and options.get("position_bias"):
        options[draw.pick("light_rotary_emb", "position_bias")] = False
    given = {
        option: FORWARD[option](draw, sizes)
        for option in inspect.signature(layer.forward).parameters
        if option not in ("self", "x", "img", "context")
    }
    given["routing_tokens"] = given.get("routing_tokens") or options.get("learned_routing_tokens") or False
    if options.get("causal_query_routing"):
        # The layer would depend on random numbers, which differ in fp64.
        given["random_route"] = False
    dim = options["dim"]
    shape = [batch, n, dim]
    if name.endswith("ViT"):
        shape = [draw.pick(1, 2), options["channels"], *pair(options["image_size"])]
    elif name.endswith("ImageAttention"):
        shape = [batch, dim, height, width] if options["channel_first"] else [batch, height, width, dim]
    data = {"x": shape, "dim": dim, "routes": sizes.routes, "std": draw.pick(0.1, 0.25, 1.0), "given": given}
    if "context" in inspect.signature(layer.forward).parameters:
        data["context"] = [batch, sizes.context, dim]
    return data, options


def draw_case(seed: int, index: int, scale: Scale, name: str | None = None) -> Case:
    """A case by the index and seed; of a given name, or of the next one in turn."""
    draw = Draw(seed, index, scale)
    name = NAMES[index % len(NAMES)] if name is None else name
    data, options = OPERATIONS[name](draw) if name in OPERATIONS else _layer(draw, name)
    attends = name in LAYERS or name.endswith("attention")
    dtype = draw.pick("float32", "float32", *(("float32", *scale.half) if attends else scale.dtypes))
    if attends and "float64" in scale.dtypes and draw.chance(0.2):
        dtype = "float64"
    autocast = None
    if name in UNDER_AUTOCAST and dtype == "float32" and draw.chance(0.3):
        autocast = draw.pick(*scale.half)
    return Case(
        name=name,
        seed=draw.random.randrange(2**31),
        dtype=dtype,
        autocast=autocast,
        grad=not draw.chance(0.2),
        layout=draw.pick("contiguous", "contiguous", "transposed", "sliced", "strided", "expanded", "mixed"),
        data=data,
        options=options,
    )


def cases(seed: int, scale: Scale, start: int = 0) -> Iterator[Case]:
    """Endless cases that alternate between all names, from a start that depends on the seed."""
    index = start
    while True:
        yield draw_case(seed, index, scale)
        index += 1


class Maker:
    """Tensors of a case, made on the CPU and laid out on the device."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.generator = torch.Generator().manual_seed(case.seed)
        self.layouts = random.Random(case.seed)
        self.dtype = getattr(torch, case.dtype)
        self.memory: dict[str, Tensor] = {}
        """All memory of tensors, by their names."""

        self.tensors: dict[str, Tensor] = {}

    def add(self, name: str, x: Tensor | None, dtype: torch.dtype | None = None) -> None:
        """Lay out a tensor under its name. A float tensor gets the dtype of the case unless another one is given."""
        if x is None:
            return
        x = x.to(dtype or self.dtype) if x.is_floating_point() else x
        layout = self.case.layout
        if layout == "mixed":
            layout = self.layouts.choice(["contiguous", "transposed", "sliced", "strided"])
        self.memory[name], self.tensors[name] = _lay_out(x.to(self.device), layout)

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return std * torch.randn(shape, generator=self.generator)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def scores(self, shape: list[int]) -> Tensor:
        scores = self.normal(*shape, std=self.case.data["std"])
        return (4 * scores).round() / 4 if self.case.data["ties"] else scores

    def mask(self, kind: str | None, shape: list[int]) -> Tensor | None:
        if kind is None:
            return None
        if kind == "broadcast":
            shape = shape[-1:]
        mask = self.rand(*shape) < 0.7
        if kind == "rows":
            # Some rows have no entries, others few.
            mask &= self.rand(*shape[:-1], 1) < self.rand(*shape[:-1], 1)
            mask &= self.rand(*shape[:-1], 1) < 0.8
        return torch.full_like(mask, kind == "all") if kind in ("all", "nothing") else mask

    def places(self, *shape: int, n: int) -> Tensor:
        """Different indices below n in each row."""
        return self.rand(*shape[:-1], n).argsort(dim=-1)[..., : shape[-1]]


def _lay_out(x: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """The memory and, in it, a tensor with the numbers of x. If expanded, the numbers are those of the first index of
    its first dimension.

    Gaps contain values that would be seen in a result.
    """
    if layout == "expanded" and x.dim() > 1 and x.shape[0] > 1:
        base = x[:1].clone()
        return base, base.expand(x.shape)
    gap = torch.nan if x.is_floating_point() else (1 if x.dtype == torch.bool else 2**30)
    if layout == "transposed" and x.dim() > 1:
        base = x.mT.contiguous()
        return base, base.mT
    if layout == "sliced" and x.dim() > 0:
        base = x.new_full((*x.shape[:-1], x.shape[-1] + 2), gap)
        view = base[..., 1:-1]
    elif layout in ("strided", "transposed"):
        base = x.new_full((*x.shape, 3), gap)
        view = base[..., 1]
    else:
        base = view = torch.empty_like(x, memory_format=torch.contiguous_format)
    view.copy_(x)
    return base, view


def build(case: Case, device: torch.device) -> Maker:
    """The tensors of a case; for a layer its inputs, without parameters."""
    make = Maker(case, device)
    if case.name in OPERATIONS:
        _TENSORS.get(case.name, _scores)(make, case.data)
    else:
        _inputs(make, case.data)
    return make


def _scores(make: Maker, data: dict[str, Any]) -> None:
    name = "x" if "x" in data else "scores"
    make.add(name, make.scores(data[name]))
    make.add("mask", make.mask(data.get("mask"), data[name]))
    if "k" in data:
        k = data["k_of"] * (0.75 + 0.25 * make.rand(*data["k"]))
        make.add("k", k, torch.float32 if make.dtype != torch.float64 else None)


def _tokens_and_routing(make: Maker, data: dict[str, Any]) -> None:
    make.add("x", make.normal(*data["x"]))
    token = make.normal(*data["routing_tokens"], std=data["std"] / data["x"][2] ** 0.5)
    make.add("routing_tokens", token)
    make.add("mask", make.mask(data.get("mask"), data["x"][:2]))


def _normalized(make: Maker, data: dict[str, Any]) -> None:
    make.add("x", make.normal(*data["x"], std=data["std"]))
    _norm(make, data)


def _norm(make: Maker, data: dict[str, Any]) -> None:
    wide = {"float32": torch.promote_types(make.dtype, torch.float32)}
    make.add("weight", 1 + make.normal(data["x"][-1], std=0.3), wide.get(data["weight"]))
    if data["bias"] is not None:
        make.add("bias", make.normal(data["x"][-1]), wide.get(data["bias"]))


def _activated(make: Maker, data: dict[str, Any]) -> None:
    wide = {"float32": torch.promote_types(make.dtype, torch.float32)}
    make.add("x", make.normal(*data["x"], std=data["std"]))
    make.add("bias", make.normal(data["x"][-1]), wide.get(data["bias"]))


def _normalized_and_routed(make: Maker, data: dict[str, Any]) -> None:
    _tokens_and_routing(make, data)
    _norm(make, data)


def _combined(make: Maker, data: dict[str, Any]) -> None:
    (batch, k, d), length = data["routed"], data["length"]
    wide = {"float32": torch.promote_types(make.dtype, torch.float32)}
    make.add("routed", make.normal(batch, k, d))
    # To the eighth power, some of them become 0 in fp16.
    make.add("scores", make.rand(batch, k) ** data["power"], wide.get(data["scores"]))
    indices = make.places(batch, k, n=length + 2 if data["past"] else length)
    make.add("indices", indices.to(getattr(torch, data["index"])))
    for name in ("null", "light", "residual", "bias", "routed_bias"):
        if data.get(name) is not None:
            shape = [batch, length, d] if name in ("light", "residual") else [d]
            make.add(name, make.normal(*shape), wide.get(data[name]))


def _attended(make: Maker, data: dict[str, Any]) -> None:
    """Inputs of `routed_attention`, and of `gathered_attention`, which has windows."""
    b, i, r, h, d = (data[name] for name in "birhd")
    wide = torch.promote_types(make.dtype, torch.float32) if data["wide"] else None
    if "w" in data:
        make.add("query", make.normal(b, data["w"], h, i, d))
        listed, n = [b, data["w"], r, data["s"]], data["n"]
        make.add("indices", make.places(*listed, n=n).to(getattr(torch, data["index"])))
    else:
        make.add("query", make.normal(b, i, h * d))
        listed, n = [b, r, data["j"]], data["j"]
    make.add("key_value", make.normal(b, r, n, 2 * h // r * d))
    make.add("weights", 0.25 + make.rand(*listed), wide)
    make.add("null_kv", make.normal(2, h, d), wide)
    make.add("mask", make.mask(data["mask"], listed))


def _windows(make: Maker, data: dict[str, Any]) -> None:
    make.add("qkv", make.normal(*data["qkv"]))
    make.add("mask", make.mask(data["mask"], data["qkv"][:2]))
    if data.get("bias") is not None:
        wide = torch.promote_types(make.dtype, torch.float32) if data["wide"] else None
        make.add("position_bias", make.normal(*data["bias"]), wide)


_TENSORS: dict[str, Callable[[Maker, dict[str, Any]], None]] = {
    "biased_gelu": _activated,
    "combine": _combined,
    "gathered_attention": _attended,
    "normalize": _normalized,
    "normalize_and_route": _normalized_and_routed,
    "route": _tokens_and_routing,
    "routed_attention": _attended,
    "routing_scores": _tokens_and_routing,
    "windowed_attention": _windows,
}


def _inputs(make: Maker, data: dict[str, Any]) -> None:
    """Inputs of a layer: tokens, and other given tensors."""
    name, given, batch, dim = make.case.name, data["given"], data["x"][0], data["dim"]
    make.add("img" if name.endswith("ViT") else "x", make.normal(*data["x"]))
    if "context" in data:
        make.add("context", make.normal(*data["context"]))
    places = data["x"][:-1]
    if make.case.options.get("channel_first"):
        places = [batch, *data["x"][2:]]
    make.add("mask", make.mask(given.get("mask"), places))
    if "context" in data:
        make.add("context_mask", make.mask(given.get("context_mask"), data["context"][:2]))
    if given.get("residual"):
        make.add("residual", make.normal(*data["x"]))
    for option, there in given.items():
        if there and "routing_tokens" in option:
            several = option.endswith("kv") or name == "CoordinateDescentRouter"
            shape = [batch, data["routes"], dim] if several else [batch, dim]
            make.add(option, make.normal(*shape, std=data["std"] / dim**0.5))
