"""Kernels of `kernels.soft_topk`: a row in registers, or in chunks that several launches search, and its gradient."""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common.launch import Launch, Launcher, Part, Scratch
from kernels._common.plans import Plan, most_registers, planner
from kernels._common.primitives import wait_for_all
from kernels._common.tensors import address, multiprocessors
from kernels.soft_topk.search import (
    STATE,
    UNIT,
    columns_of,
    conclude,
    first_state,
    is_searching,
    load_k,
    load_scores,
    measure,
    next_state,
    open_bracket,
    place_probes,
    ratio_of,
    refine,
    select,
    store_partials,
    store_solution,
    store_state,
    store_survey,
    sum_pair,
    sum_partials,
    survey,
    wide,
)

RESIDENT = 16384
"""Longest row that one program keeps in registers. It is half as long with a mask if entries are loaded one by one,
with addresses for each of them."""

CHUNK = 8192
"""Entries of a longer row per program."""

LEAST_CHUNK = 2048
"""Fewest entries per program if all programs of a row wait for each other."""

SEARCHES = 5
"""Launches that search a longer row. If a search is still open then, every program of the last launch finishes it on
its own."""

RESIDENT_PROBES = 8
TOGETHER_PROBES = 8
CHUNK_PROBES = 16
"""Probes of a pass that is a launch. With more probes a search needs fewer passes. A launch for each pass takes longer
than the exponentials of more probes."""


@triton.jit
def _resident_kernel(
    scores_ptr,  # rows n
    mask_ptr,  # rows n
    k_ptr,  # rows
    y_ptr,  # rows n
    solution_ptr,  # rows 3, fp64
    scores_stride,
    mask_stride,
    n,
    k: "fp64",
    eps: "fp64",
    rate: "fp64",
    REPEATS: tl.constexpr,
    WIDTH: tl.constexpr,
    PROBES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_K: tl.constexpr,
):
    """One row, held in registers from the first pass to the last."""
    rate = wide(rate)
    row = tl.program_id(0).to(tl.int64)
    columns = columns_of(REPEATS, WIDTH)
    scores = load_scores(scores_ptr + row * scores_stride, mask_ptr + row * mask_stride, columns, n, HAS_MASK)
    k = load_k(k_ptr, row, k, HAS_K)

    least, largest, n_valid, total, squares = survey(scores, WIDTH)
    bracket, aim = open_bracket(least, largest, n_valid, total, squares, k, eps)
    passes = 1
    while is_searching(bracket, n_valid, k, eps):
        probes = place_probes(bracket, aim, PROBES)
        counts, totals = measure(scores, probes, rate, WIDTH, PROBES)
        bracket, aim = refine(bracket, aim, probes, counts, totals, k, eps)
        passes += 1

    anchor, scale = conclude(bracket, n_valid, k, eps)
    store_solution(solution_ptr, row, anchor, scale, passes + 1, True)
    y, _ = select(scores, anchor, scale, rate)
    tl.store(y_ptr + row * n + columns, y.to(y_ptr.dtype.element_ty), mask=columns < n)


