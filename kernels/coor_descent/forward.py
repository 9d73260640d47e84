"""Forward pass of `kernels.coor_descent`: one program for several rows, several for one row, or streamed rows."""

from collections.abc import Iterator
from functools import lru_cache
from math import exp
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common.launch import Launch, Launcher, Scratch
from kernels._common.plans import Plan, most_registers, planner, registers_of_addresses, tile_settings
from kernels._common.primitives import (
    EXP2_LACKS,
    clip_enlarged,
    clip_scaled,
    count_in_thread,
    exchange_highest,
    exchange_sum,
    exp2,
    exp2_line,
    exp2_minus_1,
    exp2_wide,
    exponent_line,
    highest_in_thread,
    inverse,
    is_above,
    larger_or_nan,
    load_k,
    load_tile,
    log2_e_over,
    log_normal,
    max_or_nan,
    per_row,
    round_down,
    slots_for,
    sum_and_count,
    sum_in_thread,
    tile_columns,
    tile_pointers,
)
from kernels._common.tensors import address, multiprocessors
from kernels.coor_descent import constants
from kernels.coor_descent.state import save_origin, save_step, save_temperature
from reference._shared.arguments import epsilon_schedule

RESIDENT = 16384
"""Longest piece of a row that one program keeps in registers. It is twice as long without a mask and a conversion,
which need registers too."""

STREAMED = 8192
"""Entries that a program reads at a time from a row too long for the registers of the whole device."""

IN_THREAD, STREAMED_IN_THREAD = 64, 16
"""Entries per thread, for rows in registers and for streamed rows."""

MAX_SCALE: tl.constexpr = tl.constexpr(exp(constants.MAX_SHIFT))
FAR: tl.constexpr = tl.constexpr(constants.FAR)


@triton.jit
def first_step(log_k, max_score, n_valid, temperature):
    """a after the first iteration, and the highest score as fp64. It is finite for a row without a valid entry. If the
    highest score is NaN or +inf, a is NaN."""
    a = temperature * (log_k - tl.log(n_valid))
    a = tl.where(max_score < float("inf"), a, float("nan"))
    return tl.where(n_valid == 0, 0.0, a), tl.where(n_valid == 0, 0.0, max_score.to(tl.float64))


@triton.jit
def origin_of(max_score, eps):
    """Origin of scores and a of a row, fp32: 0, or the highest score if all are far below 0."""
    return tl.where((max_score < -FAR * eps) & (max_score > -float("inf")), max_score, 0.0).to(tl.float32)


@triton.jit
def from_origin(scores, origin):
    """Scores of a tile relative to the origin of their row."""
    if tl.min(origin, axis=0) < 0:
        scores -= per_row(origin)
    return scores


@triton.jit
def cool(temperature, eps_decay, eps):
    """The next temperature of the schedule, and log2(e) over it."""
    temperature = tl.maximum(temperature * eps_decay, eps)
    return temperature, log2_e_over(temperature)


@triton.jit
def soft_selection(scores, a, factor, HAS_MASK: tl.constexpr):
    """exp(min(s + a, 0) / temperature). NaN stays NaN, and masked entries are 0 even if a is not finite."""
    slope, offset, rest = exponent_line(-a, factor)
    # Below 1, unless the threshold is so far above all scores that their exponentials are 0.
    y = exp2_line(scores, slope, offset) * per_row(exp2(tl.minimum(rest, 1.0).to(tl.float32)))
    y = tl.minimum(y, 1.0, propagate_nan=tl.PropagateNan.ALL)
    if HAS_MASK:
        y = tl.where(scores == -float("inf"), 0.0, y)
    return y


