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
    count_tile,
    exchange_highest,
    exchange_sum,
    exp_over,
    load_tile,
    round_down,
    subtract,
    sum_in_thread,
    sum_tile,
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
MAX_EXPONENT: tl.constexpr = tl.constexpr(in_pytorch.MAX_EXPONENT)


@triton.jit
def _load_k(k_ptr, row, k, HAS_K: tl.constexpr):
    """k of a row as fp64; NaN, and with it the row, where it is not positive."""
    k += tl.zeros((), tl.float64)
    if HAS_K:
        k = tl.load(k_ptr + row).to(tl.float64)
    return tl.where(k > 0, k, float("nan"))


@triton.jit
def _first_step(log_k, highest, n_valid, temperature):
    """a after the first iteration, and the highest score as fp64; finite for a row without a valid entry."""
    a = temperature * (log_k - tl.log(n_valid))
    return tl.where(n_valid == 0, 0.0, a), tl.where(n_valid == 0, 0.0, highest.to(tl.float64))


@triton.jit
def _cool(temperature, eps_decay, eps):
    """The next temperature of the schedule."""
    cooler = temperature * eps_decay
    return tl.where(cooler > eps, cooler, eps + tl.zeros((), tl.float64))


@triton.jit
def _save(trace_ptr, ratio_ptr, temperature_ptr, row, part, n_iters, t, a, ratio, temperature):
    """What the backward pass needs of iteration t. The first program of the row writes, the first row for all."""
    place = tl.cast(row, tl.int64) * n_iters + t
    tl.store(trace_ptr + place, a, mask=part == 0)
    tl.store(ratio_ptr + place, ratio.to(tl.float32), mask=part == 0)
    tl.store(temperature_ptr + t, temperature, mask=(part == 0) & (row == 0))


