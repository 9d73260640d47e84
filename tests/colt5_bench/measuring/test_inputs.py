"""Comparisons of inputs and results of calls."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colt5_bench.measuring.inputs import same_bits

DTYPES = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128),
    *(torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float8_e4m3fn),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(st.data(), st.lists(st.integers(0, 5), max_size=3))
@settings(max_examples=15, deadline=None)
def test_each_bit_counts(dtype, data, shape):
    """Tensors of any size are equal to their copy, including NaN; a single different element is found at any place."""
    size = torch.empty((), dtype=dtype).itemsize
    limit = 1 if dtype is torch.bool else 255
    numbers = torch.randint(0, limit + 1, (*shape, size), dtype=torch.uint8)
    one = numbers.view(dtype).squeeze(-1)
    other = one.clone()
    assert same_bits(one, other)
    assert same_bits(one.mT if one.ndim > 1 else one, other.mT if one.ndim > 1 else other)
    assert not same_bits(one, other.unsqueeze(0))
    if one.numel():
        place = data.draw(st.integers(0, numbers.numel() - 1))
        flipped = numbers.clone()
        flipped.view(-1)[place] ^= 1
        assert not same_bits(one, flipped.view(dtype).squeeze(-1))


@pytest.mark.parametrize("other", [torch.int32, torch.int16, torch.float64], ids=str)
def test_bits_of_other_dtypes(other):
    assert same_bits(torch.zeros(4), torch.zeros(4, dtype=other)) == (other.itemsize == 4)