@triton.jit
def descend(
    scores,  # REPEATS ROWS WIDTH
    rows,  # ROWS
    columns,  # REPEATS 1 WIDTH
    part,
    step,
    scores_ptr,
    mask_ptr,
    k_ptr,
    state_ptr,
    mailbox_ptr,
    scores_stride,
    mask_stride,
    n_rows,
    n,
    n_iters,
    k,
    first,
    eps_decay,
    eps,
    cooling,
    REPEATS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_K: tl.constexpr,
    SAVE: tl.constexpr,
):
    """Run all iterations on rows in registers. The results are weights w and an fp64 r per row, with the output min(w
    r, 1); then the last a, log2(e) over the temperature of the output, and the next step.

    The first `cooling` iterations have their own temperatures. After them the temperature stays, and so do the
    exponentials w = exp((s - base) / e): with r = exp((a + base) / e), an iteration is r <- k r / sum min(w r, 1),
    without a logarithm. If the threshold, -a, gets far from the base, scores are read again for new weights.
    """
    max_score = max_or_nan(highest_in_thread(scores, ROWS, WIDTH), 1)
    n_valid = tl.sum(count_in_thread(is_above(scores, -float("inf")), ROWS, WIDTH), axis=1).to(tl.float64)
    if PROGRAMS > 1:
        step += 1
        max_score, n_valid = exchange_highest(mailbox_ptr, step, part, max_score, n_valid, PROGRAMS, SLOTS)

    k_of_row = load_k(k_ptr, rows, k, n_rows, HAS_K)
    log_k = tl.log(k_of_row)
    temperature = first + tl.zeros((), tl.float64)
    factor = log2_e_over(temperature)
    a, max_score = first_step(log_k, max_score, n_valid, temperature)
    origin = origin_of(max_score, eps)
    a, max_score = a + origin, max_score - origin
    scores = from_origin(scores, origin)
    if SAVE:
        save_step(state_ptr, rows, part, n_rows, n_iters, 0, a, tl.zeros([ROWS], tl.float64), temperature, factor)
        save_origin(state_ptr, rows, part, n_rows, n_iters, origin)

    for t in range(1, cooling):
        temperature, factor = cool(temperature, eps_decay, eps)
        threshold = -a
        anchor = tl.where(max_score < threshold, max_score, threshold)
        slope, offset, rest = exponent_line(anchor, factor)
        clipped = clip_enlarged(exp2_line(scores, slope, offset), per_row(exp2_minus_1(rest) + EXP2_LACKS))
        above_threshold = is_above(scores, per_row(round_down(threshold)))
        total, above = sum_and_count(clipped, above_threshold, REPEATS, ROWS, WIDTH, SAVE)
        if PROGRAMS > 1:
            step += 1
            total, above = exchange_sum(mailbox_ptr, step, part, total, above, PROGRAMS, SLOTS)
        # The largest entry counts as 1. Only a row without a valid entry has a sum of 0, and no logarithm.
        total = tl.maximum(total, 0.5)
        a = temperature * (log_k - log_normal(total)) - anchor
        if SAVE:
            ratio = above * inverse(total)
            save_step(state_ptr, rows, part, n_rows, n_iters, t, a, ratio, temperature, factor)

    temperature, factor = cool(temperature, eps_decay, eps)
    weights, slope, offset, base, r, r_max = _weigh(scores, a, max_score, temperature)
    below = round_down(-a)
    for t in range(tl.maximum(cooling, 1), n_iters):
        scale = tl.where(r > r_max, r, r_max)
        clipped = clip_scaled(weights, per_row(scale.to(tl.float32)))
        # An exponential grows with its score, so comparing it with that of the threshold compares the scores.
        limit = exp2_line(per_row(below), slope, offset)
        total, above = sum_and_count(clipped, is_above(weights, limit), REPEATS, ROWS, WIDTH, SAVE)
        if PROGRAMS > 1:
            step += 1
            total, above = exchange_sum(mailbox_ptr, step, part, total, above, PROGRAMS, SLOTS)
        total = tl.maximum(total, 0.5)
        r = k_of_row * scale * inverse(total)
        a = temperature * log_normal(r) - base
        below = round_down(-a)
        if SAVE:
            ratio = above * inverse(total)
            save_step(state_ptr, rows, part, n_rows, n_iters, t, a, ratio, temperature, factor)
        near = tl.where(r > r_max, r, r_max).to(tl.float32)
        if tl.max(((near > MAX_SCALE) | (near < 1.0 / MAX_SCALE)).to(tl.int32), axis=0) > 0:
            again = load_tile(
                scores_ptr, mask_ptr, rows, columns, scores_stride, mask_stride, n_rows, n, HAS_MASK, True
            )
            again = from_origin(again, origin)
            weights, slope, offset, base, r, r_max = _weigh(again, a, max_score, temperature)
    if SAVE:
        save_temperature(state_ptr, n_rows, n_iters, n_iters, temperature, factor)
    return weights, r, a, factor, step


