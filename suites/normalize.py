"""RMSNorm and LayerNorm as inputs of a linear layer, compared with PyTorch's and Liger's own with a conversion."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
import reference
from colt5_bench.case import FORWARD, Case, Cost, Problem, Truth
from colt5_bench.pytest_plugin.replay import replay
from colt5_bench.suite import Implementation, Suite
from suites._descent import both_directions, implementations
from suites._layers import truth_of
from suites._ours import by_kernels, guest
from suites.peers import LIGER


@dataclass(frozen=True)
class NormalizeCase(Case):
    """Tokens `rows d`."""

    rows: int
    d: int
    center: bool
    dtype: str
    """Dtype of tokens, weight and bias."""

    result: str
    """The dtype of the result."""

    @property
    def eps(self) -> float:
        return 1e-5 if self.center else 1e-12

    @property
    def options(self) -> dict[str, Any]:
        return {"center": self.center, "eps": self.eps, "dtype": getattr(torch, self.result)}


def cases(preset: str, device: torch.device) -> list[NormalizeCase]:
    """The tokens of the feed-forward and image layers in colt5-attention's README, and those of CoLT5 XL."""
    shapes, dtypes = [(65536, 512)], [("float32", "bfloat16")]
    if preset == "smoke":
        shapes, dtypes = [(63, 47)], [*dtypes, ("float32", "float32")]
    else:
        shapes = [*shapes, (4095, 509)] if device.type == "cuda" else [(4096, 512)]
    if preset == "full":
        shapes += [(65536, 32), (16384, 2048)] if device.type == "cuda" else []
        dtypes += [("float32", "float32"), ("bfloat16", "bfloat16")]
    return [NormalizeCase(*shape, center, *dtype) for dtype in dtypes for shape in shapes for center in (False, True)]


def problem(case: NormalizeCase, device: torch.device) -> Problem:
    """Normally distributed tokens; the gradient of the result has its dtype."""
    shapes: dict[str, tuple[int, ...]] = {"x": (case.rows, case.d), "weight": (case.d,)}
    if case.center:
        shapes["bias"] = (case.d,)
    *drawn, upstream = case.normal(device, *shapes.values(), (case.rows, case.d))
    inputs = {name: tensor.to(getattr(torch, case.dtype)) for name, tensor in zip(shapes, drawn, strict=True)}
    return Problem(inputs, (upstream / case.rows**0.5).to(getattr(torch, case.result)), tuple(inputs))


def truth(case: NormalizeCase, problem: Problem, direction: str) -> Truth:
    return truth_of(partial(reference.normalize, center=case.center, eps=case.eps), problem, direction)


def normalizing(function: Callable[..., Tensor]) -> Callable[[NormalizeCase], Callable[..., Tensor]]:
    return lambda case: partial(function, **case.options)


plain = normalizing(reference.normalize)


def in_torch(case: NormalizeCase) -> Callable[..., Tensor]:
    """PyTorch's kernel adds its epsilon to the mean square; the epsilon here is too small to matter."""

    def function(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if case.center:
            out = F.layer_norm(x, x.shape[-1:], weight, bias, case.eps)
        else:
            out = F.rms_norm(x, x.shape[-1:], weight, case.eps**2 / case.d)
        return out.to(getattr(torch, case.result))

    return function


def by_liger(case: NormalizeCase) -> Callable[..., Tensor]:
    """Liger's kernels add the epsilon as PyTorch's do. They compute in fp32, like all others here."""
    functional = import_module("liger_kernel.transformers.functional")

    def function(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if case.center:
            out = functional.liger_layer_norm(x, weight, bias, case.eps)
        else:
            out = functional.liger_rms_norm(x, weight, case.eps**2 / case.d, casting_mode="gemma", in_place=False)
        return out.to(getattr(torch, case.result))

    return function


def cost(case: NormalizeCase, direction: str) -> Cost:
    """Tokens read and the result written; then tokens and grad_output read and the gradient written."""
    size, result = (getattr(torch, dtype).itemsize for dtype in (case.dtype, case.result))
    entries, parameters = case.rows * case.d, size * case.d * (1 + case.center)
    forward = entries * (size + result) + parameters
    return Cost(forward if direction == FORWARD else 2 * (forward + parameters) + entries * size)


SUITE = Suite(
    name="normalize",
    description="RMSNorm and LayerNorm in front of a linear layer",
    cases=cases,
    directions=both_directions,
    implementations=implementations(
        Implementation("reference", plain),
        by_kernels(normalizing(kernels.normalize)),
        Implementation("torch", in_torch),
        Implementation("liger", by_liger, LIGER),
    ),
    reference="reference",
    problem=problem,
    truth=truth,
    plain=plain,
    cost=cost,
    guest=guest(normalizing),
    x_axis="d",
)


def test_normalize(record, benchmark):
    replay(record, benchmark)