@triton.jit
def _soft_selection(scores, a, temperature):
    """exp(min(s + a, 0) / temperature); NaN stays NaN."""
    excess = subtract(scores, -a)
    return exp_over(tl.where(excess > 0, 0.0, excess), temperature)


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
    first_temperature: "fp64",
    eps_decay: "fp64",
    eps: "fp64",
    REPEATS: tl.constexpr,
    WIDTH: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_K: tl.constexpr,
    SAVE: tl.constexpr,
):
    """Rows whose pieces fit into the registers of PROGRAMS programs."""
    group = tl.program_id(0) // PROGRAMS
    part = tl.program_id(0) % PROGRAMS
    mailbox_ptr += group * (8 * PROGRAMS)
    columns = part * (REPEATS * WIDTH) + tile_columns(REPEATS, WIDTH)
    step = 0

    for row in range(group, n_rows, tl.num_programs(0) // PROGRAMS):
        row_start = tl.cast(row, tl.int64)
        scores, valid = load_tile(
            scores_ptr + row_start * scores_stride, mask_ptr + row_start * mask_stride, columns, n, HAS_MASK
        )
        highest = tl.max(tl.max(scores, axis=0), axis=0)
        n_valid = count_tile(scores, valid, WIDTH)
        if PROGRAMS > 1:
            step += 1
            highest, n_valid = exchange_highest(mailbox_ptr, step, part, highest, n_valid, PROGRAMS, SLOTS)

        log_k = tl.log(_load_k(k_ptr, row, k, HAS_K))
        temperature = first_temperature + tl.zeros((), tl.float64)
        a, highest = _first_step(log_k, highest, n_valid, temperature)
        if SAVE:
            _save(trace_ptr, ratio_ptr, temperature_ptr, row, part, n_iters, 0, a, a * 0.0, temperature)

        weights = tl.zeros([REPEATS, WIDTH], tl.float32)
        base = tl.zeros((), tl.float64)
        base_temperature = tl.zeros((), tl.float64)
        for t in range(1, n_iters):
            temperature = _cool(temperature, eps_decay, eps)
            anchor = tl.where(highest < -a, highest, -a)
            if (temperature != base_temperature) | (tl.abs(anchor - base) > temperature * MAX_SHIFT):
                base = anchor
                base_temperature = temperature
                weights = exp_over(subtract(scores, base), temperature)
            scale = exp_over((base - anchor).to(tl.float32), temperature)
            total = sum_tile(tl.minimum(weights * scale, 1.0), WIDTH)
            above = total * 0.0
            if SAVE:
                above = sum_tile(tl.where(scores > round_down(-a), 1.0, 0.0), WIDTH)
            if PROGRAMS > 1:
                step += 1
                total, above = exchange_sum(mailbox_ptr, step, part, total, above, PROGRAMS, SLOTS)
            total = tl.where(n_valid == 0, 1.0, total)
            a = temperature * (log_k - tl.log(total)) - anchor
            if SAVE:
                _save(trace_ptr, ratio_ptr, temperature_ptr, row, part, n_iters, t, a, above / total, temperature)

        temperature = _cool(temperature, eps_decay, eps)
        if SAVE:
            tl.store(temperature_ptr + n_iters, temperature, mask=(part == 0) & (row == 0))
        y = tl.where(valid, _soft_selection(scores, a, temperature), 0.0)
        tl.store(y_ptr + row_start * n + columns, y.to(y_ptr.dtype.element_ty), mask=columns < n)


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
    first_temperature: "fp64",
    eps_decay: "fp64",
    eps: "fp64",
    tiles,
    REPEATS: tl.constexpr,
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

    for row in range(n_rows):
        row_scores_ptr = scores_ptr + tl.cast(row, tl.int64) * scores_stride
        row_mask_ptr = mask_ptr + tl.cast(row, tl.int64) * mask_stride

        highest_in_lane = tl.full([WIDTH], -float("inf"), tl.float32)
        count_in_thread = tl.zeros([WIDTH // 4], tl.float64)
        for tile in range(tiles):
            tile_cols = columns + tile * (REPEATS * WIDTH)
            scores, valid = load_tile(row_scores_ptr, row_mask_ptr, tile_cols, n, HAS_MASK)
            highest_in_lane = tl.maximum(highest_in_lane, tl.max(scores, axis=0))
            present = tl.where(valid, tl.where(scores == scores, 1.0, float("nan")), 0.0)
            count_in_thread += sum_in_thread(present, WIDTH).to(tl.float64)
        step += 1
        highest, n_valid = exchange_highest(
            mailbox_ptr, step, part, tl.max(highest_in_lane, axis=0), tl.sum(count_in_thread, axis=0), PROGRAMS, SLOTS
        )

        log_k = tl.log(_load_k(k_ptr, row, k, HAS_K))
        temperature = first_temperature + tl.zeros((), tl.float64)
        a, highest = _first_step(log_k, highest, n_valid, temperature)
        if SAVE:
            _save(trace_ptr, ratio_ptr, temperature_ptr, row, part, n_iters, 0, a, a * 0.0, temperature)

        for t in range(1, n_iters):
            temperature = _cool(temperature, eps_decay, eps)
            anchor = tl.where(highest < -a, highest, -a)
            threshold = round_down(-a)
            total_in_thread = tl.zeros([WIDTH // 4], tl.float64)
            above_in_thread = tl.zeros([WIDTH // 4], tl.float64)
            for tile in range(tiles):
                tile_cols = columns + tile * (REPEATS * WIDTH)
                scores, _ = load_tile(row_scores_ptr, row_mask_ptr, tile_cols, n, HAS_MASK)
                clipped = exp_over(tl.minimum(subtract(scores, anchor), 0.0), temperature)
                total_in_thread += sum_in_thread(clipped, WIDTH).to(tl.float64)
                if SAVE:
                    above_in_thread += sum_in_thread(tl.where(scores > threshold, 1.0, 0.0), WIDTH).to(tl.float64)
            step += 1
            total, above = exchange_sum(
                mailbox_ptr, step, part, tl.sum(total_in_thread, axis=0), tl.sum(above_in_thread, axis=0),
                PROGRAMS, SLOTS,
            )  # fmt: skip
            total = tl.where(n_valid == 0, 1.0, total)
            a = temperature * (log_k - tl.log(total)) - anchor
            if SAVE:
                _save(trace_ptr, ratio_ptr, temperature_ptr, row, part, n_iters, t, a, above / total, temperature)

        temperature = _cool(temperature, eps_decay, eps)
        if SAVE:
            tl.store(temperature_ptr + n_iters, temperature, mask=(part == 0) & (row == 0))
        for tile in range(tiles):
            tile_cols = columns + tile * (REPEATS * WIDTH)
            scores, valid = load_tile(row_scores_ptr, row_mask_ptr, tile_cols, n, HAS_MASK)
            y = tl.where(valid, _soft_selection(scores, a, temperature), 0.0)
            y_ptrs = y_ptr + tl.cast(row, tl.int64) * n + tile_cols
            tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=tile_cols < n)


@triton.jit
def _direct_gradient(scores, grad, valid, a, temperature):
    """The gradient of the scores through the output alone, at constant a: g y / temperature where y < 1."""
    excess = subtract(scores, -a)
    direct = grad * exp_over(tl.where(excess > 0, 0.0, excess), temperature) * (1.0 / temperature).to(tl.float32)
    return tl.where(valid, tl.where(excess > 0, 0.0, direct), 0.0)


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
    n,
    n_iters,
    chunks,
    REPEATS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Each chunk's part of the gradient of the last a, for rows of several chunks."""
    row = tl.cast(tl.program_id(0) // chunks, tl.int64)
    columns = (tl.program_id(0) % chunks) * (REPEATS * WIDTH) + tile_columns(REPEATS, WIDTH)
    scores, valid = load_tile(
        scores_ptr + row * scores_stride, mask_ptr + row * mask_stride, columns, n, HAS_MASK
    )
    grad = tl.load(grad_ptr + row * grad_stride + columns, mask=valid, other=0.0).to(tl.float32)
    a = tl.load(trace_ptr + row * n_iters + n_iters - 1)
    direct = _direct_gradient(scores, grad, valid, a, tl.load(temperature_ptr + n_iters))
    tl.store(grad_a_ptr + tl.program_id(0), sum_tile(direct, WIDTH))


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
    n,
    n_iters,
    chunks,
    k: "fp64",
    REPEATS: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_K: tl.constexpr,
):
    """Gradient of one chunk of a row, from the last iteration to the first."""
    row = tl.cast(tl.program_id(0) // chunks, tl.int64)
    chunk = tl.program_id(0) % chunks
    columns = chunk * (REPEATS * WIDTH) + tile_columns(REPEATS, WIDTH)
    scores, valid = load_tile(
        scores_ptr + row * scores_stride, mask_ptr + row * mask_stride, columns, n, HAS_MASK
    )
    grad = tl.load(grad_ptr + row * grad_stride + columns, mask=valid, other=0.0).to(tl.float32)
    trace_ptr += row * n_iters
    ratio_ptr += row * n_iters
    k = _load_k(k_ptr, row, k, HAS_K)

    a = tl.load(trace_ptr + n_iters - 1)
    ds = _direct_gradient(scores, grad, valid, a, tl.load(temperature_ptr + n_iters))
    if SLOTS == 1:
        grad_a = sum_tile(ds, WIDTH)
    else:
        grad_a = tl.zeros([SLOTS], tl.float64)
        for start in range(0, chunks, SLOTS):
            slot = start + tl.arange(0, SLOTS)
            grad_a += tl.load(grad_a_ptr + row * chunks + slot, mask=slot < chunks, other=0.0)
        grad_a = tl.sum(grad_a, axis=0)

    # Iterations of one temperature whose a are close share the weights w = exp((s - base) / e), and only the
    # coefficients of w add up: an exponential for each such run, not for each iteration.
    weights = tl.zeros([REPEATS, WIDTH], tl.float32)
    coefficients = tl.zeros([REPEATS, WIDTH], tl.float32)
    base = tl.zeros((), tl.float64)
    base_temperature = tl.zeros((), tl.float64)
    dk = tl.zeros((), tl.float64)
    for step in range(1, n_iters):
        t = n_iters - step
        previous = tl.load(trace_ptr + t - 1)
        temperature = tl.load(temperature_ptr + t)
        if (temperature != base_temperature) | (tl.abs(a + base) > temperature * MAX_SHIFT):
            ds -= coefficients * weights
            coefficients = tl.zeros([REPEATS, WIDTH], tl.float32)
            base = -a
            base_temperature = temperature
            # At most k for an entry below the threshold; above it the weight is not used and must not overflow.
            limit = (temperature * MAX_EXPONENT).to(tl.float32)
            weights = exp_over(tl.minimum(subtract(scores, base), limit), temperature)
        coefficient = (grad_a / k).to(tl.float32) * exp_over((a + base).to(tl.float32), temperature)
        coefficients += tl.where(scores <= round_down(-previous), coefficient, 0.0)
        dk += grad_a * temperature
        grad_a *= tl.load(ratio_ptr + t).to(tl.float64)
        a = previous
    ds -= coefficients * weights
    dk = (dk + grad_a * tl.load(temperature_ptr)) / k

    ds = tl.where(valid, ds, 0.0)
    tl.store(ds_ptr + row * n + columns, ds.to(ds_ptr.dtype.element_ty), mask=columns < n)
    tl.store(dk_ptr + row, dk, mask=chunk == 0)


def _tile(entries: int) -> dict[str, int]:
    """Launch settings for a tile of at least `entries`: 16 entries a thread, 32 in the largest."""
    block = max(triton.next_power_of_2(entries), 128)
    num_warps = min(max(block // 512, 1), 16)
    return {"REPEATS": block // (128 * num_warps), "WIDTH": 128 * num_warps, "num_warps": num_warps}


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

    if n <= RESIDENT:
        programs, groups, piece = 1, n_rows, n
    else:
        # As few entries a program as there are programs to share them, but no fewer than are worth an exchange.
        piece = RESIDENT if n_rows * triton.cdiv(n, RESIDENT // 2) > available else RESIDENT // 2
        programs = triton.cdiv(n, piece)
        groups = min(n_rows, available // programs)
    streams = groups == 0
    if streams:
        programs, groups, piece = available, 1, STREAMED

    alone = programs == 1 and not streams
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
        **_tile(piece),
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
    settings = {**_tile(min(n, BACKWARD)), "HAS_MASK": mask is not None}
    strides = (grad.stride(0), scores.stride(0), 0 if mask is None else mask.stride(0))
    mask_or_any = scores if mask is None else mask

    grad_a = dk
    if chunks > 1:
        grad_a = torch.empty(n_rows * chunks, dtype=torch.float64, device=scores.device)
        _grad_a_kernel[(n_rows * chunks,)](
            grad, scores, mask_or_any, trace, temperatures, grad_a, *strides, n, n_iters, chunks, **settings
        )
    _backward_kernel[(n_rows * chunks,)](
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
