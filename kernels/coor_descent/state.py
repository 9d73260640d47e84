"""State that the forward pass of coordinate descent keeps for the backward pass: a few numbers per row and iteration.

One fp64 tensor `rows+1 2 n_iters+1` has, for row r and iteration t, a_t in [r, 0, t] and the share of the sum that is
above the threshold in [r, 1, t]. After the rows follow, for the kernels, the temperature of iteration t in [rows, 0, t]
and log2(e) over it in [rows, 1, t]. Index n_iters belongs to the output; for a row, [r, 0, n_iters] is the origin of
its scores and a, which is 0 unless all scores are far below.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def allocate_state(scores: Tensor, n_iters: int, save: bool) -> Tensor:
    """An uninitialised state for scores `rows n`; without entries if nothing is saved."""
    shape = (scores.shape[0] + 1, 2, n_iters + 1) if save else (0,)
    return scores.new_empty(shape, dtype=torch.float64)


def iterations_of(state: Tensor) -> int:
    return state.shape[-1] - 1


def views_of(state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a `rows n_iters`, shares `rows n_iters` and origins `rows 1`."""
    return state[:-1, 0, :-1], state[:-1, 1, :-1], state[:-1, 0, -1:]


@triton.jit
def row_state(state_ptr, rows, n_iters):
    """Pointers to the numbers of some rows; those of the schedule are in row n_rows."""
    return state_ptr + rows.to(tl.int64) * (2 * (n_iters + 1))


@triton.jit
def save_step(state_ptr, rows, part, n_rows, n_iters, t, a, ratio, temperature, factor):
    """Write the state of iteration t. The first program of a row writes for the row, the first program of all for the
    schedule."""
    row_ptrs = row_state(state_ptr, rows, n_iters) + t
    writes = (rows < n_rows) & (part == 0)
    tl.store(row_ptrs, a, mask=writes)
    tl.store(row_ptrs + n_iters + 1, ratio, mask=writes)
    save_temperature(state_ptr, n_rows, n_iters, t, temperature, factor)


@triton.jit
def save_origin(state_ptr, rows, part, n_rows, n_iters, origin):
    row_ptrs = row_state(state_ptr, rows, n_iters) + n_iters
    writes = (rows < n_rows) & (part == 0)
    tl.store(row_ptrs, origin, mask=writes)
    # Never read, but all results of an operator have to be deterministic.
    tl.store(row_ptrs + n_iters + 1, tl.zeros_like(origin), mask=writes)


@triton.jit
def save_temperature(state_ptr, n_rows, n_iters, t, temperature, factor):
    schedule_ptr = row_state(state_ptr, n_rows + tl.zeros((), tl.int64), n_iters) + t
    first = tl.program_id(0) == 0
    tl.store(schedule_ptr, temperature, mask=first)
    tl.store(schedule_ptr + n_iters + 1, factor, mask=first)
