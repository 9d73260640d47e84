import math
from functools import partial

import pytest
import torch
import triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

import reference
from kernels.route_prefixes import backward as prefix_backward
from kernels.route_prefixes import forward as prefix_forward
from kernels.route_prefixes import route_prefixes
from reference._shared.ranks import Ranks
from tests.correct import check_correct
from tests.kernels.devices import DEVICES, capture

INTERPRETED = triton.knobs.runtime.interpret

ONCE = pytest.mark.skipif(INTERPRETED, reason="the operator is the same, and called too often for the interpreter")

CONSTANT = {"n_iters": 3, "eps": 0.1}
DECAYING = {"n_iters": 5, "eps": 0.1, "eps_init": 0.5, "eps_decay": 0.5}

# In branches that are not taken, tensors have values that the interpreter's NumPy warns of.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.parametrize("device", DEVICES)]


@pytest.fixture
def small_tiles(set_sizes):
    """Small tiles, so that these tests' prefixes, selections and tokens take several steps of every loop."""
    set_sizes(prefix_forward, NUM_WARPS=1, IN_THREAD=4, RANKS=16, RANKS_IN_THREAD=1)
    set_sizes(prefix_backward, SLOTS=16, TOKENS=128, PREFIXES=2, NUM_WARPS=1)


def differentiate(function, scores, grad, **arguments):
    scores = scores.detach().requires_grad_()
    selection = function(scores, **arguments)
    return selection, torch.autograd.grad(selection.weights, scores, grad.to(selection.weights.dtype))[0]


def named(selection, ds):
    return {"output": selection.weights.detach(), "scores": ds}


def check(scores, **arguments):
    """Selection, weights and gradient against the reference in fp64; errors against those of the reference in fp32."""
    arguments = {"k": arguments["num_selected"] * 9 / 8, **arguments}
    batch, routes, n = scores.shape
    windows = max(math.ceil(n / arguments["window_size"]) - 1, 0)
    grad = torch.randn(batch, windows, routes, arguments["num_selected"], device=scores.device)
    ours, ds = differentiate(route_prefixes, scores, grad, **arguments)
    expected, expected_ds = differentiate(reference.route_prefixes, scores.double(), grad, **arguments)
    plain = partial(differentiate, reference.route_prefixes, scores, grad, **arguments)

    assert ds.dtype == scores.dtype
    assert ours.weights.dtype == torch.promote_types(scores.dtype, torch.float32)
    assert torch.equal(ours.indices, expected.indices)
    assert (ours.mask is None) == (expected.mask is None)
    if ours.mask is not None:
        assert torch.equal(ours.mask, expected.mask)
        assert (ours.weights[~ours.mask] == 0).all()
    found, truth = named(ours, ds), named(expected, expected_ds)
    check_correct(found, lambda: named(*plain()), truth, least=2e-6)


@pytest.mark.parametrize("schedule", [CONSTANT, DECAYING], ids=["constant", "decaying"])
@pytest.mark.parametrize(
    ("shape", "window_size", "num_selected"),
    [
        ((2, 2, 20), 8, 10),
        ((1, 1, 41), 20, 3),
        ((1, 1, 9), 8, 9),
    ],
)
@pytest.mark.parametrize("straight_through", [False, True])
def test_follows_the_reference(device, straight_through, shape, window_size, num_selected, schedule):
    options = {"window_size": window_size, "num_selected": num_selected, "straight_through": straight_through}
    check(torch.randn(shape, device=device), **options, **schedule)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("most", "window_size", "num_selected"), [(1, 130, 40), (2, 75, 20), (4, 50, 60)])
def test_several_tiles(device, most, window_size, num_selected, set_sizes):
    set_sizes(prefix_forward, GROUP=most)
    scores = torch.randn(1, 1, 240, device=device)
    check(scores, window_size=window_size, num_selected=num_selected, **DECAYING)


