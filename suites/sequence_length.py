"""The router and the attention layers by length, to rows of 1,048,576 tokens: routed whole, or in blocks.

Metrics of the router: `lost`, the share of the tokens with the k largest scores that it does not select. Routing in
blocks loses some if one block has more of them than another. Tokens here are independent of their position. A text,
whose important parts are close together, loses more.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch.func import functional_call

import reference
from colt5_bench.case import FORWARD, Problem
from colt5_bench.pytest_plugin.replay import replay
from colt5_bench.suite import Suite
from suites._dense import DenseAttention
from suites._descent import both_directions, implementations
from suites._layers import GUEST, OURS, REFERENCE, Layer, LayerCase, RoutedTokens, cost, plain, problem, truth
from suites._pieces import by_window, in_pieces
from suites.layers import LONGEST_AT_ONCE
from suites.peers import COLT5_LAYER_PLAIN, COLT5_LAYER_TRITON, DENSE, DENSE_FLASH

BLOCK = 131_072
"""`route_block_size` in colt5-attention's README, the longest row of the published kernel."""

MOST_ROUTED = 1024
"""Number of routed tokens, even of a million; a quarter if there are few tokens."""


@dataclass(frozen=True)
class LengthCase(LayerCase):
    """A layer for one sequence, or for a context, of n tokens."""

    kind: str
    n: int
    k: int
    """Tokens that are routed, as queries and as keys and values."""

    route_block_size: int | None
    dim: int
    dtype: str = "float32"

    @property
    def layer(self) -> Layer:
        layer = replace(LAYERS[self.kind](self), dtype=self.dtype)
        if self.route_block_size is None:
            return layer
        return replace(layer, colt5_raises=layer.colt5_raises or "its route_block_size raises an IndexError")


def _router(case: LengthCase) -> Layer:
    """The router without straight-through weights, so that the output shows the weights."""
    options: dict[str, Any] = {"route_block_size": case.route_block_size, "straight_through": False}
    return Layer(
        lambda package, use_triton: RoutedTokens(
            package.CoordinateDescentRouter(case.dim, use_triton=use_triton, **options), case.k
        ),
        inputs={"x": (1, case.n, case.dim)},
        output=(1, case.k, case.dim),
        masks={"mask": (1, case.n)},
    )


def _cross_attention(case: LengthCase) -> Layer:
    """k tokens attend to a context of n; half of them and k tokens of the context are routed."""
    shape = (1, case.k, case.dim)
    return Layer(
        lambda package, use_triton: package.ConditionalRoutedCrossAttention(
            case.dim,
            num_tokens_q=case.k // 2,
            num_tokens_kv=case.k,
            kv_routing_tokens=2,
            route_block_size=case.route_block_size,
            use_triton=use_triton,
        ),
        inputs={"x": shape, "context": (1, case.n, case.dim)},
        output=shape,
        masks={"mask": shape[:2], "context_mask": (1, case.n)},
        dense=lambda attend: DenseAttention(attend, case.dim, heads=8),
        dense_pairs=case.k * case.n,
        colt5_raises="its cross attention raises a NameError",
    )


def _self_attention(case: LengthCase) -> Layer:
    """Half as many light heads as heavy ones, as in CoLT5 Base."""
    shape = (1, case.n, case.dim)
    return Layer(
        lambda package, use_triton: package.ConditionalRoutedAttention(
            case.dim,
            num_heavy_tokens_q=case.k,
            num_heavy_tokens_kv=case.k,
            light_heads=4,
            heavy_heads=8,
            router_kwargs={"route_block_size": case.route_block_size},
            use_triton=use_triton,
        ),
        inputs={"x": shape},
        output=shape,
        masks={"mask": shape[:2]},
        dense=lambda attend: DenseAttention(attend, case.dim, heads=8),
        dense_pairs=case.n**2,
    )


