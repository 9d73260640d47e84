"""Rows sorted by their scores: one kernel ranks the entries of runs, and one merges the runs.

Keys are those of `triton.py`, no two of which are equal. A key's rank is the number of larger ones in all runs; in a
sorted run, a binary search finds it. Neighbours in their run search at the same time, so they read the same cache
lines.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common.launch import COUNTS, Launch, Launcher, Scratch
from kernels._common.plans import Plan, planner
from kernels.select.triton import SMALLEST, keys_of, load_ordered

RUN = 512
"""Entries of a run: a power of two, and so a multiple of the sizes below."""

RANKED, RANKED_AGAINST = 16, 256
"""Entries that one program ranks in their run, and the number of others that it reads at a time."""

MERGED, MERGED_RUNS = 64, 8
"""Entries whose ranks one program finds, and the number of runs that it searches at a time."""

LONGEST = 16384
"""Longest row. An entry needs as many searches as its row has runs."""

MOST = 65536
"""Most entries of all rows. The work of comparisons and searches grows with each entry; PyTorch has more launches, and
less work per entry."""


@triton.jit(do_not_specialize=[*COUNTS, "n"])
def _runs_kernel(
    scores_ptr,  # rows n
    keys_ptr,  # rows n, int64
    scores_stride,
    n,
    blocks,
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
    AGAINST: tl.constexpr,
):
    """Keys of BLOCK entries sorted within their run, the largest first."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    scores_ptr += row * scores_stride
    first = tl.program_id(0) % blocks * BLOCK
    run = first // RUN * RUN
    own = first + tl.arange(0, BLOCK)
    keys = keys_of(load_ordered(scores_ptr, scores_ptr, own, n, False), own, n)
    larger = tl.zeros([BLOCK, AGAINST], tl.int32)
    for start in range(run, tl.minimum(run + RUN, n), AGAINST):
        other = start + tl.arange(0, AGAINST)
        others = keys_of(load_ordered(scores_ptr, scores_ptr, other, n, False), other, n)
        larger += ((others[None, :] > keys[:, None]) & (other < n)[None, :]).to(tl.int32)
    tl.store(keys_ptr + row * n + run + tl.sum(larger, axis=1), keys, mask=own < n)


@triton.jit(do_not_specialize=[*COUNTS, "n"])
def _merge_kernel(
    scores_ptr,  # rows n
    keys_ptr,  # rows n, int64: sorted runs
    ordered_ptr,  # rows n
    order_ptr,  # rows n, int64
    scores_stride,
    n,
    blocks,
    RUN: tl.constexpr,
    HALVINGS: tl.constexpr,
    BLOCK: tl.constexpr,
    RUNS: tl.constexpr,
):
    """Write scores and indices of BLOCK entries to their places in the row, searching RUNS runs at a time."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    keys_ptr += row * n
    own = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys_ptr + own, mask=own < n, other=SMALLEST)
    rank = tl.zeros([BLOCK], tl.int32)
    for first in range(0, n, RUNS * RUN):
        begin = first + (RUN * tl.arange(0, RUNS))[:, None]
        end = tl.minimum(begin + RUN, n)
        larger = tl.zeros([RUNS, BLOCK], tl.int32)
        for halving in tl.static_range(HALVINGS):
            last = begin + larger + (RUN >> halving) - 1
            is_larger = tl.load(keys_ptr + last, mask=last < end, other=SMALLEST) > key[None, :]
            larger += tl.where(is_larger, RUN >> halving, 0)
        rank += tl.sum(larger, axis=0)
    index = n - 1 - (key & 0x7FFFFFFF)
    score = tl.load(scores_ptr + row * scores_stride + index, mask=own < n, other=0.0)
    tl.store(ordered_ptr + row * n + rank, score, mask=own < n)
    tl.store(order_ptr + row * n + rank, index, mask=own < n)


@planner
def _plan_runs(n_rows: int, n: int) -> Plan:
    """Pieces are blocks of a row, each with a program."""
    blocks = triton.cdiv(n, RANKED)
    return Plan(n_rows * blocks, {"RUN": RUN, "BLOCK": RANKED, "AGAINST": RANKED_AGAINST}, blocks)


@planner
def _plan_merge(n_rows: int, n: int) -> Plan:
    """Pieces are blocks of a row, each with a program."""
    blocks = triton.cdiv(n, MERGED)
    tile = {"RUN": RUN, "HALVINGS": RUN.bit_length(), "BLOCK": MERGED, "RUNS": MERGED_RUNS}
    return Plan(n_rows * blocks, tile, blocks)


def sort_rows(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores `rows n`, the largest first and equal ones in the order of their indices, and their int64 indices.

    The last stride of scores is 1. NaN comes first. PyTorch sorts long rows, many rows, and fp64, which the kernels do
    not support.
    """
    if scores.dtype == torch.float64 or scores.shape[1] > LONGEST or scores.numel() > MOST:
        return scores.sort(dim=1, descending=True, stable=True)
    ordered = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    order = torch.empty(scores.shape, dtype=torch.int64, device=scores.device)
    _launch_sort(scores, ordered, order)
    return ordered, order


@Launcher
def _launch_sort(scores: Tensor, ordered: Tensor, order: Tensor) -> Iterator[Launch]:
    n_rows, n = scores.shape
    keys, numbers = Scratch(n_rows, n, dtype=torch.int64), (scores.stride(0), n)
    plan = _plan_runs(n_rows, n)
    yield Launch(_runs_kernel, plan, scores, keys, *numbers, plan.pieces)
    plan = _plan_merge(n_rows, n)
    yield Launch(_merge_kernel, plan, scores, keys, ordered, order, *numbers, plan.pieces)
