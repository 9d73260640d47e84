import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from reference import biased_gelu

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
BIAS = torch.linspace(-1, 1, 8, dtype=torch.float64)


def test_is_what_pytorch_makes_of_it():
    torch.testing.assert_close(biased_gelu(X, BIAS), F.gelu(X + BIAS))


def test_a_token_by_hand():
    out = biased_gelu(torch.tensor([1.5, -3.0]), torch.tensor([0.5, 2.0]))
    expected = [x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in (2.0, -1.0)]
    torch.testing.assert_close(out, torch.tensor(expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    """The bias keeps digits that are too small for the dtype of tokens."""
    x = X.to(dtype)
    out = biased_gelu(x, BIAS.float())
    assert out.dtype == dtype
    assert torch.equal(out, biased_gelu(x.float(), BIAS.float()).to(dtype))
    assert not torch.equal(out, F.gelu(x + BIAS.to(dtype)))


def test_gradients():
    inputs = tuple(each.clone().requires_grad_() for each in (X[0, :2], BIAS))
    assert gradcheck(biased_gelu, inputs)
    assert gradgradcheck(biased_gelu, inputs)
