"""The fused top-k against the plain one in fp64: on the CPU path, in Triton's interpreter and on a GPU."""

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from kernels import topk
from kernels.topk import api
from tests.kernels.devices import DEVICE, capture

INTERPRETED = triton.knobs.runtime.interpret

N_ITERS = 5 if INTERPRETED else 20
"""The interpreter is slow per iteration."""


def randn(*shape):
    return torch.randn(shape, device=DEVICE)


def max_abs(*tensors):
    return max((tensor.abs().max().item() for tensor in tensors if tensor.numel()), default=0.0)


PARTS = ("values", "coor_descent_values", "gates")


def weighted(result, weights, parts=PARTS):
    """A scalar that depends on the differentiable parts of the result."""
    given = zip((getattr(result, part) for part in parts), weights, strict=True)
    return sum((part * weight.to(part)).sum() for part, weight in given)


def check(x, k, mask=None, parts=PARTS, **options):
    """Results and gradient against plain PyTorch in fp64, with as many valid entries as are selected."""
    options.setdefault("n_iters", N_ITERS)
    one, other = x.detach().clone().requires_grad_(), x.detach().double().requires_grad_()
    fused = topk(one, k, mask=mask, fused=True, **options)
    plain = reference.topk(other, k, mask=mask, **options)
    rounding = 0.0 if x.dtype == torch.float32 else 2 * torch.finfo(x.dtype).eps

    chosen = plain.gates != 0
    assert torch.equal(fused.indices[chosen], plain.indices[chosen])
    for name in PARTS:
        actual, expected = getattr(fused, name), getattr(plain, name)
        assert actual.dtype == x.dtype
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6 + rounding, atol=2e-6)
        assert not actual[~chosen].any()

    weights = [randn(*fused.values.shape) for _ in parts]
    weighted(fused, weights, parts).backward()
    weighted(plain, weights, parts).backward()
    # 2e-6 in an output of the descent, times its contribution: a gradient of 3 weights and |x|, divided by eps.
    scale = 3 * max_abs(*weights) * (1 + max_abs(x)) / options.get("eps", 0.1)
    torch.testing.assert_close(one.grad.double(), other.grad, rtol=rounding, atol=2e-6 * scale + rounding)


@pytest.mark.parametrize(
    ("shape", "k"), [((3, 512), 10), ((2, 3, 100), 3), ((5, 1), 1), ((3, 77), 32), ((2, 77), 77), ((0, 9), 2)], ids=str
)
def test_matches_plain_pytorch(shape, k):
    check(randn(*shape), k)


@pytest.mark.parametrize("k", [7, 40])
def test_masked_entries_are_never_selected(k):
    mask = torch.rand(3, 97, device=DEVICE) > 0.3
    mask[0] = False
    mask[1] = False
    mask[1, 3] = True
    check(randn(3, 97), k, mask, eps=0.03, eps_init=4.0, eps_decay=0.2 if INTERPRETED else 0.7)
    result = topk(randn(3, 97), k, n_iters=N_ITERS, mask=mask, fused=True)
    assert (result.gates != 0).sum(-1).tolist() == [0, 1, min(k, int(mask[2].sum()))]
    assert mask.gather(-1, result.indices)[result.gates != 0].all()