@triton.jit
def _weigh(scores, a, max_score, temperature):
    """Weights of the scores at a base near the threshold -a. With them, slope and offset of their exponents, and the
    base of a row. Then exp((a + base) / e), and the same for the threshold at the highest score, as fp64."""
    factor = log2_e_over(temperature)
    threshold = -a
    anchor = tl.where(max_score < threshold, max_score, threshold)
    slope, offset, rest = exponent_line(anchor, factor)
    base = anchor + rest * inverse(slope.to(tl.float64))
    r = exp2_wide((a + base) * factor).to(tl.float64)
    r_max = exp2_wide((base - max_score) * factor).to(tl.float64)
    return exp2_line(scores, slope, offset), slope, offset, base, r, r_max


@triton.jit
def _relax_rows(
    rows, columns, part, step, scores_ptr, mask_ptr, k_ptr, y_ptr, state_ptr, mailbox_ptr, scores_stride, mask_stride,
    n_rows, n, n_iters, k, first, eps_decay, eps, cooling, REPEATS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, PROGRAMS: tl.constexpr, SLOTS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_K: tl.constexpr,
    SAVE: tl.constexpr,
):  # fmt: skip
    """Compute rows, or one program's part of a row, from scores to output; return the next step."""
    scores = load_tile(scores_ptr, mask_ptr, rows, columns, scores_stride, mask_stride, n_rows, n, HAS_MASK)
    weights, r, _, _, step = descend(
        scores, rows, columns, part, step, scores_ptr, mask_ptr, k_ptr, state_ptr, mailbox_ptr, scores_stride,
        mask_stride, n_rows, n, n_iters, k, first, eps_decay, eps, cooling, REPEATS, ROWS, WIDTH, PROGRAMS, SLOTS,
        HAS_MASK, HAS_K, SAVE,
    )  # fmt: skip
    y = tl.minimum(weights * per_row(r.to(tl.float32)), 1.0, propagate_nan=tl.PropagateNan.ALL)
    if HAS_MASK:
        scores = load_tile(scores_ptr, mask_ptr, rows, columns, scores_stride, mask_stride, n_rows, n, HAS_MASK, True)
        y = tl.where(scores == -float("inf"), 0.0, y)
    exists = (per_row(rows) < n_rows) & (columns < n)
    tl.store(tile_pointers(y_ptr, rows, columns, n), y.to(y_ptr.dtype.element_ty), mask=exists)
    return step


@triton.jit(do_not_specialize_on_alignment=["n_rows"])
def _resident_kernel(
    scores_ptr,  # rows n
    mask_ptr,  # rows n
    k_ptr,  # rows
    y_ptr,  # rows n
    state_ptr,  # rows+1 2 n_iters+1, fp64
    mailbox_ptr,  # groups 2 PROGRAMS 4, int64
    scores_stride,
    mask_stride,
    n_rows,
    n,
    n_iters,
    k: "fp64",
    first: "fp64",
    eps_decay: "fp64",
    eps: "fp64",
    cooling,
    REPEATS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_K: tl.constexpr,
    SAVE: tl.constexpr,
):
    """Rows that fit into registers: ROWS rows in one program, or one row in PROGRAMS programs."""
    group = tl.program_id(0) // PROGRAMS
    part = tl.program_id(0) % PROGRAMS
    columns = part * (REPEATS * WIDTH) + tile_columns(REPEATS, WIDTH)
    rows = group.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    step = 0
    if PROGRAMS == 1:
        _relax_rows(
            rows, columns, part, step, scores_ptr, mask_ptr, k_ptr, y_ptr, state_ptr, mailbox_ptr, scores_stride,
            mask_stride, n_rows, n, n_iters, k, first, eps_decay, eps, cooling, REPEATS, ROWS, WIDTH, PROGRAMS, SLOTS,
            HAS_MASK, HAS_K, SAVE,
        )  # fmt: skip
    else:
        mailbox_ptr += group * (8 * PROGRAMS)
        groups = tl.num_programs(0) // PROGRAMS
        for _ in range(group, n_rows, groups):
            step = _relax_rows(
                rows, columns, part, step, scores_ptr, mask_ptr, k_ptr, y_ptr, state_ptr, mailbox_ptr, scores_stride,
                mask_stride, n_rows, n, n_iters, k, first, eps_decay, eps, cooling, REPEATS, ROWS, WIDTH, PROGRAMS,
                SLOTS, HAS_MASK, HAS_K, SAVE,
            )  # fmt: skip
            rows += groups


