import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from reference import normalize

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
WEIGHT, BIAS = torch.linspace(0.5, 2, 8, dtype=torch.float64), torch.linspace(-1, 1, 8, dtype=torch.float64)


@pytest.mark.parametrize("bias", [None, BIAS])
def test_is_what_pytorch_makes_of_it(bias):
    torch.testing.assert_close(
        normalize(X, WEIGHT, bias, center=True, eps=1e-3), F.layer_norm(X, (8,), WEIGHT, bias, 1e-3)
    )
    expected = F.rms_norm(X, (8,), WEIGHT, 1e-30)
    torch.testing.assert_close(normalize(X, WEIGHT, bias), expected if bias is None else expected + bias)


def test_a_token_by_hand():
    out = normalize(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 10.0]))
    torch.testing.assert_close(out, torch.tensor([0.6, 8.0]) * 2**0.5)
    short = normalize(torch.tensor([3e-3, 4e-3]), torch.ones(2), eps=1e-2)
    torch.testing.assert_close(short, torch.tensor([0.3, 0.4]) * 2**0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    """A norm of 300 x 300 entries of 300 is not an fp16 number."""
    x, weight = (300 * X.repeat(1, 1, 300)).to(dtype), torch.ones(2400, dtype=dtype)
    assert torch.equal(normalize(x, weight), normalize(x.double(), weight.double()).to(dtype))
    wide = normalize(x, weight, dtype=torch.float32)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide.double(), normalize(x.double(), weight.double()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("center", [False, True])
def test_gradients(center):
    def function(x, weight, bias):
        return normalize(x, weight, bias, center=center, eps=1e-3)

    inputs = tuple(each.clone().requires_grad_() for each in (X[0, :2], WEIGHT, BIAS))
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)
