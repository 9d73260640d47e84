"""Every layer of colt5-attention. Sizes are those of the examples in its README, and of the models of the CoLT5 paper.

Next to them are the dense layers that they replace, with the width of the heavy branch. These compute something else,
with separate weights, and each is judged by its own fp64 truth.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

import reference
from colt5_bench.case import FORWARD, Problem
from colt5_bench.pytest_plugin.replay import replay
from colt5_bench.suite import Suite
from suites._dense import DenseAttention, DenseBlock, DenseFeedForward, OverMap
from suites._descent import both_directions, implementations
from suites._layers import (
    GUEST,
    OURS,
    REFERENCE,
    Layer,
    LayerCase,
    RoutedTokens,
    cost,
    plain,
    problem,
    sparingly,
    truth,
    without_memory,
)
from suites._pieces import by_window, in_pieces
from suites.peers import COLT5_LAYER_PLAIN, COLT5_LAYER_TRITON, DENSE, DENSE_FLASH


class Encoder(NamedTuple):
    """The layers of an encoder: sizes, and numbers of routed tokens."""

    batch: int
    n: int
    dim: int
    light_ff: int
    heavy_ff: int
    light_heads: int
    heavy_heads: int
    window: int
    """Twice the radius of the light attention."""

    routed: int
    """Tokens routed through the heavy feed-forward layer, and as queries."""

    routed_kv: int


def of_paper(n: int, dim: int, light_ff: int, heavy_ff: int, light_heads: int, heavy_heads: int) -> Encoder:
    """2303.09752, section 3 and appendix: m = q = n / 16 and v = n / 8 tokens are routed, the radius is 127."""
    return Encoder(1, n, dim, light_ff, heavy_ff, light_heads, heavy_heads, 254, n // 16, n // 8)


def of_document(batch: int, n: int, dim: int) -> Encoder:
    """1024 of 32768 tokens are routed there."""
    return Encoder(batch, n, dim, dim // 2, 4 * dim, 8, 8, 128, n // 32, n // 32)


PAPER_SIZES = {
    "base": (768, 1024, 8096, 4, 8),
    "large": (1024, 1408, 11264, 4, 12),
    "xl": (2048, 2560, 20480, 8, 24),
}
"""dim, light and heavy feed-forward, light and heavy heads of 64."""

ENCODERS = {
    "tiny": of_document(1, 128, 64),
    "odd": of_document(2, 131, 60),
    "document-2k": of_document(2, 2048, 512),
    "document": of_document(2, 32768, 512),
    "document-16k": of_document(1, 16384, 512),
    "document-8x4k": of_document(8, 4096, 512),
    **{f"{size}-{n // 1024}k": of_paper(n, *sizes) for (size, sizes), n in product(PAPER_SIZES.items(), (4096, 16384))},
}


class Example(NamedTuple):
    """Sizes of the other examples in colt5-attention's README, and the factors by which they are smaller here."""

    context: int
    side: int
    """Side of the feature map."""

    vit_dim: int
    vit_depth: int


EXAMPLES = {
    "tiny": Example(512, 16, 32, 1),
    "document-2k": Example(65536, 64, 256, 6),
    "document": Example(1_048_576, 256, 1024, 6),
}

AUTOREGRESSIVE = {
    "tiny": (2, 256, 64),
    "odd": (2, 259, 60),
    "document-2k": (2, 1024, 512),
    "document": (2, 8192, 512),
    "document-32k": (2, 32768, 512),
    "document-128k": (1, 131_072, 512),
    "document-1m": (1, 1_048_576, 512),
}
"""The example in colt5-attention's README, smaller and longer ones: sequences, their length and dim."""

LONGEST_AT_ONCE = 8192
"""Most tokens of an autoregressive layer whose windows can all be routed at once in fp64."""

ONLY_FORWARD = {"document-1m"}
"""Models that are too long for training."""


def feed_forward(model: str) -> Layer:
    size = ENCODERS[model]
    shape = (size.batch, size.n, size.dim)
    return Layer(
        lambda package, use_triton: package.ConditionalRoutedFeedForward(
            size.dim,
            num_heavy_tokens=size.routed,
            light_ff_mult=size.light_ff / size.dim,
            heavy_ff_mult=size.heavy_ff / size.dim,
            use_triton=use_triton,
        ),
        inputs={"x": shape},
        output=shape,
        masks={"mask": shape[:2]},
        dense=lambda attend: DenseFeedForward(size.dim, size.heavy_ff),
    )


def attention(model: str) -> Layer:
    size = ENCODERS[model]
    shape = (size.batch, size.n, size.dim)
    return Layer(
        lambda package, use_triton: package.ConditionalRoutedAttention(
            size.dim,
            num_heavy_tokens_q=size.routed,
            num_heavy_tokens_kv=size.routed_kv,
            light_heads=size.light_heads,
            light_window_size=size.window,
            heavy_heads=size.heavy_heads,
            use_triton=use_triton,
        ),
        inputs={"x": shape},
        output=shape,
        masks={"mask": shape[:2]},
        dense=lambda attend: DenseAttention(attend, size.dim, size.heavy_heads),
        dense_pairs=size.batch * size.n**2,
    )


