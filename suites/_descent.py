"""Parts that the suites of coordinate descent share: the case, its inputs, its fp64 truth, cost and accuracy."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import log
from typing import Any, Self

import torch
from torch import Tensor

import kernels
import reference
from colt5_bench.case import DIRECTIONS, FORWARD, Case, Cost, Problem, Truth
from colt5_bench.suite import C, Implementation
from colt5_bench.tolerance import Tolerance
from reference._shared.arguments import epsilon_schedule
from suites._ours import by_kernels


@dataclass(frozen=True)
class Temperature:
    """A schedule of temperatures: from `eps_init`, times `eps_decay` after each iteration, down to `eps`."""

    eps: float
    eps_init: float | None = None
    eps_decay: float = 1.0


CONSTANT = Temperature(0.1)
"""The default of colt5-attention's README."""

COLD = Temperature(0.03)

DECAYING = Temperature(0.03, eps_init=4.0, eps_decay=0.7)
"""With it, 20 iterations are said to have the effect of 50 without it: https://arxiv.org/abs/2304.04947, section
3.2."""

HEAVY_SHARE = 16
"""k = n / 16: the share of tokens that CoLT5 routes to its heavy branch (2303.09752, section 3)."""

FORWARD_BOUND, GRADIENT_BOUND = 2e-6, 1e-4
"""Bounds for the project's own kernels in fp32: the largest error of an output, and of a gradient."""

LENIENT_SHARE = 1e-3
"""Share of the largest gradient that counts as rounding in `lenient`."""

LONGEST_SEGMENTED = 131072
"""Most entries of a row for the published algorithm, which has a whole row in one program."""

UNIT_ROUNDOFF = torch.finfo(torch.float32).eps / 2
"""The largest relative rounding error of fp32."""

CHUNK_BYTES = 2**30
"""Approximate memory for the fp64 truth at a time."""


