import math
import re

import pytest
import torch
import triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

import reference
from colt5_bench.measuring import static_facts
from kernels._common.tensors import triton_for_cpu_tensors
from kernels.soft_topk import soft_topk
from kernels.soft_topk import triton as soft_topk_kernels
from tests.kernels.devices import DEVICES, capture

INTERPRETED = triton.knobs.runtime.interpret

# In branches that are not taken, tensors have values that the interpreter's NumPy warns of.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.parametrize("device", DEVICES)]


@pytest.fixture(params=["one program a row", "together", "chunks", "chunks, finished alone"])
def path(request, set_sizes):
    """Each path of a kernel through a row of these tests' length. The interpreter cannot run programs together."""
    if request.param != "one program a row":
        set_sizes(soft_topk_kernels, RESIDENT=100, CHUNK=128, CHUNK_PROBES=8)
    if request.param.startswith("chunks"):
        searches = 4 if request.param == "chunks" else 1
        set_sizes(soft_topk_kernels, SEARCHES=searches, multiprocessors=lambda device: 1)


def check(scores, k, eps, mask=None):
    """Compare values and gradients with the reference in fp64 on the same numbers."""
    scores, grad = scores.requires_grad_(), torch.randn(scores.shape, device=scores.device).to(scores.dtype)
    wide = scores.detach().double().requires_grad_()
    inputs, wide_inputs, wide_k = [scores], [wide], k
    if isinstance(k, torch.Tensor):
        k, wide_k = k.requires_grad_(), k.detach().double().requires_grad_()
        inputs, wide_inputs = [scores, k], [wide, wide_k]
    y = soft_topk(scores, k=k, eps=eps, mask=mask)
    expected = reference.soft_topk(wide, k=wide_k, eps=eps, mask=mask)
    assert y.dtype == scores.dtype
    rounding = torch.finfo(scores.dtype).eps if scores.dtype != torch.float32 else 0.0
    torch.testing.assert_close(y.double(), expected, rtol=rounding, atol=2e-6)

    # An error of y is multiplied by its factor in the gradient: (g_i - mean g) / eps.
    largest = 2 * grad.abs().max().item()
    tolerances = (2e-6 * largest / eps, 2e-6 * largest)
    actual = torch.autograd.grad(y, inputs, grad)
    for found, wanted, tolerance in zip(
        actual, torch.autograd.grad(expected, wide_inputs, grad.double()), tolerances, strict=False
    ):
        torch.testing.assert_close(found.double(), wanted, rtol=rounding, atol=tolerance)


@pytest.mark.parametrize(("spread", "eps"), [(1.0, 0.3), (22.6, 0.03), (1e4, 1e-3)])
@pytest.mark.usefixtures("path")
def test_follows_the_reference(device, spread, eps):
    scores = torch.randn(3, 201, device=device) * spread
    check(scores, torch.tensor([1.0, 40.5, 200.2], device=device), eps)