@pytest.mark.parametrize("k", [0.5, 3.0, 30.0, 1e4])
def test_k(device, k):
    check(torch.randn(1, 1, 30, device=device), window_size=10, num_selected=4, k=k, **CONSTANT)


def test_ties(device):
    levels = torch.randint(-2, 3, (1, 1, 60), device=device) / 2
    check(levels, window_size=25, num_selected=12, **DECAYING)
    zeros = torch.where(torch.rand(1, 1, 40, device=device) > 0.5, 0.0, -0.0)
    check(zeros, window_size=15, num_selected=5, **CONSTANT)


@pytest.mark.parametrize("spread", [20.0, 1e4])
def test_wide_scores(device, spread):
    check(torch.randn(1, 1, 60, device=device) * spread, window_size=20, num_selected=10, **DECAYING)


def test_ascending_scores(device):
    """Each window selects only the tokens nearest before it; the last scores are the first in the order."""
    scores = torch.arange(40.0, device=device).view(1, 1, -1) / 8
    check(scores, window_size=8, num_selected=8, **CONSTANT)
    assert route_prefixes(scores, window_size=8, num_selected=8, k=9, **CONSTANT).indices[0, 3, 0, 0].item() == 31


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(device, dtype):
    check(torch.randn(1, 1, 50, device=device).to(dtype), window_size=16, num_selected=7, **CONSTANT)


def test_layouts(device):
    storage = torch.randn(2 * 3 * 20 + 1, device=device)
    for scores in (
        storage[1:61].view(1, 3, 20),
        storage[:40].view(1, 20, 2).transpose(1, 2),
        storage[:120].view(3, 2, 20).transpose(0, 1)[:1],
        storage[:20].expand(1, 2, 20),
    ):
        check(scores, window_size=16, num_selected=6, **CONSTANT)


@pytest.mark.parametrize("shape", [(2, 2, 8), (1, 1, 1), (0, 2, 30)])
def test_nothing_to_route(device, shape):
    scores = torch.randn(shape, device=device, requires_grad=True)
    indices, weights, mask = route_prefixes(scores, window_size=8, num_selected=1, k=1, **CONSTANT)
    assert indices.shape == weights.shape == (shape[0], math.ceil(shape[2] / 8) - 1, shape[1], 1)
    assert mask is None
    (ds,) = torch.autograd.grad(weights.sum(), scores)
    assert torch.equal(ds, torch.zeros_like(scores))


def test_nan_concerns_what_comes_after(device):
    scores = torch.randn(1, 2, 32, device=device)
    arguments = {"window_size": 8, "num_selected": 4, "k": 4.5, **CONSTANT}
    clean = route_prefixes(scores, **arguments)
    scores[0, 1, 19] = math.nan
    indices, weights, _ = route_prefixes(scores, **arguments)
    assert torch.equal(weights[0, :, 0], clean.weights[0, :, 0])
    assert torch.equal(weights[0, :2], clean.weights[0, :2])
    assert weights[0, 2, 1].isnan().all()
    assert indices[0, 2, 1, 0] == 19


@settings(max_examples=4 if INTERPRETED else 50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=30), st.integers(1, 9), st.integers(1, 30))
def test_what_is_selected_once_is_so_until_it_is_not(device, numbers, window_size, num_selected):
    """A token is selected by consecutive windows, from the first after it: the backward pass relies on it."""
    scores = torch.tensor(numbers, dtype=torch.float32, device=device).view(1, 1, -1)
    num_selected = min(num_selected, len(numbers))
    selected = route_prefixes(scores, window_size=window_size, num_selected=num_selected, k=2, **CONSTANT)
    before = set()
    for window, listed in enumerate(selected.indices[0, :, 0].tolist()):
        length = (window + 1) * window_size
        assert len(set(listed)) == num_selected
        chosen = {index for index in listed if index < length}
        assert len(chosen) == min(num_selected, length)
        assert {index for index in chosen if index < length - window_size} <= before
        before = chosen


