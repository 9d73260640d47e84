"""Attention to routed keys and values and to a learned pair: the heavy branch of an attention layer."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import kernels
import reference
from colt5_bench.case import FORWARD, Case, Cost, Problem, Truth
from colt5_bench.pytest_plugin.replay import replay
from colt5_bench.suite import Implementation, Suite
from reference.routed_attention import attend_to_routed
from suites._descent import both_directions, implementations
from suites._layers import TRAINING_PRODUCTS, truth_of
from suites._ours import by_kernels, guest


@dataclass(frozen=True)
class RoutedAttentionCase(Case):
    """n routed queries of each of `batch` sequences attend to n routed keys."""

    batch: int
    n: int
    heads: int
    dim_head: int
    routes: int
    masked: bool
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def cases(preset: str, device: torch.device) -> list[RoutedAttentionCase]:
    """The attention layer in colt5-attention's README, and CoLT5 XL with 16k tokens."""
    if preset == "smoke":
        return [RoutedAttentionCase(2, 41, 4, 16, 2, masked, "float32") for masked in (False, True)]
    sizes, dtypes = [(2, 1024, 8, 64)], ["float32"]
    if device.type == "cuda":
        sizes, dtypes = [*sizes, (1, 1024, 24, 64)], ["bfloat16", "float32"]
    return [
        RoutedAttentionCase(*size, routes, masked, dtype)
        for dtype in dtypes
        for size in sizes
        for routes in ((1, 2) if preset == "full" else (1,))
        for masked in (False, True)
    ]


def problem(case: RoutedAttentionCase, device: torch.device) -> Problem:
    """Normally distributed, with weights from 0 to 1; a quarter of the keys is masked if there is a mask."""
    width, dtype = case.heads * case.dim_head, case.torch_dtype
    tokens, of_routes = (case.batch, case.n, width), (case.batch, case.routes, case.n)
    query, key_value, weights, null_kv, presence, upstream = case.normal(
        device,
        tokens,
        (*of_routes, 2 * width // case.routes),
        of_routes,
        (2, case.heads, case.dim_head),
        of_routes,
        tokens,
    )
    inputs = {
        "query": query.to(dtype),
        "key_value": key_value.to(dtype),
        "weights": torch.special.ndtr(weights),
        "null_kv": null_kv,
    }
    differentiable = tuple(inputs)
    if case.masked:
        inputs["mask"] = torch.special.ndtr(presence) > 0.25
    return Problem(inputs, upstream.to(dtype), differentiable)


def truth(case: RoutedAttentionCase, problem: Problem, direction: str) -> Truth:
    return truth_of(reference.routed_attention, problem, direction)


def attending(function: Callable[..., Tensor]) -> Callable[[RoutedAttentionCase], Callable[..., Tensor]]:
    return lambda case: function


plain = attending(reference.routed_attention)


def cost(case: RoutedAttentionCase, direction: str) -> Cost:
    """Queries, keys and values read and the output written. Then all of these and grad_output read, and gradients
    written. A key is multiplied with a query, and a value with its weight."""
    width, size = case.heads * case.dim_head, case.torch_dtype.itemsize
    queries, keys = case.batch * case.n * width * size, 2 * case.batch * case.n * width * size
    rest = case.batch * case.routes * case.n * (4 + case.masked) + 8 * width
    flops = 4 * case.batch * case.n * (case.n + 1) * width
    exponentials = case.batch * case.heads * case.n * (case.n + 1)
    forward = 2 * queries + keys + rest
    if direction == FORWARD:
        return Cost(forward, exponentials, flops, case.dtype)
    backward = 3 * queries + 2 * keys + 2 * rest
    # The softmax has to be computed again.
    return Cost(forward + backward, 2 * exponentials, TRAINING_PRODUCTS * flops + flops // 2, case.dtype)


SUITE = Suite(
    name="routed_attention",
    description="attention to routed keys and values and to a learned pair",
    cases=cases,
    directions=both_directions,
    implementations=implementations(
        Implementation("reference", plain),
        by_kernels(attending(kernels.routed_attention)),
        Implementation[RoutedAttentionCase]("sdpa", lambda case: partial(attend_to_routed, use_flash=True)),
    ),
    reference="reference",
    problem=problem,
    truth=truth,
    plain=plain,
    cost=cost,
    guest=guest(attending),
)


def test_routed_attention(record, benchmark):
    replay(record, benchmark)