@triton.jit
def _survey_kernel(
    scores_ptr,  # rows n
    mask_ptr,  # rows n
    partials_ptr,  # rows chunks 2 PROBES, fp64
    scores_stride,
    mask_stride,
    n,
    chunks,
    REPEATS: tl.constexpr,
    WIDTH: tl.constexpr,
    PROBES: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """First pass over rows of several chunks."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    columns = (tl.program_id(0) % chunks) * (REPEATS * WIDTH) + columns_of(REPEATS, WIDTH)
    scores = load_scores(scores_ptr + row * scores_stride, mask_ptr + row * mask_stride, columns, n, HAS_MASK)
    store_survey(partials_ptr + tl.program_id(0).to(tl.int64) * (2 * PROBES), *survey(scores, WIDTH))


@triton.jit(do_not_specialize=["search"])
def _search_kernel(
    scores_ptr,  # rows n
    mask_ptr,  # rows n
    k_ptr,  # rows
    partials_ptr,  # searches+1 rows chunks 2 PROBES, fp64
    states_ptr,  # searches+1 rows STATE, fp64
    scores_stride,
    mask_stride,
    n_rows,
    n,
    chunks,
    k: "fp64",
    eps: "fp64",
    rate: "fp64",
    search,
    FIRST: tl.constexpr,
    REPEATS: tl.constexpr,
    WIDTH: tl.constexpr,
    PROBES: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_K: tl.constexpr,
):
    """Run one more pass over rows of several chunks. A program computes the state of its row, then probes its chunk."""
    rate = wide(rate)
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    k = load_k(k_ptr, row, k, HAS_K)

    # This pass reads the results of the one before, and writes to the next place.
    rows = tl.cast(n_rows, tl.int64)
    partials_ptr += ((search - 1) * rows + row) * chunks * (2 * PROBES)
    states_ptr += ((search - 1) * rows + row) * STATE
    if FIRST:
        bracket, aim, n_valid, passes = first_state(partials_ptr, chunks, k, eps, PROBES, SLOTS)
    else:
        bracket, aim, n_valid, passes = next_state(states_ptr, partials_ptr, chunks, k, eps, PROBES, SLOTS)
    store_state(states_ptr + rows * STATE, bracket, aim, n_valid, passes, chunk == 0)

    if is_searching(bracket, n_valid, k, eps):
        columns = chunk * (REPEATS * WIDTH) + columns_of(REPEATS, WIDTH)
        scores = load_scores(scores_ptr + row * scores_stride, mask_ptr + row * mask_stride, columns, n, HAS_MASK)
        counts, totals = measure(scores, place_probes(bracket, aim, PROBES), rate, WIDTH, PROBES)
        store_partials(partials_ptr + (rows * chunks + chunk) * (2 * PROBES), counts, totals, PROBES)


@triton.jit
def _finish_kernel(
    scores_ptr,  # rows n
    mask_ptr,  # rows n
    k_ptr,  # rows
    partials_ptr,  # rows chunks 2 PROBES, fp64
    state_ptr,  # rows STATE, fp64
    y_ptr,  # rows n
    solution_ptr,  # rows 3, fp64
    scores_stride,
    mask_stride,
    n,
    chunks,
    k: "fp64",
    eps: "fp64",
    rate: "fp64",
    REPEATS: tl.constexpr,
    WIDTH: tl.constexpr,
    PROBES: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_K: tl.constexpr,
):
    """Last pass over rows of several chunks; an open search continues over the whole row."""
    rate = wide(rate)
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    scores_ptr += row * scores_stride
    mask_ptr += row * mask_stride
    k = load_k(k_ptr, row, k, HAS_K)

    bracket, aim, n_valid, passes = next_state(
        state_ptr + row * STATE, partials_ptr + row * chunks * (2 * PROBES), chunks, k, eps, PROBES, SLOTS
    )
    while is_searching(bracket, n_valid, k, eps):
        probes = place_probes(bracket, aim, PROBES)
        counts = tl.zeros([PROBES], tl.float64)
        totals = tl.zeros([PROBES], tl.float64)
        for tile in range(chunks):
            columns = tile * (REPEATS * WIDTH) + columns_of(REPEATS, WIDTH)
            scores = load_scores(scores_ptr, mask_ptr, columns, n, HAS_MASK)
            tile_counts, tile_totals = measure(scores, probes, rate, WIDTH, PROBES)
            counts += tile_counts
            totals += tile_totals
        bracket, aim = refine(bracket, aim, probes, counts, totals, k, eps)
        passes += 1

    anchor, scale = conclude(bracket, n_valid, k, eps)
    store_solution(solution_ptr, row, anchor, scale, passes + 1, chunk == 0)
    columns = chunk * (REPEATS * WIDTH) + columns_of(REPEATS, WIDTH)
    scores = load_scores(scores_ptr, mask_ptr, columns, n, HAS_MASK)
    y, _ = select(scores, anchor, scale, rate)
    tl.store(y_ptr + row * n + columns, y.to(y_ptr.dtype.element_ty), mask=columns < n)


@triton.jit
def _together_kernel(
    scores_ptr,  # rows n
    mask_ptr,  # rows n
    k_ptr,  # rows
    partials_ptr,  # 2 rows chunks 2 PROBES, fp64
    arrived_ptr,  # rows, int32, zeros at first
    y_ptr,  # rows n
    solution_ptr,  # rows 3, fp64
    scores_stride,
    mask_stride,
    n_rows,
    n,
    chunks,
    k: "fp64",
    eps: "fp64",
    rate: "fp64",
    REPEATS: tl.constexpr,
    WIDTH: tl.constexpr,
    PROBES: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_K: tl.constexpr,
):
    """All passes over rows whose programs run at the same time, with their chunks in registers."""
    rate = wide(rate)
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    columns = chunk * (REPEATS * WIDTH) + columns_of(REPEATS, WIDTH)
    scores = load_scores(scores_ptr + row * scores_stride, mask_ptr + row * mask_stride, columns, n, HAS_MASK)
    k = load_k(k_ptr, row, k, HAS_K)
    partials_ptr += row * chunks * (2 * PROBES)
    arrived_ptr += row

    store_survey(partials_ptr + chunk * (2 * PROBES), *survey(scores, WIDTH))
    wait_for_all(arrived_ptr, chunks)
    bracket, aim, n_valid, _ = first_state(partials_ptr, chunks, k, eps, PROBES, SLOTS)
    passes = 1
    while is_searching(bracket, n_valid, k, eps):
        probes = place_probes(bracket, aim, PROBES)
        counts, totals = measure(scores, probes, rate, WIDTH, PROBES)
        # Passes alternate between two places: when a program writes to one, all programs have read its old values.
        pass_ptr = partials_ptr + (passes % 2) * tl.cast(n_rows, tl.int64) * chunks * (2 * PROBES)
        store_partials(pass_ptr + chunk * (2 * PROBES), counts, totals, PROBES)
        passes += 1
        wait_for_all(arrived_ptr, passes * chunks)
        counts, totals = sum_partials(pass_ptr, chunks, PROBES, SLOTS)
        bracket, aim = refine(bracket, aim, probes, counts, totals, k, eps)

    anchor, scale = conclude(bracket, n_valid, k, eps)
    store_solution(solution_ptr, row, anchor, scale, passes + 1, chunk == 0)
    y, _ = select(scores, anchor, scale, rate)
    tl.store(y_ptr + row * n + columns, y.to(y_ptr.dtype.element_ty), mask=columns < n)


@triton.jit
def _load_for_gradient(grad_output_ptr, scores_ptr, mask_ptr, solution_ptr, columns, n, rate, HAS_MASK: tl.constexpr):
    """grad_output and y, both 0 for entries that pass no gradient on."""
    scores = load_scores(scores_ptr, mask_ptr, columns, n, HAS_MASK)
    y, free = select(scores, tl.load(solution_ptr), tl.load(solution_ptr + 1).to(tl.float32), rate)
    grad_output = tl.load(grad_output_ptr + columns, mask=free & (columns < n), other=0.0).to(tl.float32)
    return grad_output, tl.where(free, y, 0.0)


@triton.jit
def _gradient_sums_kernel(
    grad_output_ptr,  # rows n
    scores_ptr,  # rows n
    mask_ptr,  # rows n
    solution_ptr,  # rows 3, fp64
    sums_ptr,  # rows chunks 2, fp64
    grad_output_stride,
    scores_stride,
    mask_stride,
    n,
    chunks,
    rate: "fp64",
    REPEATS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Each chunk's share of sum g y and sum y."""
    rate = wide(rate)
    row = (tl.program_id(0) // chunks).to(tl.int64)
    columns = (tl.program_id(0) % chunks) * (REPEATS * WIDTH) + columns_of(REPEATS, WIDTH)
    grad_output, y = _load_for_gradient(
        grad_output_ptr + row * grad_output_stride, scores_ptr + row * scores_stride, mask_ptr + row * mask_stride,
        solution_ptr + row * 3, columns, n, rate, HAS_MASK,
    )  # fmt: skip
    weighted, total = sum_pair(grad_output * y, y, WIDTH)
    sums_ptr += tl.program_id(0).to(tl.int64) * 2
    tl.store(sums_ptr, weighted)
    tl.store(sums_ptr + 1, total)


@triton.jit
def _gradient_kernel(
    grad_output_ptr,  # rows n
    scores_ptr,  # rows n
    mask_ptr,  # rows n
    solution_ptr,  # rows 3, fp64
    sums_ptr,  # rows chunks 2, fp64
    ds_ptr,  # rows n
    dk_ptr,  # rows, fp64
    grad_output_stride,
    scores_stride,
    mask_stride,
    n,
    chunks,
    rate: "fp64",
    inverse_eps: "fp64",
    REPEATS: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Gradient of one chunk of a row, which is the whole row if SLOTS is 1."""
    rate, inverse_eps = wide(rate), wide(inverse_eps)
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    columns = chunk * (REPEATS * WIDTH) + columns_of(REPEATS, WIDTH)
    grad_output, y = _load_for_gradient(
        grad_output_ptr + row * grad_output_stride, scores_ptr + row * scores_stride, mask_ptr + row * mask_stride,
        solution_ptr + row * 3, columns, n, rate, HAS_MASK,
    )  # fmt: skip
    if SLOTS == 1:
        weighted, total = sum_pair(grad_output * y, y, WIDTH)
    else:
        weighted_in_slot = tl.zeros([SLOTS], tl.float64)
        total_in_slot = tl.zeros([SLOTS], tl.float64)
        for start in range(0, chunks, SLOTS):
            slot = start + tl.arange(0, SLOTS)
            slot_ptrs = sums_ptr + (row * chunks + slot) * 2
            weighted_in_slot += tl.load(slot_ptrs, mask=slot < chunks, other=0.0)
            total_in_slot += tl.load(slot_ptrs + 1, mask=slot < chunks, other=0.0)
        weighted = tl.sum(weighted_in_slot, axis=0)
        total = tl.sum(total_in_slot, axis=0)

    # If no entry is below 1, the result does not depend on the scores or on k.
    mean = tl.where(total == 0, 0.0, ratio_of(weighted, total))
    ds = (grad_output - mean) * y * inverse_eps.to(tl.float32)
    tl.store(ds_ptr + row * n + columns, ds.to(ds_ptr.dtype.element_ty), mask=columns < n)
    tl.store(dk_ptr + row, mean, mask=chunk == 0)


@planner
def _plan(n_rows: int, n: int, unmasked: bool, aligned: bool) -> Plan:
    """Pieces are chunks. A thread has 16 entries, 32 in the largest tile.

    The explicit limit on registers equals the hardware's: without it, ptxas spills some to fit more programs.
    """
    resident = RESIDENT if unmasked or aligned else RESIDENT // 2
    chunks = 1 if n <= resident else triton.cdiv(n, CHUNK)
    block = max(triton.next_power_of_2(n if chunks == 1 else CHUNK), 128)
    num_warps = min(max(block // 512, 1), 16)
    settings = {
        "REPEATS": block // (128 * num_warps),
        "WIDTH": 128 * num_warps,
        "num_warps": num_warps,
        "maxnreg": most_registers(num_warps),
    }
    return Plan(n_rows * chunks, settings, chunks)


@planner
def _plan_slots(n_rows: int, n: int, unmasked: bool, aligned: bool) -> Plan:
    """The plan of chunks, and the number of chunks that a program reads at a time."""
    plan = _plan(n_rows, n, unmasked, aligned)
    return plan._replace(settings={**plan.settings, "SLOTS": min(triton.next_power_of_2(plan.pieces), 128)})


@planner
def _plan_together(n_rows: int, n: int, unmasked: bool, aligned: bool, available: int) -> Plan:
    """All passes in one launch, with chunks as small as the number of multiprocessors allows, one chunk for each. If
    there are too few multiprocessors, each pass is a launch."""
    plan = _plan_slots(n_rows, n, unmasked, aligned)
    if plan.pieces == 1 or plan.programs > available:
        return plan
    chunk = CHUNK
    while chunk > LEAST_CHUNK and n_rows * triton.cdiv(n, chunk // 2) <= available:
        chunk //= 2
    chunks, num_warps = triton.cdiv(n, chunk), max(chunk // 512, 1)
    settings = {
        "REPEATS": chunk // (128 * num_warps),
        "WIDTH": 128 * num_warps,
        "SLOTS": 128,
        "num_warps": num_warps,
        "maxnreg": most_registers(num_warps),
        "launch_cooperative_grid": True,
    }
    return Plan(n_rows * chunks, settings, chunks)


def _sizes_of(scores: Tensor, mask: Tensor | None) -> tuple[int, int, bool, bool]:
    """Sizes and options that a plan depends on."""
    n_rows, n = scores.shape
    stride = 0 if mask is None else mask.stride(0)
    # The bitwise or is a multiple of 16 only if each of the numbers is.
    return n_rows, n, mask is None, (n | address(scores) | scores.stride(0) | stride) % 16 == 0


@Launcher
def launch_forward(
    scores: Tensor, mask: Tensor | None, k_rows: Tensor | None, k: float, eps: float, y: Tensor, solution: Tensor
) -> Iterator[Launch]:
    n_rows, n = scores.shape
    inputs = (scores, scores if mask is None else mask, scores if k_rows is None else k_rows)
    strides = (scores.stride(0), 0 if mask is None else mask.stride(0))
    # Kernels take k, eps for scores in UNITs, and the rate log2(e) / eps, since they compute powers of two.
    numbers = (k, UNIT.value * eps, math.log2(math.e) / (UNIT.value * eps))
    variant = {"HAS_MASK": mask is not None, "HAS_K": k_rows is not None}
    sizes = _sizes_of(scores, mask)
    plan = _plan(*sizes)
    chunks = plan.pieces
    if chunks == 1:
        yield Launch(
            _resident_kernel, plan, *inputs, y, solution, *strides, n, *numbers, PROBES=RESIDENT_PROBES, **variant
        )
        return

    available = multiprocessors(scores.device)
    together = _plan_together(*sizes, available)
    # With a multiprocessor for each, all programs run at the same time, and can wait for each other.
    if together.programs <= available:
        chunks = together.pieces
        partials = Scratch(2, n_rows, chunks, 2 * TOGETHER_PROBES, dtype=torch.float64)
        pointers = (*inputs, partials, Scratch(n_rows, dtype=torch.int32, zeros=True), y, solution)
        sizes_and_numbers = (*strides, n_rows, n, chunks, *numbers)
        yield Launch(_together_kernel, together, *pointers, *sizes_and_numbers, PROBES=TOGETHER_PROBES, **variant)
        return

    # One for each search, and one for the survey before.
    of_partials, of_states = n_rows * chunks * 2 * CHUNK_PROBES, n_rows * STATE.value
    partials = Scratch(SEARCHES + 1, of_partials, dtype=torch.float64)
    states = Scratch(SEARCHES + 1, of_states, dtype=torch.float64)
    last = (Part(partials, SEARCHES * of_partials), Part(states, SEARCHES * of_states))
    slots, settings = _plan_slots(*sizes), {"PROBES": CHUNK_PROBES, **variant}

    yield Launch(
        _survey_kernel, plan, *inputs[:2], partials, *strides, n, chunks, PROBES=CHUNK_PROBES, HAS_MASK=mask is not None
    )
    for search in range(1, SEARCHES + 1):
        searched = (*strides, n_rows, n, chunks, *numbers, search)
        yield Launch(_search_kernel, slots, *inputs, partials, states, *searched, FIRST=search == 1, **settings)
    yield Launch(_finish_kernel, slots, *inputs, *last, y, solution, *strides, n, chunks, *numbers, **settings)


@Launcher
def launch_backward(
    grad_output: Tensor, scores: Tensor, mask: Tensor | None, solution: Tensor, eps: float, ds: Tensor, dk: Tensor
) -> Iterator[Launch]:
    n_rows, n = scores.shape
    sizes = _sizes_of(scores, mask)
    plan = _plan(*sizes)
    chunks = plan.pieces
    inputs = (grad_output, scores, scores if mask is None else mask, solution)
    strides = (grad_output.stride(0), scores.stride(0), 0 if mask is None else mask.stride(0))
    rate = math.log2(math.e) / (UNIT.value * eps)
    variant = {"HAS_MASK": mask is not None}

    sums: Tensor | Scratch = dk
    if chunks > 1:
        sums = Scratch(n_rows, chunks, 2, dtype=torch.float64)
        yield Launch(_gradient_sums_kernel, plan, *inputs, sums, *strides, n, chunks, rate, **variant)
    numbers = (*strides, n, chunks, rate, 1.0 / eps)
    yield Launch(_gradient_kernel, _plan_slots(*sizes), *inputs, sums, ds, dk, *numbers, **variant)
