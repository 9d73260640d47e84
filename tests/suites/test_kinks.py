"""Gradients of the soft top-k are judged, except where fp32 cannot decide the side of a kink."""

from dataclasses import replace
from functools import partial

import pytest
import torch

import kernels
import reference
from colt5_bench.case import FORWARD_BACKWARD, Problem
from colt5_bench.measuring.accuracy import diverge
from suites import soft_topk
from suites._kinks import ENDS, SATURATION, undecided_routes
from suites.soft_topk import SoftTopkCase, projected

CPU = torch.device("cpu")
CASE = SoftTopkCase(rows=64, n=509, k=31, eps=1.0, std=5.0)
RELAXATIONS = {"exact": (soft_topk.plain, SATURATION), "projected": (projected, ENDS)}
MOVED = 7
"""The entry of each row that is moved to a kink."""


def scores_of(case):
    return soft_topk.problem(case, CPU).inputs["scores"]


def moved_to_kink(case, plain, kinks, offset):
    """fp32 scores `rows n` with an entry of each row at its first kink, plus an offset. It moves the kink, too."""
    scores = scores_of(case)
    for _ in range(200):
        wide = scores.double()
        y = plain(case)(wide)
        largest, index = y.masked_fill(y == 1, 0.0).max(dim=-1, keepdim=True)
        place = kinks.places(wide.gather(-1, index), largest, case.eps)[0] + offset
        scores = scores.scatter(-1, torch.full_like(index, MOVED), place.float())
    return scores


@pytest.mark.parametrize("name", RELAXATIONS)
@pytest.mark.parametrize("eps", [0.02, 1.0])
def test_gradients_next_to_kinks_are_those_of_autograd(name, eps):
    case, (plain, kinks) = replace(CASE, eps=eps), RELAXATIONS[name]
    scores = scores_of(case).double().requires_grad_()
    upstream = torch.randn(scores.shape, dtype=torch.float64)
    y = plain(case)(scores)
    (expected,) = torch.autograd.grad(y, scores, upstream)
    found = kinks.gradient(y.detach(), (y > 0) & (y < 1), upstream, eps)
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
    assert all(each.all() for each in rows(moved_to_kink(CASE, plain, kinks, 0.0)))
    for offset in (-3e-4, 3e-4):
        assert not any(each.any() for each in rows(moved_to_kink(CASE, plain, kinks, offset)))


def test_routes_are_undecided_where_their_scores_are():
    """Tokens whose first feature is the score."""
    routing_tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])

    def undecided(scores):
        x = torch.stack([scores, 0 * scores + torch.arange(CASE.n) / CASE.n], dim=-1)
        return undecided_routes(x, routing_tokens, CASE.k, CASE.eps)

    assert not undecided(scores_of(CASE)).any()
    moved = undecided(moved_to_kink(CASE, soft_topk.plain, SATURATION, 0.0))
    assert moved[:, 0].all()
    assert not moved[:, 1].any()


def test_entries_that_have_the_same_gradient_on_both_sides_are_judged():
    """At low temperatures the k-th entry is 1 up to a rounding, and the sum of all others is another rounding."""
    scores = torch.tensor([[3.0, 2.0, 1.0, -5.0, -5.1]], dtype=torch.float64)
    y = torch.tensor([[1.0, 1.0, 1.0 - 1e-9, 6e-10, 4e-10]], dtype=torch.float64)
    upstream = torch.tensor([[1.0, -2.0, 3.0, 4.0, 5.0]], dtype=torch.float64)
    assert SATURATION.distances(scores, y, 0.1)[0, 2] < 1e-9
    between = (y > 0) & (y < 1)
    assert SATURATION.gradient(y, between, upstream, 0.1).abs().max() < 1e-7
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
    scores = moved_to_kink(CASE, soft_topk.plain, SATURATION, 0.0)
    problem = Problem({"scores": scores}, torch.randn(scores.shape))
    truth = soft_topk.truth(CASE, problem, FORWARD_BACKWARD)
    expected, at_kink = truth.gradients["scores"], truth.at_kink["scores"]
    decided_otherwise = 0
    for implementation in IMPLEMENTATIONS.values():
        leaf = scores.clone().requires_grad_()
        y = implementation(leaf, k=CASE.k, eps=CASE.eps)
        (gradient,) = torch.autograd.grad(y, leaf, problem.upstream)
        assert diverge(gradient, expected, at_kink).largest < 1e-4
        decided_otherwise += diverge(gradient, expected).fraction_above > 0
    assert decided_otherwise >= 2
