import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference import select


def test_the_largest_first():
    scores = torch.randn(3, 4, 20)
    values, indices = scores.topk(7)
    assert torch.equal(select(scores, num_selected=7), indices)
    assert torch.equal(scores.gather(-1, indices), values)


def test_of_equal_scores_the_first():
    assert select(torch.tensor([1.0, 2.0, 1.0, 2.0, 0.0, -0.0, 0.0]), num_selected=7).tolist() == [1, 3, 0, 2, 4, 5, 6]


def test_nan_is_largest_and_minus_infinity_no_mask():
    scores = torch.tensor([[1.0, math.nan, math.inf, -math.inf, math.nan, 0.0]])
    mask = torch.tensor([True, True, True, True, True, False])
    assert select(scores, num_selected=6, mask=mask).tolist() == [[1, 4, 2, 0, 3, 5]]


def test_masked_entries_come_last_in_their_order():
    scores = torch.tensor([[3.0, 9.0, math.nan, 1.0], [4.0, 1.0, 7.0, 2.0]])
    mask = torch.tensor([[True, False, False, True], [False] * 4])
    assert select(scores, num_selected=4, mask=mask).tolist() == [[0, 3, 1, 2], [0, 1, 2, 3]]


def test_has_no_gradient():
    assert not select(torch.randn(5, requires_grad=True), num_selected=2).requires_grad


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=20), st.data())
def test_is_a_stable_sort(numbers, data):
    k = data.draw(st.integers(1, len(numbers)))
    expected = sorted(range(len(numbers)), key=lambda i: (-numbers[i], i))[:k]
    assert select(torch.tensor(numbers, dtype=torch.float64), num_selected=k).tolist() == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_selected": 0}, "num_selected must be from 1 to n = 5, got 0"),
        ({"num_selected": 6}, "num_selected must be from 1 to n = 5, got 6"),
        ({"scores": torch.ones(5, dtype=torch.int64)}, "scores must be a tensor of a float dtype, got torch.int64"),
        ({"mask": torch.ones(5)}, "mask must be a tensor of dtype torch.bool, got torch.float32"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        select(**{"scores": torch.randn(2, 5), "num_selected": 2, **arguments})