@triton.jit
def _streaming_kernel(
    scores_ptr,  # rows n
    mask_ptr,  # rows n
    k_ptr,  # rows
    y_ptr,  # rows n
    state_ptr,  # rows+1 2 n_iters+1, fp64
    mailbox_ptr,  # 2 PROGRAMS 4, int64
    scores_stride,
    mask_stride,
    n_rows,
    n,
    n_iters,
    k: "fp64",
    first: "fp64",
    eps_decay: "fp64",
    eps: "fp64",
    tiles,
    REPEATS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_K: tl.constexpr,
    SAVE: tl.constexpr,
):
    """Compute longer rows one by one. The current row is in the L2 cache and is read from there."""
    part = tl.program_id(0)
    start = tl.cast(part, tl.int64) * tiles * (REPEATS * WIDTH)
    columns = start + tile_columns(REPEATS, WIDTH)
    step = 0
    for row in range(n_rows):
        rows = row + tl.arange(0, 1).to(tl.int64)
        max_of_thread = tl.full([1, WIDTH // 4], -float("inf"), tl.float32)
        n_valid_in_thread = tl.zeros([1, WIDTH // 4], tl.int32)
        for tile in range(tiles):
            tile_cols = columns + tile * (REPEATS * WIDTH)
            scores = load_tile(scores_ptr, mask_ptr, rows, tile_cols, scores_stride, mask_stride, n_rows, n, HAS_MASK)
            max_of_thread = larger_or_nan(max_of_thread, highest_in_thread(scores, 1, WIDTH))
            n_valid_in_thread += count_in_thread(is_above(scores, -float("inf")), 1, WIDTH)
        max_score = max_or_nan(max_of_thread, 1)
        n_valid = tl.sum(n_valid_in_thread, axis=1).to(tl.float64)
        step += 1
        max_score, n_valid = exchange_highest(mailbox_ptr, step, part, max_score, n_valid, PROGRAMS, SLOTS)
        log_k = tl.log(load_k(k_ptr, rows, k, n_rows, HAS_K))
        temperature = first + tl.zeros((), tl.float64)
        factor = log2_e_over(temperature)
        a, max_score = first_step(log_k, max_score, n_valid, temperature)
        origin = origin_of(max_score, eps)
        a, max_score = a + origin, max_score - origin
        move = per_row(origin)
        if SAVE:
            save_step(state_ptr, rows, part, n_rows, n_iters, 0, a, tl.zeros([1], tl.float64), temperature, factor)
            save_origin(state_ptr, rows, part, n_rows, n_iters, origin)

        for t in range(1, n_iters):
            temperature, factor = cool(temperature, eps_decay, eps)
            anchor = tl.where(max_score < -a, max_score, -a)
            threshold = per_row(round_down(-a))
            slope, offset, rest = exponent_line(anchor, factor)
            more = per_row(exp2_minus_1(rest) + EXP2_LACKS)
            total_in_thread = tl.zeros([1, WIDTH // 4], tl.float64)
            above_in_thread = tl.zeros([1, WIDTH // 4], tl.int32)
            for tile in range(tiles):
                tile_cols = columns + tile * (REPEATS * WIDTH)
                scores = load_tile(
                    scores_ptr, mask_ptr, rows, tile_cols, scores_stride, mask_stride, n_rows, n, HAS_MASK
                )
                scores -= move
                clipped = clip_enlarged(exp2_line(scores, slope, offset), more)
                total_in_thread += sum_in_thread(clipped, REPEATS, 1, WIDTH)
                if SAVE:
                    above_in_thread += count_in_thread(is_above(scores, threshold), 1, WIDTH)
            total = tl.sum(total_in_thread, axis=1)
            above = tl.sum(above_in_thread, axis=1).to(tl.float64)
            step += 1
            total, above = exchange_sum(mailbox_ptr, step, part, total, above, PROGRAMS, SLOTS)
            total = tl.maximum(total, 0.5)
            a = temperature * (log_k - log_normal(total)) - anchor
            if SAVE:
                ratio = above * inverse(total)
                save_step(state_ptr, rows, part, n_rows, n_iters, t, a, ratio, temperature, factor)

        temperature, factor = cool(temperature, eps_decay, eps)
        if SAVE:
            save_temperature(state_ptr, n_rows, n_iters, n_iters, temperature, factor)
        for tile in range(tiles):
            tile_cols = columns + tile * (REPEATS * WIDTH)
            scores = load_tile(scores_ptr, mask_ptr, rows, tile_cols, scores_stride, mask_stride, n_rows, n, HAS_MASK)
            y = soft_selection(scores - move, a, factor, HAS_MASK).to(y_ptr.dtype.element_ty)
            tl.store(tile_pointers(y_ptr, rows, tile_cols, n), y, mask=tile_cols < n)


def entries_in_thread(n_rows: int, n: int, available: int) -> int:
    """Entries of a row per thread: enough to make the scalar work of a row negligible. There are fewer if
    multiprocessors would have no work."""
    warps = n_rows * n // (IN_THREAD * 32)
    if n > RESIDENT or warps >= 8 * available:
        return IN_THREAD
    return IN_THREAD // 2 if 4 * warps >= available else IN_THREAD // 4


@planner
def _plan(n_rows: int, n: int, simple: bool, aligned: bool, available: int) -> Plan:
    """Pieces are tiles that a program streams, of a row that does not stay in registers.

    Rows are simple without a mask and a conversion. If other rows are not aligned, entries are loaded one by one, each
    with its address, so only half as many fit into registers.
    """
    resident, most = (RESIDENT, IN_THREAD) if simple or aligned else (RESIDENT // 2, IN_THREAD // 2)
    if n <= resident or (simple and n <= 2 * resident):
        tile = tile_settings(n, min(entries_in_thread(n_rows, n, available), most))
        # Fewer registers per thread allow more rows at a time, which hide each other's latency. Loads need more
        # registers with a mask or a conversion.
        registers = most_registers(tile["num_warps"])
        if simple:
            registers = min(registers, 128 + registers_of_addresses(tile, aligned))
        alone = {"PROGRAMS": 1, "SLOTS": 1, "maxnreg": registers}
        return Plan(triton.cdiv(n_rows, tile["ROWS"]), {**tile, **alone}, 0)
    # As few entries per program as the number of programs allows, but enough to be worth an exchange.
    halve = n_rows * triton.cdiv(n, resident // 2) <= available
    piece = resident // 2 if halve else resident
    sharing = triton.cdiv(n, piece)
    # Rounded up if enough programs are available, so that few numbers of programs serve all lengths.
    rounded = 8 * triton.cdiv(sharing, 8)
    if n_rows * rounded <= available:
        sharing = rounded
    if sharing <= available:
        groups = max(min(n_rows, available // sharing), 1)
        return Plan(groups * sharing, _shared(piece, most, sharing), 0)
    tiles = triton.cdiv(triton.cdiv(n, available), STREAMED)
    return Plan(available, _shared(STREAMED, STREAMED_IN_THREAD, available), tiles)


def _shared(piece: int, in_thread: int, programs: int) -> dict[str, Any]:
    """Settings for rows that are divided among programs, which must all run at the same time to exchange numbers."""
    tile = tile_settings(piece, in_thread)
    return {
        **tile,
        "PROGRAMS": programs,
        "SLOTS": slots_for(programs, tile["num_warps"]),
        "launch_cooperative_grid": True,
        # All registers of a multiprocessor: without a limit, the assembler may spill to fit a second program.
        "maxnreg": most_registers(tile["num_warps"]),
    }


@lru_cache(maxsize=1024)
def cooling_iterations(n_iters: int, eps: float, first: float, eps_decay: float) -> int:
    """Iterations before the temperature reaches that of the output."""
    temperatures = list(epsilon_schedule(n_iters, eps, first, eps_decay))
    return temperatures.index(temperatures[-1])


@Launcher
def launch_forward(
    scores: Tensor,
    mask: Tensor | None,
    k_rows: Tensor | None,
    k: float,
    n_iters: int,
    eps: float,
    first: float,
    eps_decay: float,
    y: Tensor,
    state: Tensor,
) -> Iterator[Launch]:
    n_rows, n = scores.shape
    simple = mask is None and scores.dtype == torch.float32
    strides = (scores.stride(0), 0 if mask is None else mask.stride(0))
    aligned = (n | address(scores) | strides[0] | strides[1]) % 16 == 0
    plan = _plan(n_rows, n, simple, aligned, multiprocessors(scores.device))
    mailbox = 8 * plan.programs if "launch_cooperative_grid" in plan.settings else 0
    kernel = _streaming_kernel if plan.pieces else _resident_kernel
    yield Launch(
        kernel,
        plan,
        scores,
        scores if mask is None else mask,
        scores if k_rows is None else k_rows,
        y,
        state,
        Scratch(mailbox, dtype=torch.int64, zeros=True) if mailbox else y,
        *strides,
        n_rows,
        n,
        n_iters,
        k,
        first,
        eps_decay,
        eps,
        plan.pieces or cooling_iterations(n_iters, eps, first, eps_decay),
        HAS_MASK=mask is not None,
        HAS_K=k_rows is not None,
        SAVE=state.numel() > 0,
    )
