"""Coordinate descent on a scalar state: one number a row instead of two vectors, with a closed-form gradient.

After its first step the recurrence of `reference.coor_descent` depends on the scores only through
`a <- e (log k - log sum exp(min(s, -a) / e))`, one fp64 scalar a row (DESIGN 3.2 to 3.4). With

    anchor h = min(max s, -a),     weights w = exp((s - base) / e)

an iteration is `S = sum min(w exp((base - h) / e), 1)` and `a = e (log k - log S) - h`. The weights depend on the
iteration only through the temperature and a base that the anchor must stay near, so that at a constant temperature an
entry costs a multiplication, a minimum and an addition, and an exponential only when the base moves.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import _coor_descent_torch as in_pytorch
from kernels._launch import as_rows, k_as_rows, mask_as_rows, multiprocessors, runs_triton
from kernels._primitives import (
    LOWEST,
    count_in_thread,
    exchange_highest,
    exchange_sum,
    exp2,
    exp_above,
    load_tile,
    log2_e_over,
    log_normal,
    per_row,
    round_down,
    sum_and_count,
    sum_in_thread,
    tile_columns,
)
from reference._arguments import check_k, check_schedule, check_scores, epsilon_schedule, first_temperature

RESIDENT = 16384
"""Longest piece of a row that one program keeps in registers."""

STREAMED = 4096
"""Entries that a program reads at a time from a row too long for the registers of the whole device."""

BACKWARD = 4096
"""Entries of a row that one program of the backward pass handles."""

MAX_SHIFT: tl.constexpr = tl.constexpr(in_pytorch.MAX_SHIFT)
LARGEST: tl.constexpr = tl.constexpr(in_pytorch.LARGEST)


@triton.jit
def _masked_count_in_thread(
    scores, REPEATS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, HAS_MASK: tl.constexpr
):
    """Entries that a mask leaves, a thread and row: ROWS x WIDTH // 4, fp64; 0 without a mask. NaN where one is NaN."""
    total = sum_in_thread(scores, REPEATS, ROWS, WIDTH)
    count = tl.zeros([ROWS, WIDTH // 4], tl.float64)
    if HAS_MASK:
        count += count_in_thread(scores != LOWEST, ROWS, WIDTH)
    return tl.where(total == total, count, float("nan"))


@triton.jit
def _load_k(k_ptr, rows, k, n_rows, HAS_K: tl.constexpr):
    """k of each row as fp64; NaN, and with it the row, where it is not positive."""
    k += tl.zeros([rows.shape[0]], tl.float64)
    if HAS_K:
        k = tl.load(k_ptr + rows, mask=rows < n_rows, other=1.0).to(tl.float64)
    return tl.where(k > 0, k, float("nan"))


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
def _save(trace_ptr, ratio_ptr, temperature_ptr, rows, part, n_rows, n_iters, t, a, ratio, temperature):
    """What the backward pass needs of iteration t. The first program of a row writes it."""
    places = rows * n_iters + t
    writes = (rows < n_rows) & (part == 0)
    tl.store(trace_ptr + places, a, mask=writes)
    tl.store(ratio_ptr + places, ratio, mask=writes)
    tl.store(temperature_ptr + t, temperature, mask=tl.program_id(0) == 0)


@triton.jit
def soft_selection(scores, a, factor, HAS_MASK: tl.constexpr):
    """exp(min(s + a, 0) / temperature); NaN stays NaN, and what is masked is 0 also where a is not finite."""
    y = tl.minimum(exp_above(scores, -a, factor), 1.0, propagate_nan=tl.PropagateNan.ALL)
    if HAS_MASK:
        y = tl.where(scores == LOWEST, 0.0, y)
    return y


@triton.jit
def descend(
    scores,  # REPEATS ROWS WIDTH
    rows,  # ROWS
    part,
    step,
    k_ptr,
    trace_ptr,
    ratio_ptr,
    temperature_ptr,
    mailbox_ptr,
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
):
    """All iterations on rows in registers: the last a, log2(e) over the temperature of the output, the next step."""
    zero = tl.zeros((), tl.float64)
    eps += zero
    inverse_decay, last_factor = 1.0 / (eps_decay + zero), log2_e_over(eps)

    highest = tl.max(tl.max(scores, axis=0), axis=1)
    n_valid = tl.sum(_masked_count_in_thread(scores, REPEATS, ROWS, WIDTH, HAS_MASK), axis=1)
    if PROGRAMS > 1:
        step += 1
        highest, n_valid = exchange_highest(mailbox_ptr, step, part, highest, n_valid, PROGRAMS, SLOTS)
    n_valid += 0 if HAS_MASK else n

    log_k = tl.log(_load_k(k_ptr, rows, k, n_rows, HAS_K))
    temperature = first + zero
    factor = log2_e_over(temperature)
    a, highest = _first_step(log_k, highest, n_valid, temperature)
    if SAVE:
        ratio = tl.zeros([ROWS], tl.float32)
        _save(trace_ptr, ratio_ptr, temperature_ptr, rows, part, n_rows, n_iters, 0, a, ratio, temperature)

    weights = tl.zeros([REPEATS, ROWS, WIDTH], tl.float32)
    base = tl.zeros([ROWS], tl.float64)
    base_temperature = zero
    for t in range(1, n_iters):
        temperature, factor = _cool(temperature, factor, eps_decay, eps, inverse_decay, last_factor)
        anchor = tl.where(highest < -a, highest, -a)
        moved = tl.max((tl.abs(anchor - base) > temperature * MAX_SHIFT).to(tl.int32), axis=0)
        if (temperature != base_temperature) | (moved > 0):
            base = anchor
            base_temperature = temperature
            weights = exp_above(scores, base, factor)
        scale = exp2(((base - anchor) * factor).to(tl.float32))
        clipped = tl.minimum(weights * per_row(scale), 1.0)
        above_threshold = scores > per_row(round_down(-a)) if SAVE else scores != scores
        total, above = sum_and_count(clipped, above_threshold, REPEATS, ROWS, WIDTH)
        if PROGRAMS > 1:
            step += 1
            total, above = exchange_sum(mailbox_ptr, step, part, total, above, PROGRAMS, SLOTS)
        total = tl.where(n_valid == 0, 1.0, total)
        a = temperature * (log_k - log_normal(total)) - anchor
        if SAVE:
            ratio = above.to(tl.float32) / total.to(tl.float32)
            _save(trace_ptr, ratio_ptr, temperature_ptr, rows, part, n_rows, n_iters, t, a, ratio, temperature)

    temperature, factor = _cool(temperature, factor, eps_decay, eps, inverse_decay, last_factor)
    if SAVE:
        tl.store(temperature_ptr + n_iters, temperature, mask=tl.program_id(0) == 0)
    return a, factor, step


@triton.jit
def _resident_kernel(
    scores_ptr,  # rows n
    mask_ptr,  # rows n
    k_ptr,  # rows
    y_ptr,  # rows n
    trace_ptr,  # rows n_iters, fp64
    ratio_ptr,  # rows n_iters, fp32
    temperature_ptr,  # n_iters + 1, fp64
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
            scores, rows, part, step, k_ptr, trace_ptr, ratio_ptr, temperature_ptr, mailbox_ptr, n_rows, n, n_iters,
            k, first, eps_decay, eps, REPEATS, ROWS, WIDTH, PROGRAMS, SLOTS, HAS_MASK, HAS_K, SAVE,
        )  # fmt: skip
        y = soft_selection(scores, a, factor, HAS_MASK).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + per_row(rows) * n + columns, y, mask=(per_row(rows) < n_rows) & (columns < n))


@triton.jit
def _streaming_kernel(
    scores_ptr,  # rows n
    mask_ptr,  # rows n
    k_ptr,  # rows
    y_ptr,  # rows n
    trace_ptr,  # rows n_iters, fp64
    ratio_ptr,  # rows n_iters, fp32
    temperature_ptr,  # n_iters + 1, fp64
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
        log_k = tl.log(_load_k(k_ptr, rows, k, n_rows, HAS_K))
        temperature = first + zero
        factor = log2_e_over(temperature)
        a, highest = _first_step(log_k, highest, n_valid, temperature)
        if SAVE:
            ratio = tl.zeros([1], tl.float32)
            _save(trace_ptr, ratio_ptr, temperature_ptr, rows, part, n_rows, n_iters, 0, a, ratio, temperature)

        for t in range(1, n_iters):
            temperature, factor = _cool(temperature, factor, eps_decay, eps, inverse_decay, last_factor)
            anchor = tl.where(highest < -a, highest, -a)
            threshold = per_row(round_down(-a))
            total_in_thread = tl.zeros([1, WIDTH // 4], tl.float64)
            above_in_thread = tl.zeros([1, WIDTH // 4], tl.int32)
            for tile in range(tiles):
                tile_cols = columns + tile * (REPEATS * WIDTH)
                scores = load_tile(
                    scores_ptr, mask_ptr, rows, tile_cols, scores_stride, mask_stride, n_rows, n, HAS_MASK
                )
                clipped = tl.minimum(exp_above(scores, anchor, factor), 1.0)
                total_in_thread += sum_in_thread(clipped, REPEATS, 1, WIDTH)
                if SAVE:
                    above_in_thread += count_in_thread(scores > threshold, 1, WIDTH)
            total = tl.sum(total_in_thread, axis=1)
            above = tl.sum(above_in_thread, axis=1).to(tl.float64)
            step += 1
            total, above = exchange_sum(mailbox_ptr, step, part, total, above, PROGRAMS, SLOTS)
            total = tl.where(n_valid == 0, 1.0, total)
            a = temperature * (log_k - log_normal(total)) - anchor
            if SAVE:
                ratio = above.to(tl.float32) / total.to(tl.float32)
                _save(trace_ptr, ratio_ptr, temperature_ptr, rows, part, n_rows, n_iters, t, a, ratio, temperature)

        temperature, factor = _cool(temperature, factor, eps_decay, eps, inverse_decay, last_factor)
        if SAVE:
            tl.store(temperature_ptr + n_iters, temperature, mask=tl.program_id(0) == 0)
        for tile in range(tiles):
            tile_cols = columns + tile * (REPEATS * WIDTH)
            scores = load_tile(scores_ptr, mask_ptr, rows, tile_cols, scores_stride, mask_stride, n_rows, n, HAS_MASK)
            y = soft_selection(scores, a, factor, HAS_MASK).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + per_row(rows) * n + tile_cols, y, mask=tile_cols < n)


@triton.jit
def _direct_gradient(scores, grad, a, temperature, HAS_MASK: tl.constexpr):
    """The gradient of the scores through the output alone, at constant a: g y / temperature where y < 1."""
    y = exp_above(scores, -a, log2_e_over(temperature))
    direct = tl.where(scores > per_row(round_down(-a)), 0.0, grad * y * (1.0 / temperature).to(tl.float32))
    if HAS_MASK:
        direct = tl.where(scores == LOWEST, 0.0, direct)
    return direct


@triton.jit
def _grad_a_kernel(
    grad_ptr,  # rows n
    scores_ptr,  # rows n
    mask_ptr,  # rows n
    trace_ptr,  # rows n_iters, fp64
    temperature_ptr,  # n_iters + 1, fp64
    grad_a_ptr,  # rows chunks, fp64
    grad_stride,
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
    """The part of one chunk of a row in the gradient of the last a."""
    rows = tl.program_id(0) // chunks + tl.arange(0, ROWS).to(tl.int64)
    columns = (tl.program_id(0) % chunks) * (REPEATS * WIDTH) + tile_columns(REPEATS, WIDTH)
    scores = load_tile(scores_ptr, mask_ptr, rows, columns, scores_stride, mask_stride, n_rows, n, HAS_MASK)
    grad = tl.load(grad_ptr + per_row(rows) * grad_stride + columns, mask=columns < n, other=0.0).to(tl.float32)
    a = tl.load(trace_ptr + rows * n_iters + n_iters - 1)
    direct = _direct_gradient(scores, grad, a, tl.load(temperature_ptr + n_iters), HAS_MASK)
    grad_a = tl.sum(sum_in_thread(direct, REPEATS, ROWS, WIDTH), axis=1)
    tl.store(grad_a_ptr + tl.program_id(0) + tl.arange(0, ROWS), grad_a)


@triton.jit
def _backward_kernel(
    grad_ptr,  # rows n
    scores_ptr,  # rows n
    mask_ptr,  # rows n
    k_ptr,  # rows
    trace_ptr,  # rows n_iters, fp64
    ratio_ptr,  # rows n_iters, fp32
    temperature_ptr,  # n_iters + 1, fp64
    grad_a_ptr,  # rows chunks, fp64
    ds_ptr,  # rows n
    dk_ptr,  # rows, fp64
    grad_stride,
    scores_stride,
    mask_stride,
    n_rows,
    n,
    n_iters,
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
    rows = tl.program_id(0) // chunks * ROWS + tl.arange(0, ROWS).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    columns = chunk * (REPEATS * WIDTH) + tile_columns(REPEATS, WIDTH)
    row_exists = rows < n_rows
    exists = per_row(row_exists) & (columns < n)
    scores = load_tile(scores_ptr, mask_ptr, rows, columns, scores_stride, mask_stride, n_rows, n, HAS_MASK)
    grad = tl.load(grad_ptr + per_row(rows) * grad_stride + columns, mask=exists, other=0.0).to(tl.float32)
    inverse_k = 1.0 / _load_k(k_ptr, rows, k, n_rows, HAS_K)

    a_ptrs = trace_ptr + rows * n_iters + n_iters - 1
    ratio_ptrs = ratio_ptr + rows * n_iters + n_iters - 1
    a = tl.load(a_ptrs, mask=row_exists, other=0.0)
    ds = _direct_gradient(scores, grad, a, tl.load(temperature_ptr + n_iters), HAS_MASK)
    if SLOTS == 1:
        grad_a = tl.sum(sum_in_thread(ds, REPEATS, ROWS, WIDTH), axis=1)
    else:
        in_slot = tl.zeros([SLOTS], tl.float64)
        for start in range(0, chunks, SLOTS):
            slot = start + tl.arange(0, SLOTS)
            in_slot += tl.load(grad_a_ptr + tl.program_id(0) - chunk + slot, mask=slot < chunks, other=0.0)
        grad_a = tl.sum(in_slot, axis=0) + tl.zeros([ROWS], tl.float64)

    # Iterations of one temperature whose a are close share the weights w = exp((s - base) / e), and only the
    # coefficients of w add up: an exponential for each such run, not for each iteration.
    weights = tl.zeros([REPEATS, ROWS, WIDTH], tl.float32)
    coefficients = tl.zeros([REPEATS, ROWS, WIDTH], tl.float32)
    base = tl.zeros([ROWS], tl.float64)
    base_temperature = tl.zeros((), tl.float64)
    factor = tl.zeros((), tl.float64)
    dk = tl.zeros([ROWS], tl.float64)
    for step in range(1, n_iters):
        a_ptrs -= 1
        previous = tl.load(a_ptrs, mask=row_exists, other=0.0)
        temperature = tl.load(temperature_ptr + n_iters - step)
        moved = tl.max((tl.abs(a + base) > temperature * MAX_SHIFT).to(tl.int32), axis=0)
        if (temperature != base_temperature) | (moved > 0):
            ds -= coefficients * weights
            coefficients = tl.zeros([REPEATS, ROWS, WIDTH], tl.float32)
            base = -a
            base_temperature = temperature
            factor = log2_e_over(temperature)
            # At most k for an entry below the threshold; above it the weight is not used and must not overflow.
            weights = tl.minimum(exp_above(scores, base, factor), LARGEST)
        coefficient = (grad_a * inverse_k).to(tl.float32) * exp2(((a + base) * factor).to(tl.float32))
        coefficients += tl.where(scores <= per_row(round_down(-previous)), per_row(coefficient), 0.0)
        dk += grad_a * temperature
        grad_a *= tl.load(ratio_ptrs, mask=row_exists, other=0.0).to(tl.float64)
        ratio_ptrs -= 1
        a = previous
    ds -= coefficients * weights
    dk = (dk + grad_a * tl.load(temperature_ptr)) * inverse_k

    if HAS_MASK:
        ds = tl.where(scores == LOWEST, 0.0, ds)
    tl.store(ds_ptr + per_row(rows) * n + columns, ds.to(ds_ptr.dtype.element_ty), mask=exists)
    tl.store(dk_ptr + rows, dk, mask=row_exists & (chunk == 0))


def tile_settings(entries: int, in_thread: int) -> dict[str, int]:
    """Launch settings for rows of up to `entries`, `in_thread` of them in each thread.

    At least 4 threads share a row, and rows that leave threads of a warp free share the warp.
    """
    threads = max(triton.next_power_of_2(entries) // in_thread, 4)
    width = 4 * threads
    return {
        "REPEATS": triton.cdiv(triton.next_power_of_2(entries), width),
        "ROWS": max(32 // threads, 1),
        "WIDTH": width,
        "num_warps": max(threads // 32, 1),
    }


def entries_in_thread(n_rows: int, n: int, available: int) -> int:
    """64 entries of a row in a thread, so that the scalar work of a row weighs little, but 16 where that leaves
    multiprocessors without work."""
    return 64 if n_rows * n >= 64 * 32 * 8 * available else 16


def _launch_forward(
    scores: Tensor,
    mask: Tensor | None,
    k_rows: Tensor | None,
    k: float,
    schedule: tuple[int, float, float, float],
    y: Tensor,
    trace: Tensor,
    ratio: Tensor,
    temperatures: Tensor,
) -> None:
    n_rows, n = scores.shape
    n_iters, eps, first, eps_decay = schedule
    available = multiprocessors(scores.device)

    programs, in_thread, piece = 1, entries_in_thread(n_rows, n, available), n
    if n > RESIDENT:
        # As few entries a program as there are programs to share them, but no fewer than are worth an exchange.
        halve = n_rows * triton.cdiv(n, RESIDENT // 2) <= available
        in_thread, piece = (32, RESIDENT // 2) if halve else (64, RESIDENT)
        programs = triton.cdiv(n, piece)
    streams = programs > available
    if streams:
        programs, in_thread, piece = available, 16, STREAMED
    tile = tile_settings(piece, in_thread)
    alone = programs == 1 and not streams
    groups = triton.cdiv(n_rows, tile["ROWS"]) if alone else max(min(n_rows, available // programs), 1)
    groups = 1 if streams else groups
    mailbox = y if alone else torch.zeros(groups * 8 * programs, dtype=torch.int64, device=y.device)
    arguments = (
        scores,
        scores if mask is None else mask,
        scores if k_rows is None else k_rows,
        y,
        trace,
        ratio,
        temperatures,
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
        **tile,
        "PROGRAMS": programs,
        "SLOTS": triton.next_power_of_2(programs),
        "HAS_MASK": mask is not None,
        "HAS_K": k_rows is not None,
        "SAVE": trace.numel() > 0,
    }
    if streams:
        tiles = triton.cdiv(triton.cdiv(n, programs), piece)
        _streaming_kernel[(programs,)](*arguments, tiles, **settings, launch_cooperative_grid=True)
    else:
        _resident_kernel[(groups * programs,)](*arguments, **settings, launch_cooperative_grid=not alone)


def _launch_backward(
    grad: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    k_rows: Tensor | None,
    k: float,
    trace: Tensor,
    ratio: Tensor,
    temperatures: Tensor,
    ds: Tensor,
    dk: Tensor,
) -> None:
    n_rows, n = scores.shape
    n_iters = trace.shape[-1]
    chunks = triton.cdiv(n, BACKWARD)
    settings = {**tile_settings(min(n, BACKWARD), 32), "HAS_MASK": mask is not None}
    strides = (grad.stride(0), scores.stride(0), 0 if mask is None else mask.stride(0))
    mask_or_any = scores if mask is None else mask

    grad_a = dk
    if chunks > 1:
        grad_a = torch.empty(n_rows * chunks, dtype=torch.float64, device=scores.device)
        _grad_a_kernel[(n_rows * chunks,)](
            grad, scores, mask_or_any, trace, temperatures, grad_a, *strides, n_rows, n, n_iters, chunks, **settings
        )
    _backward_kernel[(triton.cdiv(n_rows, settings["ROWS"]) * chunks,)](
        grad,
        scores,
        mask_or_any,
        scores if k_rows is None else k_rows,
        trace,
        ratio,
        temperatures,
        grad_a,
        ds,
        dk,
        *strides,
        n_rows,
        n,
        n_iters,
        chunks,
        k,
        SLOTS=min(triton.next_power_of_2(chunks), 1024),
        HAS_K=k_rows is not None,
        **settings,
    )


_library = torch.library.Library("colt5", "FRAGMENT")
_library.define(
    "coor_descent(Tensor scores, Tensor? mask, Tensor? k_rows, float k, int n_iters, float eps, float first, "
    "float eps_decay, bool save) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "coor_descent_backward(Tensor grad, Tensor scores, Tensor? mask, Tensor? k_rows, float k, Tensor trace, "
    "Tensor ratio, Tensor temperatures) -> (Tensor, Tensor)"
)


@torch.library.register_fake("colt5::coor_descent", lib=_library)
def _allocate(
    scores: Tensor,
    mask: Tensor | None,
    k_rows: Tensor | None,
    k: float,
    n_iters: int,
    eps: float,
    first: float,
    eps_decay: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, and what the backward pass needs: a, the share above the threshold, and the temperatures.

    That is 12 bytes a row and iteration; nothing of size n is kept but the scores.
    """
    saved = (scores.shape[0], n_iters if save else 0)
    wide = torch.float64
    return (
        torch.empty(scores.shape, dtype=scores.dtype, device=scores.device),
        torch.empty(saved, dtype=wide, device=scores.device),
        torch.empty(saved, dtype=torch.float32, device=scores.device),
        torch.empty(n_iters + 1 if save else 0, dtype=wide, device=scores.device),
    )


def _forward(
    scores: Tensor,
    mask: Tensor | None,
    k_rows: Tensor | None,
    k: float,
    n_iters: int,
    eps: float,
    first: float,
    eps_decay: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _allocate(scores, mask, k_rows, k, n_iters, eps, first, eps_decay, save)
    y, trace, ratio, temperatures = outputs
    if scores.numel() == 0:
        return outputs
    if runs_triton(scores):
        schedule = (n_iters, eps, first, eps_decay)
        _launch_forward(scores, mask, k_rows, k, schedule, y, trace, ratio, temperatures)
    else:
        steps = list(epsilon_schedule(n_iters, eps, first, eps_decay))
        y.copy_(in_pytorch.forward(scores, mask, in_pytorch.wide_k(scores, k_rows, k), steps, trace, ratio))
        if save:
            temperatures.copy_(torch.tensor(steps, dtype=torch.float64))
    return outputs


@torch.library.register_fake("colt5::coor_descent_backward", lib=_library)
def _allocate_gradients(
    grad: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    k_rows: Tensor | None,
    k: float,
    trace: Tensor,
    ratio: Tensor,
    temperatures: Tensor,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(scores.shape, dtype=scores.dtype, device=scores.device),
        torch.empty(scores.shape[0], dtype=torch.float64, device=scores.device),
    )


def _backward(
    grad: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    k_rows: Tensor | None,
    k: float,
    trace: Tensor,
    ratio: Tensor,
    temperatures: Tensor,
) -> tuple[Tensor, Tensor]:
    ds, dk = _allocate_gradients(grad, scores, mask, k_rows, k, trace, ratio, temperatures)
    if scores.numel() == 0:
        return ds, dk
    grad = as_rows(grad)
    if runs_triton(scores):
        _launch_backward(grad, scores, mask, k_rows, k, trace, ratio, temperatures, ds, dk)
    else:
        wide_k, steps = in_pytorch.wide_k(scores, k_rows, k), temperatures.tolist()
        gradients = in_pytorch.backward(grad, scores, mask, wide_k, steps, trace, ratio)
        ds.copy_(gradients[0]), dk.copy_(gradients[1])
    return ds, dk


for _device in ("CPU", "CUDA"):
    _library.impl("coor_descent", _forward, _device)
    _library.impl("coor_descent_backward", _backward, _device)


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    scores, mask, k_rows, k, *_ = inputs
    _, trace, ratio, temperatures = output
    ctx.save_for_backward(scores, mask, k_rows, trace, ratio, temperatures)
    ctx.k = k
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    scores, mask, k_rows, trace, ratio, temperatures = ctx.saved_tensors
    ds, dk = torch.ops.colt5.coor_descent_backward(grad, scores, mask, k_rows, ctx.k, trace, ratio, temperatures)
    return ds, None, None if k_rows is None else dk.to(k_rows.dtype), *(None,) * 6


def _refuse(ctx, *_: Tensor) -> None:
    raise NotImplementedError("kernels.coor_descent has no second derivative: use reference.coor_descent")


torch.library.register_autograd("colt5::coor_descent", _differentiate, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("colt5::coor_descent_backward", _refuse, lib=_library)


def coor_descent(
    scores: Tensor,
    *,
    n_iters: int,
    k: float | Tensor,
    eps: float = 0.1,
    eps_init: float | None = None,
    eps_decay: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """`reference.coor_descent` in one kernel, with fp64 where it counts and a closed-form gradient.

    The backward pass needs the scores and 12 bytes a row and iteration. Results are bitwise equal from run to run.
    A CPU tensor gets the same mathematics in PyTorch.

    Args:
        scores: `... n`: fp32, bf16 or fp16, and fp64 on the CPU (computed in fp32 on a GPU). Any strides.
        n_iters: number of iterations, at least 1.
        k: how many entries a row should sum to. A number, or a tensor that broadcasts to `...`, one k a row; it has a
            gradient.
        eps: last temperature, in units of the scores.
        eps_init: first temperature; None or anything below eps stands for eps.
        eps_decay: factor in (0, 1] on the temperature after each iteration, until it reaches eps.
        mask: bool, broadcasts to `... n`; entries that are False take part in nothing and come out as 0.

    Returns:
        `... n`, in the dtype of the scores. A row with a NaN among its valid scores is NaN, and so is a row whose k
        (from a tensor) is not positive.

    Raises:
        ValueError: an argument is out of its range, or shapes do not match.
        NotImplementedError: a second derivative is asked for.
    """
    check_scores(scores, mask)
    check_k(k, scores)
    check_schedule(n_iters, eps, eps_init, eps_decay)
    k_rows, k_number = k_as_rows(k, scores.shape)
    needs_grad = scores.requires_grad or (k_rows is not None and k_rows.requires_grad)
    y, *_ = torch.ops.colt5.coor_descent(
        as_rows(scores),
        mask_as_rows(mask, scores.shape),
        k_rows,
        k_number,
        n_iters,
        eps,
        first_temperature(eps, eps_init),
        eps_decay,
        needs_grad and torch.is_grad_enabled(),
    )
    return y.view(scores.shape)
