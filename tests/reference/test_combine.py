import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from reference import combine

GENERATOR = torch.Generator().manual_seed(1)
ROUTED, SCORES, NULL, LIGHT, RESIDUAL = (
    torch.randn(shape, generator=GENERATOR, dtype=torch.float64)
    for shape in ((2, 3, 4), (2, 3), (4,), (2, 6, 4), (2, 6, 4))
)
INDICES = torch.tensor([[5, 0, 2], [1, 6, 9]])
"""Two tokens of the second sequence have no place."""


@pytest.mark.parametrize("null", [None, NULL])
@pytest.mark.parametrize("light", [None, LIGHT])
@pytest.mark.parametrize("residual", [None, RESIDUAL])
@pytest.mark.parametrize("start", [0, 2, 6])
def test_one_token_at_a_time(null, light, residual, start):
    out = combine(ROUTED, SCORES, INDICES, length=6, null=null, light=light, residual=residual, start=start)
    for b in range(2):
        for i in range(6):
            expected = torch.zeros(4, dtype=torch.float64) if null is None or i < start else null.clone()
            for j in range(3):
                if INDICES[b, j] == i:
                    expected = SCORES[b, j] * ROUTED[b, j]
            expected = expected + sum(branch[b, i] for branch in (light, residual) if branch is not None)
            torch.testing.assert_close(out[b, i], expected)


def test_dtype_of_the_result():
    half = ROUTED.bfloat16()
    assert combine(half, SCORES.bfloat16(), INDICES, length=6).dtype == torch.bfloat16
    assert combine(half, SCORES.float(), INDICES, length=6).dtype == torch.float32
    assert combine(half, SCORES.float(), INDICES, length=6, dtype=torch.float16).dtype == torch.float16


def test_gradients():
    def function(*inputs):
        routed, scores, null, light, residual = inputs
        return combine(routed, scores, INDICES, length=6, null=null, light=light, residual=residual)

    inputs = tuple(each.clone().requires_grad_() for each in (ROUTED, SCORES, NULL, LIGHT, RESIDUAL))
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)
