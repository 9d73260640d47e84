import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from reference import coor_descent

CONSTANT = {"n_iters": 6, "eps": 0.2}
DECAYING = {"n_iters": 6, "eps": 0.1, "eps_init": 2.0, "eps_decay": 0.5}
SCHEDULES = pytest.mark.parametrize("options", [CONSTANT, DECAYING], ids=["constant", "decaying"])


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def row_by_hand(scores, k, n_iters, eps, eps_init=None, eps_decay=1.0):
    """The definition (docs/design.md, section 1) on one row, a list of Python's floats, with every sum rounded once."""
    temperature = max(eps if eps_init is None else eps_init, eps)
    b = [-s for s in scores]
    for _ in range(n_iters):
        exponents = [(s + b_i) / temperature for s, b_i in zip(scores, b, strict=True)]
        largest = max(exponents)
        log_sum = largest + math.log(math.fsum(math.exp(x - largest) for x in exponents))
        a = temperature * (math.log(k) - log_sum)
        b = [-max(s + a, 0.0) for s in scores]
        temperature = max(temperature * eps_decay, eps)
    return [math.exp((s + a + b_i) / temperature) for s, b_i in zip(scores, b, strict=True)]


def by_hand(scores, k, mask=None, **options):
    """`row_by_hand` of the valid entries of each row; the others are 0."""
    n, shape = scores.shape[-1], scores.shape
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand(shape)
    k = torch.as_tensor(k, dtype=scores.dtype).expand(shape[:-1])
    y = torch.zeros(shape).double().reshape(-1, n)
    for row, (s, valid, k_row) in enumerate(
        zip(scores.reshape(-1, n), mask.reshape(-1, n), k.reshape(-1), strict=True)
    ):
        if valid.any():
            y[row, valid] = torch.tensor(row_by_hand(s[valid].tolist(), k_row.item(), **options), dtype=torch.float64)
    return y.view(shape)


@SCHEDULES
@pytest.mark.parametrize("spread", [0.0, 1.0, 20.0])
@pytest.mark.parametrize(
    ("shape", "k"), [((1,), 0.5), ((3, 7), 2), ((2, 3, 30), 4.5), ((2, 9), 9), ((2, 9), 40)], ids=str
)
def test_is_the_definition(shape, k, spread, options):
    scores = spread * randn(*shape)
    # Rounding of numbers as large as the scores, in each iteration, divided by the temperature in the exponent.
    bound = 1e-15 * options["n_iters"] * (1 + 5 * spread) / options["eps"]
    expected = by_hand(scores, k, **options)
    torch.testing.assert_close(coor_descent(scores, k=k, **options), expected, rtol=0, atol=bound)


@SCHEDULES
@pytest.mark.parametrize("shape", [(9,), (3, 1, 9), (2, 1), (3, 2, 9)], ids=str)
def test_masks_and_k_broadcast(shape, options):
    scores, mask = randn(3, 2, 9), torch.rand(shape) > 0.3
    for k in (torch.tensor(2), torch.tensor([1.5, 3.0]), torch.tensor([[1.0], [2.0], [4.0]])):
        expected = by_hand(scores, k, mask, **options)
        torch.testing.assert_close(coor_descent(scores, k=k, mask=mask, **options), expected, rtol=0, atol=1e-12)


@SCHEDULES
@pytest.mark.parametrize("masked", [False, True])
def test_first_and_second_derivatives(masked, options):
    scores, k = randn(3, 6).requires_grad_(), torch.tensor([1.0, 2.5, 8.0], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0], [1, 0, 1, 1, 1, 1]]).bool() if masked else None

    def function(scores, k):
        return coor_descent(scores, k=k, mask=mask, **{**options, "n_iters": 4})

    assert gradcheck(function, (scores, k))
    assert gradgradcheck(function, (scores, k))


def test_relu_has_no_slope_at_its_kink():
    """With k = n the first a is exactly 0. An entry of score 0 is then at the kink, and counts as below it."""
    scores = torch.tensor([0.0, -0.5, -1.0, -2.0], dtype=torch.float64, requires_grad=True)
    options = {"n_iters": 2, "k": 4.0, "eps": 0.5}
    (at_kink,) = torch.autograd.grad(coor_descent(scores, **options)[1], scores)
    below = scores.detach() - torch.tensor([1e-9, 0, 0, 0])
    (expected,) = torch.autograd.grad(coor_descent(below.requires_grad_(), **options)[1], below)
    above = scores.detach() + torch.tensor([1e-9, 0, 0, 0])
    (other,) = torch.autograd.grad(coor_descent(above.requires_grad_(), **options)[1], above)
    torch.testing.assert_close(at_kink, expected, rtol=0, atol=1e-7)
    assert (at_kink - other).abs().max() > 0.01