@pytest.mark.parametrize("n", [1, 2, 7, 129])
def test_short_rows(device, n):
    mask = torch.rand(3, n, device=device) > 0.2
    check(torch.randn(3, n, device=device), torch.tensor([0.4, max(1.0, n // 2), n + 1.0], device=device), 0.1, mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(device, dtype):
    check(torch.randn(2, 130, device=device).to(dtype), 20, 0.1)


@pytest.mark.usefixtures("path")
def test_ties(device):
    scores = torch.tensor([[0.0], [3.25], [-1e4]], device=device).expand(3, 160).clone()
    check(scores, 77.7, 0.05)
    levels = torch.randint(-3, 4, (2, 160), device=device) / 2
    check(levels, torch.tensor([30.25, 120.75], device=device), 0.02)


def test_extreme_scores(device):
    scores = torch.tensor([[1e4, -1e4, 0.0, 5e3, 1e4], [1e8, 1.0, 0.5, -1e8, 0.75]], device=device)
    y = soft_topk(scores, k=2.5, eps=1e-3)
    torch.testing.assert_close(
        y, torch.tensor([[1, 0, 0, 0.5, 1], [1, 1, 0, 0, 0.5]], device=device), rtol=0, atol=2e-6
    )


@pytest.mark.usefixtures("path")
def test_rows_with_no_equation_to_solve(device):
    scores = torch.randn(6, 200, device=device)
    scores[4, 1] = scores[5, 2] = math.nan
    mask = torch.ones(6, 200, dtype=torch.bool, device=device)
    mask[0] = mask[5, 2] = mask[1, 3:] = False
    scores.requires_grad_()
    k = torch.tensor([1.0, 3.0, 0.0, -1.0, 300.0, 20.0], device=device, requires_grad=True)
    y = soft_topk(scores, k=k, eps=0.05, mask=mask)
    assert (y[0] == 0).all()
    assert (y[1] == mask[1]).all()
    assert y[2:5].isnan().all()
    assert y[5].sum().item() == pytest.approx(20, rel=1e-5)
    ds, dk = torch.autograd.grad(y[[0, 1, 5]].sum(), (scores, k))
    assert (ds[:2] == 0).all()
    assert (dk[:2] == 0).all()
    assert (ds[5].abs() < 1e-4).all()
    assert dk[5].item() == pytest.approx(1, rel=1e-5)


def test_layouts(device):
    n, k, eps = 37, 5, 0.1
    storage = torch.randn(2 * n * 3 + 1, device=device)
    mask = torch.rand(n, device=device) > 0.2
    for scores in (
        storage[1 : 1 + 2 * n].view(2, n),
        storage[: 4 * n].view(2, 2 * n)[:, ::2],
        storage[: 2 * n].view(n, 2).t(),
        storage[:n].expand(2, n),
        storage[: 2 * n].view(2, 1, n),
        storage[:n],
    ):
        y = soft_topk(scores, k=k, eps=eps, mask=mask)
        assert y.shape == scores.shape
        torch.testing.assert_close(
            y.double(), reference.soft_topk(scores.double(), k=k, eps=eps, mask=mask), rtol=0, atol=2e-6
        )


def test_expanded_arguments_have_gradients(device):
    scores = torch.randn(2, 1, 20, device=device)
    k = torch.tensor([[2.0], [7.0]], device=device, requires_grad=True)
    y = soft_topk(scores.expand(2, 3, 20), k=k, eps=0.2)
    (dk,) = torch.autograd.grad(y.sum(), k)
    torch.testing.assert_close(dk, torch.full((2, 1), 3.0, device=device), rtol=1e-5, atol=0)
    y = soft_topk(scores.requires_grad_(), k=3, eps=0.2)
    (ds,) = torch.autograd.grad(y.sum(), scores)
    torch.testing.assert_close(ds, torch.zeros_like(ds), rtol=0, atol=2e-5)


def test_no_rows(device):
    scores = torch.randn(0, 5, device=device, requires_grad=True)
    y = soft_topk(scores, k=2, eps=0.1)
    assert y.shape == (0, 5)
    assert torch.autograd.grad(y.sum(), scores)[0].shape == (0, 5)


def test_fp64_gradients(device):
    scores = torch.randn(3, 9, dtype=torch.float64, device=device, requires_grad=True)
    k = torch.tensor([2.0, 3.5, 10.0], dtype=torch.float64, device=device, requires_grad=True)
    mask = torch.rand(3, 9, device=device) > 0.2
    assert gradcheck(lambda scores, k: soft_topk(scores, k=k, eps=0.4, mask=mask), (scores, k))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"k": 0}, "k"),
        ({"k": torch.ones(7)}, "k"),
        ({"eps": 0.0}, "eps"),
        ({"mask": torch.ones(2, 5)}, "mask"),
        ({"scores": torch.ones(2, 0)}, "scores"),
    ],
)
def test_wrong_arguments(device, arguments, named):
    with pytest.raises(ValueError, match=rf"^{named} must be .*, got "):
        soft_topk(**{"scores": torch.randn(2, 5), "k": 2, "eps": 0.1, **arguments})


def test_second_derivative_is_refused(device):
    scores = torch.randn(2, 5, device=device, requires_grad=True)
    (ds,) = torch.autograd.grad(soft_topk(scores, k=2, eps=0.1).square().sum(), scores, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"reference\.soft_topk"):
        ds.sum().backward()


@pytest.mark.usefixtures("path")
def test_is_bitwise_reproducible(device):
    scores = torch.randn(1, 200, device=device, requires_grad=True)
    runs = []
    for _ in range(2):
        y = soft_topk(scores, k=31, eps=0.05)
        runs.append((y, *torch.autograd.grad(y, scores, torch.linspace(-1, 1, 200, device=device)[None])))
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_is_an_operator(device):
    scores = torch.randn(1, 9, device=device, requires_grad=True)
    mask = torch.rand(1, 9, device=device) > 0.2
    torch.library.opcheck(torch.ops.colt5.soft_topk, (scores, mask, torch.ones(1, device=device), 0.0, 0.3))


