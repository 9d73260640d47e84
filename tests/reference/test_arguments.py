import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference._shared.arguments import (
    FLOAT_DTYPES,
    check_counts,
    check_k,
    check_schedule,
    check_scores,
    check_tokens,
    epsilon_schedule,
    first_temperature,
    require,
)

SCORES = torch.zeros(2, 3, 5)


def test_require_names_the_argument_its_value_and_what_is_allowed():
    require(True, "depth", 3, "> 2")
    with pytest.raises(ValueError, match=r"^depth must be > 2, got 1$"):
        require(False, "depth", 1, "> 2")
    with pytest.raises(ValueError, match=r"^x must be of shape \(2, 3, 5\) or \(1, 5\), got shape \(4,\)$"):
        require(False, "x", torch.zeros(4).shape, "of shape {} or (1, {})", SCORES.shape, 5)
    with pytest.raises(ValueError, match=r"^x must be on meta, the device of y, got on cpu$"):
        require(False, "x", SCORES.device, "on {}, the device of y", torch.device("meta"))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", [(1,), (0, 5), (2, 3, 5)], ids=str)
def test_scores_of_any_float_dtype(dtype, shape):
    check_scores(torch.zeros(shape, dtype=dtype), None)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), "scores must be a tensor of a float dtype, got torch.int64"),
        (torch.zeros(3, dtype=torch.complex64), "scores must be a tensor of a float dtype, got torch.complex64"),
        (torch.zeros(()), r"scores must be of shape \(..., n\), got a tensor without dimensions"),
        (torch.zeros(3, 0), r"scores must be of shape \(..., n\) with n >= 1, got shape \(3, 0\)"),
    ],
)
def test_wrong_scores(scores, message):
    with pytest.raises(ValueError, match=message):
        check_scores(scores, None)


@pytest.mark.parametrize("shape", [(), (5,), (1,), (3, 1), (1, 3, 5), (2, 3, 5)], ids=str)
def test_a_mask_that_broadcasts(shape):
    check_scores(SCORES, torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 3, 5), "mask must be a tensor of dtype torch.bool, got torch.float32"),
        (torch.ones(4, dtype=torch.bool), r"mask must be of a shape that broadcasts to \(2, 3, 5\).*got shape \(4,\)"),
        (torch.ones(2, 1, 3, 5, dtype=torch.bool), r"got shape \(2, 1, 3, 5\)"),
        (torch.ones(1, 2, 3, 5, dtype=torch.bool), r"got shape \(1, 2, 3, 5\)"),
        (torch.ones(5, dtype=torch.bool, device="meta"), "mask must be on cpu, the device of scores, got on meta"),
    ],
)
def test_wrong_masks(mask, message):
    with pytest.raises(ValueError, match=message):
        check_scores(SCORES, mask)


@pytest.mark.parametrize("shape", [(), (3,), (1,), (2, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.float64])
def test_one_k_a_row(shape, dtype):
    check_k(torch.ones(shape, dtype=dtype), SCORES)


def test_the_values_of_a_k_tensor_are_not_looked_at():
    check_k(torch.full((3,), -1.0), SCORES)


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (0, "k must be > 0, got 0"),
        (-2.5, "k must be > 0, got -2.5"),
        (float("nan"), "k must be > 0, got nan"),
        (torch.ones(3, dtype=torch.bool), "k must be a number or a tensor of real numbers, got torch.bool"),
        (torch.ones(3, dtype=torch.complex64), "k must be a number or a tensor of real numbers, got torch.complex64"),
        (torch.ones(5), r"k must be of a shape that broadcasts to \(2, 3\), .*one k per row, got shape \(5,\)"),
        (torch.ones(2, 3, 1), r"got shape \(2, 3, 1\)"),
        (torch.ones(3, device="meta"), "k must be on cpu, the device of scores, got on meta"),
    ],
)
def test_wrong_k(k, message):
    with pytest.raises(ValueError, match=message):
        check_k(k, SCORES)


