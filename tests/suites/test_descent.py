from dataclasses import replace
from functools import partial
from math import log

import pytest
import torch

import reference
from colt5_bench.case import FORWARD, FORWARD_BACKWARD
from colt5_bench.measuring.accuracy import Spread
from colt5_bench.measuring.conditions import Conditions
from colt5_bench.measuring.measure import measure
from colt5_bench.measuring.roofline import measure_ceilings
from colt5_bench.suite import Implementation
from suites import _descent, peers
from suites._descent import COLD, CONSTANT, DECAYING, DescentCase
from suites.coor_descent import SUITE, compiling_takes_too_long
from suites.segments import SegmentCase

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CASE = DescentCase.at(4, 64, 12, COLD, std=5.0)


def test_a_sixteenth_is_selected_and_at_least_one():
    assert DescentCase.at(4, 4096, 5, CONSTANT).k == 256
    assert DescentCase.at(4, 8, 5, CONSTANT).k == 1


def test_scores_have_the_spread_the_ties_and_the_dtype_of_the_case():
    case = DescentCase.at(8, 4096, 5, CONSTANT, std=5.0, dtype="bfloat16")
    problem = _descent.problem(case, CPU)
    assert problem.inputs["scores"].dtype == problem.upstream.dtype == torch.bfloat16
    assert problem.inputs["scores"].float().std().item() == pytest.approx(5.0, rel=0.05)

    tied = _descent.problem(replace(case, ties=True, dtype="float32"), CPU).inputs["scores"]
    assert torch.equal(4 * tied, (4 * tied).round())
    assert tied.unique().numel() < 400


@pytest.mark.parametrize("direction", [FORWARD, FORWARD_BACKWARD])
@pytest.mark.parametrize("chunk", [1, 3 * 6 * 8 * 64 * 12, 2**30])
def test_truth_is_the_definition_in_fp64_however_it_is_cut(monkeypatch, direction, chunk):
    problem = _descent.problem(CASE, CPU)
    scores = problem.inputs["scores"].double().requires_grad_()
    expected = reference.coor_descent(scores, **CASE.arguments)
    expected.backward(problem.upstream.double())

    monkeypatch.setattr(_descent, "CHUNK_BYTES", chunk)
    truth = _descent.truth(CASE, problem, direction)
    torch.testing.assert_close(truth.output, expected.detach(), rtol=1e-12, atol=1e-14)
    assert set(truth.gradients) == (set() if direction == FORWARD else {"scores"})
    for name, gradient in truth.gradients.items():
        torch.testing.assert_close(gradient, scores.grad, rtol=1e-12, atol=1e-13)
        assert truth.at_kink[name].shape == gradient.shape


def a_by_definition(case, scores):
    """a of each iteration, from the two vectors of the definition."""
    b, a = -scores, []
    for temperature in case.temperatures()[:-1]:
        log_sum = ((scores + b) / temperature).logsumexp(dim=-1, keepdim=True)
        a.append(temperature * (log(case.k) - log_sum))
        b = -torch.relu(scores + a[-1])
    return a


@pytest.mark.parametrize("iteration", [0, 1, 5, 11])
@pytest.mark.parametrize("temperature", [CONSTANT, DECAYING])
def test_an_entry_at_a_kink_is_marked(iteration, temperature):
    case = DescentCase.at(4, 64, 12, temperature)
    scores = _descent.problem(case, CPU).inputs["scores"].double()
    assert not _descent.entries_at_kink(case, scores).any()

    # a depends only weakly on the score: setting the score to -a repeatedly converges to the kink.
    for _ in range(60):
        scores[2, 7] = -a_by_definition(case, scores)[iteration][2, 0]
    whole_row = torch.zeros_like(scores, dtype=torch.bool)
    whole_row[2] = True
    assert torch.equal(_descent.entries_at_kink(case, scores), whole_row)

    # Near the kink fp64 can decide the side, but the score as an fp32 number cannot.
    exact, roundoff = scores[2, 7].item(), 2.0**-24 * scores[2, 7].abs().item()
    scores[2, 7] = exact + 0.3 * roundoff
    assert _descent.entries_at_kink(case, scores).nonzero().tolist() == [[2, 7]]

    # A change of a takes back up to two thirds of the distance.
    scores[2, 7] = exact + 4 * roundoff
    assert not _descent.entries_at_kink(case, scores).any()