@pytest.mark.parametrize("parts", [("values",), ("coor_descent_values",), ("gates", "coor_descent_values")], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_some_results(parts, masked):
    mask = torch.rand(2, 30, device=DEVICE) > 0.5 if masked else None
    check(randn(2, 30), 20, mask, parts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    # Distinct in either dtype: of equal entries torch.topk may select any.
    x = torch.stack([torch.randperm(120, device=DEVICE) for _ in range(3)]).to(dtype) / 32
    check(x, 9)


def test_rows_too_long_for_the_kernel(monkeypatch):
    monkeypatch.setattr(api, "LONGEST", 50)
    check(randn(2, 130), 9)


def test_of_equal_entries_the_first():
    if not INTERPRETED and DEVICE == "cpu":
        pytest.skip("torch.topk selects on the CPU path")
    x = torch.tensor([[1.0, 3.0, 3.0, -2.0, 3.0, 1.0]], device=DEVICE)
    assert topk(x, 4, fused=True).indices.tolist() == [[1, 2, 4, 0]]


def test_negative_zero_and_infinite_scores_are_ordered():
    x = torch.tensor([[-5.0, 0.0, -1e30, 7.0, -0.5, 1e4]], device=DEVICE)
    assert topk(x, 6, fused=True).indices.tolist() == [[5, 3, 1, 4, 0, 2]]


def test_the_example_of_the_systems_document():
    x = randn(2 if INTERPRETED else 1024, 512)
    values, indices, coor_descent_values, gates = topk(x, k=10, fused=True)
    expected = x.topk(10)
    torch.testing.assert_close(values, expected.values, rtol=1e-6, atol=0)
    assert torch.equal(indices, expected.indices)
    assert ((coor_descent_values > 0) & (coor_descent_values <= 1)).all()
    torch.testing.assert_close(gates, torch.ones_like(gates), rtol=1e-6, atol=0)


def test_without_fused_kernels_come_one_after_the_other():
    x = randn(3, 20)
    for actual, expected in zip(topk(x, 4), reference.topk(x.double(), 4), strict=True):
        torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=1e-5, atol=1e-5)
    for fused in (False, True):
        values, indices, soft, gates = topk(x, 4, fused=fused, non_differentiable=True)
        assert (soft, gates) == (None, None)
        assert torch.equal(values, x.gather(-1, indices))


# On a GPU most examples compile a kernel.
@settings(max_examples=8 if INTERPRETED or DEVICE == "cuda" else 50)
@given(data=st.data())
def test_laws(data):
    n = data.draw(st.integers(1, 40))
    k = data.draw(st.integers(1, n))
    entries = data.draw(st.lists(st.integers(-1000, 1000), min_size=n, max_size=n, unique=True))
    x = torch.tensor([entries], device=DEVICE) / 64
    result = topk(x, k, n_iters=N_ITERS, fused=True)
    assert result.indices.unique().numel() == k
    assert torch.equal(x.gather(-1, result.indices), x.topk(k).values)
    assert (result.coor_descent_values.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": 0}, "k must be from 1 to n = 5, got 0"),
        ({"k": 6}, "k must be from 1 to n = 5, got 6"),
        ({"coor_descent_k_ratio": 0.5}, "coor_descent_k_ratio must be >= 1, got 0.5"),
        ({"n_iters": 0}, "n_iters must be >= 1"),
        ({"mask": torch.ones(3, 4, dtype=torch.bool)}, "mask must be of a shape"),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_wrong_arguments_are_named(fused, wrong, message):
    arguments = {"k": 2, **wrong}
    with pytest.raises(ValueError, match=message):
        topk(torch.randn(3, 5), fused=fused, **arguments)


def test_opcheck():
    if not INTERPRETED and DEVICE == "cpu":
        pytest.skip("the CPU path composes other operators")
    mask = torch.rand(2, 40, device=DEVICE) > 0.3
    for hidden in (None, mask):
        x = randn(2, 40).requires_grad_()
        torch.library.opcheck(torch.ops.colt5.topk.default, (x, hidden, 4, 4.5, 5, 0.1, 0.1, 1.0, True))


@pytest.mark.skipif(INTERPRETED, reason="what is compiled is PyTorch's part; the interpreter adds nothing but time")
def test_compiles_as_one_graph():
    x = randn(3, 40)
    compiled = torch.compile(topk, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(x, 4, fused=True), topk(x, 4, fused=True), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.gpu
def test_captured_in_a_cuda_graph():
    x, weights = randn(64, 512).requires_grad_(), [randn(64, 10) for _ in range(3)]

    def step():
        result = topk(x, 10, fused=True)
        return result.indices, torch.autograd.grad(weighted(result, weights), x)[0]

    graph, (indices, gradient) = capture(step)
    with torch.no_grad():
        x.copy_(randn(64, 512))
    graph.replay()
    expected = step()
    assert torch.equal(indices, expected[0])
    assert torch.equal(gradient, expected[1])