@pytest.mark.parametrize("schedule", [(1, 0.1, None, 1.0), (50, 1e-3, 4.0, 0.7), (5, 0.1, 0.01, 1e-9)])
def test_schedules(schedule):
    check_schedule(*schedule)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ((0, 0.1, None, 1.0), "n_iters must be >= 1, got 0"),
        ((-3, 0.1, None, 1.0), "n_iters must be >= 1, got -3"),
        ((1, 0.0, None, 1.0), "eps must be > 0, got 0.0"),
        ((1, float("nan"), None, 1.0), "eps must be > 0, got nan"),
        ((1, 0.1, 0.0, 1.0), "eps_init must be None or > 0, got 0.0"),
        ((1, 0.1, -4.0, 1.0), "eps_init must be None or > 0, got -4.0"),
        ((1, 0.1, None, 0.0), r"eps_decay must be in \(0, 1\], got 0.0"),
        ((1, 0.1, None, 1.1), r"eps_decay must be in \(0, 1\], got 1.1"),
    ],
)
def test_wrong_schedules(schedule, message):
    with pytest.raises(ValueError, match=message):
        check_schedule(*schedule)


@pytest.mark.parametrize(("eps_init", "first"), [(None, 0.1), (4.0, 4.0), (0.01, 0.1)])
def test_the_first_temperature_is_not_below_the_last(eps_init, first):
    assert first_temperature(0.1, eps_init) == first
    assert next(epsilon_schedule(5, 0.1, eps_init, 0.5)) == first


def test_temperatures_fall_by_the_decay_until_eps():
    # Powers of two, so that every product is exact.
    assert list(epsilon_schedule(5, 0.375, 4.0, 0.5)) == [4.0, 2.0, 1.0, 0.5, 0.375, 0.375]
    assert list(epsilon_schedule(1, 0.375, 4.0, 0.5)) == [4.0, 2.0]


def test_temperatures_are_constant_without_a_decay():
    assert list(epsilon_schedule(3, 0.1, 4.0, 1.0)) == [4.0] * 4
    assert list(epsilon_schedule(3, 0.1, None, 0.5)) == [0.1] * 4


@given(
    n_iters=st.integers(1, 60),
    eps=st.floats(1e-3, 10.0),
    eps_init=st.none() | st.floats(1e-3, 100.0),
    eps_decay=st.floats(0.01, 1.0),
)
def test_one_temperature_an_iteration_and_one_for_the_output(n_iters, eps, eps_init, eps_decay):
    temperatures = list(epsilon_schedule(n_iters, eps, eps_init, eps_decay))
    assert len(temperatures) == n_iters + 1
    assert min(temperatures) >= eps
    for warmer, cooler in itertools.pairwise(temperatures):
        assert cooler == max(warmer * eps_decay, eps)


def test_counts():
    check_counts(heads=1, dim=512)
    with pytest.raises(ValueError, match="dim must be >= 1, got 0"):
        check_counts(heads=1, dim=0)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 5), (0, 3, 5), (2, 0, 5)], ids=str)
def test_tokens(dtype, shape):
    check_tokens(torch.zeros(shape, dtype=dtype), 5)
    check_tokens(torch.zeros(shape, dtype=dtype), 5, torch.ones(shape[:2], dtype=torch.bool))


@pytest.mark.parametrize(
    ("x", "mask", "message"),
    [
        (torch.zeros(2, 3, 5).long(), None, "context must be a tensor of a float dtype, got torch.int64"),
        (torch.zeros(3, 5), None, r"context must be of shape \(b, n, 5\), got shape \(3, 5\)"),
        (torch.zeros(2, 3, 4), None, r"context must be of shape \(b, n, 5\), got shape \(2, 3, 4\)"),
        (SCORES, torch.ones(2, 3), "context_mask must be a tensor of dtype torch.bool, got torch.float32"),
        (
            SCORES,
            torch.ones(3).bool(),
            r"context_mask must be of shape \(2, 3\), one entry per token of context, got shape \(3,\)",
        ),
        (
            SCORES,
            torch.ones(2, 3, device="meta").bool(),
            "must be on cpu, the device of context, got on meta",
        ),
    ],
)
def test_wrong_tokens(x, mask, message):
    with pytest.raises(ValueError, match=message):
        check_tokens(x, 5, mask, "context", "context_mask")