@settings(max_examples=3 if INTERPRETED else 50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.floats(-9, 9, width=32), min_size=9, max_size=30), st.integers(4, 9), st.floats(0.1, 40))
def test_thresholds_ascend(device, numbers, window_size, k):
    """From window to window, in each iteration: the backward pass searches among them."""
    scores = torch.tensor(numbers, dtype=torch.float32, device=device).view(1, 1, -1)
    schedule = (DECAYING["n_iters"], DECAYING["eps"], DECAYING["eps_init"], DECAYING["eps_decay"])
    *_, state = torch.ops.colt5.route_prefixes(scores, None, window_size, 1, k, *schedule, False, True)
    a = state[:-1, 0, :-1]
    assert len(a) == math.ceil(len(numbers) / window_size) - 1
    assert (a.diff(dim=0) <= 1e-6 * a[1:].abs().clamp(min=1)).all()


def test_fp64_gradients(device):
    scores = torch.randn(1, 2, 13, dtype=torch.float64, device=device, requires_grad=True)
    arguments = {"window_size": 4, "num_selected": 3, "k": 3.4, "n_iters": 4, "eps": 0.4}
    if device == "cuda" or INTERPRETED:
        check(scores.detach(), **arguments)
        return
    assert gradcheck(lambda scores: route_prefixes(scores, **arguments).weights, scores)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"scores": torch.ones(2, 5)}, "scores"),
        ({"scores": torch.ones(2, 1, 0)}, "scores"),
        ({"scores": torch.ones(1, 2, 5, dtype=torch.int32)}, "scores"),
        ({"window_size": 0}, "window_size"),
        ({"num_selected": 0}, "num_selected"),
        ({"num_selected": 6}, "num_selected"),
        ({"k": 0}, "k"),
        ({"k": torch.ones(1)}, "k"),
        ({"n_iters": 0}, "n_iters"),
        ({"eps": 0.0}, "eps"),
        ({"eps_decay": 1.5}, "eps_decay"),
    ],
)
def test_wrong_arguments(device, arguments, named):
    arguments = {"scores": torch.randn(1, 2, 5), "window_size": 2, "num_selected": 2, "k": 2, "n_iters": 3, **arguments}
    for function in (route_prefixes, reference.route_prefixes):
        with pytest.raises(ValueError, match=rf"^{named} must be .*, got "):
            function(**arguments)


def test_second_derivative_is_refused(device):
    scores = torch.randn(1, 1, 9, device=device, requires_grad=True)
    weights = route_prefixes(scores, window_size=4, num_selected=2, k=2, **CONSTANT).weights
    (ds,) = torch.autograd.grad(weights.square().sum(), scores, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"reference\.route_prefixes"):
        ds.sum().backward()


def test_is_bitwise_reproducible(device):
    scores = torch.randn(1, 2, 50, device=device)
    grad = torch.randn(1, 1, 2, 9, device=device)
    arguments = {"window_size": 30, "num_selected": 9, "k": 10, **DECAYING}
    (first, first_ds), (second, second_ds) = (
        differentiate(route_prefixes, scores, grad, **arguments) for _ in range(2)
    )
    assert torch.equal(first.indices, second.indices)
    assert torch.equal(first.weights, second.weights)
    assert torch.equal(first_ds, second_ds)


def of_ranks(count, scores, grad, **arguments):
    """Results of several processes, which this process simulates in turn."""
    states = []

    def first_gather(x):
        states.append(x.clone())
        return [torch.zeros_like(x)] * count

    for number in range(count):
        differentiate(route_prefixes, scores, grad, ranks=Ranks(number, count, first_gather), **arguments)
    every = [
        differentiate(route_prefixes, scores, grad, ranks=Ranks(number, count, lambda x: states), **arguments)
        for number in range(count)
    ]
    return states, every


