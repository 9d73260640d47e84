"""Sums over programs by the last programs to arrive."""

import pytest
import torch
import triton
import triton.language as tl

from kernels._common.shares import add_up_shares, clear_arrivals, new_arrivals, new_shares, share_ptrs
from tests.kernels.devices import DEVICE

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not triton.knobs.runtime.interpret, reason="is about a kernel, which needs a GPU"
)


@triton.jit
def clear_kernel(arrivals_ptr):
    clear_arrivals(arrivals_ptr)


@triton.jit
def sum_kernel(x_ptr, shares_ptr, sums_ptr, arrivals_ptr, d, SUMS: tl.constexpr, BLOCK_D: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK_D)
    for number in tl.static_range(SUMS):
        x = tl.load(x_ptr + (number * programs + program) * d + columns, mask=columns < d)
        tl.store(share_ptrs(shares_ptr, number, program, programs, d, columns), x, mask=columns < d)
    add_up_shares(shares_ptr, sums_ptr, arrivals_ptr, program, programs, d, SUMS, BLOCK_D)


@pytest.mark.parametrize("d", [1, 20, 512])
@pytest.mark.parametrize("programs", [1, 32, 33, 100])
def test_sums_are_those_of_all_programs_each_time(programs, d):
    """One program and many groups, whose last one may be smaller; counters are cleared once."""
    sums = 3
    arrivals = new_arrivals(torch.empty(0, device=DEVICE)).fill_(7)
    clear_kernel[(2,)](arrivals)
    for _ in range(2):
        x = torch.randn(sums, programs, d, device=DEVICE)
        found = torch.full((sums, d), torch.nan, device=DEVICE)
        shares = new_shares(sums, programs, d, x)
        sum_kernel[(programs,)](x, shares, found, arrivals, d, SUMS=sums, BLOCK_D=triton.next_power_of_2(d))
        torch.testing.assert_close(found.double(), x.double().sum(1), rtol=0, atol=1e-5 * programs**0.5)
        assert not arrivals.any()
