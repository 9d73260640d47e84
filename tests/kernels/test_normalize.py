"""The fused normalisation against the plain one in fp64: on the CPU path, in Triton's interpreter and on a GPU."""

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from kernels import normalize
from tests.kernels.devices import DEVICE, capture, rounding, tokens

INTERPRETED = triton.knobs.runtime.interpret
ON_CPU_PATH = DEVICE == "cpu" and not INTERPRETED


def check(x, center, *, has_bias=True, dtype=None, eps=1e-5):
    given = [x, *(tokens(x.shape[-1], dtype=x.dtype) for _ in range(1 + has_bias))]
    fused, plain = ([e.detach().clone().to(t).requires_grad_() for e in given] for t in (x.dtype, torch.float64))
    out = normalize(*fused, center=center, eps=eps, dtype=dtype)
    expected = reference.normalize(*plain, center=center, eps=eps)
    assert out.shape == x.shape
    assert out.dtype == (dtype or x.dtype)
    upstream = torch.randn_like(out)
    gradients = torch.autograd.grad(out, fused, upstream)
    truths = torch.autograd.grad(expected, plain, upstream.double())
    for actual, truth in zip((out, *gradients), (expected, *truths), strict=True):
        largest = truth.abs().max().item() if truth.numel() else 0.0
        torch.testing.assert_close(actual.double(), truth, rtol=0, atol=rounding(actual) * largest)
    for actual, value in zip(gradients, fused, strict=True):
        assert actual.dtype == value.dtype


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 48), (1, 7), (2, 2, 5), (0, 16), (9, 33), (3, 2100)], ids=str)
def test_matches_plain_pytorch(shape, center):
    check(tokens(*shape), center)
    check(tokens(*shape), center, has_bias=False, dtype=torch.bfloat16)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("result", [None, torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, result, center):
    check(tokens(6, 40, dtype=dtype), center, dtype=result)


def test_parameters_may_be_wider_than_tokens():
    x, weight = tokens(3, 8, dtype=torch.bfloat16).requires_grad_(), tokens(8).requires_grad_()
    out = normalize(x, weight)
    assert out.dtype == torch.float32
    gradients = torch.autograd.grad(out.sum(), (x, weight))
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("center", [False, True])
def test_strides(center):
    check(tokens(16, 6).mT, center)
    check(tokens(4, 6, 10)[:, ::2, 1:], center)
    check(tokens(1, 12).expand(5, 12), center)
    x, weight = tokens(4, 6).requires_grad_(), tokens(6).requires_grad_()
    # The gradient of a sum has stride 0.
    (gradient,) = torch.autograd.grad(normalize(x, weight).sum(), x)
    (expected,) = torch.autograd.grad(reference.normalize(x, weight).sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_rows_shorter_than_the_least_norm_are_divided_by_it():
    x = tokens(4, 6)
    x[1], x[2] = 0, 1e-4
    check(x, center=False, eps=0.5)
    weight = tokens(6)
    assert not normalize(torch.zeros(2, 6, device=DEVICE), weight).any()


@pytest.mark.parametrize("center", [False, True])
def test_large_and_small_tokens(center):
    for scale in (1e-6, 1e6):
        # An epsilon that is equally small relative to the tokens at either scale.
        check(tokens(5, 20) * scale, center, eps=1e-5 * (scale**2 if center else scale))


def test_nan_stays_in_its_row():
    x = tokens(3, 8)
    x[1, 4] = torch.nan
    for center in (False, True):
        out = normalize(x, tokens(8), center=center, eps=1e-5)
        assert out[1].isnan().all()
        assert out[[0, 2]].isfinite().all()


@settings(max_examples=6 if INTERPRETED else 30)
@given(rows=st.integers(1, 9), d=st.integers(2, 40), factor=st.integers(-8, 8), center=st.booleans())
def test_a_factor_changes_nothing(rows, d, factor, center):
    x, weight = tokens(rows, d), tokens(d)
    out, scaled = (normalize(each, weight, center=center, eps=1e-30) for each in (x, x * 2.0**factor))
    torch.testing.assert_close(scaled, out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.zeros(3, 4, dtype=torch.int64)}, "x must be a tensor of a float dtype, got torch.int64"),
        ({"x": torch.zeros(())}, r"x must be of shape \(..., d\)"),
        ({"weight": torch.zeros(5)}, r"weight must be of shape \(4,\)"),
        ({"bias": torch.zeros(1, 4)}, r"bias must be of shape \(4,\)"),
        ({"eps": 0.0}, "eps must be > 0, got 0.0"),
        ({"dtype": torch.int8}, "dtype must be None or a float dtype, got torch.int8"),
    ],
)
@pytest.mark.parametrize("operation", [normalize, reference.normalize])
def test_wrong_arguments_are_named(operation, wrong, message):
    with pytest.raises(ValueError, match=message):
        operation(**{"x": torch.zeros(3, 4), "weight": torch.zeros(4), **wrong})


def test_opcheck():
    if ON_CPU_PATH:
        pytest.skip("the CPU path composes PyTorch's operators")
    x, weight, bias = tokens(2, 3, 6).requires_grad_(), tokens(6).requires_grad_(), tokens(6).requires_grad_()
    torch.library.opcheck(torch.ops.colt5.normalize.default, (x, weight, bias, True, 1e-5, torch.bfloat16))


@pytest.mark.skipif(INTERPRETED, reason="what is compiled is PyTorch's part; the interpreter adds nothing but time")
def test_compiles_as_one_graph():
    x, weight = tokens(3, 10).requires_grad_(), tokens(10).requires_grad_()
    compiled = torch.compile(normalize, fullgraph=True, backend="aot_eager")
    outs = [function(x, weight, dtype=torch.bfloat16) for function in (compiled, normalize)]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(out.float().square().sum(), (x, weight)) for out in outs))


@pytest.mark.skipif(ON_CPU_PATH, reason="the CPU path has derivatives of any order")
def test_there_is_no_second_derivative():
    x, weight = tokens(3, 4).requires_grad_(), tokens(4)
    (gradient,) = torch.autograd.grad(normalize(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.gpu
def test_captured_in_a_cuda_graph_and_equal_from_run_to_run():
    x, weight, bias = tokens(5000, 96).requires_grad_(), tokens(96).requires_grad_(), tokens(96).requires_grad_()
    upstream = tokens(5000, 96, dtype=torch.bfloat16)

    def step():
        out = normalize(x, weight, bias, center=True, eps=1e-5, dtype=torch.bfloat16)
        return out.detach(), *torch.autograd.grad(out, (x, weight, bias), upstream)

    graph, captured = capture(step)
    with torch.no_grad():
        x.copy_(tokens(5000, 96))
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(captured, step(), strict=True))
