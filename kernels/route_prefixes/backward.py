"""Backward pass of `kernels.route_prefixes`: first the gradients of each prefix's thresholds, then the gradient of each
token.

Through the threshold of iteration t of each prefix that contains it, a token that is not above the threshold before
receives -A exp((s + a) / e) / k (docs/design.md, section 3). More entries make a sum larger and so the next threshold:
thresholds ascend from window to window. So the prefixes through which a token receives are all from some window w on.
They add up to exp((s + a_w) / e) S_w, where S_w = A_w / k + exp((a_(w+1) - a_w) / e) S_(w+1) does not depend on the
token: the token has to find w, and computes one exponential for all prefixes. Its gradients as a selected token are
adjacent in memory, since the windows that selected it are consecutive.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common.launch import COUNTS, Launch, Launcher, Scratch
from kernels._common.plans import Plan, planner
from kernels._common.primitives import (
    exp2,
    exp2_line,
    exponent_line,
    per_row,
    round_down,
)
from kernels.coor_descent import LARGEST, direct_gradient, iterations_of, row_state
from kernels.route_prefixes.forward import prefix_row

SLOTS = 1024
"""Selected tokens that a program reads at a time."""

TOKENS = 128
"""Tokens per program."""

WINDOWS = 4
"""Windows that selected a token, read at a time."""

PREFIXES, FEW_PREFIXES = 1024, 256
"""Prefixes that are added up at a time, for many windows and for few. Few sizes serve all lengths."""

NUM_WARPS = 4


@triton.jit(do_not_specialize=[*COUNTS, "n"])
def _thresholds_kernel(
    grad_output_ptr,  # prefixes selected
    indices_ptr,  # prefixes selected, int64
    scores_ptr,  # rows n
    state_ptr,  # prefixes+1 2 n_iters+1, fp64
    ends_ptr,  # rows n, int32 or int64
    direct_ptr,  # prefixes*selected, fp32
    shares_ptr,  # rows n_iters windows, fp64
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
):
    """Gradients that the selected tokens of one prefix receive directly. Also, for each iteration, A / k, and the
    highest score at which a token receives through the threshold."""
    row = (tl.program_id(0) // n_windows).to(tl.int64)
    window = tl.program_id(0) % n_windows
    prefix = prefix_row(row, window, routes, n_windows)
    schedule_ptr = row_state(state_ptr, tl.cast(n_rows, tl.int64) * n_windows, n_iters)

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
        grad_output = tl.load(grad_output_ptr + prefix * selected + slot, mask=exists, other=0.0).to(tl.float32)
        direct = direct_gradient(score[None, None, :], grad_output[None, None, :], last_a, temperature, factor)
        direct = tl.reshape(direct, [SLOTS])
        total += direct.to(tl.float64)
        # The windows that selected a token begin with the one after its own.
        token = row * n + position
        begin = tl.load(ends_ptr + token - 1, mask=exists & (token > 0), other=0)
        place = begin + (window - position // window_size)
        tl.store(direct_ptr + place, direct, mask=exists)
    grad_a = tl.sum(total, axis=0)

    t = tl.arange(0, ITERATIONS)
    exists = (t > 0) & (t < n_iters)
    ratio_ptr = row_state(state_ptr, prefix, n_iters) + n_iters + 1
    handed_on = tl.load(ratio_ptr + t + 1, mask=t + 1 < n_iters, other=1.0)
    grad_a *= tl.cumprod(handed_on, axis=0, reverse=True)
    place = (row * n_iters + t) * n_windows + window
    tl.store(shares_ptr + place, grad_a * inverse_k, mask=exists)
    before = tl.load(row_state(state_ptr, prefix, n_iters) + t - 1, mask=exists, other=0.0)
    tl.store(steps_ptr + (row * n_iters + t) * 3 * n_windows + window, round_down(-before), mask=exists)


@triton.jit
def _follow(decay, share, next_decay, next_share):
    """Composition of two steps of a linear recurrence, the first one applied first."""
    return decay * next_decay, next_share + next_decay * share


@triton.jit(do_not_specialize=COUNTS)
def _sums_kernel(
    shares_ptr,  # rows n_iters windows, fp64
    state_ptr,  # prefixes+1 2 n_iters+1, fp64
    steps_ptr,  # rows n_iters 3 windows, fp32
    n_rows,
    routes,
    n_windows,
    n_iters,
    PREFIXES: tl.constexpr,
):
    """For one row and iteration, and each window: the sum of the shares from that window on. The unit is exp(-a / e).
    The offset of the exponent of tokens is written with it."""
    row = (tl.program_id(0) // (n_iters - 1)).to(tl.int64)
    t = 1 + tl.program_id(0) % (n_iters - 1)
    schedule_ptr = row_state(state_ptr, tl.cast(n_rows, tl.int64) * n_windows, n_iters)
    factor = tl.load(schedule_ptr + n_iters + 1 + t)
    shares_ptr += (row * n_iters + t) * n_windows
    steps_ptr += (row * n_iters + t) * 3 * n_windows
    carried = tl.zeros((), tl.float64)
    for start in range(0, n_windows, PREFIXES):
        # The last window comes first.
        window = n_windows - 1 - start - tl.arange(0, PREFIXES)
        exists = window >= 0
        a_ptrs = row_state(state_ptr, prefix_row(row, window, routes, n_windows), n_iters) + t
        a = tl.load(a_ptrs, mask=exists, other=0.0)
        has_next = exists & (window + 1 < n_windows)
        next_a_ptrs = row_state(state_ptr, prefix_row(row, window + 1, routes, n_windows), n_iters) + t
        next_a = tl.load(next_a_ptrs, mask=has_next, other=0.0)
        # The factor is at most 1, except for a prefix without a score above -inf. The a of such a prefix is below the
        # next one, and its factor must not overflow.
        decay = tl.where(has_next, tl.exp2(tl.minimum((next_a - a) * factor, 1.0)), 0.0)
        share = tl.load(shares_ptr + window, mask=exists, other=0.0)
        decay, total = tl.associative_scan((decay, share), 0, _follow)
        # A window before the first has no share and passes nothing on.
        total += decay * carried
        carried = tl.sum(tl.where(tl.arange(0, PREFIXES) == PREFIXES - 1, total, 0.0), axis=0)
        _, offset, rest = exponent_line(-a, factor)
        total = total.to(tl.float32) * exp2(rest.to(tl.float32))
        tl.store(steps_ptr + n_windows + window, total, mask=exists)
        tl.store(steps_ptr + 2 * n_windows + window, offset, mask=exists)


@triton.jit(do_not_specialize=[*COUNTS, "n"])
def _tokens_kernel(
    scores_ptr,  # rows n
    state_ptr,  # prefixes+1 2 n_iters+1, fp64
    counts_ptr,  # rows n, int32
    ends_ptr,  # rows n, int32 or int64
    direct_ptr,  # prefixes*selected, fp32
    steps_ptr,  # rows n_iters 3 windows, fp32
    ds_ptr,  # rows n
    scores_stride,
    n_rows,
    n,
    n_windows,
    window_size,
    n_iters,
    halvings,
    TOKENS: tl.constexpr,
    WINDOWS: tl.constexpr,
):
    """The gradient of TOKENS neighbouring scores."""
    row = (tl.program_id(0) % n_rows).to(tl.int64)
    column = tl.program_id(0) // n_rows * TOKENS + tl.arange(0, TOKENS)
    score = tl.load(scores_ptr + row * scores_stride + column, mask=column < n, other=0.0).to(tl.float32)
    first = tl.minimum(column // window_size, n_windows)

    factor_ptr = row_state(state_ptr, tl.cast(n_rows, tl.int64) * n_windows, n_iters) + n_iters + 1
    through_a = tl.zeros([1, TOKENS, 1], tl.float32)
    for t in range(n_iters - 1, 0, -1):
        step_ptr = steps_ptr + (row * n_iters + t) * 3 * n_windows
        low, high = first, tl.full([TOKENS], n_windows, tl.int32)
        for _ in range(halvings):
            middle = (low + high) // 2
            is_above = score > tl.load(step_ptr + middle, mask=low < high, other=float("inf"))
            low = tl.where(is_above, middle + 1, low)
            high = tl.where(is_above, high, middle)
        exists = low < n_windows
        total = tl.load(step_ptr + n_windows + low, mask=exists, other=0.0)
        offset = tl.load(step_ptr + 2 * n_windows + low, mask=exists, other=0.0)
        slope = tl.load(factor_ptr + t).to(tl.float32)
        # If there is no prefix, the weight must not overflow.
        through_a += per_row(total) * tl.minimum(exp2_line(per_row(score), slope, offset), LARGEST)

    count = tl.load(counts_ptr + row * n + column, mask=column < n, other=0)
    begin = tl.load(ends_ptr + row * n + column, mask=column < n, other=0) - count
    direct = tl.zeros([TOKENS], tl.float32)
    for passed in range(0, tl.max(count, axis=0), WINDOWS):
        place = passed + tl.arange(0, WINDOWS)[None, :]
        direct_ptrs = direct_ptr + begin[:, None] + place
        direct += tl.sum(tl.load(direct_ptrs, mask=place < count[:, None], other=0.0), axis=1)

    ds = direct - tl.reshape(through_a, [TOKENS])
    tl.store(ds_ptr + row * n + column, ds.to(ds_ptr.dtype.element_ty), mask=column < n)


@planner
def _plan_thresholds(n_rows: int, n_windows: int, n_iters: int) -> Plan:
    settings = {"SLOTS": SLOTS, "ITERATIONS": triton.next_power_of_2(n_iters), "num_warps": NUM_WARPS}
    return Plan(n_rows * n_windows, settings)


@planner
def _plan_sums(n_rows: int, n_windows: int, n_iters: int) -> Plan:
    settings = {"PREFIXES": PREFIXES if n_windows > FEW_PREFIXES else FEW_PREFIXES, "num_warps": NUM_WARPS}
    return Plan(n_rows * (n_iters - 1), settings)


@planner
def _plan_tokens(n_rows: int, n: int) -> Plan:
    return Plan(n_rows * triton.cdiv(n, TOKENS), {"TOKENS": TOKENS, "WINDOWS": WINDOWS, "num_warps": NUM_WARPS})


def launch_backward(
    grad_output: Tensor,
    scores: Tensor,
    window_size: int,
    k: float,
    indices: Tensor,
    counts: Tensor,
    state: Tensor,
    ds: Tensor,
) -> None:
    """Write the gradient of scores `rows n` to `ds`, from that of the weights `b w r s`."""
    # End of the entries of each token, which has one for each window that selected it.
    ends = counts.view(-1).cumsum(dim=0, dtype=torch.int32 if indices.numel() < 2**31 else torch.int64)
    _launch_gradients(grad_output, scores, window_size, k, indices, counts, ends, state, ds)


@Launcher
def _launch_gradients(
    grad_output: Tensor,
    scores: Tensor,
    window_size: int,
    k: float,
    indices: Tensor,
    counts: Tensor,
    ends: Tensor,
    state: Tensor,
    ds: Tensor,
) -> Iterator[Launch]:
    n_rows, n = scores.shape
    _, n_windows, routes, selected = indices.shape
    n_iters = iterations_of(state)
    direct = Scratch(indices.numel(), dtype=torch.float32)
    shares = Scratch(n_rows, n_iters, n_windows, dtype=torch.float64)
    steps = Scratch(n_rows, n_iters, 3, n_windows, dtype=torch.float32)
    yield Launch(
        _thresholds_kernel,
        _plan_thresholds(n_rows, n_windows, n_iters),
        grad_output,
        indices,
        scores,
        state,
        ends,
        direct,
        shares,
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
    )
    if n_iters > 1:
        plan = _plan_sums(n_rows, n_windows, n_iters)
        yield Launch(_sums_kernel, plan, shares, state, steps, n_rows, routes, n_windows, n_iters)
    yield Launch(
        _tokens_kernel,
        _plan_tokens(n_rows, n),
        scores,
        state,
        counts,
        ends,
        direct,
        steps,
        ds,
        scores.stride(0),
        n_rows,
        n,
        n_windows,
        window_size,
        n_iters,
        n_windows.bit_length(),
    )
