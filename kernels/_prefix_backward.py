"""Backward pass of `kernels.route_prefixes`: what each prefix hands back to its thresholds, then what each token gets.

Through the threshold of iteration t of each prefix that holds it, a token below the threshold before receives
-A p = -c exp((s - base) / e) (DESIGN 3.3), where only c depends on the prefix as long as prefixes have the same base: a
token adds up coefficients, and computes an exponential only where the base is another one. And what it receives as one
that was selected lies side by side for all the windows that selected it, which follow each other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import _coor_descent_torch as in_pytorch
from kernels._descent_backward import direct_gradient
from kernels._descent_state import iterations_of, row_state
from kernels._prefix_forward import prefix_row
from kernels._primitives import (
    exp2_line,
    exp2_wide,
    exponent_line,
    fma_if_at_most,
    round_down,
)

SLOTS = 1024
"""Selected tokens that a program looks at at a time."""

TOKENS = 128
"""Tokens of a program."""

WINDOWS = 4
"""Of the windows that selected a token, how many are read at a time."""

SAME_BASE = 32
"""Neighbouring prefixes that have the base of the first of them, unless their thresholds are far from its."""

NUM_WARPS = 2

UNROLLED = 16
"""Prefixes whose numbers are loaded at a time: to wait for those of each took 100 cycles a prefix."""

MAX_SHIFT: tl.constexpr = tl.constexpr(in_pytorch.MAX_SHIFT)
LARGEST: tl.constexpr = tl.constexpr(in_pytorch.LARGEST)


@triton.jit
def _load_a(state_ptr, prefix, n_iters, t):
    """a of a prefix at iterations t, 0 where there is no such iteration."""
    return tl.load(row_state(state_ptr, prefix, n_iters) + t, mask=(t >= 0) & (t < n_iters), other=0.0)


@triton.jit
def _thresholds_kernel(
    grad_ptr,  # prefixes selected
    indices_ptr,  # prefixes selected, int64
    scores_ptr,  # rows n
    state_ptr,  # prefixes+1 2 n_iters+1, fp64
    starts_ptr,  # rows n, int64
    direct_ptr,  # prefixes*selected, fp32
    steps_ptr,  # rows n_iters 3 windows, fp32
    scores_stride,
    n_rows,
    n,
    routes,
    n_windows,
    window_size,
    n_iters,
    selected,
    inverse_k: "fp64",
    SLOTS: tl.constexpr,
    ITERATIONS: tl.constexpr,
    SAME_BASE: tl.constexpr,
):
    """Of one prefix: what its selected tokens receive directly; and of each iteration the score up to which a token
    receives through its threshold, the coefficient, and the offset of the exponent, which says what the base is."""
    row = (tl.program_id(0) // n_windows).to(tl.int64)
    window = tl.program_id(0) % n_windows
    prefix = prefix_row(row, window, routes, n_windows)
    schedule_ptr = row_state(state_ptr, n_rows * n_windows + tl.zeros((), tl.int64), n_iters)

    temperature = tl.load(schedule_ptr + n_iters)
    factor = tl.load(schedule_ptr + 2 * n_iters + 1)
    last_a = tl.load(row_state(state_ptr, prefix, n_iters) + n_iters - 1) + tl.zeros([1], tl.float64)
    wanted = tl.minimum((window + 1) * window_size, selected)
    total = tl.zeros([SLOTS], tl.float64)
    for start in range(0, wanted, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        exists = slot < wanted
        position = tl.load(indices_ptr + prefix * selected + slot, mask=exists, other=0)
        score = tl.load(scores_ptr + row * scores_stride + position, mask=exists, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + prefix * selected + slot, mask=exists, other=0.0).to(tl.float32)
        direct = direct_gradient(score[None, None, :], grad[None, None, :], last_a, temperature, factor, False)
        direct = tl.reshape(direct, [SLOTS])
        total += direct.to(tl.float64)
        # The windows that selected a token begin with the one after its own.
        place = tl.load(starts_ptr + row * n + position, mask=exists, other=0) + (window - position // window_size)
        tl.store(direct_ptr + place, direct, mask=exists)
    grad_a = tl.sum(total, axis=0)

    t = tl.arange(0, ITERATIONS)
    exists = (t > 0) & (t < n_iters)
    ratio_ptr = row_state(state_ptr, prefix, n_iters) + n_iters + 1
    handed_on = tl.load(ratio_ptr + t + 1, mask=t + 1 < n_iters, other=1.0)
    grad_a *= tl.cumprod(handed_on, axis=0, reverse=True)
    temperature = tl.load(schedule_ptr + t, mask=exists, other=1.0)
    factor = tl.load(schedule_ptr + n_iters + 1 + t, mask=exists, other=1.0)
    a = _load_a(state_ptr, prefix, n_iters, t)
    common_a = _load_a(state_ptr, prefix - window % SAME_BASE * routes, n_iters, t)
    is_far = tl.abs(a - common_a) > temperature * MAX_SHIFT
    _, offset, rest = exponent_line(-tl.where(is_far, a, common_a), factor)
    shift = tl.where(is_far, 0.0, (a - common_a) * factor)
    coefficient = (grad_a * inverse_k).to(tl.float32) * exp2_wide(shift + rest)

    step_ptrs = steps_ptr + (row * n_iters + t) * 3 * n_windows + window
    tl.store(step_ptrs, round_down(-_load_a(state_ptr, prefix, n_iters, t - 1)), mask=exists)
    tl.store(step_ptrs + n_windows, coefficient, mask=exists)
    tl.store(step_ptrs + 2 * n_windows, offset, mask=exists)


@triton.jit
def _add_each(through_a, scores, columns, slope, step_ptr, stride, begin, end, window_size):
    """Add prefixes of windows `begin` to `end` at one iteration, each with an exponential of its own, at the columns
    that it holds."""
    for window in range(begin, end):
        limit = tl.load(step_ptr + window)
        coefficient = tl.load(step_ptr + stride + window)
        offset = tl.load(step_ptr + 2 * stride + window) + tl.zeros([1], tl.float32)
        limits = tl.where(columns < (window + 1) * window_size, limit, -float("inf"))
        # Above the threshold the weight is not used and must not overflow.
        weights = tl.minimum(exp2_line(scores, slope, offset), LARGEST)
        through_a = fma_if_at_most(through_a, weights, coefficient, scores, limits)
    return through_a


@triton.jit
def _add_prefixes(
    through_a, scores, columns, slope, step_ptr, stride, begin, end, window_size, SAME_BASE: tl.constexpr,
    UNROLLED: tl.constexpr,
):  # fmt: skip
    """Add prefixes of windows `begin` to `end` at one iteration, which hold all columns and may have the same base."""
    first = begin // SAME_BASE * SAME_BASE
    windows = first + tl.arange(0, SAME_BASE)
    offset = tl.load(step_ptr + 2 * stride + begin)
    offsets = tl.load(step_ptr + 2 * stride + windows, mask=(windows >= begin) & (windows < end), other=offset)
    if tl.max((offsets != offset).to(tl.int32), axis=0) > 0:
        through_a = _add_each(through_a, scores, columns, slope, step_ptr, stride, begin, end, window_size)
    else:
        coefficients = tl.zeros_like(scores)
        for window in tl.range(first, first + SAME_BASE, loop_unroll_factor=UNROLLED):
            exists = (window >= begin) & (window < end)
            limit = tl.load(step_ptr + window, mask=exists, other=0.0) + tl.zeros_like(scores)
            coefficient = tl.load(step_ptr + stride + window, mask=exists, other=0.0)
            coefficients = fma_if_at_most(coefficients, 1.0, coefficient, scores, limit)
        weights = tl.minimum(exp2_line(scores, slope, offset + tl.zeros([1], tl.float32)), LARGEST)
        through_a += coefficients * weights
    return through_a


@triton.jit
def _tokens_kernel(
    scores_ptr,  # rows n
    state_ptr,  # prefixes+1 2 n_iters+1, fp64
    leaves_ptr,  # rows n, int32
    starts_ptr,  # rows n, int64
    direct_ptr,  # prefixes*selected, fp32
    steps_ptr,  # rows n_iters 3 windows, fp32
    ds_ptr,  # rows n
    scores_stride,
    n_rows,
    n,
    n_windows,
    window_size,
    n_iters,
    TOKENS: tl.constexpr,
    WINDOWS: tl.constexpr,
    SAME_BASE: tl.constexpr,
    UNROLLED: tl.constexpr,
):
    """The gradient of TOKENS neighbouring scores; the first tokens, which are in most prefixes, come first."""
    row = (tl.program_id(0) % n_rows).to(tl.int64)
    start = tl.program_id(0) // n_rows * TOKENS
    column = start + tl.arange(0, TOKENS)
    score = tl.load(scores_ptr + row * scores_stride + column, mask=column < n, other=0.0).to(tl.float32)
    scores, columns = score[None, None, :], column[None, None, :]

    first = tl.minimum(start // window_size, n_windows)
    whole = tl.minimum((start + TOKENS - 1) // window_size, n_windows)
    bases = tl.where(whole < n_windows, tl.cdiv(n_windows, SAME_BASE), 0)
    through_a = tl.zeros([1, 1, TOKENS], tl.float32)
    for t in range(n_iters - 1, 0, -1):
        factor_ptr = row_state(state_ptr, n_rows * n_windows + tl.zeros((), tl.int64), n_iters) + n_iters + 1
        slope = tl.load(factor_ptr + t).to(tl.float32)
        step_ptr = steps_ptr + (row * n_iters + t) * 3 * n_windows
        through_a = _add_each(through_a, scores, columns, slope, step_ptr, n_windows, first, whole, window_size)
        for same in range(whole // SAME_BASE, bases):
            begin = tl.maximum(same * SAME_BASE, whole)
            end = tl.minimum(same * SAME_BASE + SAME_BASE, n_windows)
            through_a = _add_prefixes(
                through_a,
                scores,
                columns,
                slope,
                step_ptr,
                n_windows,
                begin,
                end,
                window_size,
                SAME_BASE,
                UNROLLED,
            )

    leave = tl.load(leaves_ptr + row * n + column, mask=column < n, other=0)
    begin = tl.load(starts_ptr + row * n + column, mask=column < n, other=0)
    count = tl.maximum(leave - column // window_size, 0)
    direct = tl.zeros([TOKENS], tl.float32)
    for passed in range(0, tl.max(count, axis=0), WINDOWS):
        place = passed + tl.arange(0, WINDOWS)[None, :]
        direct_ptrs = direct_ptr + begin[:, None] + place
        direct += tl.sum(tl.load(direct_ptrs, mask=place < count[:, None], other=0.0), axis=1)

    ds = direct - tl.reshape(through_a, [TOKENS])
    tl.store(ds_ptr + row * n + column, ds.to(ds_ptr.dtype.element_ty), mask=column < n)


def launch_backward(
    grad: Tensor,
    scores: Tensor,
    window_size: int,
    k: float,
    indices: Tensor,
    leaves: Tensor,
    state: Tensor,
    ds: Tensor,
) -> None:
    """Write the gradient of scores `rows n` to `ds`, from that of the weights `b w r s`."""
    n_rows, n = scores.shape
    _, n_windows, routes, selected = indices.shape
    n_iters = iterations_of(state)
    # Where the entries of a token begin, whose number is how many windows selected it.
    counts = (leaves - torch.arange(n, dtype=torch.int32, device=ds.device) // window_size).clamp_(min=0).view(-1)
    starts = counts.cumsum(dim=0) - counts
    direct = torch.empty(indices.numel(), dtype=torch.float32, device=ds.device)
    steps = torch.empty(n_rows, n_iters, 3, n_windows, dtype=torch.float32, device=ds.device)
    _thresholds_kernel[(n_rows * n_windows,)](
        grad,
        indices,
        scores,
        state,
        starts,
        direct,
        steps,
        scores.stride(0),
        n_rows,
        n,
        routes,
        n_windows,
        window_size,
        n_iters,
        selected,
        1.0 / k,
        SLOTS=SLOTS,
        ITERATIONS=triton.next_power_of_2(n_iters),
        SAME_BASE=SAME_BASE,
        num_warps=4,
    )
    _tokens_kernel[(n_rows * triton.cdiv(n, TOKENS),)](
        scores,
        state,
        leaves,
        starts,
        direct,
        steps,
        ds,
        scores.stride(0),
        n_rows,
        n,
        n_windows,
        window_size,
        n_iters,
        TOKENS=TOKENS,
        WINDOWS=WINDOWS,
        SAME_BASE=SAME_BASE,
        UNROLLED=UNROLLED,
        num_warps=NUM_WARPS,
    )