def test_cost_is_the_least_that_has_to_be_done():
    constant, decaying = (DescentCase.at(8, 4096, 20, temperature) for temperature in (CONSTANT, DECAYING))
    entries = 8 * 4096
    assert _descent.cost(constant, FORWARD) == _descent.Cost(bytes=8 * entries, exponentials=entries)
    assert _descent.cost(constant, FORWARD_BACKWARD) == _descent.Cost(bytes=20 * entries, exponentials=2 * entries)
    # 4 x .7 ** 13 is the last temperature above .03; the first iteration needs no exponential.
    assert _descent.cost(decaying, FORWARD).exponentials == (13 + 1) * entries
    # After two iterations the output has a temperature of its own.
    assert _descent.cost(replace(decaying, n_iters=2), FORWARD).exponentials == 2 * entries
    assert _descent.cost(replace(constant, dtype="bfloat16"), FORWARD).bytes == 4 * entries


def test_ours_keeps_the_promise_whatever_plain_pytorch_does():
    expected = torch.tensor([0.5, -40.0], dtype=torch.float64)
    lax = Spread(expected).tolerance().at_least(1.0)
    assert _descent.promised(CASE, "output", expected, lax).of(expected).tolist() == [2e-6, 2e-6]
    assert _descent.promised(CASE, "scores", expected, lax).of(expected).tolist() == [1e-4, 1e-4]
    half = _descent.promised(replace(CASE, dtype="bfloat16"), "scores", expected, lax)
    assert half.of(expected).tolist() == pytest.approx([1e-4 + 40 / 256] * 2)


def test_others_may_fall_on_the_other_side_of_a_kink():
    expected = torch.tensor([0.5, -40.0], dtype=torch.float64)
    strict = Spread(expected).tolerance()
    assert _descent.lenient(CASE, "scores", expected, strict).of(expected).tolist() == pytest.approx([0.04, 0.04])
    assert _descent.lenient(CASE, "scores", expected, strict.at_least(0.5)).of(expected).tolist() == [0.5, 0.5]
    assert _descent.lenient(CASE, "output", expected, strict) is strict


@pytest.mark.parametrize("bound", [_descent.promised, _descent.lenient], ids=["promised", "lenient"])
@pytest.mark.parametrize("slip", [{"k": CASE.k * 1.05}, {"n_iters": CASE.n_iters - 1}, {"eps": CASE.eps * 1.02}])
def test_the_gate_sees_a_small_mistake(bound, slip):
    mistaken = partial(reference.coor_descent, **{**CASE.arguments, **slip})
    suite = replace(
        SUITE, implementations={"mistaken": Implementation("mistaken", lambda case: mistaken, bound=bound)}, timed=False
    )
    conditions = Conditions(CPU, "cpu", "abc", measure_ceilings(CPU))
    (record,) = measure(suite, CASE, FORWARD_BACKWARD, ["mistaken"], conditions)
    assert record.status == "wrong"


def test_the_milestones_are_measured_by_default_on_a_gpu():
    shapes = [(case.rows, case.n, case.n_iters, case.eps, case.eps_init) for case in SUITE.cases("default", CUDA)]
    assert shapes[:6] == [
        (8192, 512, 20, 0.03, 4.0),
        (1024, 4096, 50, 0.1, None),
        (64, 32768, 50, 0.1, None),
        (8, 131072, 50, 0.1, None),
        (1, 1048576, 20, 0.03, 4.0),
        (4, 4194304, 20, 0.03, 4.0),
    ]


def test_peers_say_why_they_cannot_run(monkeypatch):
    long = DescentCase.at(1, 262144, 5, CONSTANT)
    monkeypatch.setattr(peers, "find_spec", lambda name: "there")
    assert peers.COLT5_TRITON.unavailable(CASE, CPU) == "its Triton kernel runs on a GPU only"
    assert peers.COLT5_TRITON.unavailable(CASE, CUDA) is None
    assert peers.COLT5_TRITON.unavailable(long, CUDA) == "takes rows of at most 131072 scores"
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    for peer in (peers.COLT5_PLAIN, peers.COLT5_TRITON, peers.COLT5_TRITON_SEGMENTED):
        assert "colt5-attention is not installed" in peer.unavailable(CASE, CUDA)


def test_compiling_is_limited_to_few_iterations():
    assert compiling_takes_too_long(DescentCase.at(4, 64, 5, CONSTANT), CPU) is None
    assert "takes too long" in compiling_takes_too_long(DescentCase.at(4, 64, 10, CONSTANT), CPU)
    assert compiling_takes_too_long(DescentCase.at(4, 64, 20, CONSTANT), CUDA) is None
    assert "takes too long" in compiling_takes_too_long(DescentCase.at(4, 64, 50, CONSTANT), CUDA)


def test_a_case_of_the_segments_suite_says_how_many():
    case = SegmentCase.at(4, 64, 10, CONSTANT, segments=5)
    assert case.segments == 5
    assert case.id.endswith("segments=5")
    assert "segments" not in case.arguments