GAP = 0.02
"""Least distance of the scores of routed tokens from the others, if rounding affects them. It is some 80 times the
error of bf16 for a score of standard deviation 0.25."""


def _attended(block: nn.Module) -> Callable[..., Tensor]:
    """Input of the feed-forward layer of a block."""
    in_pieces(block)
    attention = cast(reference.ConditionalRoutedTransformerBlock, block).conditional_attn
    return lambda x, mask=None: attention(x, mask=mask, residual=x)


def _apart(layer: Layer, problem: Problem) -> Problem:
    """Move tokens near the edge of the selection of a feed-forward layer. They move along its routing token, until
    their scores are at GAP from the edge. Its scores depend on the result of attention, in bf16 under autocast. A token
    that is routed in one implementation but not in another differs by the whole heavy branch, which shows nothing about
    rounding."""
    wide = {name: each.double() if each.is_floating_point() else each for name, each in problem.inputs.items()}
    token, x = wide["conditional_ff.router.routing_token"], wide["x"]
    block = without_memory(lambda: layer.make(reference, False))
    routed = cast(reference.ConditionalRoutedTransformerBlock, block).conditional_ff.num_heavy_tokens
    with torch.no_grad():
        scores = (sparingly(layer, _attended, autocast=False)(**wide) @ token.mT).squeeze(-1)
    beyond = scores - scores.topk(routed + 1).values[..., -2:].mean(dim=-1, keepdim=True)
    shift = torch.where(beyond.abs() < GAP, GAP * beyond.sign(), 0.0)
    moved = x + shift.unsqueeze(-1) * token / token.square().sum()
    return replace(problem, inputs={**problem.inputs, "x": moved.to(problem.inputs["x"].dtype)})


def block(model: str) -> Layer:
    size = ENCODERS[model]
    shape = (size.batch, size.n, size.dim)
    return Layer(
        lambda package, use_triton: package.ConditionalRoutedTransformerBlock(
            size.dim,
            num_heavy_attn_tokens_q=size.routed,
            num_heavy_attn_tokens_kv=size.routed_kv,
            num_heavy_ff_tokens=size.routed,
            light_heads=size.light_heads,
            light_window_size=size.window,
            heavy_heads=size.heavy_heads,
            light_ff_mult=size.light_ff / size.dim,
            heavy_ff_mult=size.heavy_ff / size.dim,
            use_triton=use_triton,
        ),
        inputs={"x": shape},
        output=shape,
        masks={"mask": shape[:2]},
        dense=lambda attend: DenseBlock(
            DenseAttention(attend, size.dim, size.heavy_heads), DenseFeedForward(size.dim, size.heavy_ff)
        ),
        settle=_apart,
        dense_pairs=size.batch * size.n**2,
    )


