"""The light branch's attention by length, window, dtype and kind of positions, compared with PyTorch's FlexAttention
with the same mask."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import kernels
import reference
from colt5_bench.case import FORWARD, Case, Cost, Problem, Truth
from colt5_bench.pytest_plugin.replay import replay
from colt5_bench.suite import Implementation, Suite
from kernels.windowed_attention import pairs_in_reach
from suites._descent import both_directions, implementations
from suites._layers import TRAINING_PRODUCTS, truth_of
from suites._ours import by_kernels, guest


@dataclass(frozen=True)
class WindowedAttentionCase(Case):
    """Windowed attention of `batch n` tokens; the radius of a layer's window of 128 is 64."""

    batch: int
    n: int
    heads: int
    dim_head: int
    window_size: int
    causal: bool
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class PositionsCase(WindowedAttentionCase):
    """The same with positions."""

    positions: str
    """rotary, or bias: one value for each distance up to 128."""


BIAS_REACH = 128


def cases(preset: str, device: torch.device) -> list[WindowedAttentionCase]:
    """The layers of colt5-attention's README: a radius of 64, and causal windows of 128, with 8 heads of 64. Those of
    the first dtype have positions as well."""
    batch, n, heads, dim_heads, dtypes = 2, 32768, 8, [64], ["bfloat16", "float32"]
    if preset == "smoke":
        batch, n, heads, dim_heads = 1, 299, 2, [16]
    elif device.type == "cpu":
        n, dtypes = 2048, ["float32"]
    lengths, windows = [n], [(64, False), (128, True)]
    if preset == "full":
        lengths, dim_heads = [n // 4, n, 4 * n], [32, 64, 128]
        windows += [(16, False), (256, False)]
    sizes = [
        (batch, n, heads, dim_head, *window, dtype)
        for dtype, window, dim_head, n in product(dtypes, windows, dim_heads, lengths)
    ]
    of_first = [each for each in sizes if each[-1] == dtypes[0]]
    return [
        *(WindowedAttentionCase(*each) for each in sizes),
        *(PositionsCase(*each, positions) for each in of_first for positions in ("rotary", "bias")),
    ]


def problem(case: WindowedAttentionCase, device: torch.device) -> Problem:
    """Normally distributed queries, keys, values and gradient of the output."""
    width, bias = case.heads * case.dim_head, (case.heads, 2 * BIAS_REACH + 1)
    qkv, upstream, position_bias = case.normal(
        device, (case.batch, case.n, 3 * width), (case.batch, case.n, width), bias
    )
    inputs = {"qkv": qkv.to(case.torch_dtype)}
    if positions_of(case) == "bias":
        inputs["position_bias"] = position_bias
    return Problem(inputs, upstream.to(case.torch_dtype), tuple(inputs))


def positions_of(case: WindowedAttentionCase) -> str | None:
    return case.positions if isinstance(case, PositionsCase) else None


def attending(function: Callable[..., Tensor]) -> Callable[[WindowedAttentionCase], Callable[..., Tensor]]:
    def build(case: WindowedAttentionCase) -> Callable[..., Tensor]:
        rotary = {"rotary_theta": 10000.0} if positions_of(case) == "rotary" else {}
        return partial(function, heads=case.heads, window_size=case.window_size, causal=case.causal, **rotary)

    return build


plain = attending(reference.windowed_attention)


def truth(case: WindowedAttentionCase, problem: Problem, direction: str) -> Truth:
    return truth_of(plain(case), problem, direction)


def flex(case: WindowedAttentionCase) -> Callable[..., Tensor]:
    """FlexAttention, compiled, which skips blocks of 128 x 128 that its mask leaves empty."""
    size = case.window_size

    def within(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if case.causal:
            return (key <= query) & (key // size >= query // size - 1)
        return (key - query).abs() <= size

    # A function is compiled for only a few sets of arguments, and runs uncompiled for more of them.
    torch.compiler.reset()
    blocks = create_block_mask(within, None, None, case.n, case.n, device="cuda")

    @torch.compile(fullgraph=True, dynamic=False)
    def function(qkv: Tensor) -> Tensor:
        query, key, value = qkv.unflatten(-1, (3, case.heads, case.dim_head)).permute(2, 0, 3, 1, 4).unbind()
        return flex_attention(query, key, value, block_mask=blocks).transpose(1, 2).flatten(-2)

    return function


def no_flex(case: WindowedAttentionCase, device: torch.device) -> str | None:
    if positions_of(case) is not None:
        return "is measured only without positions"
    return None if device.type == "cuda" else "has a backward pass only on a GPU"


def cost(case: WindowedAttentionCase, direction: str) -> Cost:
    """Queries, keys and values read and the output written; then those and grad_output read and gradients written.
    Positions cost nothing here: they could be computed. Pairs within reach have an exponential and two products, whose
    four factors have a gradient each."""
    width = case.heads * case.dim_head
    pairs = case.batch * pairs_in_reach(case.n, case.window_size, case.causal)
    tensor = case.torch_dtype.itemsize * case.batch * case.n * width
    exponentials, flops = pairs * case.heads, 2 * 2 * pairs * width
    if direction == FORWARD:
        return Cost(4 * tensor, exponentials, flops, case.dtype)
    return Cost((4 + 7) * tensor, 2 * exponentials, TRAINING_PRODUCTS * flops, case.dtype)


SUITE = Suite(
    name="windowed_attention",
    description="attention within a radius and in causal windows, beside FlexAttention",
    cases=cases,
    directions=both_directions,
    implementations=implementations(
        Implementation("reference", plain),
        by_kernels(attending(kernels.windowed_attention)),
        Implementation[WindowedAttentionCase]("flex", flex, no_flex),
    ),
    reference="reference",
    problem=problem,
    truth=truth,
    plain=plain,
    cost=cost,
    guest=guest(attending),
)


def test_windowed_attention(record, benchmark):
    replay(record, benchmark)
