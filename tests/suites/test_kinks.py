"""Gradients of the exact soft top-k are judged, except where fp32 cannot decide the side of a kink."""

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch

import kernels
import reference
from colt5_bench.case import FORWARD_BACKWARD, Problem
from colt5_bench.measuring.accuracy import diverge
from suites import route, routing, soft_topk
from suites._kinks import ENDS, SATURATION
from suites._layers import SCORE_STD
from suites.route import RouteCase
from suites.routing import RoutingCase
from suites.soft_topk import SoftTopkCase, projected

CPU = torch.device("cpu")
CASE = SoftTopkCase(rows=64, n=509, k=31, eps=1.0, std=5.0)
RELAXATIONS = {"exact": (soft_topk.plain, SATURATION), "projected": (projected, ENDS)}
MOVED = 7
"""The entry that is moved to a kink."""


def scores_of(case):
    return soft_topk.problem(case, CPU).inputs["scores"]


def moved_to_kink(case, plain, kinks, offset=0.0, of_rows=slice(None), scores=None):
    """fp32 scores `rows n` with an entry of some rows at its first kink, plus an offset. It moves the kink, too."""
    scores = (scores_of(case) if scores is None else scores).clone()
    for _ in range(200):
        wide = scores[of_rows].double()
        y = plain(case)(wide)
        largest, index = y.masked_fill(y == 1, 0.0).max(dim=-1, keepdim=True)
        place = kinks.places(wide.gather(-1, index), largest, case.eps)[0] + offset
        scores[of_rows, MOVED] = place[:, 0].float()
    return scores


def gradient(kinks, y, between, upstream, eps):
    """The gradient of the scores if the entries of a mask are those between 0 and 1."""
    weights = kinks.weights(y).masked_fill(~between, 0.0)
    mean = (upstream * weights).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
    return (upstream - mean.nan_to_num()) * weights / eps


@pytest.mark.parametrize("name", RELAXATIONS)
@pytest.mark.parametrize("eps", [0.02, 1.0])
def test_gradients_by_the_entries_between_are_those_of_autograd(name, eps):
    case, (plain, kinks) = replace(CASE, eps=eps), RELAXATIONS[name]
    scores = scores_of(case).double().requires_grad_()
    upstream = torch.randn(scores.shape, dtype=torch.float64)
    y = plain(case)(scores)
    (expected,) = torch.autograd.grad(y, scores, upstream)
    found = gradient(kinks, y.detach(), (y > 0) & (y < 1), upstream, eps)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", RELAXATIONS)
def test_rows_are_undecided_where_fp32_cannot_decide(name):
    plain, kinks = RELAXATIONS[name]
    upstream = torch.randn(CASE.rows, CASE.n, dtype=torch.float64)

    def rows(scores):
        wide = scores.double()
        undecided = kinks.undecided(wide, plain(CASE)(wide), upstream, CASE.eps)
        return undecided.any(-1), undecided[:, MOVED]

    assert not any(each.any() for each in rows(scores_of(CASE)))
    assert all(each.all() for each in rows(moved_to_kink(CASE, plain, kinks)))
    for offset in (-3e-4, 3e-4):
        assert not any(each.any() for each in rows(moved_to_kink(CASE, plain, kinks, offset)))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kinks", [SATURATION, ENDS], ids=["exact", "projected"])
