import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

import kernels
from reference import coor_descent, topk
from reference.topk import TopkReturn


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def test_the_example_of_the_systems_document():
    x = torch.randn(1024, 512)
    values, indices, coor_descent_values, gates = topk(x, k=10)
    expected = x.topk(10)
    # Gates are 1 except for the rounding of soft + (1 - soft).
    torch.testing.assert_close(values, expected.values, rtol=2e-7, atol=0)
    torch.testing.assert_close(gates, torch.ones(1024, 10), rtol=2e-7, atol=0)
    assert torch.equal(indices, expected.indices)
    assert ((coor_descent_values > 0) & (coor_descent_values <= 1)).all()
    assert indices.dtype == torch.int64


def test_returns_a_named_tuple():
    result = topk(randn(3, 8), 2)
    assert isinstance(result, TopkReturn)
    assert result._fields == ("values", "indices", "coor_descent_values", "gates")
    assert [part.shape for part in result] == [(3, 2)] * 4


@pytest.mark.parametrize(("k", "ratio", "descent_k"), [(4, 9 / 8, 4.5), (4, 1.0, 4.0), (8, 9 / 8, 9.0), (9, 9 / 8, 9)])
def test_coordinate_descent_sums_to_a_few_more_than_are_selected(k, ratio, descent_k):
    x, schedule = randn(2, 3, 9), {"n_iters": 7, "eps": 0.3, "eps_init": 2.0, "eps_decay": 0.6}
    result = topk(x, k, coor_descent_k_ratio=ratio, **schedule)
    relaxed = coor_descent(x, k=descent_k, **schedule)
    assert torch.equal(result.coor_descent_values, relaxed.gather(-1, result.indices))


def test_the_gradient_goes_through_the_relaxation_and_the_selected_entries():
    """Straight through: values are x times 1 in the forward pass, and x times the relaxation in the backward pass."""
    x, weights = randn(3, 9).requires_grad_(), randn(4, 3, 2)
    values, indices, soft, gates = topk(x, 2, eps=0.5)
    (gradient,) = torch.autograd.grad([values, soft, gates], x, list(weights[:3]))

    relaxed = coor_descent(x, n_iters=20, k=2 * 9 / 8, eps=0.5).gather(-1, indices)
    selected = x.gather(-1, indices)
    upstream = [weights[0], weights[0] * selected.detach() + weights[1] + weights[2]]
    (expected,) = torch.autograd.grad([selected, relaxed], x, upstream)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-13)
    # The next candidates have a gradient too.
    assert gradient.all()


def test_gradcheck_of_the_relaxed_selection():
    # Entries are so far apart that finite differences do not change the selection.
    x = torch.tensor([[0.0, 2.0, 1.0, -1.0], [3.0, 0.5, -2.0, 1.5]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, True, True, False])
    assert gradcheck(lambda x: topk(x, 2, eps=0.5, n_iters=5, mask=mask).coor_descent_values, x)


@pytest.mark.parametrize("shape", [(40,), (3, 1, 40), (3, 2, 40)], ids=str)
def test_masked_entries_are_never_selected(shape):
    x, mask = randn(3, 2, 40), torch.rand(shape) > 0.5
    # The largest, and values that no comparison orders.
    x = torch.where(mask, x, torch.tensor([1e6, torch.nan, torch.inf, -torch.inf]).repeat(10)).requires_grad_()
    values, indices, soft, gates = topk(x, 7, mask=mask)
    valid = mask.expand(x.shape)
    assert valid.gather(-1, indices).all()
    assert torch.equal(indices, x.detach().masked_fill(~valid, -1e9).topk(7).indices)

    (values.sum() + soft.sum() + gates.sum()).backward()
    assert not x.grad[~valid].any()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("non_differentiable", [False, True])
def test_fewer_valid_entries_than_k(non_differentiable):
    x = randn(3, 6).requires_grad_()
    mask = torch.tensor([[0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]]).bool()
    result = topk(x, 4, mask=mask, non_differentiable=non_differentiable)
    valid = mask.gather(-1, result.indices)
    # Valid entries come first.
    assert valid.tolist() == [[True, True, False, False], [False] * 4, [True] * 4]
    for part in (result.values, result.coor_descent_values, result.gates):
        if part is not None:
            assert torch.equal(part != 0, valid)
    result.values.sum().backward()
    assert x.grad.isfinite().all()
    assert not x.grad[1].any()


def test_where_the_relaxation_saturates_selection_is_by_score():
    x = 100 * torch.tensor([[5.0, 1.0, 4.0, 2.0, 3.0, 6.0]])
    result = topk(x, 3, coor_descent_k_ratio=2.0)
    assert (result.coor_descent_values == 1).all()
    assert result.indices.tolist() == [[5, 0, 2]]


def test_ties_are_selected_once_each():
    result = topk(torch.tensor([[1.0, 2.0, 1.0, 1.0, 2.0]]), 3)
    torch.testing.assert_close(result.values, torch.tensor([[2.0, 2.0, 1.0]]))
    assert sorted(result.indices[0, :2].tolist()) == [1, 4]
    assert result.indices[0, 2].item() in (0, 2, 3)
    assert result.coor_descent_values[0, 0] == result.coor_descent_values[0, 1]


def test_non_differentiable_is_the_hard_selection_alone():
    x = randn(3, 9).requires_grad_()
    values, indices, soft, gates = topk(x, 4, non_differentiable=True)
    assert (soft, gates) == (None, None)
    assert torch.equal(values, x.topk(4).values)
    (gradient,) = torch.autograd.grad(values.sum(), x)
    assert torch.equal(gradient, torch.zeros_like(x).scatter(-1, indices, 1.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_keeps_the_dtype(dtype):
    result = topk(torch.randn(3, 9).to(dtype), 4)
    assert {part.dtype for part in result} == {dtype, torch.int64}


def test_fused_is_what_the_kernels_compute():
    x = torch.randn(3, 40)
    for ours, theirs in zip(topk(x, 5, eps=0.3, fused=True), kernels.topk(x, 5, eps=0.3, fused=True), strict=True):
        assert torch.equal(ours, theirs)


@given(st.data())
def test_laws(data):
    """k distinct places, values in descending order, and no larger one left out."""
    row = data.draw(st.lists(st.floats(-50, 50), min_size=1, max_size=25))
    k = data.draw(st.integers(1, len(row)))
    x = torch.tensor(row, dtype=torch.float64)
    values, indices, soft, _ = topk(x, k)
    assert len(set(indices.tolist())) == k
    torch.testing.assert_close(values, torch.tensor(sorted(row, reverse=True)[:k], dtype=torch.float64))
    assert (soft.diff() <= 0).all()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": 0}, "k must be from 1 to n = 5, got 0"),
        ({"k": 6}, "k must be from 1 to n = 5, got 6"),
        ({"coor_descent_k_ratio": 0.9}, "coor_descent_k_ratio must be >= 1, got 0.9"),
        ({"x": torch.ones(3, 5, dtype=torch.int64)}, "must be a tensor of a float dtype, got torch.int64"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, r"mask must be of a shape that broadcasts to \(3, 5\)"),
        ({"n_iters": 0}, "n_iters must be >= 1, got 0"),
        ({"eps": 0.0}, "eps must be > 0, got 0.0"),
        ({"eps_decay": 0.0}, r"eps_decay must be in \(0, 1\], got 0.0"),
    ],
)
def test_wrong_arguments_are_named(wrong, message, fused):
    arguments = {"x": torch.randn(3, 5), "k": 2, **wrong}
    with pytest.raises(ValueError, match=message):
        topk(**arguments, fused=fused)
