"""The branches of a routed layer and its residual in one sum."""

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
from suites._descent import both_directions, implementations
from suites._layers import truth_of
from suites._ours import by_kernels, guest


@dataclass(frozen=True)
class CombineCase(Case):
    """Sequences of n tokens of d features; k tokens of each sequence are routed."""

    batch: int
    n: int
    k: int
    d: int
    null: bool
    residual: bool
    dtype: str
    """Dtype of all tensors. With `autocast`, results of the branches are bfloat16, the rest float32."""

    @property
    def wide(self) -> torch.dtype:
        """Dtype of the result."""
        return torch.float32 if self.dtype == "autocast" else getattr(torch, self.dtype)

    @property
    def of_branches(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "autocast" else self.wide


def cases(preset: str, device: torch.device) -> list[CombineCase]:
    """The sizes of the attention and feed-forward layers in colt5-attention's README. The former has a null token, the
    latter has none."""
    sizes, dtypes = (2, 32768, 1024, 512), ["autocast"]
    if preset == "smoke":
        sizes = (2, 97, 5, 23)
    elif device.type != "cuda":
        sizes = (2, 2048, 64, 512)
    if preset == "full":
        dtypes += ["float32", "bfloat16"]
    kinds = [(True, False), (False, False), (True, True)]
    return [CombineCase(*sizes, *kind, dtype) for dtype in dtypes for kind in kinds]


def problem(case: CombineCase, device: torch.device) -> Problem:
    """Normally distributed branches, and routed tokens spread evenly at random."""
    all_tokens = (case.batch, case.n, case.d)
    shapes = {"routed": (case.batch, case.k, case.d), "scores": (case.batch, case.k), "light": all_tokens}
    if case.null:
        shapes["null"] = (case.d,)
    if case.residual:
        shapes["residual"] = all_tokens
    *drawn, order, upstream = case.normal(device, *shapes.values(), (case.batch, case.n), all_tokens)
    dtypes = {"routed": case.of_branches, "light": case.of_branches}
    inputs = {name: tensor.to(dtypes.get(name, case.wide)) for name, tensor in zip(shapes, drawn, strict=True)} | {
        "indices": order.topk(case.k).indices
    }
    return Problem(inputs, upstream.to(case.wide), tuple(shapes))


def truth(case: CombineCase, problem: Problem, direction: str) -> Truth:
    return truth_of(partial(reference.combine, length=case.n), problem, direction)


def combining(function: Callable[..., Tensor]) -> Callable[[CombineCase], Callable[..., Tensor]]:
    return lambda case: partial(function, length=case.n, dtype=case.wide)


plain = combining(reference.combine)


def cost(case: CombineCase, direction: str) -> Cost:
    """All inputs read and the result written. Then grad_output read, which is also the gradient of the residual, and a
    gradient written for everything else."""
    result, branch = case.wide.itemsize, case.of_branches.itemsize
    entries, routed = case.batch * case.n * case.d, case.batch * case.k * (case.d * branch + result)
    light, null = entries * branch, case.null * case.d * result
    forward = light + routed + null + 8 * case.batch * case.k + entries * result * (1 + case.residual)
    return Cost(forward if direction == FORWARD else forward + entries * result + light + 2 * routed + null)


SUITE = Suite(
    name="combine",
    description="the branches of a routed layer and its residual in one sum",
    cases=cases,
    directions=both_directions,
    implementations=implementations(
        Implementation("reference", plain),
        by_kernels(combining(kernels.combine)),
    ),
    reference="reference",
    problem=problem,
    truth=truth,
    plain=plain,
    cost=cost,
    guest=guest(combining),
)


def test_combine(record, benchmark):
    replay(record, benchmark)
