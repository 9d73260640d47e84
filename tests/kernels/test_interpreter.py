"""The faster interpreter of the tests against Triton's own."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from tests.kernels.interpreter import generic_reduce

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="is about Triton's interpreter")

ROWS, COLUMNS = 4, 8


@triton.jit
def _in_order(a, b):
    """A reduction that depends on order and place, unlike a sum."""
    return 3 * a - b


@triton.jit
def _last_of_the_smallest(a, at_a, b, at_b):
    first = a < b
    return tl.where(first, a, b), tl.where(first, at_a, at_b)


@triton.jit
def _reduce_kernel(x_ptr, out_ptr, at_ptr, AXIS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    flat = tl.arange(0, ROWS * COLUMNS)
    x = tl.load(x_ptr + flat).reshape(ROWS, COLUMNS)
    smallest, at = tl.reduce((x, flat.reshape(ROWS, COLUMNS)), AXIS, _last_of_the_smallest, keep_dims=True)
    ones = tl.zeros_like(x) + 1
    tl.store(out_ptr + flat, (ones * tl.reduce(x, AXIS, _in_order, keep_dims=True)).reshape(ROWS * COLUMNS))
    tl.store(at_ptr + flat, (ones.to(tl.int32) * (at + smallest.to(tl.int32))).reshape(ROWS * COLUMNS))
    row = tl.load(x_ptr + tl.arange(0, COLUMNS))
    tl.store(out_ptr + ROWS * COLUMNS, tl.reduce(row, 0, _in_order))
    tl.store(out_ptr + ROWS * COLUMNS + 1 + tl.arange(0, COLUMNS), tl.sort(row))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_reduces_as_tritons_own_does(monkeypatch, axis, dtype):
    def reduced():
        out = torch.zeros(ROWS * COLUMNS + 1 + COLUMNS, dtype=dtype)
        at = torch.zeros(ROWS * COLUMNS, dtype=torch.int32)
        _reduce_kernel[(1,)](x, out, at, axis, ROWS, COLUMNS)
        return out, at

    # Few different numbers, so that some are equal.
    x = torch.randint(-5, 5, (ROWS * COLUMNS,)).to(dtype)
    ours = reduced()
    monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", generic_reduce)
    assert all(torch.equal(one, other) for one, other in zip(ours, reduced(), strict=True))
    assert torch.equal(ours[0][-COLUMNS:], x[:COLUMNS].sort().values)
