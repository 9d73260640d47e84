"""Forward pass of `kernels.route_prefixes`: a program computes the descent on neighbouring prefixes of a row, another
selects.

Prefixes are read from the L2 cache in each iteration; no tensor has the size of windows times tokens. Neighbouring
prefixes have nearly equal thresholds. So a program has GROUP of them, and reads an entry and computes its exponential
w = exp((s - base) / e) once: for each prefix, an iteration adds up min(w c, 1) with its own c = exp((base - h) / e).
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from kernels._common.launch import COUNTS, Launch, Launcher
from kernels._common.plans import Plan, planner
from kernels._common.primitives import (
    EXP2_LACKS,
    INTERPRETED,
    LOG2_E,
    clip_enlarged,
    count_in_thread,
    exp2_line,
    exp2_minus_1,
    exponent_line,
    highest_in_thread,
    inverse,
    is_above,
    larger_or_nan,
    load_tile,
    log2_e_over,
    log_normal,
    lower_fp32,
    max_or_nan,
    per_row,
    round_down,
    sum_in_thread,
    tile_columns,
)
from kernels._common.tensors import address, multiprocessors
from kernels.coor_descent import MAX_SHIFT, cool, first_step, row_state, save_step, soft_selection
from kernels.select import sort_rows

GROUP = 4
"""Most prefixes of a program that computes descents."""

NUM_WARPS = 8

IN_THREAD = 32
"""Entries per thread of the part that the prefixes share."""

REGISTERS = 128
"""Most registers per thread of such a program."""

LONGEST_END = 2048
"""Most entries that are in one prefix of a program but not in another."""

RANKS = 2048
"""Ranks, or places, that selection reads at a time."""

RANKS_IN_THREAD = 8


@triton.jit
def prefix_row(row, window, routes, n_windows):
    """The index, in the order `b w r`, of a window's selection from a row `(b r)` of the scores."""
    return (row // routes * n_windows + window) * routes + row % routes


@triton.jit
def _clip_scaled_by_pair(x, high, low):
    """min(x * (high + low), 1), rounded once, for x >= 0, including infinity, and 0 < low; 0 for NaN."""
    if INTERPRETED:
        scaled = x.to(tl.float64) * high.to(tl.float64) + x.to(tl.float64) * low.to(tl.float64)
        return tl.where(scaled == scaled, tl.minimum(scaled.to(tl.float32), 1.0), 0.0)
    return tl.inline_asm_elementwise(
        """{
        .reg .f32 rest;
        mul.ftz.f32 rest, $1, $3;
        fma.rn.ftz.sat.f32 $0, $1, $2, rest;
        }""",
        "=f,f,f,f",
        [x, high, low],
        tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _load_common(scores_ptr, row, start, end, stride, n_rows, REPEATS: tl.constexpr, WIDTH: tl.constexpr):
    """Scores from `start`, -inf from `end` on: REPEATS x 1 x WIDTH."""
    rows = row + tl.zeros([1], tl.int64)
    columns = start + tile_columns(REPEATS, WIDTH)
    return load_tile(scores_ptr, scores_ptr, rows, columns, stride, 0, n_rows, end, False)


@triton.jit
def _load_own(scores_ptr, row, start, end, lengths, stride, n_rows, WIDTH: tl.constexpr):
    """Scores from `start`, -inf from the length of each prefix on: 1 x prefixes x WIDTH."""
    scores = _load_common(scores_ptr, row, start, end, stride, n_rows, 1, WIDTH)
    return tl.where(start + tile_columns(1, WIDTH) < per_row(lengths), scores, -float("inf"))


@triton.jit(do_not_specialize=COUNTS)
def _descend_kernel(
    scores_ptr,  # rows n
    state_ptr,  # prefixes+1 2 n_iters+1, fp64
    scores_stride,
    n_rows,
    routes,
    n_windows,
    window_size,
    part,
    parts,
    n_iters,
    k: "fp64",
    first: "fp64",
    eps_decay: "fp64",
    eps: "fp64",
    GROUP: tl.constexpr,
    REPEATS: tl.constexpr,
    WIDTH: tl.constexpr,
    COUNT: tl.constexpr,
):
    """All iterations on up to GROUP prefixes of one row; the longest prefixes come first. This program computes one of
    `parts` such groups, from the group number `part` on."""
    row = (tl.program_id(0) % n_rows).to(tl.int64)
    group = tl.program_id(0) // n_rows
    is_own = group % parts == part
    last = n_windows - group * GROUP
    window = last - GROUP + tl.arange(0, GROUP)
    n_prefixes = tl.cast(n_rows, tl.int64) * n_windows
    prefixes = tl.where((window >= 0) & is_own, prefix_row(row, window, routes, n_windows), n_prefixes)
    # A prefix that does not exist has the length of the first one.
    lengths = (tl.maximum(window, 0) + 1) * window_size
    common = tl.where(is_own, (tl.maximum(last - GROUP, 0) + 1) * window_size, 0)
    longest = tl.where(is_own, last * window_size, 0)

    max_of_thread = tl.full([1, WIDTH // 4], -float("inf"), tl.float32)
    n_valid_of_thread = tl.zeros([1, WIDTH // 4], tl.int32)
    for start in range(0, common, REPEATS * WIDTH):
        scores = _load_common(scores_ptr, row, start, common, scores_stride, n_rows, REPEATS, WIDTH)
        max_of_thread = larger_or_nan(max_of_thread, highest_in_thread(scores, 1, WIDTH))
        n_valid_of_thread += count_in_thread(is_above(scores, -float("inf")), 1, WIDTH)
    max_score = max_or_nan(max_of_thread, 1) + tl.zeros([GROUP], tl.float32)
    n_valid = tl.sum(n_valid_of_thread, axis=1) + tl.zeros([GROUP], tl.int32)
    for start in range(common, longest, WIDTH):
        own = _load_own(scores_ptr, row, start, longest, lengths, scores_stride, n_rows, WIDTH)
        max_score = larger_or_nan(max_score, max_or_nan(highest_in_thread(own, GROUP, WIDTH), 1))
        n_valid += tl.sum(count_in_thread(is_above(own, -float("inf")), GROUP, WIDTH), axis=1)

    log_k = tl.log(k + tl.zeros([GROUP], tl.float64))
    temperature = first + tl.zeros((), tl.float64)
    factor = log2_e_over(temperature)
    a, max_score = first_step(log_k, max_score, n_valid.to(tl.float64), temperature)
    nothing = tl.zeros([GROUP], tl.float64)
    save_step(state_ptr, prefixes, 0, n_prefixes, n_iters, 0, a, nothing, temperature, factor)

    for t in range(1, n_iters):
        temperature, factor = cool(temperature, eps_decay, eps)
        threshold = round_down(-a)
        anchor = tl.where(max_score < -a, max_score, -a)
        base = tl.sum(tl.where(tl.arange(0, GROUP) == GROUP - 1, anchor, 0.0), axis=0) + tl.zeros([1], tl.float64)
        shift = (base - anchor) * factor
        is_far = tl.max(tl.where(tl.abs(shift) <= MAX_SHIFT * LOG2_E, 0, 1), axis=0)
        alike = tl.where(is_far > 0, 0, common)

        slope, offset, rest = exponent_line(base, factor)
        scale = tl.exp2(shift + rest) * (1.0 + EXP2_LACKS)
        scale_high = lower_fp32(scale)
        # Never 0, because 0 times infinity is NaN.
        scale_low = per_row((scale - scale_high).to(tl.float32) + 1e-30)
        scale_high = per_row(scale_high.to(tl.float32))
        total_in_thread = tl.zeros([GROUP, WIDTH // 4], tl.float64)
        above_in_thread = tl.zeros([GROUP, WIDTH // 4], tl.int32)
        for start in range(0, alike, REPEATS * WIDTH):
            scores = _load_common(scores_ptr, row, start, alike, scores_stride, n_rows, REPEATS, WIDTH)
            weights = exp2_line(scores, slope, offset)
            clipped = _clip_scaled_by_pair(weights, scale_high, scale_low)
            total_in_thread += sum_in_thread(clipped, REPEATS, GROUP, WIDTH)
            if COUNT:
                above_in_thread += count_in_thread(is_above(scores, per_row(threshold)), GROUP, WIDTH)

        # The second loop reads the tokens of only some of the prefixes. It reads all tokens if thresholds are far from
        # each other.
        slope, offset, rest = exponent_line(anchor, factor)
        more = per_row(exp2_minus_1(rest) + EXP2_LACKS)
        for start in range(alike, longest, WIDTH):
            own = _load_own(scores_ptr, row, start, longest, lengths, scores_stride, n_rows, WIDTH)
            clipped = clip_enlarged(exp2_line(own, slope, offset), more)
            total_in_thread += sum_in_thread(clipped, 1, GROUP, WIDTH)
            if COUNT:
                above_in_thread += count_in_thread(is_above(own, per_row(threshold)), GROUP, WIDTH)

        total = tl.maximum(tl.sum(total_in_thread, axis=1), 0.5)
        above = tl.sum(above_in_thread, axis=1).to(tl.float64)
        a = temperature * (log_k - log_normal(total)) - anchor
        ratio = above * inverse(total)
        save_step(state_ptr, prefixes, 0, n_prefixes, n_iters, t, a, ratio, temperature, factor)

    temperature, factor = cool(temperature, eps_decay, eps)
    save_step(state_ptr, prefixes, 0, n_prefixes, n_iters, n_iters, nothing, nothing, temperature, factor)


@triton.jit(do_not_specialize=[*COUNTS, "n"])
def _select_kernel(
    ordered_ptr,  # rows n
    order_ptr,  # rows n, int64
    state_ptr,  # prefixes+1 2 n_iters+1, fp64
    indices_ptr,  # prefixes selected, int64
    weights_ptr,  # prefixes selected
    mask_ptr,  # prefixes selected, bool, if there is a mask
    counts_ptr,  # rows n, int32
    n_rows,
    n,
    routes,
    n_windows,
    window_size,
    n_iters,
    selected,
    RANKS: tl.constexpr,
    STRAIGHT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SAVE: tl.constexpr,
):
    """Select the first entries of a row, in the order of scores, that are in a prefix. Write them with weights and
    mask, and count one more window for each of them. The shortest prefixes, which take longest, come first."""
    row = (tl.program_id(0) % n_rows).to(tl.int64)
    window = tl.program_id(0) // n_rows
    length = (window + 1) * window_size
    prefix = prefix_row(row, window, routes, n_windows)
    a = tl.load(row_state(state_ptr, prefix + tl.zeros([1], tl.int64), n_iters) + n_iters - 1)
    schedule_ptr = row_state(state_ptr, tl.cast(n_rows, tl.int64) * n_windows, n_iters) + n_iters
    factor = tl.load(schedule_ptr + n_iters + 1)
    indices_ptr += prefix * selected
    weights_ptr += prefix * selected
    mask_ptr += prefix * selected

    wanted = tl.minimum(length, selected)
    found = tl.zeros((), tl.int32)
    start = tl.zeros((), tl.int32)
    while (found < wanted) & (start < n):
        rank = start + tl.arange(0, RANKS)
        position = tl.load(order_ptr + row * n + rank, mask=rank < n, other=n)
        is_before = (position < length).to(tl.int32)
        slot = found + tl.cumsum(is_before, axis=0) - is_before
        chosen = (is_before > 0) & (slot < selected)
        score = tl.load(ordered_ptr + row * n + rank, mask=chosen, other=0.0).to(tl.float32)
        weight = tl.reshape(soft_selection(score[None, None, :], a, factor, False), [RANKS])
        if STRAIGHT:
            weight = tl.where(weight == weight, 1.0, weight)
        tl.store(indices_ptr + slot, position, mask=chosen)
        tl.store(weights_ptr + slot, weight.to(weights_ptr.dtype.element_ty), mask=chosen)
        if HAS_MASK:
            tl.store(mask_ptr + slot, 1, mask=chosen)
        if SAVE:
            tl.atomic_add(counts_ptr + row * n + position, 1, mask=chosen, sem="relaxed")
        found += tl.sum(is_before, axis=0)
        start += RANKS

    for start in range(wanted, selected, RANKS):
        slot = start + tl.arange(0, RANKS)
        tl.store(indices_ptr + slot, slot.to(tl.int64), mask=slot < selected)
        tl.store(weights_ptr + slot, tl.zeros([RANKS], weights_ptr.dtype.element_ty), mask=slot < selected)
        if HAS_MASK:
            tl.store(mask_ptr + slot, 0, mask=slot < selected)


@planner
def _plan_descent(n_rows: int, n_windows: int, window_size: int, aligned: bool, available: int) -> Plan:
    """A program has few enough prefixes for all multiprocessors to have work. Its prefixes share most reads. If rows
    are not aligned, the addresses of entries take half of the registers for entries."""
    group = 1
    while (
        2 * group <= GROUP
        and n_rows * triton.cdiv(n_windows, 2 * group) >= available
        and (2 * group - 1) * window_size <= LONGEST_END
    ):
        group *= 2
    width = 4 * 32 * NUM_WARPS
    in_thread = IN_THREAD if aligned else IN_THREAD // 2
    tile = {"GROUP": group, "REPEATS": 32 * NUM_WARPS * in_thread // width, "WIDTH": width}
    settings = {**tile, "num_warps": NUM_WARPS, "maxnreg": REGISTERS}
    return Plan(n_rows * triton.cdiv(n_windows, group), settings)


@planner
def _plan_selection(n_rows: int, n_windows: int) -> Plan:
    return Plan(n_rows * n_windows, {"RANKS": RANKS, "num_warps": max(RANKS // (32 * RANKS_IN_THREAD), 1)})


def launch_forward(
    scores: Tensor,
    window_size: int,
    k: float,
    schedule: tuple[int, float, float, float],
    straight_through: bool,
    indices: Tensor,
    weights: Tensor,
    mask: Tensor,
    counts: Tensor,
    state: Tensor,
    is_descended: bool,
) -> None:
    """Select from scores `rows n`. Write indices and weights `b w r s`, the state unless it exists already, and, if
    they have entries, the mask `b w r s` and `counts` `b r n`, which are zeros before."""
    # Among equal scores the first comes first. Each prefix selects from the single order by position.
    ordered, order = sort_rows(scores)
    sizes = (window_size, k, *schedule, straight_through, is_descended)
    _launch_descent_and_selection(scores, *sizes, ordered, order, indices, weights, mask, counts, state)


@Launcher
def launch_part(
    scores: Tensor,
    routes: int,
    n_windows: int,
    window_size: int,
    k: float,
    n_iters: int,
    eps: float,
    first: float,
    eps_decay: float,
    part: int,
    parts: int,
    save: bool,
    state: Tensor,
) -> Iterator[Launch]:
    """Compute the descents for one of several parts of the prefixes of scores `rows n`, and write their state."""
    n_rows = scores.shape[0]
    aligned = (address(scores) | scores.stride(0)) % 16 == 0
    yield Launch(
        _descend_kernel,
        # The plan is for all prefixes, so that results have the same bits on any rank.
        _plan_descent(n_rows, n_windows, window_size, aligned, multiprocessors(scores.device)),
        scores,
        state,
        scores.stride(0),
        n_rows,
        routes,
        n_windows,
        window_size,
        part,
        parts,
        n_iters,
        k,
        first,
        eps_decay,
        eps,
        COUNT=save,
    )


@Launcher
def _launch_descent_and_selection(
    scores: Tensor,
    window_size: int,
    k: float,
    n_iters: int,
    eps: float,
    first: float,
    eps_decay: float,
    straight_through: bool,
    is_descended: bool,
    ordered: Tensor,
    order: Tensor,
    indices: Tensor,
    weights: Tensor,
    mask: Tensor,
    counts: Tensor,
    state: Tensor,
) -> Iterator[Launch]:
    n_rows, n = scores.shape
    _, n_windows, routes, selected = indices.shape
    save = counts.numel() > 0
    if not is_descended:
        schedule = (n_iters, eps, first, eps_decay)
        yield from launch_part.choose(scores, routes, n_windows, window_size, k, *schedule, 0, 1, save, state)
    yield Launch(
        _select_kernel,
        _plan_selection(n_rows, n_windows),
        ordered,
        order,
        state,
        indices,
        weights,
        mask,
        counts,
        n_rows,
        n,
        routes,
        n_windows,
        window_size,
        n_iters,
        selected,
        STRAIGHT=straight_through,
        HAS_MASK=mask.numel() > 0,
        SAVE=save,
    )
