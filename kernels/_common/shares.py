"""Sums over all programs of a kernel, computed by the programs themselves in a fixed order.

Each program writes its share. The last program of a group to arrive adds up the shares of the group, and the last of
these programs adds up the sums of all groups. This needs no extra kernel, and results are bitwise equal from run to
run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP: tl.constexpr = tl.constexpr(32)
"""Number of programs in a group."""

MOST_GROUPS: tl.constexpr = tl.constexpr(127)

TILE: tl.constexpr = tl.constexpr(8192)
"""Entries that a program loads at a time."""


def new_arrivals(x: Tensor) -> Tensor:
    """Counters of programs, on the device of x. An earlier kernel has to call `clear_arrivals`."""
    return x.new_empty(MOST_GROUPS.value + 1, dtype=torch.int32)


def new_shares(sums: int, programs: int, d: int, x: Tensor) -> Tensor:
    """Shares of sums of d entries, on the device of x: `sums programs+groups d`, fp32."""
    groups = triton.cdiv(programs, GROUP.value)
    assert groups <= MOST_GROUPS.value
    return x.new_empty((sums, programs + groups, d), dtype=torch.float32)


@triton.jit
def clear_arrivals(arrivals_ptr):
    if tl.program_id(0) == 0:
        tl.store(arrivals_ptr + tl.arange(0, MOST_GROUPS + 1), 0)


@triton.jit
def share_ptrs(shares_ptr, number, program, programs, d, columns):
    """Pointers to the share of one program in the sum `number`."""
    return shares_ptr + ((number * (programs + tl.cdiv(programs, GROUP)) + program) * d + columns)


@triton.jit
def _add_up(shares_ptr, step, to_ptr, to_step, count, d, SUMS: tl.constexpr, BLOCK_D: tl.constexpr):
    TOGETHER: tl.constexpr = TILE // BLOCK_D if BLOCK_D < TILE else 1
    columns = tl.arange(0, BLOCK_D)
    for _ in tl.static_range(SUMS):
        total = tl.zeros([BLOCK_D], tl.float32)
        for start in range(0, count, TOGETHER):
            rows = start + tl.arange(0, TOGETHER)
            there = (rows < count)[:, None] & (columns < d)[None, :]
            shares = tl.load(shares_ptr + rows[:, None] * d + columns[None, :], mask=there, other=0.0)
            total += tl.sum(shares, axis=0)
        tl.store(to_ptr + columns, total, mask=columns < d)
        shares_ptr += step
        to_ptr += to_step


@triton.jit
def add_up_shares(shares_ptr, sums_ptr, arrivals_ptr, program, programs, d, SUMS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write the sums `sums d` once all programs have written their shares. Counters are 0 before and after."""
    groups = tl.cdiv(programs, GROUP)
    step = (programs + groups) * d
    group = program // GROUP
    first = group * GROUP
    of_group = tl.minimum(programs - first, GROUP)
    # The counter publishes the writes of all threads.
    tl.debug_barrier()
    if tl.atomic_add(arrivals_ptr + 1 + group, 1, sem="acq_rel") == of_group - 1:
        tl.store(arrivals_ptr + 1 + group, 0)
        of_groups_ptr = shares_ptr + programs * d
        _add_up(shares_ptr + first * d, step, of_groups_ptr + group * d, step, of_group, d, SUMS, BLOCK_D)
        tl.debug_barrier()
        if tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == groups - 1:
            tl.store(arrivals_ptr, 0)
            _add_up(of_groups_ptr, step, sums_ptr, d, groups, d, SUMS, BLOCK_D)
