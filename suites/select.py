"""The hard top-k by the length of rows and the kind of scores, compared with torch.topk.

The values at the indices are compared, which ours has to gather first: of equal scores torch.topk may return any. They
are copies, so no error is allowed. NaN counts as larger than any number, as in torch.topk; zeros of either sign are
equal, and so are all NaN.

Metric: `not_largest`, the number of selected values that are not among the k largest of their row. It counts errors
that no distance shows: a right value that comes twice, or a neighbour of the right value.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module

import torch
from torch import Tensor

import kernels
import reference
from colt5_bench.case import FORWARD, Case, Cost, Problem, Truth
from colt5_bench.pytest_plugin.replay import replay
from colt5_bench.suite import Implementation, Suite
from colt5_bench.tolerance import Tolerance
from suites._descent import implementations
from suites._ours import by_kernels
from suites.peers import FLASHINFER, QUACK


@dataclass(frozen=True)
class SelectCase(Case):
    """The k largest of each of `rows n` normally distributed fp32 scores."""

    rows: int
    n: int
    k: int

    def scores(self, generator: torch.Generator) -> Tensor:
        """fp32 `rows n`."""
        return torch.randn(self.rows, self.n, generator=generator)


@dataclass(frozen=True)
class HostileCase(SelectCase):
    """The k largest of scores that are difficult for a search by bits, by counting or by comparing."""

    distribution: str
    """A name in `DISTRIBUTIONS`."""

    def scores(self, generator: torch.Generator) -> Tensor:
        return DISTRIBUTIONS[self.distribution](super().scores(generator), generator)


def _bits(scores: Tensor, generator: torch.Generator, first: int, last: int) -> Tensor:
    """Floats whose bits are integers from `first` to `last`, with a random sign."""
    magnitudes = torch.randint(first, last + 1, scores.shape, generator=generator, dtype=torch.int32)
    return magnitudes.view(torch.float32).copysign(scores)


def _some(scores: Tensor, generator: torch.Generator, value: float) -> Tensor:
    """Scores, some of which are replaced by the value with their sign; in the last row, all are."""
    share = torch.arange(1, len(scores) + 1)[:, None] / len(scores)
    replaced = torch.rand(scores.shape, generator=generator) < share**2
    return torch.where(replaced, torch.tensor(value).copysign(scores), scores)


ONE, INFINITY = 0x3F800000, 0x7F800000
"""Bits of fp32 numbers."""

DISTRIBUTIONS: Mapping[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "narrow": lambda scores, generator: 1 + 1e-4 * scores,
    "ties": lambda scores, generator: (2 * scores).round() / 2,
    "constant": lambda scores, generator: scores[:, :1].expand_as(scores).contiguous(),
    "ascending": lambda scores, generator: scores.sort().values,
    "descending": lambda scores, generator: scores.sort(descending=True).values,
    "signed_zeros": lambda scores, generator: torch.zeros_like(scores).copysign(scores),
    "low_bits": lambda scores, generator: _bits(scores, generator, ONE, ONE + 2**8 - 1),
    "denormal": lambda scores, generator: _bits(scores, generator, 0, 2**23 - 1),
    "infinite": lambda scores, generator: _some(scores, generator, torch.inf),
    "nan": lambda scores, generator: _some(scores, generator, torch.nan),
    "any_bits": lambda scores, generator: _bits(scores, generator, 0, 2**31 - 1),
}
"""From normally distributed scores and a source of random numbers to scores of the same shape."""


def cases(preset: str, device: torch.device) -> list[SelectCase]:
    if preset == "smoke":
        return [SelectCase(4, 512, 64), *hostile(3, 509, 61)]
    shapes = [(1024, 512, 10), (64, 32768, 1024), (2, 2**20, 1024), (1023, 4095, 100)]
    hostile_shapes = [(64, 32768, 1024)]
    if preset == "full":
        hostile_shapes = shapes.copy()
        shapes += [(1, 2**20, 1024), (1, 2**20, 16384), (8, 131072, 4096), (4, 2**22, 1024)]
    regular = [SelectCase(*shape) for shape in shapes]
    return [*regular, *(case for shape in hostile_shapes for case in hostile(*shape))]


def hostile(rows: int, n: int, k: int) -> list[SelectCase]:
    return [HostileCase(rows, n, k, name) for name in DISTRIBUTIONS]


Select = Callable[[SelectCase], Callable[..., Tensor]]
"""From a case to a function from scores `rows n` to values `rows k`, the largest first."""


def values(select: Callable[..., Tensor]) -> Select:
    return lambda case: lambda scores: scores.gather(-1, select(scores, num_selected=case.k))


def problem(case: SelectCase, device: torch.device) -> Problem:
    scores = case.scores(case.generator()).to(device)
    return Problem({"scores": scores}, scores.new_zeros(case.rows, case.k), ())


def truth(case: SelectCase, problem: Problem, direction: str) -> Truth:
    return Truth(values(reference.select)(case)(problem.inputs["scores"].double()))


def cost(case: SelectCase, direction: str) -> Cost:
    """Scores read, and an index and a value written for each selected entry."""
    return Cost(bytes=4 * case.rows * case.n + 12 * case.rows * case.k)


def count_not_largest(selected: Tensor, scores: Tensor) -> int:
    """Number of selected values `rows k` that are not among the k largest of fp32 scores `rows n`.

    A value may be selected as often as it is among the k largest.
    """
    rows, k = selected.shape
    largest = scores.gather(-1, reference.select(scores, num_selected=k))
    both = torch.cat([largest, selected], dim=1)
    # Equal integers for all NaN, and for zeros of either sign.
    keys = torch.where(both.isnan(), torch.nan, both + 0.0).view(torch.int32)
    each_row = torch.arange(rows, device=keys.device)[:, None] << 32
    _, places = (each_row + keys).unique(return_inverse=True)
    wanted, got = (part.flatten().bincount(minlength=2 * rows * k) for part in places.split(k, dim=1))
    return int((got - wanted).clamp(min=0).sum())


def exact(case: SelectCase, tensor: str, expected: Tensor, tolerance: Tolerance) -> Tolerance:
    """Copies of scores have no error."""
    return tolerance.at_most(0.0)


def held(implementation: Implementation[SelectCase]) -> Implementation[SelectCase]:
    """The implementation with exact values required, and its wrong ones counted."""

    def metrics(case: SelectCase, problem: Problem) -> Mapping[str, float]:
        scores = problem.inputs["scores"]
        return {"not_largest": count_not_largest(implementation.build(case)(scores), scores)}

    return replace(implementation, bound=exact, metrics=metrics)


def by_quack(case: SelectCase) -> Callable[..., Tensor]:
    topk = import_module("quack.topk").topk
    return lambda scores: topk(scores, case.k)[0]


def by_flashinfer(case: SelectCase) -> Callable[..., Tensor]:
    topk = import_module("flashinfer").top_k
    return lambda scores: topk(scores, case.k, sorted=True)[0]


def quack_missing(case: SelectCase, device: torch.device) -> str | None:
    powers = all(size.bit_count() == 1 for size in (case.n, case.k))
    if not powers or case.n > 4096 or case.k > 128:
        return "takes rows of at most 4096 scores and selects at most 128, both powers of two"
    return QUACK(case, device)


SUITE = Suite(
    name="select",
    description="the hard top-k by the length of the rows and the kind of the scores",
    cases=cases,
    directions=lambda case: (FORWARD,),
    implementations=implementations(
        held(Implementation("reference", values(reference.select))),
        held(by_kernels(values(kernels.select))),
        held(Implementation("torch_topk", lambda case: lambda scores: scores.topk(case.k, dim=-1).values)),
        held(Implementation("flashinfer_topk", by_flashinfer, FLASHINFER)),
        held(Implementation("quack_topk", by_quack, quack_missing)),
    ),
    reference="reference",
    problem=problem,
    truth=truth,
    plain=values(reference.select),
    cost=cost,
    guest=lambda function: held(by_kernels(values(function), name="guest")),
)


def test_select(record, benchmark):
    replay(record, benchmark)