@pytest.mark.parametrize("others", [1, 5])
def test_a_change_is_a_bound_for_any_sides(kinks, others, seed):
    """Up to three equal scores at the kink, each on its own side, beside others between 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    tied = 1 + seed % 3
    below = -0.9 * torch.rand(others, generator=generator, dtype=torch.float64) - 0.01
    scores = torch.cat((torch.tensor([2.0]), torch.zeros(tied), below))[None]
    y = torch.cat((torch.ones(1 + tied), below.exp() if kinks is SATURATION else 1 + below))[None]
    upstream = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    change = kinks.change(scores, y, upstream, 1.0)
    possible = []
    for sides in product((False, True), repeat=tied):
        between = y < 1
        between[0, 1 : 1 + tied] = torch.tensor(sides)
        possible.append(gradient(kinks, y, between, upstream, 1.0))
    changes = torch.stack(possible).amax(0) - torch.stack(possible).amin(0)
    assert (changes <= change + 1e-9).all()
    # It is not much more than what is possible.
    assert change.sum() <= 10 * changes.sum()


def test_entries_that_have_the_same_gradient_on_both_sides_are_judged():
    """At low temperatures the k-th entry is 1 up to a rounding, and the sum of all others is another rounding."""
    scores = torch.tensor([[3.0, 2.0, 1.0, -5.0, -5.1]], dtype=torch.float64)
    y = torch.tensor([[1.0, 1.0, 1.0 - 1e-9, 6e-10, 4e-10]], dtype=torch.float64)
    upstream = torch.tensor([[1.0, -2.0, 3.0, 4.0, 5.0]], dtype=torch.float64)
    assert SATURATION.distances(scores, y, 0.1)[0, 2] < 1e-9
    assert not SATURATION.undecided(scores, y, upstream, 0.1).any()


def nudged(scores, toward, **options):
    """The definition on scores of which one is the next fp32 number, as after a rounding."""
    nudge = torch.nextafter(scores.detach(), torch.tensor(toward)) - scores.detach()
    return reference.soft_topk(scores + nudge * (torch.arange(scores.shape[-1]) == MOVED), **options)


IMPLEMENTATIONS = {
    "reference": reference.soft_topk,
    "kernels": kernels.soft_topk,
    "nudged up": partial(nudged, toward=torch.inf),
    "nudged down": partial(nudged, toward=-torch.inf),
}


def test_either_side_of_a_kink_is_right():
    """Every other row has an entry at the kink and the gradient of one side. Other rows are judged."""
    scores = moved_to_kink(CASE, soft_topk.plain, SATURATION, of_rows=slice(None, None, 2))
    problem = Problem({"scores": scores}, torch.randn(scores.shape))
    truth = soft_topk.truth(CASE, problem, FORWARD_BACKWARD)
    expected, at_kink = truth.gradients["scores"], truth.at_kink["scores"]
    assert at_kink[::2, MOVED].all()
    assert not at_kink[1::2].any()

    y, between = truth.output, (truth.output > 0) & (truth.output < 1)
    moved = torch.arange(CASE.n) == MOVED
    sides = [
        gradient(SATURATION, y, each, problem.upstream.double(), CASE.eps)[::2]
        for each in (between | moved, between & ~moved)
    ]
    taken = []
    for implementation in IMPLEMENTATIONS.values():
        leaf = scores.clone().requires_grad_()
        (found,) = torch.autograd.grad(implementation(leaf, k=CASE.k, eps=CASE.eps), leaf, problem.upstream)
        assert diverge(found, expected, at_kink).largest < 1e-4
        assert diverge(0.99 * found, expected, at_kink).largest > 1e-3
        off = torch.stack([(found[::2] - side).abs().amax(-1) for side in sides])
        assert (off.amin(0) < 1e-4).all()
        taken.append(off.argmin(0))
    assert (torch.stack(taken).amin(0) < torch.stack(taken).amax(0)).any()


ROUTE = RouteCase(509, 31, 2, 64, "exact", None, "float32")
ROUTING = RoutingCase(4, 509, 32, 31, 8.0, None, 1.0, "exact", "selected")
OF_SCORES = {
    route: SoftTopkCase(1, ROUTE.n, ROUTE.options["k"], ROUTE.options["eps"], SCORE_STD),
    routing: SoftTopkCase(1, ROUTING.n, ROUTING.k, ROUTING.eps, ROUTING.score_std),
}
"""The soft top-k of the scores of the first sequence."""


@pytest.mark.parametrize(("suite", "case"), [(route, ROUTE), (routing, ROUTING)], ids=["route", "routing"])
def test_gradients_of_an_undecided_route_are_not_judged(suite, case):
    """The scores of the first route of the first sequence are a feature of its tokens."""
    problem, of_scores = suite.problem(case, CPU), OF_SCORES[suite]
    x, tokens = problem.inputs.values()
    assert not any(each.any() for each in suite.truth(case, problem, FORWARD_BACKWARD).at_kink.values())

    tokens.view(-1, case.dim)[0] = of_scores.std * (torch.arange(case.dim) == 0)
    scores = of_scores.std * x[:1, :, 0]
    x[:1, :, 0] = moved_to_kink(of_scores, soft_topk.plain, SATURATION, scores=scores) / of_scores.std
    of_x, of_tokens = suite.truth(case, problem, FORWARD_BACKWARD).at_kink.values()
    assert of_x[0, MOVED, 0]
    assert not of_x[1:].any()
    assert of_x.double().mean() < 0.02
    assert of_tokens.view(-1, case.dim)[0].any()
    assert not of_tokens.view(-1, case.dim)[1:].any()
