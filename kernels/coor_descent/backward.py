"""Backward pass of `kernels.coor_descent`: one reduction, then each chunk of a row independently."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common.launch import Launch, Launcher, Scratch
from kernels._common.plans import Plan, planner, registers_of_addresses, tile_settings
from kernels._common.primitives import (
    exp2,
    exp2_line,
    exp2_wide,
    exponent_line,
    fma_if_at_most,
    inverse,
    load_k,
    load_tile,
    opaque,
    per_row,
    round_down,
    sum_in_thread,
    tile_columns,
    tile_pointers,
)
from kernels._common.tensors import address
from kernels.coor_descent import constants
from kernels.coor_descent.forward import cooling_iterations, from_origin
from kernels.coor_descent.state import row_state

CHUNK = 4096
"""Entries of a row per program of the backward pass."""

IN_THREAD = 16
"""Entries of a row per thread; each needs at least four registers."""

REGISTERS = 128
"""Most registers per thread, without addresses."""

MAX_SHIFT: tl.constexpr = tl.constexpr(constants.MAX_SHIFT)
LARGEST: tl.constexpr = tl.constexpr(constants.LARGEST)


@triton.jit
def direct_gradient(scores, grad_output, a, temperature, factor):
    """The gradient of the scores through the output alone, at constant a. It is g y / temperature where y < 1, and 0
    for a score of -inf, even if g is infinite there."""
    slope, offset, rest = exponent_line(-a, factor)
    scale = exp2(tl.minimum(rest, 1.0).to(tl.float32)) * inverse(temperature).to(tl.float32)
    power = exp2_line(scores, slope, offset)
    # Compared by the exponential: with the score, the compiler would keep the outcome for each entry during all
    # iterations.
    return tl.where((scores > per_row(round_down(-a))) | (power == 0), 0.0, grad_output * power * per_row(scale))


@triton.jit(do_not_specialize=["chunks"])
def _grad_a_kernel(
    grad_output_ptr,  # rows n
    scores_ptr,  # rows n
    mask_ptr,  # rows n
    state_ptr,  # rows+1 2 n_iters+1, fp64
    grad_a_ptr,  # rows chunks, fp64
    grad_output_stride,
    scores_stride,
    mask_stride,
    n_rows,
    n,
    n_iters,
    chunks,
    REPEATS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """The contribution of one chunk of a row to the gradient of the last a."""
    rows = tl.program_id(0) // chunks + tl.arange(0, ROWS).to(tl.int64)
    columns = (tl.program_id(0) % chunks) * (REPEATS * WIDTH) + tile_columns(REPEATS, WIDTH)
    scores = load_tile(scores_ptr, mask_ptr, rows, columns, scores_stride, mask_stride, n_rows, n, HAS_MASK)
    grad_output_ptrs = tile_pointers(grad_output_ptr, rows, columns, grad_output_stride)
    grad_output = tl.load(grad_output_ptrs, mask=columns < n, other=0.0).to(tl.float32)
    a_ptrs = row_state(state_ptr, rows, n_iters) + n_iters - 1
    a = tl.load(a_ptrs)
    origin = tl.load(a_ptrs + 1).to(tl.float32)
    schedule_ptr = row_state(state_ptr, n_rows + tl.zeros((), tl.int64), n_iters) + n_iters
    temperature, factor = tl.load(schedule_ptr), tl.load(schedule_ptr + n_iters + 1)
    direct = direct_gradient(from_origin(scores, origin), grad_output, a, temperature, factor)
    grad_a = tl.sum(sum_in_thread(direct, REPEATS, ROWS, WIDTH), axis=1)
    tl.store(grad_a_ptr + tl.program_id(0) + tl.arange(0, ROWS), grad_a)


@triton.jit(do_not_specialize=["chunks"], do_not_specialize_on_alignment=["n_rows"])
def _backward_kernel(
    grad_output_ptr,  # rows n
    scores_ptr,  # rows n
    mask_ptr,  # rows n
    k_ptr,  # rows
    state_ptr,  # rows+1 2 n_iters+1, fp64
    grad_a_ptr,  # rows chunks, fp64
    ds_ptr,  # rows n
    dk_ptr,  # rows, fp64
    grad_output_stride,
    scores_stride,
    mask_stride,
    n_rows,
    n,
    n_iters,
    cooling,
    chunks,
    k: "fp64",
    REPEATS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_K: tl.constexpr,
):
    """Gradient of ROWS whole rows, or of one chunk of a row, from the last iteration to the first."""
    # A constant for the compiler if a program has whole rows.
    chunks = 1 if SLOTS == 1 else chunks
    rows = (tl.program_id(0) // chunks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    chunk = tl.program_id(0) % chunks
    columns = chunk * (REPEATS * WIDTH) + tile_columns(REPEATS, WIDTH)
    row_exists = rows < n_rows
    exists = per_row(row_exists) & (columns < n)
    grad_output_ptrs = tile_pointers(grad_output_ptr, rows, columns, grad_output_stride)

    a_ptrs = row_state(state_ptr, rows, n_iters) + n_iters - 1
    temperature_ptr = row_state(state_ptr, n_rows + tl.zeros((), tl.int64), n_iters) + n_iters
    last_a = tl.load(a_ptrs, mask=row_exists, other=0.0)
    last_temperature, last_factor = tl.load(temperature_ptr), tl.load(temperature_ptr + n_iters + 1)
    # The numbers of an iteration and row are loaded one iteration ahead.
    ratio = tl.load(a_ptrs + n_iters + 1, mask=row_exists, other=0.0)
    previous = tl.load(a_ptrs - 1, mask=row_exists & (n_iters > 1), other=0.0)

    scores = load_tile(scores_ptr, mask_ptr, rows, columns, scores_stride, mask_stride, n_rows, n, HAS_MASK)
    origin = tl.load(a_ptrs + 1, mask=row_exists, other=0.0).to(tl.float32)
    inverse_k = inverse(load_k(k_ptr, rows, k, n_rows, HAS_K))
    # Loads are before the branch on the origin, for which they would have to wait. Without that branch, which is rarely
    # taken, the compiler would subtract the origin again in each iteration.
    if SLOTS == 1:
        grad_output = tl.load(grad_output_ptrs, mask=exists, other=0.0).to(tl.float32)
        scores = from_origin(scores, origin)
        direct = direct_gradient(scores, grad_output, last_a, last_temperature, last_factor)
        grad_a = tl.sum(sum_in_thread(direct, REPEATS, ROWS, WIDTH), axis=1)
    else:
        in_slot = tl.zeros([SLOTS], tl.float64)
        for start in range(0, chunks, SLOTS):
            slot = start + tl.arange(0, SLOTS)
            in_slot += tl.load(grad_a_ptr + tl.program_id(0) - chunk + slot, mask=slot < chunks, other=0.0)
        grad_a = tl.sum(in_slot, axis=0) + tl.zeros([ROWS], tl.float64)
        scores = from_origin(scores, origin)

    # The iterations of the last temperature share weights w = exp((s - base) / e) as long as their a are close. Only
    # the coefficients of w add up: one exponential for each such run instead of one for each iteration.
    through_a = tl.zeros([REPEATS, ROWS, WIDTH], tl.float32)
    coefficients = tl.zeros([REPEATS, ROWS, WIDTH], tl.float32)
    weights = tl.zeros([REPEATS, ROWS, WIDTH], tl.float32)
    base = tl.full([ROWS], float("inf"), tl.float64)
    dk = tl.zeros([ROWS], tl.float64)
    a = last_a
    for t in range(n_iters - 1, tl.maximum(cooling, 1) - 1, -1):
        a_ptrs -= 1
        next_ratio = tl.load(a_ptrs + n_iters + 1, mask=row_exists, other=0.0)
        next_previous = tl.load(a_ptrs - 1, mask=row_exists & (t > 1), other=0.0)
        if tl.max((tl.abs(a + base) > last_temperature * MAX_SHIFT).to(tl.int32), axis=0) > 0:
            through_a += coefficients * weights
            coefficients = tl.zeros([REPEATS, ROWS, WIDTH], tl.float32)
            slope, offset, rest = exponent_line(-a, last_factor)
            base = rest * inverse(slope.to(tl.float64)) - a
            # At most k for an entry below the threshold. Above it the weight is not used but must not overflow.
            weights = tl.minimum(exp2_line(scores, slope, offset), LARGEST)
        coefficient = (grad_a * inverse_k).to(tl.float32) * exp2_wide((a + base) * last_factor)
        limit = per_row(round_down(-previous))
        coefficients = fma_if_at_most(coefficients, 1.0, per_row(coefficient), scores, limit)
        dk += grad_a * last_temperature
        grad_a *= ratio
        a, previous, ratio = previous, next_previous, next_ratio
    through_a += coefficients * weights

    temperature_ptr += tl.minimum(cooling, n_iters) - n_iters
    for t in range(tl.minimum(cooling, n_iters) - 1, 0, -1):
        a_ptrs -= 1
        temperature_ptr -= 1
        next_ratio = tl.load(a_ptrs + n_iters + 1, mask=row_exists, other=0.0)
        next_previous = tl.load(a_ptrs - 1, mask=row_exists & (t > 1), other=0.0)
        temperature, factor = tl.load(temperature_ptr), tl.load(temperature_ptr + n_iters + 1)
        slope, offset, rest = exponent_line(-a, factor)
        coefficient = (grad_a * inverse_k).to(tl.float32) * exp2(rest.to(tl.float32))
        limit = per_row(round_down(-previous))
        through_a = fma_if_at_most(through_a, exp2_line(scores, slope, offset), per_row(coefficient), scores, limit)
        dk += grad_a * temperature
        grad_a *= ratio
        a, previous, ratio = previous, next_previous, next_ratio
    dk = (dk + grad_a * tl.load(row_state(state_ptr, n_rows + tl.zeros((), tl.int64), n_iters))) * inverse_k

    # Read and computed again instead of kept: registers limit how many rows are processed at a time.
    again = opaque(rows)
    last_a = tl.load(row_state(state_ptr, again, n_iters) + n_iters - 1, mask=row_exists, other=0.0)
    grad_output = tl.load(
        tile_pointers(grad_output_ptr, again, columns, grad_output_stride), mask=exists, other=0.0
    ).to(tl.float32)
    ds = direct_gradient(scores, grad_output, last_a, last_temperature, last_factor) - through_a
    if HAS_MASK:
        ds = tl.where(scores == -float("inf"), 0.0, ds)
    tl.store(tile_pointers(ds_ptr, rows, columns, n), ds.to(ds_ptr.dtype.element_ty), mask=exists)
    if HAS_K:
        tl.store(dk_ptr + rows, dk, mask=row_exists & (chunk == 0))


@planner
def _plan_sums(n_rows: int, n: int, aligned: bool) -> Plan:
    """Pieces are chunks, each with a program."""
    chunks = triton.cdiv(n, CHUNK)
    tile = tile_settings(min(n, CHUNK), IN_THREAD)
    registers = REGISTERS + registers_of_addresses(tile, aligned)
    return Plan(triton.cdiv(n_rows, tile["ROWS"]) * chunks, {**tile, "maxnreg": registers}, chunks)


@planner
def _plan(n_rows: int, n: int, aligned: bool) -> Plan:
    """The plan of chunks, and the number of chunks that a program reads at a time. Few different sizes serve all
    lengths."""
    plan = _plan_sums(n_rows, n, aligned)
    slots = next(size for size in (1, 128, 1024) if plan.pieces <= size or size == 1024)
    return plan._replace(settings={**plan.settings, "SLOTS": slots})


@Launcher
def launch_backward(
    grad_output: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    k_rows: Tensor | None,
    k: float,
    n_iters: int,
    eps: float,
    first: float,
    eps_decay: float,
    state: Tensor,
    ds: Tensor,
    dk: Tensor,
) -> Iterator[Launch]:
    """Write the gradient of the scores to `ds`, and that of a k with one entry per row to `dk`."""
    n_rows, n = scores.shape
    strides = (grad_output.stride(0), scores.stride(0), 0 if mask is None else mask.stride(0))
    aligned = (n | address(scores) | strides[0] | strides[1] | strides[2]) % 16 == 0
    plan = _plan(n_rows, n, aligned)
    mask_or_any = scores if mask is None else mask

    grad_a: Tensor | Scratch = state
    if plan.pieces > 1:
        sums = _plan_sums(n_rows, n, aligned)
        grad_a = Scratch(sums.programs, dtype=torch.float64)
        yield Launch(
            _grad_a_kernel,
            sums,
            grad_output,
            scores,
            mask_or_any,
            state,
            grad_a,
            *strides,
            n_rows,
            n,
            n_iters,
            sums.pieces,
            HAS_MASK=mask is not None,
        )
    yield Launch(
        _backward_kernel,
        plan,
        grad_output,
        scores,
        mask_or_any,
        scores if k_rows is None else k_rows,
        state,
        grad_a,
        ds,
        dk,
        *strides,
        n_rows,
        n,
        n_iters,
        cooling_iterations(n_iters, eps, first, eps_decay),
        plan.pieces,
        k,
        HAS_MASK=mask is not None,
        HAS_K=k_rows is not None,
    )
