"""Coordinate descent and the soft top-k for any scores, against results with hundreds of digits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from reference._shared.arguments import epsilon_schedule
from reference.coor_descent import FAR
from tests.reference import exact
from tests.reference.outliers import rows

OPTIONS = st.sampled_from(
    [{"n_iters": t, "eps": eps} for t in (1, 2, 5) for eps in (0.03, 1.0)]
    + [{"n_iters": 4, "eps": 0.1, "eps_init": 4.0, "eps_decay": 0.5}]
)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
KS = st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0, 9.0])


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60)
@given(data=st.data(), k=KS, options=OPTIONS)
def test_coordinate_descent(dtype, data, k, options):
    row = data.draw(rows(dtype)).double()
    *temperatures, last = epsilon_schedule(**{"eps_init": None, "eps_decay": 1.0, **options})
    if row.isneginf().all():
        expected = torch.zeros_like(row)
    else:
        expected = torch.tensor(exact.coor_descent(row.tolist(), k, **options), dtype=torch.float64)
    # Numbers near a threshold are at most the limit on outliers, and each iteration rounds them three times.
    limit = FAR * sum(temperatures) * (1 + max(math.log(len(row) / k), 0.0))
    bound = 3 * options["n_iters"] * torch.finfo(torch.float64).eps * limit / last
    y = reference.coor_descent(row, k=k, **options)
    torch.testing.assert_close(y, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60)
@given(data=st.data(), k=KS, eps=st.sampled_from([0.03, 0.1, 1.0, 50.0]))
def test_soft_topk(dtype, data, k, eps):
    row = data.draw(rows(dtype)).double()
    expected = torch.tensor(exact.soft_topk(row.tolist(), k, eps), dtype=torch.float64)
    y = reference.soft_topk(row, k=k, eps=eps)
    # Exponents are differences, which are exact near 0; elsewhere y is as small as its error.
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)
