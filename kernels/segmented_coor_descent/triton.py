"""Kernels of `kernels.segmented_coor_descent`, one program per row: in registers, or read again in each iteration."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common.launch import COUNTS, Launch, Launcher
from kernels._common.plans import Plan, most_registers, planner
from kernels.segmented_coor_descent.steps import (
    borders_of,
    cool,
    exponentials_of,
    finite,
    first_b,
    gradient_through_output,
    gradient_through_scores,
    largest_of,
    load_log_k,
    load_scores,
    next_a,
    next_b,
    output_of,
    slot_of,
)

RESIDENT = 8192
"""Longest row whose s, b and, in the backward pass, ds one program keeps in registers. For fp64 it is a quarter."""

STREAMED = 8192
"""Entries of a longer row that a program reads at a time; a quarter of it for fp64."""


@triton.jit(do_not_specialize=COUNTS)
def _resident_forward_kernel(
    scores_ptr,  # rows n
    mask_ptr,  # rows n
    k_ptr,  # rows
    y_ptr,  # rows n
    a_ptr,  # segments rows
    b_ptr,  # segments rows n
    temperature_ptr,  # n_iters + 1, fp64
    scores_stride,
    mask_stride,
    n_rows,
    n,
    n_iters,
    segments,
    k: "fp64",
    first: "fp64",
    eps_decay: "fp64",
    eps: "fp64",
    BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_K: tl.constexpr,
    SAVE: tl.constexpr,
):
    """All iterations of a row that fits into registers."""
    dtype: tl.constexpr = b_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_N)
    s = load_scores(scores_ptr + row * scores_stride, mask_ptr + row * mask_stride, columns, n, dtype, HAS_MASK)
    log_k, _ = load_log_k(k_ptr, row, k, dtype, HAS_K)
    temperature = first + tl.zeros((), tl.float64)
    eps_decay += tl.zeros((), tl.float64)
    eps += tl.zeros((), tl.float64)

    max_score = finite(tl.max(s, axis=0))
    b = first_b(s)
    a = tl.zeros((), dtype)
    largest = tl.zeros((), dtype)
    for segment in range(segments):
        if SAVE:
            tl.store(b_ptr + slot_of(segment, row, n_rows) * n + columns, b, mask=columns < n)
        start, stop = borders_of(segment, n_iters, segments)
        for t in range(start, stop):
            if SAVE:
                tl.store(temperature_ptr + t, temperature, mask=row == 0)
            total = tl.sum(exponentials_of(s, b, largest, temperature), axis=0)
            a = next_a(total, largest, log_k, temperature)
            b = next_b(s, a)
            largest = largest_of(max_score, a)
            temperature = cool(temperature, eps_decay, eps)
        if SAVE:
            tl.store(a_ptr + slot_of(segment, row, n_rows), a)

    if SAVE:
        tl.store(temperature_ptr + n_iters, temperature, mask=row == 0)
    tl.store(y_ptr + row * n + columns, output_of(s, a, temperature).to(y_ptr.dtype.element_ty), mask=columns < n)


@triton.jit(do_not_specialize=COUNTS)
def _streaming_forward_kernel(
    scores_ptr,  # rows n
    mask_ptr,  # rows n
    k_ptr,  # rows
    y_ptr,  # rows n
    a_ptr,  # segments rows
    b_ptr,  # segments rows n
    temperature_ptr,  # n_iters + 1, fp64
    scores_stride,
    mask_stride,
    n_rows,
    n,
    n_iters,
    segments,
    k: "fp64",
    first: "fp64",
    eps_decay: "fp64",
    eps: "fp64",
    BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_K: tl.constexpr,
    SAVE: tl.constexpr,
):
    """Run all iterations of a longer row, tile by tile. One pass per iteration updates b and adds up the sums for a."""
    dtype: tl.constexpr = b_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * scores_stride
    mask_ptr += row * mask_stride
    log_k, _ = load_log_k(k_ptr, row, k, dtype, HAS_K)
    temperature = first + tl.zeros((), tl.float64)
    eps_decay += tl.zeros((), tl.float64)
    eps += tl.zeros((), tl.float64)

    in_lane = tl.full([BLOCK_N], -float("inf"), dtype)
    for tile in range(0, n, BLOCK_N):
        s = load_scores(scores_ptr, mask_ptr, tile + tl.arange(0, BLOCK_N), n, dtype, HAS_MASK)
        in_lane = tl.maximum(in_lane, s)
    max_score = finite(tl.max(in_lane, axis=0))

    a = tl.zeros((), dtype)
    largest = tl.zeros((), dtype)
    for segment in range(segments):
        start, stop = borders_of(segment, n_iters, segments)
        for t in range(start, stop):
            if SAVE:
                tl.store(temperature_ptr + t, temperature, mask=row == 0)
            in_lane = tl.zeros([BLOCK_N], dtype)
            for tile in range(0, n, BLOCK_N):
                columns = tile + tl.arange(0, BLOCK_N)
                s = load_scores(scores_ptr, mask_ptr, columns, n, dtype, HAS_MASK)
                b = tl.where(t == 0, first_b(s), next_b(s, a))
                if SAVE and t == start:
                    tl.store(b_ptr + slot_of(segment, row, n_rows) * n + columns, b, mask=columns < n)
                in_lane += exponentials_of(s, b, largest, temperature)
            a = next_a(tl.sum(in_lane, axis=0), largest, log_k, temperature)
            largest = largest_of(max_score, a)
            temperature = cool(temperature, eps_decay, eps)
        if SAVE:
            tl.store(a_ptr + slot_of(segment, row, n_rows), a)

    if SAVE:
        tl.store(temperature_ptr + n_iters, temperature, mask=row == 0)
    for tile in range(0, n, BLOCK_N):
        columns = tile + tl.arange(0, BLOCK_N)
        s = load_scores(scores_ptr, mask_ptr, columns, n, dtype, HAS_MASK)
        tl.store(y_ptr + row * n + columns, output_of(s, a, temperature).to(y_ptr.dtype.element_ty), mask=columns < n)


@triton.jit
def _resume(a_ptr, row, segment, n_rows, max_score):
    """a at the start of a segment, and the largest s + b there. Both are 0 for the first segment, which starts from
    b = -s."""
    a = tl.load(a_ptr + slot_of(segment - 1, row, n_rows), mask=segment > 0, other=0.0)
    return a, tl.where(segment > 0, largest_of(max_score, a), 0.0)


@triton.jit(do_not_specialize=COUNTS)
def _resident_backward_kernel(
    grad_output_ptr,  # rows n
    scores_ptr,  # rows n
    mask_ptr,  # rows n
    k_ptr,  # rows
    a_ptr,  # segments rows
    b_ptr,  # segments rows n
    temperature_ptr,  # n_iters + 1, fp64
    ds_ptr,  # rows n
    dk_ptr,  # rows
    grad_output_stride,
    scores_stride,
    mask_stride,
    n_rows,
    n,
    n_iters,
    segments,
    k: "fp64",
    BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_K: tl.constexpr,
):
    """The gradient of a row that fits into registers, from the last segment to the first."""
    dtype: tl.constexpr = b_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_N)
    s = load_scores(scores_ptr + row * scores_stride, mask_ptr + row * mask_stride, columns, n, dtype, HAS_MASK)
    grad_output = tl.load(grad_output_ptr + row * grad_output_stride + columns, mask=columns < n, other=0.0)
    log_k, k = load_log_k(k_ptr, row, k, dtype, HAS_K)
    max_score = finite(tl.max(s, axis=0))

    a = tl.load(a_ptr + slot_of(segments - 1, row, n_rows))
    ds = gradient_through_output(s, grad_output, a, tl.load(temperature_ptr + n_iters))
    grad_a = tl.sum(ds, axis=0)
    dk = tl.zeros((), dtype)
    for reverse in range(segments):
        segment = segments - 1 - reverse
        start, stop = borders_of(segment, n_iters, segments)
        # The first iteration of all passes no gradient to the scores.
        for steps_back in range(stop - tl.maximum(start, 1)):
            t = stop - 1 - steps_back
            b = tl.load(b_ptr + slot_of(segment, row, n_rows) * n + columns, mask=columns < n, other=0.0)
            _, largest = _resume(a_ptr, row, segment, n_rows, max_score)
            for recomputed in range(start, t):
                temperature = tl.load(temperature_ptr + recomputed)
                total = tl.sum(exponentials_of(s, b, largest, temperature), axis=0)
                a = next_a(total, largest, log_k, temperature)
                b = next_b(s, a)
                largest = largest_of(max_score, a)

            temperature = tl.load(temperature_ptr + t)
            exponentials = exponentials_of(s, b, largest, temperature)
            total = tl.sum(exponentials, axis=0)
            total = tl.where(total == 0, 1.0, total)
            clipped = tl.sum(tl.where(b < 0, exponentials, 0.0), axis=0)
            ds -= gradient_through_scores(s, b, exponentials, grad_a / total)
            dk += grad_a * temperature.to(dtype)
            grad_a *= clipped / total

    dk += grad_a * tl.load(temperature_ptr).to(dtype)
    tl.store(ds_ptr + row * n + columns, ds.to(ds_ptr.dtype.element_ty), mask=columns < n)
    tl.store(dk_ptr + row, dk / k)


@triton.jit
def _load_b(b_ptr, s, a, columns, n, saved):
    """b of a tile: from its checkpoint if an iteration starts from there, else from the previous a."""
    if saved:
        b = tl.load(b_ptr + columns, mask=columns < n, other=0.0)
    else:
        b = next_b(s, a)
    return b


@triton.jit(do_not_specialize=COUNTS)
def _streaming_backward_kernel(
    grad_output_ptr,  # rows n
    scores_ptr,  # rows n
    mask_ptr,  # rows n
    k_ptr,  # rows
    a_ptr,  # segments rows
    b_ptr,  # segments rows n
    temperature_ptr,  # n_iters + 1, fp64
    ds_ptr,  # rows n, of the dtype of b: accumulates the gradient of the scores
    dk_ptr,  # rows
    grad_output_stride,
    scores_stride,
    mask_stride,
    n_rows,
    n,
    n_iters,
    segments,
    k: "fp64",
    BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_K: tl.constexpr,
):
    """The gradient of a longer row, tile by tile, from the last segment to the first."""
    dtype: tl.constexpr = b_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    grad_output_ptr += row * grad_output_stride
    scores_ptr += row * scores_stride
    mask_ptr += row * mask_stride
    ds_ptr += row * n
    log_k, k = load_log_k(k_ptr, row, k, dtype, HAS_K)

    a = tl.load(a_ptr + slot_of(segments - 1, row, n_rows))
    temperature = tl.load(temperature_ptr + n_iters)
    in_lane = tl.zeros([BLOCK_N], dtype)
    max_in_lane = tl.full([BLOCK_N], -float("inf"), dtype)
    for tile in range(0, n, BLOCK_N):
        columns = tile + tl.arange(0, BLOCK_N)
        s = load_scores(scores_ptr, mask_ptr, columns, n, dtype, HAS_MASK)
        ds = gradient_through_output(s, tl.load(grad_output_ptr + columns, mask=columns < n, other=0.0), a, temperature)
        tl.store(ds_ptr + columns, ds, mask=columns < n)
        in_lane += ds
        max_in_lane = tl.maximum(max_in_lane, s)
    grad_a = tl.sum(in_lane, axis=0)
    max_score = finite(tl.max(max_in_lane, axis=0))

    dk = tl.zeros((), dtype)
    for reverse in range(segments):
        segment = segments - 1 - reverse
        start, stop = borders_of(segment, n_iters, segments)
        start_ptr = b_ptr + slot_of(segment, row, n_rows) * n
        # The first iteration of all passes no gradient to the scores.
        for steps_back in range(stop - tl.maximum(start, 1)):
            t = stop - 1 - steps_back
            a, largest = _resume(a_ptr, row, segment, n_rows, max_score)
            for recomputed in range(start, t):
                temperature = tl.load(temperature_ptr + recomputed)
                in_lane = tl.zeros([BLOCK_N], dtype)
                for tile in range(0, n, BLOCK_N):
                    columns = tile + tl.arange(0, BLOCK_N)
                    s = load_scores(scores_ptr, mask_ptr, columns, n, dtype, HAS_MASK)
                    b = _load_b(start_ptr, s, a, columns, n, recomputed == start)
                    in_lane += exponentials_of(s, b, largest, temperature)
                a = next_a(tl.sum(in_lane, axis=0), largest, log_k, temperature)
                largest = largest_of(max_score, a)

            temperature = tl.load(temperature_ptr + t)
            in_lane = tl.zeros([BLOCK_N], dtype)
            clipped_in_lane = tl.zeros([BLOCK_N], dtype)
            for tile in range(0, n, BLOCK_N):
                columns = tile + tl.arange(0, BLOCK_N)
                s = load_scores(scores_ptr, mask_ptr, columns, n, dtype, HAS_MASK)
                b = _load_b(start_ptr, s, a, columns, n, t == start)
                exponentials = exponentials_of(s, b, largest, temperature)
                in_lane += exponentials
                clipped_in_lane += tl.where(b < 0, exponentials, 0.0)
            total = tl.sum(in_lane, axis=0)
            total = tl.where(total == 0, 1.0, total)
            clipped = tl.sum(clipped_in_lane, axis=0)
            # A thread may read entries that another thread wrote in the previous iteration.
            tl.debug_barrier()
            for tile in range(0, n, BLOCK_N):
                columns = tile + tl.arange(0, BLOCK_N)
                s = load_scores(scores_ptr, mask_ptr, columns, n, dtype, HAS_MASK)
                b = _load_b(start_ptr, s, a, columns, n, t == start)
                ds = tl.load(ds_ptr + columns, mask=columns < n, other=0.0)
                ds -= gradient_through_scores(s, b, exponentials_of(s, b, largest, temperature), grad_a / total)
                tl.store(ds_ptr + columns, ds, mask=columns < n)
            dk += grad_a * temperature.to(dtype)
            grad_a *= clipped / total

    dk += grad_a * tl.load(temperature_ptr).to(dtype)
    tl.store(dk_ptr + row, dk / k)


@planner
def _plan(n_rows: int, n: int, itemsize: int) -> Plan:
    """A thread has 16 entries, 4 in fp64. Pieces are tiles of a row that does not stay in registers, which are read
    again."""
    size = 4 if itemsize == 8 else 1
    resident = n * size <= RESIDENT
    block_n = max(triton.next_power_of_2(n), 32) if resident else STREAMED // size
    num_warps = max(block_n * size // 512, 1)
    # All registers of a multiprocessor: without a limit, the compiler spills to fit more programs.
    settings = {"BLOCK_N": block_n, "num_warps": num_warps, "maxnreg": most_registers(num_warps)}
    return Plan(n_rows, settings, 0 if resident else triton.cdiv(n, block_n))


@Launcher
def launch_forward(
    scores: Tensor,
    mask: Tensor | None,
    k_rows: Tensor | None,
    k: float,
    n_iters: int,
    first: float,
    eps_decay: float,
    eps: float,
    segments: int,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    temperatures: Tensor,
) -> Iterator[Launch]:
    n_rows, n = scores.shape
    plan = _plan(n_rows, n, b.itemsize)
    yield Launch(
        _streaming_forward_kernel if plan.pieces else _resident_forward_kernel,
        plan,
        scores,
        scores if mask is None else mask,
        scores if k_rows is None else k_rows,
        y,
        a,
        b,
        temperatures,
        scores.stride(0),
        0 if mask is None else mask.stride(0),
        n_rows,
        n,
        n_iters,
        segments,
        k,
        first,
        eps_decay,
        eps,
        HAS_MASK=mask is not None,
        HAS_K=k_rows is not None,
        SAVE=b.numel() > 0,
    )


def launch_backward(
    grad_output: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    k_rows: Tensor | None,
    k: float,
    a: Tensor,
    b: Tensor,
    temperatures: Tensor,
    ds: Tensor,
    dk: Tensor,
) -> None:
    _, n_rows, n = b.shape
    adds_up = _plan(n_rows, n, b.itemsize).pieces > 0
    total = torch.empty_like(ds, dtype=b.dtype) if adds_up and ds.dtype != b.dtype else ds
    _launch_gradients(grad_output, scores, mask, k_rows, k, a, b, temperatures, total, dk)
    if total is not ds:
        ds.copy_(total)


@Launcher
def _launch_gradients(
    grad_output: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    k_rows: Tensor | None,
    k: float,
    a: Tensor,
    b: Tensor,
    temperatures: Tensor,
    ds: Tensor,
    dk: Tensor,
) -> Iterator[Launch]:
    segments, n_rows, n = b.shape
    plan = _plan(n_rows, n, b.itemsize)
    yield Launch(
        _streaming_backward_kernel if plan.pieces else _resident_backward_kernel,
        plan,
        grad_output,
        scores,
        scores if mask is None else mask,
        scores if k_rows is None else k_rows,
        a,
        b,
        temperatures,
        ds,
        dk,
        grad_output.stride(0),
        scores.stride(0),
        0 if mask is None else mask.stride(0),
        n_rows,
        n,
        temperatures.numel() - 1,
        segments,
        k,
        HAS_MASK=mask is not None,
        HAS_K=k_rows is not None,
    )
