"""Routing for autoregressive attention: every window selects from all tokens before it, by length of the sequence."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from einops import repeat
from torch import Tensor

import kernels
import reference
from colt5_bench.case import FORWARD, Cost, Problem, Truth
from colt5_bench.pytest_plugin.replay import replay
from colt5_bench.suite import Implementation, Suite
from colt5_bench.tolerance import Tolerance
from suites import _descent
from suites._descent import DECAYING, DescentCase, both_directions, implementations, lenient
from suites._ours import by_kernels, guest

ROUTES, WINDOW, SELECTED = 2, 128, 1024
"""Sizes of the example in colt5-attention's README."""


@dataclass(frozen=True)
class PrefixCase(DescentCase):
    """Coordinate descent on the prefixes of all windows, each of which selects 8 / 9 k entries."""

    batch: int
    """`rows` is the number of sequences of scores."""

    window_size: int

    @property
    def num_selected(self) -> int:
        return self.k * 8 // 9

    def lengths(self) -> range:
        """Lengths of the prefixes."""
        return range(self.window_size, self.n, self.window_size)


def cases(preset: str, device: torch.device) -> list[PrefixCase]:
    def at(batch: int, n: int, window_size: int = WINDOW, selected: int = SELECTED) -> PrefixCase:
        case = PrefixCase.at(batch * ROUTES, n, 20, DECAYING, batch=batch, window_size=window_size)
        return replace(case, k=selected * 9 // 8)

    if preset == "smoke":
        return [at(1, 97, window_size=16, selected=24)]
    if device.type != "cuda":
        return [at(1, 2048), at(1, 4096)] if preset == "full" else [at(1, 2048)]
    return [at(2, 8192), at(2, 32768), *([at(1, 131072), at(1, 1048576)] if preset == "full" else [])]


def directions(case: PrefixCase) -> tuple[str, ...]:
    """Both directions, but only forward above 131072 tokens. For a million tokens, the truth of the gradient would take
    hours."""
    return (FORWARD,) if case.n > 131072 else both_directions(case)


def problem(case: PrefixCase, device: torch.device) -> Problem:
    routes = case.rows // case.batch
    selected = case.batch, len(case.lengths()), routes, case.num_selected
    scores, upstream = case.normal(device, (case.batch, routes, case.n), selected)
    return Problem({"scores": case.std * scores}, upstream)


def weights(function: Callable[..., reference.PrefixSelection]) -> Callable[[PrefixCase], Callable[..., Tensor]]:
    def build(case: PrefixCase) -> Callable[..., Tensor]:
        settings = {"window_size": case.window_size, "num_selected": case.num_selected, **case.arguments}
        return lambda scores: function(scores, **settings).weights

    return build


plain = weights(reference.route_prefixes)


def in_masked_rows(case: PrefixCase) -> Callable[..., Tensor]:
    """The method of the plain layer: scores copied for each window, with a mask."""

    def select(scores: Tensor) -> Tensor:
        lengths = torch.arange(case.window_size, case.n, case.window_size, device=scores.device)
        before = torch.arange(case.n, device=scores.device) < lengths[:, None, None]
        rows = repeat(scores, "b r n -> b w r n", w=len(lengths))
        relaxed = reference.coor_descent(rows, mask=before, **case.arguments)
        indices = rows.detach().masked_fill(~before, -torch.inf).topk(case.num_selected, dim=-1).indices
        return relaxed.gather(-1, indices)

    return select


def truth(case: PrefixCase, problem: Problem, direction: str) -> Truth:
    """The definition in fp64, a window at a time."""
    scores, outputs = problem.inputs["scores"].detach().double(), []
    gradient, at_kink = torch.zeros_like(scores), torch.zeros_like(scores, dtype=torch.bool)
    for window, length in enumerate(case.lengths()):
        prefix = scores[..., :length].clone().requires_grad_(direction != FORWARD)
        y = reference.coor_descent(prefix, **case.arguments)
        largest = prefix.detach().sort(dim=-1, descending=True, stable=True).indices[..., : case.num_selected]
        selected = torch.nn.functional.pad(y.gather(-1, largest), (0, case.num_selected - largest.shape[-1]))
        outputs.append(selected.detach())
        if direction != FORWARD:
            (of_prefix,) = torch.autograd.grad(selected, prefix, problem.upstream[:, window].double())
            gradient[..., :length] += of_prefix
            at_kink[..., :length] |= _descent.entries_at_kink(replace(case, n=length), prefix.detach())
    output = torch.stack(outputs, dim=1)
    return Truth(output) if direction == FORWARD else Truth(output, {"scores": gradient}, {"scores": at_kink})


def cost(case: PrefixCase, direction: str) -> Cost:
    """Scores read, and an index and a weight written for each selected entry. Then the gradient of the weights, indices
    and scores read, and the gradient of the scores written.

    An exponential for each entry and temperature after the first iteration, which prefixes can share; and the same
    again. Adding them up, for each prefix and iteration, takes longer than all this and is not counted here.
    """
    _, *later, _ = case.temperatures()
    entries = case.rows * case.n
    selected = case.rows * len(case.lengths()) * case.num_selected
    exponentials = entries * len(set(later))
    forward = 4 * entries + 12 * selected
    if direction == FORWARD:
        return Cost(bytes=forward, exponentials=exponentials)
    return Cost(bytes=forward + 12 * selected + 8 * entries, exponentials=2 * exponentials)


def promised(case: PrefixCase, tensor: str, expected: Tensor, tolerance: Tolerance) -> Tolerance:
    """The bound of our own kernels for weights; a gradient sums up those of all windows."""
    return tolerance.at_most(_descent.FORWARD_BOUND) if tensor == "output" else tolerance


SUITE = Suite(
    name="route_prefixes",
    description="routing from every prefix of a sequence",
    cases=cases,
    directions=directions,
    implementations=implementations(
        Implementation("reference", plain),
        Implementation("masked_rows", in_masked_rows),
        by_kernels(weights(kernels.route_prefixes), bound=promised),
    ),
    reference="reference",
    problem=problem,
    truth=truth,
    plain=plain,
    cost=cost,
    guest=guest(weights, bound=lenient),
)


def test_route_prefixes(record, benchmark):
    replay(record, benchmark)