def router(model: str) -> Layer:
    """1024 of a million tokens for each of two routes."""
    dim, context = ENCODERS[model].dim, EXAMPLES[model].context
    k = min(1024, context // 4)
    return Layer(
        lambda package, use_triton: RoutedTokens(
            package.CoordinateDescentRouter(dim, num_routing_tokens=2, straight_through=False, use_triton=use_triton), k
        ),
        inputs={"x": (1, context, dim)},
        output=(1, 2, k, dim),
    )


def cross_attention(model: str) -> Layer:
    """A sequence of 1024 tokens attends to 1024 tokens of a million, selected from eight blocks."""
    dim, context = ENCODERS[model].dim, EXAMPLES[model].context
    n = min(1024, context // 4)
    return Layer(
        lambda package, use_triton: package.ConditionalRoutedCrossAttention(
            dim,
            num_tokens_q=n // 2,
            num_tokens_kv=n,
            kv_routing_tokens=2,
            route_block_size=context // 8,
            use_triton=use_triton,
        ),
        inputs={"x": (1, n, dim), "context": (1, context, dim)},
        output=(1, n, dim),
        masks={"mask": (1, n), "context_mask": (1, context)},
        dense=lambda attend: DenseAttention(attend, dim, heads=8),
        dense_pairs=n * context,
        colt5_raises="its cross attention raises a NameError",
    )


def autoregressive(model: str) -> Layer:
    shape = batch, n, dim = AUTOREGRESSIVE[model]
    return Layer(
        lambda package, use_triton: package.ConditionalRoutedAutoregressiveAttention(
            dim,
            num_heavy_tokens_q=32,
            num_heavy_tokens_kv=min(1024, n // 8),
            num_routed_kv=2,
            use_triton=use_triton,
            use_flash_attn=True,
        ),
        inputs={"x": shape},
        output=shape,
        dense=lambda attend: DenseAttention(attend, dim, heads=8, causal=True),
        sparing=by_window if n > LONGEST_AT_ONCE else in_pieces,
        dense_pairs=batch * n**2,
        colt5_raises="with two sets of keys, it gives every sequence of a batch the tokens of the first one",
    )


def image(model: str) -> Layer:
    """1024 of 65536 positions are routed."""
    dim, side = 32, EXAMPLES[model].side
    shape = (1, dim, side, side)
    return Layer(
        lambda package, use_triton: package.ConditionalRoutedImageAttention(
            dim,
            num_heavy_tokens_q=side**2 // 64,
            num_heavy_tokens_kv=side**2 // 64,
            light_window_size=side // 8,
            channel_first=True,
            use_triton=use_triton,
        ),
        inputs={"x": shape},
        output=shape,
        dense=lambda attend: OverMap(DenseAttention(attend, dim, heads=8)),
        dense_pairs=side**4,
        colt5_raises="its image attention raises an error for this map",
    )


def vit(model: str) -> Layer:
    """Images of 8 by 8 patches of 32 pixels."""
    dim = EXAMPLES[model].vit_dim
    return Layer(
        lambda package, use_triton: package.ConditionalRoutedViT(
            image_size=256,
            patch_size=32,
            num_classes=1000,
            dim=dim,
            depth=EXAMPLES[model].vit_depth,
            attn_num_heavy_tokens_q=16,
            attn_num_heavy_tokens_kv=16,
            attn_heavy_dim_head=64,
            attn_heavy_heads=8,
            attn_light_dim_head=32,
            attn_light_heads=4,
            attn_light_window_size=4,
            ff_num_heavy_tokens=16,
            ff_heavy_mult=4,
            ff_light_mult=2,
            router_use_triton=use_triton,
        ),
        inputs={"img": (1, 3, 256, 256)},
        output=(1, 1000),
        colt5_raises="its ViT raises an error",
    )


LAYERS: dict[str, Callable[[str], Layer]] = {
    "router": router,
    "feed_forward": feed_forward,
    "attention": attention,
    "block": block,
    "cross_attention": cross_attention,
    "autoregressive": autoregressive,
    "image": image,
    "vit": vit,
}

OF_AN_ENCODER = ("feed_forward", "attention", "block")

WITHOUT_PRODUCTS = ("router", "cross_attention")
"""Layers that mostly route, in fp32 also under autocast."""


@dataclass(frozen=True)
class ModelLayerCase(LayerCase):
    """A layer of a model."""

    kind: str
    """Name of one of LAYERS."""

    model: str
    """Name of one of ENCODERS, or of AUTOREGRESSIVE."""

    dtype: str = "float32"

    @property
    def layer(self) -> Layer:
        return replace(LAYERS[self.kind](self.model), dtype=self.dtype)


def cases(preset: str, device: torch.device) -> list[ModelLayerCase]:
    if preset == "smoke":
        return [
            *(ModelLayerCase(kind, "tiny") for kind in LAYERS),
            *(ModelLayerCase(kind, "tiny", "autocast") for kind in ("feed_forward", "image")),
            *(ModelLayerCase(kind, "odd") for kind in (*OF_AN_ENCODER, "autoregressive")),
        ]
    on_gpu = device.type == "cuda"
    of_models = list(product(LAYERS, ["document" if on_gpu else "document-2k"]))
    dtypes, models = ["float32"], ["base-4k"] if preset == "full" else []
    if on_gpu:
        dtypes += ["autocast", "bfloat16"] if preset == "full" else ["autocast"]
        models = [model for model in ENCODERS if model.startswith(tuple(PAPER_SIZES))]
    of_models += product(OF_AN_ENCODER, models)
    made = [
        ModelLayerCase(kind, model, dtype)
        for dtype, (kind, model) in product(dtypes, of_models)
        if dtype != "autocast" or kind not in WITHOUT_PRODUCTS
    ]
    if on_gpu:
        longer = [model for model in AUTOREGRESSIVE if model not in (*EXAMPLES, "odd")]
        made += [ModelLayerCase("autoregressive", model, "autocast") for model in longer]
    return made


def directions(case: LayerCase) -> tuple[str, ...]:
    assert isinstance(case, ModelLayerCase)
    return (FORWARD,) if case.model in ONLY_FORWARD else both_directions(case)


SUITE = Suite(
    name="layers",
    description="every layer at the sizes of colt5-attention's README and CoLT5 Base, Large and XL, beside dense ones",
    cases=cases,
    directions=directions,
    implementations=implementations(REFERENCE, OURS, DENSE, DENSE_FLASH, COLT5_LAYER_PLAIN, COLT5_LAYER_TRITON),
    reference="reference",
    problem=problem,
    truth=truth,
    plain=plain,
    cost=cost,
    guest=GUEST,
    x_axis="kind",
)


def test_layers(record, benchmark):
    replay(record, benchmark)
