from dataclasses import replace
from importlib.util import find_spec
from math import inf

import pytest
import torch

from colt5_bench.case import FORWARD_BACKWARD
from colt5_bench.measuring.accuracy import Spread
from colt5_bench.measuring.conditions import Conditions
from colt5_bench.measuring.measure import measure
from colt5_bench.measuring.roofline import measure_ceilings
from suites import routing
from suites.routing import SUITE, RoutingCase
from suites.sequence_length import SUITE as SEQUENCE_LENGTH
from suites.sequence_length import LengthCase

CPU = torch.device("cpu")
CASE = RoutingCase(4, 1024, 64, 32, 22.6, 20, 0.03, "coor_descent", "fetched")
"""A router initialised for dimension 512, with the settings of colt5-attention's README."""

needs_colt5 = pytest.mark.skipif(not find_spec("colt5_attention"), reason="colt5-attention is not installed")


def metrics(case, implementation="reference"):
    return SUITE.implementations[implementation].metrics(case, SUITE.problem(case, CPU))


def test_scores_are_as_wide_as_the_case_says():
    inputs = SUITE.problem(CASE, CPU).inputs
    scores = inputs["x"] @ inputs["router.routing_token"].mT
    assert scores.std().item() == pytest.approx(22.6, rel=0.05)


def test_metrics_are_those_of_the_definition():
    case = replace(CASE, score_std=0.5)
    problem = SUITE.problem(case, CPU)
    router = routing.our_router(case, False)
    scores = (problem.inputs["router.routing_token"] @ problem.inputs["x"].mT).squeeze(1)
    y = router.relax(scores, case.k)
    truth = SUITE.truth(case, problem, FORWARD_BACKWARD)

    measured = metrics(case)
    assert measured["sum_error"] == pytest.approx((y.sum(-1) - 72).abs().mean().item(), rel=1e-4)
    assert measured["saturated"] == (y == 1).sum(-1).float().mean().item()
    assert measured["gradient"] == pytest.approx(truth.gradients["router.routing_token"].norm().item(), rel=1e-4)
    assert measured["agreement"] == 1
    assert 0 < measured["carrying"] <= 1


def test_the_published_settings_do_not_train_a_router_as_it_is_initialised():
    measured = metrics(CASE)
    assert measured["gradient"] == measured["carrying"] == 0
    assert measured["saturated"] > CASE.k


def test_exact_and_normalised_to_what_is_selected_does():
    measured = metrics(replace(CASE, solver="exact", n_iters=None, normalize_to="selected"))
    assert measured["gradient"] > 1
    assert measured["sum_error"] < 1e-4


@needs_colt5
def test_ranking_what_is_saturated_selects_others():
    assert metrics(CASE, "colt5_plain")["agreement"] < 0.9
    assert metrics(CASE, "ours")["agreement"] == 1
    narrow = replace(CASE, score_std=0.5)
    theirs, ours = metrics(narrow, "colt5_plain"), metrics(narrow)
    assert theirs == pytest.approx(ours, rel=1e-3)


@needs_colt5
def test_colt5_is_measured_whatever_it_selects():
    implementation = SUITE.implementations["colt5_plain"]
    expected = torch.zeros(1, dtype=torch.float64)
    assert implementation.bound(CASE, "output", expected, Spread(expected).tolerance()).of(expected).item() == inf
    assert implementation.unavailable(CASE, CPU) is None
    assert "exact solver" in implementation.unavailable(replace(CASE, solver="exact", n_iters=None), CPU)
    assert "normalisation" in implementation.unavailable(replace(CASE, normalize_to="selected"), CPU)


def test_the_gate_sees_another_temperature():
    ours = SUITE.implementations["ours"]
    mistaken = replace(ours, build=lambda case: ours.build(replace(case, eps=0.031)))
    suite = replace(SUITE, implementations={"mistaken": mistaken})
    conditions = Conditions(CPU, "cpu", "abc", measure_ceilings(CPU))
    (record,) = measure(suite, replace(CASE, score_std=2.0), FORWARD_BACKWARD, ["mistaken"], conditions)
    assert record.status == "wrong"


@pytest.mark.parametrize("implementation", ["reference", "ours"])
def test_routing_in_blocks_loses_what_one_block_has_more_of_than_its_share(implementation):
    case = LengthCase("router", 1024, 64, 256, 32)
    problem = SEQUENCE_LENGTH.problem(case, CPU)
    scores = problem.inputs["x"] @ problem.inputs["router.routing_token"].mT
    best = scores.flatten().topk(64).indices
    beyond = sum(max(0, ((best // 256) == block).sum().item() - 16) for block in range(4))
    assert beyond > 0

    lost = SEQUENCE_LENGTH.implementations[implementation].metrics
    assert lost(case, problem) == {"lost": pytest.approx(beyond / 64)}
    assert lost(replace(case, route_block_size=None), problem) == {"lost": 0}
    assert lost(replace(case, kind="self_attention"), problem) == {}


def test_a_million_tokens_are_routed_whole_and_in_blocks_on_a_gpu():
    cases = SEQUENCE_LENGTH.cases("default", torch.device("cuda"))
    for kind in ("router", "cross_attention", "self_attention"):
        own = {(case.n, case.route_block_size) for case in cases if case.kind == kind}
        assert {(1024, None), (2**20, None), (2**20, 131072)} <= own