@pytest.mark.parametrize("schedule", [CONSTANT, DECAYING])
@pytest.mark.parametrize(
    ("count", "shape", "window_size"), [(1, (1, 1, 32), 4), (2, (2, 2, 48), 3), (5, (1, 2, 96), 8)]
)
def test_ranks_share_descents(device, small_tiles, count, shape, window_size, schedule):
    """All have the bits of one process. Kernels compute no prefix twice."""
    scores = torch.randn(shape, device=device)
    arguments = {"window_size": window_size, "num_selected": 6, "k": 7.5, **schedule}
    grad = torch.randn(shape[0], math.ceil(shape[2] / window_size) - 1, shape[1], 6, device=device)
    selection, ds = differentiate(route_prefixes, scores, grad, **arguments)
    states, every = of_ranks(count, scores, grad, **arguments)
    for shared, shared_ds in every:
        torch.testing.assert_close((*shared, shared_ds), (*selection, ds), rtol=0, atol=0)
    if states:
        of_prefixes = torch.stack(states)[:, :-1].flatten(2).any(dim=-1)
        assert (of_prefixes.sum(dim=0) == 1).all()


@ONCE
def test_is_an_operator(device):
    scores = torch.randn(1, 1, 9, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.colt5.route_prefixes, (scores, None, 8, 2, 2.0, 2, 0.3, 0.3, 1.0, True, True))


@ONCE
def test_compiles_into_one_graph(device):
    def function(scores):
        indices, weights, mask = route_prefixes(scores * 2, window_size=8, num_selected=10, k=6, **CONSTANT)
        return indices, (weights * mask).square()

    scores = torch.randn(1, 2, 14, device=device, requires_grad=True)
    indices, weights = torch.compile(function, backend="aot_eager", fullgraph=True)(scores)
    eager_indices, eager_weights = function(scores)
    assert torch.equal(indices, eager_indices)
    torch.testing.assert_close(weights, eager_weights)
    torch.testing.assert_close(
        torch.autograd.grad(weights.sum(), scores), torch.autograd.grad(eager_weights.sum(), scores)
    )


@pytest.mark.gpu
def test_is_captured_in_a_cuda_graph(device):
    if device == "cpu":
        pytest.skip("graphs are CUDA's")
    scores, grad = torch.randn(1, 2, 5000, device=device), torch.randn(1, 39, 2, 300, device=device)
    arguments = {"window_size": 128, "num_selected": 300, "k": 337.5, **DECAYING}
    graph, (captured, captured_ds) = capture(lambda: differentiate(route_prefixes, scores, grad, **arguments))
    scores.copy_(torch.randn_like(scores))
    graph.replay()
    eager, eager_ds = differentiate(route_prefixes, scores, grad, **arguments)
    assert torch.equal(captured.indices, eager.indices)
    assert torch.equal(captured.weights, eager.weights)
    assert torch.equal(captured_ds, eager_ds)


@pytest.mark.gpu
@pytest.mark.parametrize(("window_size", "n"), [(128, 8192), (1000, 9001)])
def test_long_sequences(device, window_size, n):
    if device == "cpu":
        pytest.skip("too long for a CPU")
    schedule = {"n_iters": 20, "eps": 0.03, "eps_init": 4.0, "eps_decay": 0.7}
    check(torch.randn(2, 2, n, device=device), window_size=window_size, num_selected=1024, **schedule)


def test_nothing_is_as_large_as_windows_times_tokens(device):
    n, window_size = (64, 4) if INTERPRETED else (4096, 16)
    scores = torch.randn(1, 1, n, device=device, requires_grad=True)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        route_prefixes(scores, window_size=window_size, num_selected=2, k=2, n_iters=2).weights.sum().backward()
    largest = max(
        (event.self_device_memory_usage if scores.is_cuda else event.self_cpu_memory_usage)
        for event in profile.events()
    )
    assert largest < n / window_size * n * 4 / 4
