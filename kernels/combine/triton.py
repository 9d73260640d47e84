"""Kernels of `kernels.combine`: the map of routed tokens, their sum with what else there is, and the gradients."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common.launch import (
    COUNTS,
    Launch,
    Launcher,
    Plan,
    has_values,
    multiprocessors,
    plan_rows,
    plan_sweep,
    planner,
)

LONGEST = 8192
"""Most features that the kernel takes; more are left to PyTorch."""


PLACES = 1024
"""Routed tokens that a program of the map writes."""


@triton.jit(do_not_specialize=[*COUNTS, "n"])
def _places_kernel(
    indices_ptr,  # b k
    slots_ptr,  # b n, int32, filled with -1
    n_routed,
    k,
    n,
    BLOCK: tl.constexpr,
):
    """Write the index, among all `b k`, of each routed token into the place of its token."""
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    places = tl.load(indices_ptr + slots, mask=slots < n_routed, other=n).to(tl.int64)
    tl.store(slots_ptr + (slots // k).to(tl.int64) * n + places, slots, mask=places < n)


@triton.jit(do_not_specialize=[*COUNTS, "n", "start"])
def _forward_kernel(
    routed_ptr,  # b k d
    scores_ptr,  # b k
    slots_ptr,  # b n, int32
    null_ptr,  # d
    light_ptr,  # b n d
    residual_ptr,  # b n d
    out_ptr,  # b n d
    routed_stride,
    light_stride,
    residual_stride,
    n_rows,
    d,
    n,
    start,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_NULL: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_LIGHT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """ROWS tokens."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)[None, :]
    there = (rows < n_rows)[:, None] & (columns < d)
    slots = tl.load(slots_ptr + rows, mask=rows < n_rows, other=-1)
    is_routed = (slots >= 0)[:, None]

    score = tl.load(scores_ptr + slots, mask=slots >= 0, other=0.0).to(tl.float32)[:, None]
    routed_ptrs = routed_ptr + slots.to(tl.int64)[:, None] * routed_stride + columns
    out = tl.load(routed_ptrs, mask=there & is_routed, other=0.0).to(tl.float32) * score
    if HAS_NULL:
        null = tl.load(null_ptr + columns, mask=columns < d, other=0.0).to(tl.float32)
        if HAS_START:
            is_routed = is_routed | (rows % n < start)[:, None]
        out = tl.where(is_routed, out, null)
    if HAS_LIGHT:
        out += tl.load(light_ptr + rows[:, None] * light_stride + columns, mask=there, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        out += tl.load(residual_ptr + rows[:, None] * residual_stride + columns, mask=there, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows[:, None] * d + columns, out.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=[*COUNTS, "n"])
def _routed_backward_kernel(
    grad_output_ptr,  # b n d
    routed_ptr,  # b k d
    scores_ptr,  # b k
    indices_ptr,  # b k
    drouted_ptr,  # b k d
    dscores_ptr,  # b k
    grad_output_stride,
    routed_stride,
    n_routed,
    k,
    n,
    d,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """ROWS routed tokens. What has no place has no gradient."""
    slots = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)[None, :]
    there = (slots < n_routed)[:, None] & (columns < d)
    places = tl.load(indices_ptr + slots, mask=slots < n_routed, other=n).to(tl.int64)
    grad_output_ptrs = (
        grad_output_ptr + ((slots // k).to(tl.int64) * n + places)[:, None] * grad_output_stride + columns
    )
    grad_output = tl.load(grad_output_ptrs, mask=there & (places < n)[:, None], other=0.0).to(tl.float32)

    rows = slots.to(tl.int64)
    routed = tl.load(routed_ptr + rows[:, None] * routed_stride + columns, mask=there, other=0.0).to(tl.float32)
    score = tl.load(scores_ptr + slots, mask=slots < n_routed, other=0.0).to(tl.float32)
    dscores = tl.sum(grad_output * routed, axis=1)
    tl.store(dscores_ptr + slots, dscores.to(dscores_ptr.dtype.element_ty), mask=slots < n_routed)
    drouted = grad_output * score[:, None]
    tl.store(drouted_ptr + rows[:, None] * d + columns, drouted.to(drouted_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=[*COUNTS, "n", "start"])
def _backward_kernel(
    grad_output_ptr,  # b n d
    slots_ptr,  # b n, int32
    dlight_ptr,  # b n d
    dnull_ptr,  # programs d, fp32
    grad_output_stride,
    n_rows,
    d,
    n,
    start,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_NULL: tl.constexpr,
    HAS_START: tl.constexpr,
    CASTS_LIGHT: tl.constexpr,
):
    """Every so many-th tile of ROWS tokens."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    dnull = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, ROWS), tl.num_programs(0)):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        there = (rows < n_rows)[:, None] & (columns < d)
        grad_output = tl.load(grad_output_ptr + rows[:, None] * grad_output_stride + columns, mask=there, other=0.0)
        if CASTS_LIGHT:
            tl.store(dlight_ptr + rows[:, None] * d + columns, grad_output.to(dlight_ptr.dtype.element_ty), mask=there)
        if HAS_NULL:
            slots = tl.load(slots_ptr + rows, mask=rows < n_rows, other=0)
            if HAS_START:
                slots = tl.where(rows % n < start, 0, slots)
            dnull += tl.where((slots < 0)[:, None], grad_output.to(tl.float32), 0.0)
    if HAS_NULL:
        share = tl.sum(dnull, axis=0)[None, :]
        tl.store(dnull_ptr + tl.program_id(0) * d + columns, share, mask=columns < d)


@planner
def _plan_places(n_routed: int) -> Plan:
    return Plan(triton.cdiv(n_routed, PLACES), {"BLOCK": PLACES})


def map_slots(indices: Tensor, n: int) -> Tensor:
    """`b n`, int32: the index, among all `b k`, of the routed token in the place of a token. -1 where there is none."""
    slots = torch.full((indices.shape[0], n), -1, dtype=torch.int32, device=indices.device)
    if has_values(indices):
        _launch_places(indices, slots)
    return slots


@Launcher
def _launch_places(indices: Tensor, slots: Tensor) -> Iterator[Launch]:
    (batch, k), n = indices.shape, slots.shape[1]
    yield Launch(_places_kernel, _plan_places(batch * k), indices, slots, batch * k, k, n)


@Launcher
def launch_forward(
    routed: Tensor,
    scores: Tensor,
    slots: Tensor,
    null: Tensor | None,
    light: Tensor | None,
    residual: Tensor | None,
    start: int,
    out: Tensor,
) -> Iterator[Launch]:
    """Write the sum `b n d` of routed tokens `(b k) d` and the optional terms `(b n) d`, by the map of `map_slots`.
    Null stands for tokens from start on."""
    n_rows, d = slots.numel(), routed.shape[1]
    yield Launch(
        _forward_kernel,
        plan_rows(n_rows, d),
        routed,
        scores,
        slots,
        scores if null is None else null,
        out if light is None else light,
        out if residual is None else residual,
        out,
        routed.stride(0),
        0 if light is None else light.stride(0),
        0 if residual is None else residual.stride(0),
        n_rows,
        d,
        slots.shape[1],
        start,
        HAS_NULL=null is not None,
        HAS_START=start > 0,
        HAS_LIGHT=light is not None,
        HAS_RESIDUAL=residual is not None,
    )


@Launcher
def launch_routed_backward(
    grad_output: Tensor, routed: Tensor, scores: Tensor, indices: Tensor, drouted: Tensor, dscores: Tensor
) -> Iterator[Launch]:
    """Write the gradients of routed tokens and of their scores."""
    (n_rows, d), (batch, k) = grad_output.shape, indices.shape
    yield Launch(
        _routed_backward_kernel,
        plan_rows(batch * k, d),
        grad_output,
        routed,
        scores,
        indices,
        drouted,
        dscores,
        grad_output.stride(0),
        routed.stride(0),
        batch * k,
        k,
        n_rows // batch,
        d,
    )


def launch_sweep(grad_output: Tensor, slots: Tensor | None, start: int, dlight: Tensor | None) -> Tensor | None:
    """Write the gradient of the light branch in its dtype, if that is wanted. Return the gradient of the null token, if
    there is the map."""
    n_rows, d = grad_output.shape
    programs = 0 if slots is None else plan_sweep(n_rows, d, multiprocessors(grad_output.device)).programs
    shares = torch.empty((programs, d), dtype=torch.float32, device=grad_output.device)
    _launch_sweep(grad_output, slots, start, dlight, shares)
    return None if slots is None else shares.sum(0)


@Launcher
def _launch_sweep(
    grad_output: Tensor, slots: Tensor | None, start: int, dlight: Tensor | None, shares: Tensor
) -> Iterator[Launch]:
    n_rows, d = grad_output.shape
    yield Launch(
        _backward_kernel,
        plan_sweep(n_rows, d, multiprocessors(grad_output.device)),
        grad_output,
        grad_output if slots is None else slots,
        grad_output if dlight is None else dlight,
        shares,
        grad_output.stride(0),
        n_rows,
        d,
        n_rows if slots is None else slots.shape[1],
        start,
        HAS_NULL=slots is not None,
        HAS_START=start > 0,
        CASTS_LIGHT=dlight is not None,
    )