@dataclass(frozen=True)
class DescentCase(Case):
    """Coordinate descent over `rows n` normally distributed scores."""

    rows: int
    n: int
    n_iters: int
    k: int
    eps: float
    eps_init: float | None
    eps_decay: float
    std: float
    """Standard deviation of the scores."""

    ties: bool
    """True if scores are rounded to multiples of 0.25, so that many are equal."""

    dtype: str

    @classmethod
    def at(
        cls,
        rows: int,
        n: int,
        n_iters: int,
        temperature: Temperature,
        *,
        std: float = 1.0,
        ties: bool = False,
        dtype: str = "float32",
        **more: int,
    ) -> Self:
        """The case with k = n / 16; `more` are the fields of a subclass."""
        return cls(
            rows=rows,
            n=n,
            n_iters=n_iters,
            k=max(1, n // HEAVY_SHARE),
            eps=temperature.eps,
            eps_init=temperature.eps_init,
            eps_decay=temperature.eps_decay,
            std=std,
            ties=ties,
            dtype=dtype,
            **more,
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of every implementation of coordinate descent, besides the scores."""
        return {
            "n_iters": self.n_iters,
            "k": self.k,
            "eps": self.eps,
            "eps_init": self.eps_init,
            "eps_decay": self.eps_decay,
        }

    def temperatures(self) -> list[float]:
        """One temperature for each iteration, and one for the output."""
        return list(epsilon_schedule(self.n_iters, self.eps, self.eps_init, self.eps_decay))


def both_directions(case: Case) -> tuple[str, ...]:
    return DIRECTIONS


def problem(case: DescentCase, device: torch.device) -> Problem:
    """Scores and the gradient of the output, the same on every device."""
    dtype, shape = getattr(torch, case.dtype), (case.rows, case.n)
    drawn, upstream = case.normal(device, shape, shape)
    scores = case.std * drawn
    if case.ties:
        scores = (4 * scores).round() / 4
    return Problem({"scores": scores.to(dtype)}, upstream.to(dtype))


def descending(function: Callable[..., Tensor]) -> Callable[[DescentCase], Callable[..., Tensor]]:
    return lambda case: partial(function, **case.arguments)


plain = descending(reference.coor_descent)


def truth(case: DescentCase, problem: Problem, direction: str) -> Truth:
    """The definition in fp64 on the same scores, by autograd, a few rows at a time."""
    # Autograd keeps about six tensors of the size of the scores per iteration.
    kept = 6 * 8 * case.n * (1 if direction == FORWARD else case.n_iters)
    rows = max(1, CHUNK_BYTES // kept)
    outputs, gradients, at_kink = [], [], []
    for scores, upstream in zip(problem.inputs["scores"].split(rows), problem.upstream.split(rows), strict=True):
        s = scores.detach().double().requires_grad_(direction != FORWARD)
        y = plain(case)(s)
        outputs.append(y.detach())
        if direction != FORWARD:
            gradients += torch.autograd.grad(y, s, upstream.double())
            at_kink.append(entries_at_kink(case, s.detach()))
    if direction == FORWARD:
        return Truth(torch.cat(outputs))
    return Truth(torch.cat(outputs), {"scores": torch.cat(gradients)}, {"scores": torch.cat(at_kink)})


def entries_at_kink(case: DescentCase, scores: Tensor, k: float | None = None) -> Tensor:
    """bool: True for fp64 scores `... n` without a defined derivative, which are at the kink s = -a of some iteration.

    relu(s + a) has no derivative at the kink. There are two kinds of such entries.

    - Within fp64 rounding of the kink, fp64 itself cannot decide the side. The side decides whether the entry passes
      its gradient on to the a before, and every entry of the row depends on that a: so the whole row is marked. Equal
      scores can put many entries there at once.
    - Within the unit roundoff of fp32 of the kink, relative to the score, the input cannot decide the side: numbers on
      both sides of the kink have the same fp32 score. Of a million scores of std 5, about four are that close to one of
      100 kinks. The tolerance is that of the input, not of a kernel, whose a is exact to a fraction of it. Only the
      entry itself is marked: the effect of its side on the rest of the row has to stay within the bound.
    """
    log_k = log(case.k if k is None else k)
    *temperatures, _ = case.temperatures()
    magnitude = scores.abs()
    undecided = torch.zeros_like(scores, dtype=torch.bool)
    whole_rows = undecided[..., :1].clone()
    a = torch.full_like(scores[..., :1], temperatures[0] * (log_k - log(case.n)))
    for t, temperature in enumerate(temperatures):
        if t > 0:
            a = temperature * (log_k - (torch.minimum(scores, -a) / temperature).logsumexp(dim=-1, keepdim=True))
        distance = (scores + a).abs()
        undecided |= distance <= UNIT_ROUNDOFF * magnitude
        whole_rows |= (distance <= 1e-13 * magnitude.clamp(min=1)).any(dim=-1, keepdim=True)
    return undecided | whole_rows


def cost(case: DescentCase, direction: str) -> Cost:
    """Scores read and output written; then scores and grad_output read and gradient written.

    An entry costs one exponential for each temperature after the first iteration, which needs none. The output costs
    one only if no iteration has its temperature. The backward pass costs the same again.
    """
    _, *later = case.temperatures()
    entries, size = case.rows * case.n, getattr(torch, case.dtype).itemsize
    exponentials = entries * len(set(later))
    if direction == FORWARD:
        return Cost(bytes=2 * size * entries, exponentials=exponentials)
    return Cost(bytes=5 * size * entries, exponentials=2 * exponentials)


def promised(case: DescentCase, tensor: str, expected: Tensor, tolerance: Tolerance) -> Tolerance:
    """The bound of our own kernels, independent of plain PyTorch; in half precision, plus the rounding of the
    result."""
    bound = FORWARD_BOUND if tensor == "output" else GRADIENT_BOUND
    dtype = getattr(torch, case.dtype)
    rounding = 0.0 if dtype.itemsize > 2 else torch.finfo(dtype).eps / 2 * expected.abs().max().item()
    return tolerance.at_most(bound + rounding)


def lenient(case: Case, tensor: str, expected: Tensor, tolerance: Tolerance) -> Tolerance:
    """The bound of code with a coordinate descent in fp32.

    An entry near a kink is on either side of it by chance, so errors of gradients are erratic: up to a thousandth of
    the largest gradient counts as rounding.
    """
    return tolerance if tensor == "output" else tolerance.at_least(LENIENT_SHARE * expected.abs().max().item())


def segments_of(case: DescentCase) -> int:
    """Segments of five iterations, the best choice for the published algorithm."""
    return max(1, case.n_iters // 5)


def in_segments(case: DescentCase, device: torch.device) -> str | None:
    return None if case.n <= LONGEST_SEGMENTED else f"takes rows of at most {LONGEST_SEGMENTED} scores"


def compiled(case: DescentCase) -> Callable[..., Tensor]:
    # A function is compiled for only a few sets of arguments, and runs uncompiled for more of them.
    torch.compiler.reset()
    return torch.compile(lambda scores: reference.coor_descent(scores, **case.arguments), fullgraph=True, dynamic=False)


REFERENCE = Implementation("reference", plain)
OURS: Implementation[DescentCase] = by_kernels(descending(kernels.coor_descent), bound=promised)


def implementations(*listed: Implementation[C]) -> dict[str, Implementation[C]]:
    return {implementation.name: implementation for implementation in listed}
