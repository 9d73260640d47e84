"""The bias and activation between the two products of a feed-forward layer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
import reference
from colt5_bench.case import FORWARD, Case, Cost, Problem, Truth
from colt5_bench.pytest_plugin.replay import replay
from colt5_bench.suite import Implementation, Suite
from suites._descent import both_directions, implementations
from suites._layers import truth_of
from suites._ours import by_kernels, guest


@dataclass(frozen=True)
class BiasedGeluCase(Case):
    """Hidden tokens `rows d`."""

    rows: int
    d: int
    dtype: str
    """Dtype of tokens; the bias is float32."""


def cases(preset: str, device: torch.device) -> list[BiasedGeluCase]:
    """The hidden tokens of the feed-forward layer in colt5-attention's README: of all tokens, and of routed ones."""
    shapes, dtypes = [(65536, 256), (2048, 2048), (4095, 509)], ["bfloat16"]
    if preset == "smoke":
        shapes, dtypes = [(63, 47)], [*dtypes, "float32"]
    elif device.type != "cuda":
        shapes = [(4096, 256)]
    if preset == "full":
        dtypes += ["float32"]
    return [BiasedGeluCase(*shape, dtype) for dtype in dtypes for shape in shapes]


def problem(case: BiasedGeluCase, device: torch.device) -> Problem:
    """Normally distributed tokens and bias."""
    dtype, tokens = getattr(torch, case.dtype), (case.rows, case.d)
    x, bias, upstream = case.normal(device, tokens, (case.d,), tokens)
    inputs = {"x": x.to(dtype), "bias": bias}
    return Problem(inputs, (upstream / case.rows**0.5).to(dtype), tuple(inputs))


def truth(case: BiasedGeluCase, problem: Problem, direction: str) -> Truth:
    return truth_of(reference.biased_gelu, problem, direction)


def activating(function: Callable[..., Tensor]) -> Callable[[BiasedGeluCase], Callable[..., Tensor]]:
    return lambda case: function


plain = activating(reference.biased_gelu)


def cost(case: BiasedGeluCase, direction: str) -> Cost:
    """Tokens read and the result written; then tokens and grad_output read and the gradient written."""
    entries, bias = case.rows * case.d * getattr(torch, case.dtype).itemsize, 4 * case.d
    return Cost(2 * entries + bias if direction == FORWARD else 5 * entries + 3 * bias)


SUITE = Suite(
    name="biased_gelu",
    description="the bias and activation between the products of a feed-forward layer",
    cases=cases,
    directions=both_directions,
    implementations=implementations(
        Implementation("reference", plain),
        by_kernels(activating(kernels.biased_gelu)),
    ),
    reference="reference",
    problem=problem,
    truth=truth,
    plain=plain,
    cost=cost,
    guest=guest(activating),
    x_axis="d",
)


def test_biased_gelu(record, benchmark):
    replay(record, benchmark)