def test_what_is_masked_takes_part_in_nothing():
    scores, mask = randn(2, 30), torch.rand(2, 30) > 0.4
    clean = scores.clone().requires_grad_()
    polluted = scores.masked_fill(~mask, torch.nan).requires_grad_()
    outputs = [coor_descent(s, k=4, mask=mask, **DECAYING) for s in (clean, polluted)]
    assert torch.equal(*outputs)
    assert not outputs[0][~mask].any()

    upstream = randn(2, 30).masked_fill(~mask, torch.inf)
    gradients = [torch.autograd.grad(y, s, upstream)[0] for y, s in zip(outputs, (clean, polluted), strict=True)]
    assert torch.equal(*gradients)
    assert not gradients[0][~mask].any()
    assert gradients[0][mask].all()


def test_a_row_without_a_valid_entry_is_zero_and_has_no_gradient():
    scores, k = randn(3, 8).requires_grad_(), torch.full((3,), 2.0, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, False, True])[:, None]
    y = coor_descent(scores, k=k, mask=mask, **CONSTANT)
    y.backward(randn(3, 8))
    for tensor in (y[:, 0], scores.grad[:, 0], k.grad):
        assert (tensor == 0).tolist() == [False, True, False]
    assert not y[1].any()
    assert not scores.grad[1].any()


def test_a_nan_stays_in_its_row():
    scores = randn(3, 8)
    clean = coor_descent(scores, k=2, **CONSTANT)
    scores[1, 4] = torch.nan
    y = coor_descent(scores.requires_grad_(), k=2, **CONSTANT)
    assert y[1].isnan().all()
    assert torch.equal(y[::2], clean[::2])
    y.backward(torch.ones_like(y))
    assert scores.grad.isnan().all(dim=-1).tolist() == [False, True, False]


@pytest.mark.parametrize("k", [0.0, -1.0, math.nan])
def test_a_k_that_is_not_positive_makes_its_row_nan(k):
    y = coor_descent(randn(3, 8), k=torch.tensor([2.0, k, 2.0]), **CONSTANT)
    assert y.isnan().tolist() == [[row == 1] * 8 for row in range(3)]


@pytest.mark.parametrize("eps", [1e-3, 1.0])
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_scores(eps, scale):
    scores = randn(2, 20)
    scores[0] *= scale
    scores[1, 3] = scale
    expected = by_hand(scores, 3, n_iters=6, eps=eps)
    # 1e4 has an error of 2e-12, which the exponent divides by eps, in each iteration.
    torch.testing.assert_close(coor_descent(scores, k=3, n_iters=6, eps=eps), expected, rtol=0, atol=6 * 4e-12 / eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_computes_in_the_dtype_of_the_scores(dtype):
    scores, k = randn(3, 16).to(dtype), torch.tensor([1, 2, 3])
    y = coor_descent(scores, k=k, n_iters=3, eps=1.0)
    assert y.dtype == dtype
    # A few roundings of numbers of up to 8, divided by a temperature of 1.
    bound = 3 * 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), by_hand(scores.double(), k, n_iters=3, eps=1.0), rtol=0, atol=bound)


@given(
    row=st.lists(st.floats(-20, 20, allow_subnormal=False), min_size=1, max_size=30),
    k=st.floats(0.1, 40),
    options=st.sampled_from([CONSTANT, DECAYING]),
)
def test_laws(row, k, options):
    """In [0, 1], monotone in the scores, and temperatures are in units of the scores."""
    scores = torch.tensor(row, dtype=torch.float64)
    y = coor_descent(scores, k=k, **options)
    assert ((y >= 0) & (y <= 1)).all()
    # (s + a) - relu(s + a) is monotone in s, rounded or not.
    assert (y[scores.argsort()].diff() >= 0).all()
    # A factor of 2 is exact in every step.
    twice = {name: 2 * value if name in ("eps", "eps_init") else value for name, value in options.items()}
    assert torch.equal(coor_descent(2 * scores, k=k, **twice), y)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)], ids=str)
def test_no_rows(shape):
    scores = randn(*shape).requires_grad_()
    y = coor_descent(scores, k=torch.ones(shape[:-1]), mask=torch.ones(5).bool(), **CONSTANT)
    y.sum().backward()
    assert y.shape == scores.grad.shape == shape


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scores": torch.ones(3, dtype=torch.int32)}, "scores must be"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, "mask must be"),
        ({"k": 0}, "k must be"),
        ({"n_iters": 0}, "n_iters must be"),
        ({"eps": -1.0}, "eps must be"),
        ({"eps_init": 0.0}, "eps_init must be"),
        ({"eps_decay": 2.0}, "eps_decay must be"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(wrong, message):
    arguments = {"scores": torch.ones(2, 3), "n_iters": 5, "k": 2, **wrong}
    with pytest.raises(ValueError, match=message):
        coor_descent(arguments.pop("scores"), **arguments)
