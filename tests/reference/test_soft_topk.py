import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from reference import coor_descent, soft_topk


def bisect(row, k, eps):
    """y of one fp64 row by bisection of a, without sets or sorting."""
    low, high = -row.max() - eps * math.log(len(row) / k) - 1, -row.min() + 1
    for _ in range(200):
        a = (low + high) / 2
        low, high = (a, high) if ((row + a) / eps).clamp(max=0).exp().sum() < k else (low, a)
    return ((row + low) / eps).clamp(max=0).exp()


@pytest.mark.parametrize("spread", [0.0, 1.0, 22.6])
@pytest.mark.parametrize("eps", [1e-2, 0.3, 5.0])
@pytest.mark.parametrize(("n", "k"), [(1, 0.5), (7, 1), (7, 2.5), (7, 6.9), (300, 40), (300, 299.5)])
def test_solves_the_equation(n, k, eps, spread):
    scores = torch.randn(3, n, dtype=torch.float64) * spread
    y = soft_topk(scores, k=k, eps=eps)
    # Bisection ends at one unit in the last place of a, which the exponent divides by eps.
    tolerance = 1e-13 * (1 + spread) / eps
    torch.testing.assert_close(y, torch.stack([bisect(row, k, eps) for row in scores]), rtol=0, atol=tolerance)
    torch.testing.assert_close(y.sum(-1), torch.full((3,), float(k), dtype=torch.float64), rtol=1e-12, atol=0)


def test_is_what_coordinate_descent_converges_to():
    scores = torch.randn(4, 64, dtype=torch.float64)
    descent = coor_descent(scores, n_iters=3000, k=9, eps=0.3)
    torch.testing.assert_close(soft_topk(scores, k=9, eps=0.3), descent, rtol=0, atol=1e-9)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients(masked):
    scores = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    k = torch.tensor([2.0, 3.5, 10.0], dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 9) > 0.3 if masked else None

    def function(scores, k):
        return soft_topk(scores, k=k, eps=0.4, mask=mask)

    assert gradcheck(function, (scores, k))
    assert gradgradcheck(function, (scores, k))


def test_gradient_is_that_of_the_implicit_function():
    scores = torch.randn(5, 50, dtype=torch.float64, requires_grad=True)
    k = torch.full((5,), 6.5, dtype=torch.float64, requires_grad=True)
    y, g, eps = soft_topk(scores, k=k, eps=0.05), torch.randn(5, 50, dtype=torch.float64), 0.05
    ds, dk = torch.autograd.grad(y, (scores, k), g)
    free = torch.where(y < 1, y, 0.0)
    mean = (g * free).sum(-1, keepdim=True) / free.sum(-1, keepdim=True)
    torch.testing.assert_close(ds, free / eps * (g - mean))
    torch.testing.assert_close(dk, mean[:, 0])


def test_rows_with_no_equation_to_solve():
    scores = torch.randn(6, 5, dtype=torch.float64)
    scores[4, 1] = scores[5, 2] = math.nan
    mask = torch.ones(6, 5, dtype=torch.bool)
    mask[0] = mask[5, 2] = mask[1, :2] = False
    scores.requires_grad_()
    k = torch.tensor([1.0, 3.0, 0.0, -1.0, 9.0, 2.0], dtype=torch.float64, requires_grad=True)
    y = soft_topk(scores, k=k, eps=1e-3, mask=mask)
    assert (y[0] == 0).all()
    assert (y[1] == mask[1]).all()
    assert y[2:5].isnan().all()
    assert y[5, 2] == 0
    assert y[5].sum().item() == pytest.approx(2)
    ds, dk = torch.autograd.grad(y[[0, 1, 5]].sum(), (scores, k))
    assert (ds[:2] == 0).all()
    assert (dk[:2] == 0).all()
    assert ds[5].isfinite().all()
    assert dk[5].item() == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_other_dtypes_follow_fp64(dtype, scale):
    scores = (torch.randn(4, 100) * scale).to(dtype)
    y = soft_topk(scores, k=12, eps=0.5)
    assert y.dtype == dtype
    # A few roundings of a relevant exponent of at most 12, the log of the smallest y.
    tolerance = 40 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), soft_topk(scores.double(), k=12, eps=0.5), rtol=0, atol=tolerance)


def test_shapes():
    scores = torch.randn(2, 3, 11)
    k = torch.tensor([[1.0], [4.0]])
    y = soft_topk(scores, k=k, eps=0.1)
    torch.testing.assert_close(y.sum(-1), k.expand(2, 3))
    torch.testing.assert_close(y[1, 2], soft_topk(scores[1, 2], k=4, eps=0.1))
    assert soft_topk(scores[:0], k=1, eps=0.1).shape == (0, 3, 11)
    mask = torch.arange(11) < 4
    torch.testing.assert_close(
        soft_topk(scores, k=2, eps=0.1, mask=mask)[..., :4], soft_topk(scores[..., :4], k=2, eps=0.1)
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"k": 0}, "k"),
        ({"k": torch.ones(7)}, "k"),
        ({"eps": 0.0}, "eps"),
        ({"eps": math.nan}, "eps"),
        ({"mask": torch.ones(2, 5)}, "mask"),
        ({"mask": torch.ones(3, 5, dtype=torch.bool)}, "mask"),
        ({"scores": torch.ones(2, 5, dtype=torch.int64)}, "scores"),
        ({"scores": torch.ones(2, 0)}, "scores"),
    ],
)
def test_wrong_arguments(arguments, named):
    with pytest.raises(ValueError, match=rf"^{named} must be .*, got "):
        soft_topk(**{"scores": torch.randn(2, 5), "k": 2, "eps": 0.1, **arguments})


@given(st.lists(st.integers(-40, 40), min_size=2, max_size=30), st.floats(0.05, 1.2), st.sampled_from([1e-3, 0.1, 3.0]))
def test_properties(numbers, share, eps):
    scores = torch.tensor(numbers, dtype=torch.float64) / 8
    k = share * len(numbers)
    y = soft_topk(scores, k=k, eps=eps)
    assert y.sum() == pytest.approx(min(k, len(numbers)), rel=1e-10)
    assert ((y >= 0) & (y <= 1 + 1e-12)).all()
    torch.testing.assert_close(soft_topk(scores + 7.25, k=k, eps=eps), y, rtol=0, atol=1e-12)
    order = scores.argsort()
    assert (y[order].diff() >= 0).all()
    torch.testing.assert_close(soft_topk(scores[order], k=k, eps=eps), y[order], rtol=0, atol=1e-12)
