"""The fused bias and activation against the plain one in fp64: CPU path, Triton's interpreter, GPU."""

import pytest
import torch
import triton

import reference
from kernels import biased_gelu
from tests.kernels.devices import DEVICE, capture, rounding, tokens

INTERPRETED = triton.knobs.runtime.interpret
ON_CPU_PATH = DEVICE == "cpu" and not INTERPRETED


def check(x, bias=None):
    given = [x, tokens(x.shape[-1]) if bias is None else bias]
    fused, plain = (
        [e.detach().clone().to(t or e.dtype).requires_grad_() for e in given] for t in (None, torch.float64)
    )
    out, expected = biased_gelu(*fused), reference.biased_gelu(*plain)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    upstream = torch.randn_like(out)
    gradients = torch.autograd.grad(out, fused, upstream)
    truths = torch.autograd.grad(expected, plain, upstream.double())
    for actual, truth in zip((out, *gradients), (expected, *truths), strict=True):
        largest = truth.abs().max().item() if truth.numel() else 0.0
        torch.testing.assert_close(actual.double(), truth, rtol=0, atol=rounding(actual) * largest)
    for actual, value in zip(gradients, fused, strict=True):
        assert actual.dtype == value.dtype


@pytest.mark.parametrize("shape", [(3, 5, 48), (1, 7), (2, 2, 5), (0, 16), (9, 33), (6,), (3, 2100), (700, 3)], ids=str)
def test_matches_plain_pytorch(shape):
    check(tokens(*shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    check(tokens(6, 40, dtype=dtype))
    check(tokens(6, 40, dtype=dtype), tokens(40, dtype=dtype))


def test_a_bias_of_more_than_tokens_have():
    x, bias = tokens(3, 8), tokens(8).double()
    torch.testing.assert_close(biased_gelu(x, bias), reference.biased_gelu(x.double(), bias).float())


def test_strides():
    check(tokens(16, 6).mT)
    check(tokens(4, 6, 10)[:, ::2, 1:])
    check(tokens(1, 12).expand(5, 12))
    check(tokens(4, 6), tokens(12)[::2])
    x, bias = tokens(4, 6).requires_grad_(), tokens(6).requires_grad_()
    # The gradient of a sum has stride 0.
    gradients = torch.autograd.grad(biased_gelu(x, bias).sum(), (x, bias))
    expected = torch.autograd.grad(reference.biased_gelu(x, bias).sum(), (x, bias))
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)


def test_rows_that_programs_share():
    """More tiles than programs on one multiprocessor, and rows that do not fill a tile."""
    check(tokens(9 * 2048 // 4 + 1, 3))


def test_far_from_0_it_is_a_ramp():
    x = torch.tensor([[-1e30, -40.0, -15.0, 15.0, 40.0, 1e18]], device=DEVICE)
    x.requires_grad_()
    out = biased_gelu(x, torch.zeros(6, device=DEVICE))
    assert out.tolist() == [[0, 0, 0, 15, 40, x[0, -1].item()]]
    assert torch.autograd.grad(out.sum(), x)[0].tolist() == [[0, 0, 0, 1, 1, 1]]


def test_nan_stays_in_its_place():
    x = tokens(3, 8)
    x[1, 4] = torch.nan
    assert torch.equal(biased_gelu(x, tokens(8)).isnan(), x.isnan())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.zeros(3, 4, dtype=torch.int64)}, "x must be a tensor of a float dtype, got torch.int64"),
        ({"x": torch.zeros(())}, r"x must be of shape \(..., d\)"),
        ({"bias": torch.zeros(1, 4)}, r"bias must be of shape \(4,\)"),
        ({"bias": torch.zeros(4, dtype=torch.int64)}, "bias must be a tensor of a float dtype, got torch.int64"),
    ],
)
@pytest.mark.parametrize("operation", [biased_gelu, reference.biased_gelu])
def test_wrong_arguments_are_named(operation, wrong, message):
    with pytest.raises(ValueError, match=message):
        operation(**{"x": torch.zeros(3, 4), "bias": torch.zeros(4), **wrong})


def test_opcheck():
    if ON_CPU_PATH:
        pytest.skip("the CPU path composes PyTorch's operators")
    x, bias = tokens(2, 3, 6).requires_grad_(), tokens(6).requires_grad_()
    torch.library.opcheck(torch.ops.colt5.biased_gelu.default, (x, bias))


@pytest.mark.skipif(INTERPRETED, reason="what is compiled is PyTorch's part; the interpreter adds nothing but time")
def test_compiles_as_one_graph():
    x, bias = tokens(3, 10).requires_grad_(), tokens(10).requires_grad_()
    compiled = torch.compile(biased_gelu, fullgraph=True, backend="aot_eager")
    outs = [function(x, bias) for function in (compiled, biased_gelu)]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), (x, bias)) for out in outs))


@pytest.mark.skipif(ON_CPU_PATH, reason="the CPU path has derivatives of any order")
def test_there_is_no_second_derivative():
    x, bias = tokens(3, 4).requires_grad_(), tokens(4)
    (gradient,) = torch.autograd.grad(biased_gelu(x, bias).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.gpu
def test_captured_in_a_cuda_graph_and_equal_from_run_to_run():
    x, bias = tokens(5000, 96, dtype=torch.bfloat16).requires_grad_(), tokens(96).requires_grad_()
    upstream = tokens(5000, 96, dtype=torch.bfloat16)

    def step():
        out = biased_gelu(x, bias)
        return out.detach(), *torch.autograd.grad(out, (x, bias), upstream)

    graph, captured = capture(step)
    with torch.no_grad():
        x.copy_(tokens(5000, 96))
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(captured, step(), strict=True))
