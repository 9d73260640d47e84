"""The end of `kernels.route`: weights and tokens at what is selected, and where that is."""

import triton
import triton.language as tl
from torch import Tensor

from kernels._common.launch import COUNTS, Plan, planner

SLOTS = 4
"""Selected tokens that one program copies."""


@triton.jit(do_not_specialize=[*COUNTS, "n", "width"])
def _gather_kernel(
    x_ptr,  # b n d
    selected_ptr,  # b r blocks selected, int64: in the block
    relaxed_ptr,  # b r blocks width
    weights_ptr,  # b r blocks selected
    tokens_ptr,  # b r blocks selected d
    indices_ptr,  # b r blocks selected, int64: in the sequence
    x_stride,
    token_stride,
    n,
    d,
    routes,
    blocks,
    width,
    selected,
    groups,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some of the tokens selected from one block."""
    row = (tl.program_id(0) // groups).to(tl.int64)
    batch, block = row // (routes * blocks), row % blocks
    slot = (tl.program_id(0) % groups) * SLOTS + tl.arange(0, SLOTS)
    exists = slot < selected
    place = row * selected + slot
    in_block = tl.load(selected_ptr + place, mask=exists, other=0)
    index = block * width + in_block
    tl.store(indices_ptr + place, index, mask=exists)
    tl.store(weights_ptr + place, tl.load(relaxed_ptr + row * width + in_block, mask=exists, other=0.0), mask=exists)
    # A block that fills up the sequence may select past its end.
    source = batch * x_stride + tl.minimum(index, n - 1) * token_stride
    for first in range(0, d, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        copied = exists[:, None] & (columns < d)[None, :]
        token = tl.load(x_ptr + source[:, None] + columns[None, :], mask=copied)
        tl.store(tokens_ptr + place[:, None] * d + columns[None, :], token, mask=copied)


@planner
def _plan(n_rows: int, selected: int, d: int) -> Plan:
    """Pieces are groups of selected tokens."""
    groups = triton.cdiv(selected, SLOTS)
    return Plan(n_rows * groups, {"SLOTS": SLOTS, "COLUMNS": min(triton.next_power_of_2(d), 512)}, groups)


def launch_gather(
    x: Tensor, selected: Tensor, relaxed: Tensor, blocks: int, weights: Tensor, tokens: Tensor, indices: Tensor
) -> None:
    """Write weights and indices `b r blocks*selected` and tokens `b r blocks*selected d` of x `b n d`, whose last
    stride is 1. Rows of `b r blocks` have the selection and the relaxed selection."""
    (n, d), (n_rows, n_selected) = x.shape[1:], selected.shape
    plan = _plan(n_rows, n_selected, d)
    _gather_kernel[plan.grid](
        x,
        selected,
        relaxed,
        weights,
        tokens,
        indices,
        x.stride(0),
        x.stride(1),
        n,
        d,
        indices.shape[1],
        blocks,
        relaxed.shape[1],
        n_selected,
        plan.pieces,
        **plan.settings,
    )