def test_compiles_into_one_graph(device):
    @torch.compile(backend="aot_eager", fullgraph=True)
    def function(scores, k):
        return soft_topk(scores * 2, k=k, eps=0.3).square()

    scores, k = torch.randn(2, 9, device=device, requires_grad=True), torch.tensor([2.0, 3.0], device=device)
    eager = soft_topk(scores * 2, k=k, eps=0.3).square()
    torch.testing.assert_close(function(scores, k), eager)
    torch.testing.assert_close(
        torch.autograd.grad(function(scores, k).sum(), scores), torch.autograd.grad(eager.sum(), scores)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("n", [512, 100_000])
def test_is_captured_in_a_cuda_graph(device, n):
    if device == "cpu":
        pytest.skip("graphs are CUDA's")
    scores = torch.randn(2, n, device=device, requires_grad=True)
    grad = torch.randn_like(scores)

    def step():
        y = soft_topk(scores, k=n / 8, eps=0.1)
        return y.detach(), *torch.autograd.grad(y, scores, grad)

    graph, captured = capture(step)
    with torch.no_grad():
        scores.copy_(torch.randn_like(scores))
    graph.replay()
    for replayed, eager in zip(captured, step(), strict=True):
        assert torch.equal(replayed, eager)


@settings(max_examples=5 if INTERPRETED else 50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(-40, 40), min_size=2, max_size=30), st.floats(0.05, 1.2), st.sampled_from([1e-3, 0.1, 3.0]))
def test_properties(device, numbers, share, eps):
    # Halves of integers, so that the shift below is exact.
    scores = torch.tensor(numbers, dtype=torch.float32, device=device) / 2
    k = share * len(numbers)
    order = scores.argsort()
    y, shifted, sorted_y = soft_topk(torch.stack([scores, scores + 16, scores[order]]), k=k, eps=eps)
    assert y.sum().item() == pytest.approx(min(k, len(numbers)), rel=1e-5)
    assert ((y >= 0) & (y <= 1)).all()
    assert (y[order].diff() >= 0).all()
    torch.testing.assert_close(shifted, y, rtol=0, atol=2e-6)
    torch.testing.assert_close(sorted_y, y[order], rtol=0, atol=2e-6)


def passes(scores, k, eps):
    _, solution = torch.ops.colt5.soft_topk(scores, None, None, float(k), eps)
    return solution[:, 2].max().item()


@pytest.mark.parametrize("spread", [1.0, 5.0, 25.0])
def test_ten_passes_suffice(device, spread):
    for eps in (0.02, 0.1, 1.0):
        assert passes(torch.randn(1, 1000, device=device) * spread, 125, eps) <= 10


def test_ten_passes_suffice_for_a_row_of_chunks(device, set_sizes):
    if INTERPRETED:
        set_sizes(soft_topk_kernels, CHUNK=2**19)
    assert passes(torch.randn(1, 2**20, device=device) * 25, 2**17, 0.02) <= 10


@pytest.mark.compiled
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n", [256, 400, 1024, 40000])
def test_lanes_agree_on_what_a_search_depends_on(device, n, masked):
    """In a sum over lanes, each adds its number to one that another lane sends. If that is a product, one lane may fuse
    it with the addition, while the other rounds and sends it. Then the sums differ, and lanes may leave the loop after
    different passes."""
    kernels = {}
    with static_facts._observed(kernels, compile_only=True), static_facts.driver_for(90), triton_for_cpu_tensors():
        scores, mask = torch.zeros(3, n), torch.ones(3, n, dtype=torch.bool) if masked else None
        soft_topk(scores, k=2, eps=0.1, mask=mask)
    assert kernels
    for kernel in kernels.values():
        sent, taken = set(), set()
        for to, source in re.findall(r"shfl\.sync\.bfly\.b32\s+(%\w+)(?:\|%p\d+)?, (%\w+)", kernel.asm["ptx"]):
            taken.add(to)
            sent.add(source)
        assert sent, "no sum over lanes was found"
        added = re.findall(r"fma\.rn\.f32\s+%\w+, %\w+, %\w+, (%\w+);", kernel.asm["ptx"])
        products = re.findall(r"mul\.(?:rn\.)?f32\s+(%\w+)", kernel.asm["ptx"])
        assert not taken.intersection(added), kernel.name
        assert not sent.intersection(products), kernel.name


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n", [100, 256, 400, 512, 1024, 4096, 16384])
def test_many_rows_sum_to_k(device, n, masked):
    """Faults that occur in one row of 100,000. On a CPU this many take minutes."""
    if device == "cpu":
        pytest.skip("is for a GPU")
    rows = 2**20 if n <= 512 else 2**29 // n
    for k, eps, spread in ((1.0, 0.1, 1.0), (2.0, 0.03, 4.0), (1.5, 0.3, 25.0)):
        scores = torch.randn(rows, n, device=device) * spread
        mask = torch.rand(rows, n, device=device) < 0.6 if masked else None
        y = soft_topk(scores, k=k, eps=eps, mask=mask)
        assert ((y >= 0) & (y <= 1)).all()
        assert ((y.sum(-1) - k).abs() <= 1e-4).all()
