"""Forward pass of `kernels.coor_descent`: one program for several rows, several for one row, or rows streamed."""

from functools import lru_cache
from math import log
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import _coor_descent_torch as in_pytorch
from kernels._descent_state import save_step
from kernels._launch import multiprocessors, tile_settings
from kernels._primitives import (
    LOWEST,
    clip_scaled,
    count_in_thread,
    exchange_highest,
    exchange_sum,
    exp2,
    exp2_line,
    exp2_wide,
    exponent_line,
    is_above,
    load_k,
    load_tile,
    log2_e_over,
    log_normal,
    per_row,
    round_down,
    sum_and_count,
    sum_in_thread,
    tile_columns,
)

RESIDENT = 16384
"""Longest piece of a row that one program keeps in registers."""

STREAMED = 8192
"""Entries that a program reads at a time from a row too long for the registers of the whole device."""

IN_THREAD, STREAMED_IN_THREAD = 64, 16
"""Entries in a thread, for the two."""

MAX_SHIFT: tl.constexpr = tl.constexpr(in_pytorch.MAX_SHIFT)


@triton.jit
def _masked_count_in_thread(
    scores, REPEATS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, HAS_MASK: tl.constexpr
):
    """Entries that a mask leaves, a thread and row: ROWS x WIDTH // 4, fp64; 0 without a mask. NaN where one is NaN."""
    total = sum_in_thread(scores, REPEATS, ROWS, WIDTH)
    count = tl.zeros([ROWS, WIDTH // 4], tl.float64)
    if HAS_MASK:
        count += count_in_thread(is_above(scores, LOWEST), ROWS, WIDTH)
    return tl.where(total == total, count, float("nan"))


@triton.jit
def _first_step(log_k, highest, n_valid, temperature):
    """a after the first iteration, and the highest score as fp64; finite for a row without a valid entry."""
    a = temperature * (log_k - tl.log(n_valid))
    return tl.where(n_valid == 0, 0.0, a), tl.where(n_valid == 0, 0.0, highest.to(tl.float64))


@triton.jit
def _cool(temperature, factor, eps_decay, eps, inverse_decay, last_factor):
    """The next temperature of the schedule, and log2(e) over it; the last two arguments save divisions."""
    cooler = temperature * eps_decay
    last = cooler <= eps
    return tl.where(last, eps, cooler), tl.where(last, last_factor, factor * inverse_decay)


@triton.jit
def soft_selection(scores, a, factor, HAS_MASK: tl.constexpr):
    """exp(min(s + a, 0) / temperature); NaN stays NaN, and what is masked is 0 also where a is not finite."""
    slope, offset, rest = exponent_line(-a, factor)
    y = exp2_line(scores, slope, offset) * per_row(exp2(rest.to(tl.float32)))
    y = tl.minimum(y, 1.0, propagate_nan=tl.PropagateNan.ALL)
    if HAS_MASK:
        y = tl.where(scores == LOWEST, 0.0, y)
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
    REPEATS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_K: tl.constexpr,
    SAVE: tl.constexpr,
    REUSE: tl.constexpr,
    RELOAD: tl.constexpr,
):
    """All iterations on rows in registers: the last a, log2(e) over the temperature of the output, the next step.

    With REUSE, exponentials are kept from iteration to iteration, as long as the temperature is the same and the
    threshold near; they are what stays in registers then. The scores stay, too, unless RELOAD has them read again.
    """
    zero = tl.zeros((), tl.float64)
    eps += zero
    inverse_decay, last_factor = 1.0 / (eps_decay + zero), log2_e_over(eps)

    highest = tl.max(tl.max(scores, axis=0), axis=1)
    n_valid = tl.sum(_masked_count_in_thread(scores, REPEATS, ROWS, WIDTH, HAS_MASK), axis=1)
    if PROGRAMS > 1:
        step += 1
        highest, n_valid = exchange_highest(mailbox_ptr, step, part, highest, n_valid, PROGRAMS, SLOTS)
    n_valid += 0 if HAS_MASK else n

    log_k = tl.log(load_k(k_ptr, rows, k, n_rows, HAS_K))
    temperature = first + zero
    factor = log2_e_over(temperature)
    a, highest = _first_step(log_k, highest, n_valid, temperature)
    if SAVE:
        save_step(state_ptr, rows, part, n_rows, n_iters, 0, a, tl.zeros([ROWS], tl.float64), temperature, factor)

    weights = tl.zeros([REPEATS, ROWS, WIDTH], tl.float32)
    offset = tl.zeros([ROWS], tl.float32)
    base = tl.zeros([ROWS], tl.float64)
    base_temperature = zero
    for t in range(1, n_iters):
        temperature, factor = _cool(temperature, factor, eps_decay, eps, inverse_decay, last_factor)
        threshold = -a
        anchor = tl.where(highest < threshold, highest, threshold)
        if REUSE:
            moved = tl.max((tl.abs(anchor - base) > temperature * MAX_SHIFT).to(tl.int32), axis=0)
            if (temperature != base_temperature) | (moved > 0):
                base_temperature = temperature
                slope, offset, rest = exponent_line(anchor, factor)
                base = anchor + rest / slope.to(tl.float64)
                again = scores
                if RELOAD:
                    again = load_tile(
                        scores_ptr, mask_ptr, rows, columns, scores_stride, mask_stride, n_rows, n, HAS_MASK, True
                    )
                weights = exp2_line(again, slope, offset)
            clipped = clip_scaled(weights, per_row(exp2_wide((base - anchor) * factor)))
            # An exponential grows with its score, so that comparing with that of the threshold is comparing scores.
            limit = exp2_line(per_row(round_down(threshold)), factor.to(tl.float32), offset)
            above_threshold = is_above(weights, limit)
        else:
            slope, offset, rest = exponent_line(anchor, factor)
            clipped = clip_scaled(exp2_line(scores, slope, offset), per_row(exp2(rest.to(tl.float32))))
            above_threshold = is_above(scores, per_row(round_down(threshold)))
        total, above = sum_and_count(clipped, above_threshold, REPEATS, ROWS, WIDTH, SAVE)
        if PROGRAMS > 1:
            step += 1
            total, above = exchange_sum(mailbox_ptr, step, part, total, above, PROGRAMS, SLOTS)
        total = tl.where(n_valid == 0, 1.0, total)
        a = temperature * (log_k - log_normal(total)) - anchor
        if SAVE:
            ratio = above.to(tl.float32) / total.to(tl.float32)
            save_step(state_ptr, rows, part, n_rows, n_iters, t, a, ratio, temperature, factor)

    temperature, factor = _cool(temperature, factor, eps_decay, eps, inverse_decay, last_factor)
    if SAVE:
        save_step(state_ptr, rows, part, n_rows, n_iters, n_iters, a, tl.zeros([ROWS], tl.float64), temperature, factor)
    return a, factor, step


@triton.jit
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
    REPEATS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_K: tl.constexpr,
    SAVE: tl.constexpr,
    REUSE: tl.constexpr,
    RELOAD: tl.constexpr,
):
    """Rows that fit into registers: ROWS of them in one program, or one in PROGRAMS of them."""
    group = tl.program_id(0) // PROGRAMS
    part = tl.program_id(0) % PROGRAMS
    mailbox_ptr += group * (8 * PROGRAMS)
    columns = part * (REPEATS * WIDTH) + tile_columns(REPEATS, WIDTH)
    step = 0
    for first_row in range(group * ROWS, n_rows, tl.num_programs(0) // PROGRAMS * ROWS):
        rows = first_row + tl.arange(0, ROWS).to(tl.int64)
        scores = load_tile(scores_ptr, mask_ptr, rows, columns, scores_stride, mask_stride, n_rows, n, HAS_MASK)
        a, factor, step = descend(
            scores, rows, columns, part, step, scores_ptr, mask_ptr, k_ptr, state_ptr, mailbox_ptr, scores_stride,
            mask_stride, n_rows, n, n_iters, k, first, eps_decay, eps, REPEATS, ROWS, WIDTH, PROGRAMS, SLOTS, HAS_MASK,
            HAS_K, SAVE, REUSE, RELOAD,
        )  # fmt: skip
        if RELOAD:
            scores = load_tile(
                scores_ptr, mask_ptr, rows, columns, scores_stride, mask_stride, n_rows, n, HAS_MASK, True
            )
        y = soft_selection(scores, a, factor, HAS_MASK).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + per_row(rows) * n + columns, y, mask=(per_row(rows) < n_rows) & (columns < n))


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
    """Longer rows, one after the other, so that one row at a time lives in the L2 cache and is read from there."""
    part = tl.program_id(0)
    start = tl.cast(part, tl.int64) * tiles * (REPEATS * WIDTH)
    columns = start + tile_columns(REPEATS, WIDTH)
    step = 0
    zero = tl.zeros((), tl.float64)
    eps += zero
    inverse_decay, last_factor = 1.0 / (eps_decay + zero), log2_e_over(eps)

    for row in range(n_rows):
        rows = row + tl.arange(0, 1).to(tl.int64)
        highest_in_thread = tl.full([1, WIDTH], LOWEST, tl.float32)
        n_valid_in_thread = tl.zeros([1, WIDTH // 4], tl.float64)
        for tile in range(tiles):
            tile_cols = columns + tile * (REPEATS * WIDTH)
            scores = load_tile(scores_ptr, mask_ptr, rows, tile_cols, scores_stride, mask_stride, n_rows, n, HAS_MASK)
            highest_in_thread = tl.maximum(highest_in_thread, tl.max(scores, axis=0))
            n_valid_in_thread += _masked_count_in_thread(scores, REPEATS, 1, WIDTH, HAS_MASK)
        highest = tl.max(highest_in_thread, axis=1)
        n_valid = tl.sum(n_valid_in_thread, axis=1)
        step += 1
        highest, n_valid = exchange_highest(mailbox_ptr, step, part, highest, n_valid, PROGRAMS, SLOTS)

        n_valid += 0 if HAS_MASK else n
        log_k = tl.log(load_k(k_ptr, rows, k, n_rows, HAS_K))
        temperature = first + zero
        factor = log2_e_over(temperature)
        a, highest = _first_step(log_k, highest, n_valid, temperature)
        if SAVE:
            save_step(state_ptr, rows, part, n_rows, n_iters, 0, a, tl.zeros([1], tl.float64), temperature, factor)

        for t in range(1, n_iters):
            temperature, factor = _cool(temperature, factor, eps_decay, eps, inverse_decay, last_factor)
            anchor = tl.where(highest < -a, highest, -a)
            threshold = per_row(round_down(-a))
            slope, offset, rest = exponent_line(anchor, factor)
            scale = per_row(exp2(rest.to(tl.float32)))
            total_in_thread = tl.zeros([1, WIDTH // 4], tl.float64)
            above_in_thread = tl.zeros([1, WIDTH // 4], tl.int32)
            for tile in range(tiles):
                tile_cols = columns + tile * (REPEATS * WIDTH)
                scores = load_tile(
                    scores_ptr, mask_ptr, rows, tile_cols, scores_stride, mask_stride, n_rows, n, HAS_MASK
                )
                clipped = clip_scaled(exp2_line(scores, slope, offset), scale)
                total_in_thread += sum_in_thread(clipped, REPEATS, 1, WIDTH)
                if SAVE:
                    above_in_thread += count_in_thread(is_above(scores, threshold), 1, WIDTH)
            total = tl.sum(total_in_thread, axis=1)
            above = tl.sum(above_in_thread, axis=1).to(tl.float64)
            step += 1
            total, above = exchange_sum(mailbox_ptr, step, part, total, above, PROGRAMS, SLOTS)
            total = tl.where(n_valid == 0, 1.0, total)
            a = temperature * (log_k - log_normal(total)) - anchor
            if SAVE:
                ratio = above.to(tl.float32) / total.to(tl.float32)
                save_step(state_ptr, rows, part, n_rows, n_iters, t, a, ratio, temperature, factor)

        temperature, factor = _cool(temperature, factor, eps_decay, eps, inverse_decay, last_factor)
        if SAVE:
            ratio = tl.zeros([1], tl.float64)
            save_step(state_ptr, rows, part, n_rows, n_iters, n_iters, a, ratio, temperature, factor)
        for tile in range(tiles):
            tile_cols = columns + tile * (REPEATS * WIDTH)
            scores = load_tile(scores_ptr, mask_ptr, rows, tile_cols, scores_stride, mask_stride, n_rows, n, HAS_MASK)
            y = soft_selection(scores, a, factor, HAS_MASK).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + per_row(rows) * n + tile_cols, y, mask=tile_cols < n)


def entries_in_thread(n_rows: int, n: int, available: int) -> int:
    """So many entries of a row in a thread that the scalar work of a row weighs little, but fewer where that leaves
    multiprocessors without work."""
    return IN_THREAD if n_rows * n >= IN_THREAD * 32 * 8 * available else IN_THREAD // 2


class _Plan(NamedTuple):
    """How rows are spread over programs."""

    programs: int
    """Of one row, or of ROWS of them."""

    groups: int
    """Rows, or ROWS of them, under way at the same time."""

    tiles: int
    """Pieces of a row that a program streams; 0 where a row stays in registers."""

    settings: dict[str, int]


@lru_cache(maxsize=4096)
def _plan(n_rows: int, n: int, simple: bool, available: int, resident: int, streamed: int) -> _Plan:
    if n <= resident:
        tile = tile_settings(n, entries_in_thread(n_rows, n, available))
        # The fewer registers a thread, the more rows under way, which hide each other's waiting. Loading needs more of
        # them where there is a mask or a conversion.
        registers = 128 if simple else min(255, 65536 // (32 * tile["num_warps"]))
        return _Plan(1, triton.cdiv(n_rows, tile["ROWS"]), 0, {**tile, **_shared_by(1), "maxnreg": registers})
    # As few entries a program as there are programs to share them, but no fewer than are worth an exchange.
    halve = n_rows * triton.cdiv(n, resident // 2) <= available
    piece = resident // 2 if halve else resident
    programs = triton.cdiv(n, piece)
    if programs <= available:
        groups = max(min(n_rows, available // programs), 1)
        return _Plan(programs, groups, 0, {**tile_settings(piece, IN_THREAD), **_shared_by(programs)})
    tiles = triton.cdiv(triton.cdiv(n, available), streamed)
    return _Plan(available, 1, tiles, {**tile_settings(streamed, STREAMED_IN_THREAD), **_shared_by(available)})


def _shared_by(programs: int) -> dict[str, int]:
    return {"PROGRAMS": programs, "SLOTS": triton.next_power_of_2(programs)}


@lru_cache(maxsize=1024)
def temperatures_repeat(n_iters: int, eps: float, first: float, eps_decay: float) -> bool:
    """Whether most iterations have the temperature of the one before."""
    return first <= eps or eps_decay == 1 or 2 * log(eps / first) / log(eps_decay) <= n_iters


def launch_forward(
    scores: Tensor,
    mask: Tensor | None,
    k_rows: Tensor | None,
    k: float,
    schedule: tuple[int, float, float, float],
    y: Tensor,
    state: Tensor,
) -> None:
    n_rows, n = scores.shape
    n_iters, eps, first, eps_decay = schedule
    simple = mask is None and scores.dtype == torch.float32
    plan = _plan(n_rows, n, simple, multiprocessors(scores.device), RESIDENT, STREAMED)
    alone = plan.programs == 1 and not plan.tiles
    mailbox = y if alone else torch.zeros(plan.groups * 8 * plan.programs, dtype=torch.int64, device=y.device)
    arguments = (
        scores,
        scores if mask is None else mask,
        scores if k_rows is None else k_rows,
        y,
        state,
        mailbox,
        scores.stride(0),
        0 if mask is None else mask.stride(0),
        n_rows,
        n,
        n_iters,
        k,
        first,
        eps_decay,
        eps,
    )
    settings = {
        **plan.settings,
        "HAS_MASK": mask is not None,
        "HAS_K": k_rows is not None,
        "SAVE": state.numel() > 0,
    }
    if plan.tiles:
        _streaming_kernel[(plan.programs,)](*arguments, plan.tiles, **settings, launch_cooperative_grid=True)
        return
    # Exponentials, scores and the pointers to a mask together are more than there are registers.
    reuse = temperatures_repeat(*schedule) and (alone or mask is None)
    _resident_kernel[(plan.groups * plan.programs,)](
        *arguments,
        **settings,
        REUSE=reuse,
        RELOAD=reuse and alone,
        launch_cooperative_grid=not alone,
    )