def _autoregressive(case: LengthCase) -> Layer:
    """As in the example of colt5-attention's README."""
    shape = (1, case.n, case.dim)
    return Layer(
        lambda package, use_triton: package.ConditionalRoutedAutoregressiveAttention(
            case.dim,
            num_heavy_tokens_q=32,
            num_heavy_tokens_kv=case.k,
            num_routed_kv=2,
            use_triton=use_triton,
            use_flash_attn=True,
        ),
        inputs={"x": shape},
        output=shape,
        sparing=by_window if case.n > LONGEST_AT_ONCE else in_pieces,
        dense=lambda attend: DenseAttention(attend, case.dim, heads=8, causal=True),
        dense_pairs=case.n**2,
        colt5_raises="with two sets of keys, it gives each window the mask of another window",
    )


LAYERS = {
    "router": _router,
    "cross_attention": _cross_attention,
    "self_attention": _self_attention,
    "autoregressive": _autoregressive,
}


def cases(preset: str, device: torch.device) -> list[LengthCase]:
    """If there is no GPU, tokens are small, and only the router has a million of them.

    Windows of an autoregressive layer are not routed in blocks; it has no gradient for a million tokens.
    """

    def at(kind: str, n: int, block: int | None, dim: int, dtype: str = "float32") -> LengthCase:
        return LengthCase(kind, n, min(MOST_ROUTED, n // 4), block, dim, dtype)

    if preset == "smoke":
        return [*(at(kind, 512, None, 32) for kind in LAYERS), at("router", 512, 128, 32)]
    on_gpu = device.type == "cuda"
    dim, step = 512 if on_gpu else 64, 1 if preset == "full" else 2
    longest = dict.fromkeys(LAYERS, 2**20 if on_gpu else 2**14) | {"router": 2**20}
    if not on_gpu:
        longest["autoregressive"] = 2**12
    made = []
    for kind in LAYERS:
        lengths = [2**power for power in range(10, 21, step) if 2**power <= longest[kind]]
        blocks = (None,) if kind == "autoregressive" else (None, BLOCK)
        dtypes = ["float32"] if kind != "autoregressive" or not on_gpu or preset == "full" else []
        if on_gpu and kind in ("self_attention", "autoregressive"):
            dtypes.append("autocast")
        made += [
            at(kind, n, block, dim, dtype)
            for dtype, n, block in product(dtypes, lengths, blocks)
            if block is None or block < n
        ]
    return made


def directions(case: LayerCase) -> tuple[str, ...]:
    assert isinstance(case, LengthCase)
    return (FORWARD,) if case.kind == "autoregressive" and case.n > BLOCK else both_directions(case)


def lost(use_triton: bool) -> Callable[[LayerCase, Problem], dict[str, float]]:
    """Implementations by the router of the reference, with or without kernels."""

    def metrics(case: LayerCase, problem: Problem) -> dict[str, float]:
        assert isinstance(case, LengthCase)
        if case.kind != "router":
            return {}
        router = case.layer.make(reference, use_triton).router
        assert isinstance(router, reference.CoordinateDescentRouter)
        token = {"routing_token": problem.inputs["router.routing_token"].detach()}
        x = problem.inputs["x"]
        with torch.no_grad():
            routed = functional_call(router, token, args=(x,), kwargs={"num_tokens": case.k})
            best = (x @ token["routing_token"].mT).squeeze(-1).topk(case.k).indices
        return {"lost": 1 - torch.isin(best, routed.indices).double().mean().item()}

    return metrics


SUITE = Suite(
    name="sequence_length",
    description="the router and the attention layers to 1,048,576 tokens, routed whole or in blocks",
    cases=cases,
    directions=directions,
    implementations=implementations(
        replace(REFERENCE, metrics=lost(use_triton=False)),
        replace(OURS, metrics=lost(use_triton=True)),
        DENSE,
        DENSE_FLASH,
        COLT5_LAYER_PLAIN,
        COLT5_LAYER_TRITON,
    ),
    reference="reference",
    problem=problem,
    truth=truth,
    plain=plain,
    cost=cost,
    guest=GUEST,
    lines=("route_block_size",),
)


def test_sequence_length(record, benchmark):
    replay(record, benchmark)
