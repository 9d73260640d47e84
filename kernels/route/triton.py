"""The end of `kernels.route`: weights, tokens and slots of the selected indices. Its backward pass begins by putting
the gradients of these weights in their places."""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from kernels._common.launch import COUNTS, Launch, Launcher
from kernels._common.plans import Plan, planner

SLOTS = 4
"""Selected tokens that one program copies."""

SPREAD = 1024
"""Places that one program writes."""


@triton.jit(do_not_specialize=[*COUNTS, "n", "width"])
def _gather_kernel(
    x_ptr,  # b n d
    selected_ptr,  # b r blocks selected, int64: in the block
    relaxed_ptr,  # b r blocks width
    mask_ptr,  # b r blocks width
    weights_ptr,  # b r blocks selected
    tokens_ptr,  # b r blocks selected d, all three with routes first if ROUTES_FIRST
    indices_ptr,  # b r blocks selected, int64: in the sequence
    slots_ptr,  # b r blocks width, int32
    x_stride,
    token_stride,
    mask_stride,
    n,
    d,
    routes,
    blocks,
    width,
    selected,
    n_batches,
    groups,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRAIGHT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    ROUTES_FIRST: tl.constexpr,
):
    """Write some of the tokens selected from one block. If weights are passed STRAIGHT through, they are 1."""
    row = (tl.program_id(0) // groups).to(tl.int64)
    batch, block = row // (routes * blocks), row % blocks
    slot = (tl.program_id(0) % groups) * SLOTS + tl.arange(0, SLOTS)
    exists = slot < selected
    in_block = tl.load(selected_ptr + row * selected + slot, mask=exists, other=0)
    place = row * selected + slot
    if ROUTES_FIRST:
        place = ((row // blocks % routes * n_batches + batch) * blocks + block) * selected + slot
    index = block * width + in_block
    tl.store(indices_ptr + place, index, mask=exists)
    weight = tl.load(relaxed_ptr + row * width + in_block, mask=exists, other=0.0)
    if STRAIGHT:
        # NaN stays, and the weight of a masked entry is 0.
        weight = tl.where(weight == weight, 1.0, weight)
        if HAS_MASK:
            is_there = tl.load(mask_ptr + row * mask_stride + in_block, mask=exists, other=0) != 0
            weight = tl.where(is_there, weight, 0.0)
    tl.store(weights_ptr + place, weight, mask=exists)
    if HAS_SLOTS:
        tl.store(slots_ptr + row * width + in_block, (block * selected + slot).to(tl.int32), mask=exists)
    # A block at the end of the sequence may select past the end.
    source = batch * x_stride + tl.minimum(index, n - 1) * token_stride
    for first in range(0, d, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        copied = exists[:, None] & (columns < d)[None, :]
        token = tl.load(x_ptr + source[:, None] + columns[None, :], mask=copied)
        tl.store(tokens_ptr + place[:, None] * d + columns[None, :], token, mask=copied)


@triton.jit(do_not_specialize=[*COUNTS, "n", "batch_stride", "route_stride"])
def _spread_kernel(
    grad_weights_ptr,  # b r selected
    slots_ptr,  # b r n, int32
    grad_scores_ptr,  # b r n
    batch_stride,
    route_stride,
    routes,
    n,
    parts,
    BLOCK: tl.constexpr,
):
    """Write gradients of weights in the places of selected entries, and 0 in all others."""
    row = (tl.program_id(0) // parts).to(tl.int64)
    place = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots_ptr + row * n + place, mask=place < n, other=-1)
    of_row = row // routes * batch_stride + row % routes * route_stride
    grad = tl.load(grad_weights_ptr + of_row + slot, mask=slot >= 0, other=0.0)
    tl.store(grad_scores_ptr + row * n + place, grad.to(grad_scores_ptr.dtype.element_ty), mask=place < n)


@planner
def _plan(n_rows: int, selected: int, d: int) -> Plan:
    """Pieces are groups of selected tokens."""
    groups = triton.cdiv(selected, SLOTS)
    return Plan(n_rows * groups, {"SLOTS": SLOTS, "COLUMNS": min(triton.next_power_of_2(d), 512)}, groups)


@planner
def _plan_spread(n_rows: int, n: int) -> Plan:
    """Pieces are parts of a row."""
    parts = triton.cdiv(n, SPREAD)
    return Plan(n_rows * parts, {"BLOCK": SPREAD}, parts)


@Launcher
def launch_gather(
    x: Tensor,
    selected: Tensor,
    relaxed: Tensor,
    mask: Tensor | None,
    blocks: int,
    straight_through: bool,
    weights: Tensor,
    tokens: Tensor,
    indices: Tensor,
    slots: Tensor | None,
) -> Iterator[Launch]:
    """Write weights and indices `b r blocks*selected` and tokens `b r blocks*selected d` of x `b n d`, whose last
    stride is 1. All three are contiguous, or contiguous with routes first. Rows of `b r blocks` have the selection, the
    relaxed selection, and the mask. If slots `b r blocks*width` have entries, write into the places of selected tokens
    their index among these."""
    (n, d), (n_rows, n_selected) = x.shape[1:], selected.shape
    plan = _plan(n_rows, n_selected, d)
    yield Launch(
        _gather_kernel,
        plan,
        x,
        selected,
        relaxed,
        relaxed if mask is None else mask,
        weights,
        tokens,
        indices,
        indices if slots is None else slots,
        x.stride(0),
        x.stride(1),
        0 if mask is None else mask.stride(0),
        n,
        d,
        indices.shape[1],
        blocks,
        relaxed.shape[1],
        n_selected,
        x.shape[0],
        plan.pieces,
        STRAIGHT=straight_through,
        HAS_MASK=mask is not None,
        HAS_SLOTS=slots is not None,
        ROUTES_FIRST=not indices.is_contiguous(),
    )


@Launcher
def launch_spread(grad_weights: Tensor, slots: Tensor, grad_scores: Tensor) -> Iterator[Launch]:
    """Write the gradient of the relaxed selection `b r n` from that of the weights `b r selected`, whose last stride is
    1."""
    batch, routes, n = slots.shape
    plan = _plan_spread(batch * routes, n)
    strides = grad_weights.stride()[:2]
    yield Launch(_spread_kernel, plan, grad_weights, slots, grad_scores, *strides, routes, n, plan.pieces)
