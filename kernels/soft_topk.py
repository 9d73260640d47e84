"""The exact soft top-k: one monotone equation a row, solved in a handful of passes over the row.

`reference.soft_topk` is y_i = min(1, exp((s_i - v) / e)) with the v at which

    F(v) = #{s_i > v} + sum over the others of exp((s_i - v) / e)

falls to k. A pass evaluates F at several probes and keeps the two around the solution, the bracket. The next probes
stand in a ladder of ever smaller steps around an interpolation, and at the solution that holds if no other score lies
between it and the bracket's end; where that gains little, they divide the fp32 numbers in the bracket evenly, which
ends whatever the scores are. As soon as no score is left in the bracket, the entries at 1 are known, and the rest is
closed form: with the anchor h at an end of the bracket, y = exp((s - h) / e) (k - #{s > h}) / sum exp((s - h) / e).
The difference s - h of two fp32 numbers is exact where it matters, so that only sums and probes need fp64.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._launch import as_rows, k_as_rows, mask_as_rows, runs_triton
from reference._arguments import check_k, check_scores, require

RESIDENT = 16384
"""Longest row that one program keeps in registers."""

CHUNK = 8192
"""Entries of a longer row that one program handles."""

SEARCHES = 5
"""Launches that search a longer row. What they leave open, the last launch finishes with every program on its own."""

RESIDENT_PROBES = 8
CHUNK_PROBES = 16
"""More probes, fewer passes: where a pass is a launch, it takes longer than the exponentials in it."""

LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))

LARGEST: tl.constexpr = tl.constexpr(3.0e38)
"""A bound on scores, to which larger ones are cut."""

HIDDEN: tl.constexpr = tl.constexpr(-3.2e38)
"""Stands for a score that takes no part: below every other, its exponential is 0, and finite."""

NARROW: tl.constexpr = tl.constexpr(2.0**-22)
"""Width of a bracket, in temperatures, at which fp32 tells no score in it from one at the kink."""

FAR: tl.constexpr = tl.constexpr(3000.0)
"""exp(8): at more than 8 temperatures from the solution, an anchor would cost the exponents some of their digits."""

STATE: tl.constexpr = tl.constexpr(16)
"""Room for the state of a search, of which eleven numbers are used."""


@triton.jit
def _wide(x):
    """A number as an fp64 tensor, which an argument is not in the interpreter."""
    return x + tl.zeros((), tl.float64)


@triton.jit
def _load_k(k_ptr, row, k, HAS_K: tl.constexpr):
    """k of a row as fp64; NaN, and with it the row, where it is not positive."""
    k = tl.load(k_ptr + row).to(tl.float64) if HAS_K else _wide(k)
    return tl.where(k > 0, k, float("nan"))


@triton.jit
def _ratio(x, y):
    """x / y of fp64 numbers in fp32: dividing in fp64 is a call, around which registers are spilled."""
    return x.to(tl.float32) / y.to(tl.float32)


@triton.jit
def _columns(REPEATS: tl.constexpr, WIDTH: tl.constexpr):
    """Column numbers of a tile, REPEATS x WIDTH, of which a thread holds four neighbours in each of the REPEATS."""
    return tl.arange(0, REPEATS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _load_scores(scores_ptr, mask_ptr, columns, n, HAS_MASK: tl.constexpr):
    """Scores as fp32, HIDDEN where there is none that takes part: REPEATS x WIDTH."""
    valid = columns < n
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr + columns, mask=valid, other=0) != 0)
    scores = tl.load(scores_ptr + columns, mask=valid, other=0.0).to(tl.float32)
    return tl.where(valid, tl.where(scores < -LARGEST, -LARGEST, scores), HIDDEN)


@triton.jit
def _sum_pair(x, y, WIDTH: tl.constexpr):
    """Sums of two tiles as fp64, in one exchange between the threads; a thread adds up its own entries in fp32."""
    pair = tl.reshape(tl.join(tl.sum(x, axis=0), tl.sum(y, axis=0)), [WIDTH // 4, 4, 2])
    return tl.split(tl.sum(tl.sum(pair, axis=1).to(tl.float64), axis=0))


@triton.jit
def _exp_over(difference, rate):
    """exp(difference / eps) of an fp32 tile; the rate, log2(e) / eps, is fp64 and a bias if it were rounded to fp32."""
    high = rate.to(tl.float32)
    low = (rate - high.to(tl.float64)).to(tl.float32)
    return tl.exp2(difference * high + difference * low)


@triton.jit
def _key(x):
    """Place of an fp64 number, rounded to fp32, among all fp32 numbers: int64 in the order of the numbers."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -2147483648 - bits, bits)


@triton.jit
def _number(key):
    """The fp32 number at a place, as fp64."""
    bits = tl.where(key < 0, -2147483648 - key, key)
    return bits.to(tl.int32).to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def _survey(scores, WIDTH: tl.constexpr):
    """Least and largest score, number, sum and sum of squares of a tile; the number is NaN where a score is."""
    hidden = scores < -LARGEST
    least = tl.min(tl.min(tl.where(hidden, LARGEST, scores), axis=0), axis=0).to(tl.float64)
    largest = tl.max(tl.max(scores, axis=0), axis=0).to(tl.float64)
    present = tl.where(hidden, 0.0, tl.where(scores == scores, 1.0, float("nan")))
    known = tl.where(hidden, 0.0, scores)
    n_valid, total = _sum_pair(present, known, WIDTH)
    squares = tl.sum(tl.sum(known * known, axis=0).to(tl.float64), axis=0)
    return least, largest, n_valid, total, squares


@triton.jit
def _open(least, largest, n_valid, total, squares, k, eps):
    """The bracket that holds for any scores, and a first aim that is good for normally distributed ones.

    F(v) lies between n exp((least - v) / e) and n exp((largest - v) / e), for v above the respective score.
    """
    share = _ratio(k, n_valid)
    rise = -eps * tl.log(share)
    low = _number(_key(tl.maximum(least + rise - eps, -LARGEST)) - 1)
    high = _number(_key(tl.minimum(largest + rise + eps, LARGEST)) + 1)

    # The normal quantile of Abramowitz and Stegun, 26.2.23.
    t = tl.sqrt(-2.0 * tl.log(tl.maximum(tl.minimum(share, 1.0 - share), 1e-12)))
    quantile = t - (2.515517 + t * (0.802853 + t * 0.010328)) / (1.0 + t * (1.432788 + t * (0.189269 + t * 0.001308)))
    mean = _ratio(total, n_valid).to(tl.float64)
    variance = _ratio(squares - mean * total, n_valid)
    deviation = tl.sqrt(tl.maximum(variance, 0.0)).to(tl.float64)
    center = mean + deviation * tl.where(share < 0.5, quantile, -quantile)
    center = tl.minimum(tl.maximum(center, low), high)
    reach = tl.where(deviation < high - low, 4.0 * deviation, 0.0)
    # Until an end is evaluated, its sums say that F is k, or 0, there, which no estimate takes for a slope.
    return (low, n_valid, k - n_valid, high, 0.0 * k, 0.0 * k), (center, reach, center)


@triton.jit
def _probes(bracket, aim, PROBES: tl.constexpr):
    """Where to evaluate F: PROBES fp32 numbers strictly inside of the bracket, as fp64."""
    low, _, _, high, _, _ = bracket
    center, reach, newton = aim
    low_key, high_key = _key(low), _key(high)
    probe = tl.arange(0, PROBES)
    # Two probes close around `newton`, the others in pairs at 2**-2 to 2**-8 of the reach around the center.
    at_newton = probe >= PROBES - 2
    halvings = tl.where(at_newton, 20 - 10 * (probe % 2), 2 + probe // 2 * (24 // PROBES))
    step = reach * (1 - 2 * (probe % 2)) * tl.exp2(-halvings.to(tl.float32))
    aimed = tl.where(at_newton, newton, center) + step
    even = low_key + (high_key - low_key) * (probe + 1) // (PROBES + 1)
    key = tl.where(reach > 0, _key(aimed), even)
    return _number(tl.minimum(tl.maximum(key, low_key + 1), high_key - 1))


@triton.jit
def _measure(scores, probes, rate, WIDTH: tl.constexpr, PROBES: tl.constexpr):
    """How many scores of a tile are above each probe, and the sum of the others' exponentials: both PROBES."""
    place = tl.arange(0, PROBES)
    counts = tl.zeros([PROBES], tl.float64)
    totals = tl.zeros([PROBES], tl.float64)
    for i in range(PROBES):
        probe = tl.sum(tl.where(place == i, probes, 0.0), axis=0)
        difference = scores - probe.to(tl.float32)
        above = difference > 0
        count, total = _sum_pair(tl.where(above, 1.0, 0.0), tl.where(above, 0.0, _exp_over(difference, rate)), WIDTH)
        counts = tl.where(place == i, count, counts)
        totals = tl.where(place == i, total, totals)
    return counts, totals


@triton.jit
def _log_ratio(x, y):
    """log(x / y) in fp32, as exact for x close to y as elsewhere; finite for x = 0."""
    excess = _ratio(x - y, y)
    return tl.where(tl.abs(excess) < 1e-3, excess, tl.log(tl.maximum(1.0 + excess, 1e-30)))


@triton.jit
def _refine(bracket, aim, probes, counts, totals, k, eps):
    """Bracket and aim after a pass."""
    low, low_count, low_total, high, high_count, high_total = bracket
    width, reach = high - low, aim[1]
    enough = counts + totals >= k
    lowest = low
    low = tl.max(tl.where(enough, probes, low), axis=0)
    low_count = tl.where(low > lowest, tl.max(tl.where(probes == low, counts, 0.0), axis=0), low_count)
    low_total = tl.where(low > lowest, tl.max(tl.where(probes == low, totals, 0.0), axis=0), low_total)
    highest = high
    high = tl.min(tl.where(probes > low, probes, high), axis=0)
    high_count = tl.where(high < highest, tl.max(tl.where(probes == high, counts, 0.0), axis=0), high_count)
    high_total = tl.where(high < highest, tl.max(tl.where(probes == high, totals, 0.0), axis=0), high_total)

    # With the entries above an end at 1, the solution is here: never too low, and exact if no score is in between.
    from_low = low + eps * tl.log(_ratio(low_total, k - low_count))
    from_high = high + eps * tl.log(_ratio(high_total, k - high_count))
    newton = tl.minimum(tl.where(low_count < k, from_low, high), tl.where(high_total > 0, from_high, high))
    newton = tl.minimum(newton, high)

    # log F between the ends, taken for a straight line; it falls no faster than with a slope of 1 / e.
    above, below = _log_ratio(low_count + low_total, k), _log_ratio(high_count + high_total, k)
    known = (above > 0) & (high_count + high_total > 0)
    center = low + (high - low) * tl.where(known, above / (above - below), 0.5)
    center = tl.minimum(tl.maximum(center, low + eps * above), newton)
    gained = (4.0 * (high - low) < width) | (reach == 0)
    bracket = (low, low_count, low_total, high, high_count, high_total)
    return bracket, (center, tl.where(gained, high - low, 0.0), newton)


@triton.jit
def _settle(bracket, k, eps):
    """Whether the bracket identifies the entries at 1; they are those above the anchor; and the scale of the others."""
    low, low_count, low_total, high, high_count, high_total = bracket
    adjacent = _key(high) - _key(low) <= 1
    empty = low_count == high_count
    at_low = adjacent | empty
    anchor = tl.where(at_low, low, high)
    scale = _ratio(k - tl.where(at_low, low_count, high_count), tl.where(at_low, low_total, high_total))
    near = (scale < FAR) & (scale * FAR > 1)
    return adjacent | (near & (empty | (high - low <= NARROW * eps))), anchor, scale


@triton.jit
def _searching(bracket, n_valid, k, eps):
    """Whether a row has an equation that is not solved yet; a NaN among its numbers leaves it without one."""
    settled, _, _ = _settle(bracket, k, eps)
    return (k < n_valid) & (settled == 0)


@triton.jit
def _conclude(bracket, n_valid, k, eps):
    """Anchor and scale of a row; without an equation to solve, all its entries are above the anchor, or NaN."""
    _, anchor, scale = _settle(bracket, k, eps)
    return tl.where(k < n_valid, anchor, tl.where(k >= n_valid, -float("inf"), float("nan"))), scale


@triton.jit
def _select(scores, anchor, scale, rate):
    """y of a tile, and which of its entries are below 1 and not hidden."""
    anchor = anchor.to(tl.float32)
    at_one = scores > anchor
    y = _exp_over(scores - anchor, rate) * scale
    y = tl.where(at_one | (y > 1), 1.0, y)
    hidden = scores < -LARGEST
    return tl.where(hidden, 0.0, y), (at_one | hidden) == 0


@triton.jit
def _store_solution(solution_ptr, row, anchor, scale, passes, wanted):
    tl.store(solution_ptr + row * 3, anchor, mask=wanted)
    tl.store(solution_ptr + row * 3 + 1, scale, mask=wanted)
    tl.store(solution_ptr + row * 3 + 2, passes, mask=wanted)


@triton.jit
def _store_state(state_ptr, bracket, aim, n_valid, passes, wanted):
    for i in tl.static_range(6):
        tl.store(state_ptr + i, bracket[i], mask=wanted)
    for i in tl.static_range(3):
        tl.store(state_ptr + 6 + i, aim[i], mask=wanted)
    tl.store(state_ptr + 9, n_valid, mask=wanted)
    tl.store(state_ptr + 10, passes, mask=wanted)


@triton.jit
def _first_state(partials_ptr, chunks, k, eps, PROBES: tl.constexpr, SLOTS: tl.constexpr):
    """State of a search after the survey of all chunks."""
    least = tl.full([SLOTS], LARGEST, tl.float64)
    largest = tl.full([SLOTS], -LARGEST, tl.float64)
    n_valid = tl.zeros([SLOTS], tl.float64)
    total = tl.zeros([SLOTS], tl.float64)
    squares = tl.zeros([SLOTS], tl.float64)
    for start in range(0, chunks, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        present = slot < chunks
        slot_ptrs = partials_ptr + slot * (2 * PROBES)
        least = tl.minimum(least, tl.load(slot_ptrs, mask=present, other=LARGEST))
        largest = tl.maximum(largest, tl.load(slot_ptrs + 1, mask=present, other=-LARGEST))
        n_valid += tl.load(slot_ptrs + 2, mask=present, other=0.0)
        total += tl.load(slot_ptrs + 3, mask=present, other=0.0)
        squares += tl.load(slot_ptrs + 4, mask=present, other=0.0)
    n_valid = tl.sum(n_valid, axis=0)
    bracket, aim = _open(
        tl.min(least, axis=0), tl.max(largest, axis=0), n_valid, tl.sum(total, axis=0), tl.sum(squares, axis=0), k, eps
    )
    return bracket, aim, n_valid, _wide(1.0)


@triton.jit
def _next_state(state_ptr, partials_ptr, chunks, k, eps, PROBES: tl.constexpr, SLOTS: tl.constexpr):
    """State of a search after a pass over all chunks; a search that had ended stays as it was."""
    bracket = (
        tl.load(state_ptr), tl.load(state_ptr + 1), tl.load(state_ptr + 2),
        tl.load(state_ptr + 3), tl.load(state_ptr + 4), tl.load(state_ptr + 5),
    )  # fmt: skip
    aim = (tl.load(state_ptr + 6), tl.load(state_ptr + 7), tl.load(state_ptr + 8))
    n_valid = tl.load(state_ptr + 9)
    passes = tl.load(state_ptr + 10)
    if _searching(bracket, n_valid, k, eps):
        counts = tl.zeros([PROBES], tl.float64)
        totals = tl.zeros([PROBES], tl.float64)
        for start in range(0, chunks, SLOTS):
            slot = start + tl.arange(0, SLOTS)[:, None]
            partial_ptrs = partials_ptr + slot * (2 * PROBES) + tl.arange(0, PROBES)[None, :]
            counts += tl.sum(tl.load(partial_ptrs, mask=slot < chunks, other=0.0), axis=0)
            totals += tl.sum(tl.load(partial_ptrs + PROBES, mask=slot < chunks, other=0.0), axis=0)
        bracket, aim = _refine(bracket, aim, _probes(bracket, aim, PROBES), counts, totals, k, eps)
        passes += 1
    return bracket, aim, n_valid, passes


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
    rate = _wide(rate)
    row = tl.program_id(0).to(tl.int64)
    columns = _columns(REPEATS, WIDTH)
    scores = _load_scores(scores_ptr + row * scores_stride, mask_ptr + row * mask_stride, columns, n, HAS_MASK)
    k = _load_k(k_ptr, row, k, HAS_K)

    least, largest, n_valid, total, squares = _survey(scores, WIDTH)
    bracket, aim = _open(least, largest, n_valid, total, squares, k, eps)
    passes = 1
    while _searching(bracket, n_valid, k, eps):
        probes = _probes(bracket, aim, PROBES)
        counts, totals = _measure(scores, probes, rate, WIDTH, PROBES)
        bracket, aim = _refine(bracket, aim, probes, counts, totals, k, eps)
        passes += 1

    anchor, scale = _conclude(bracket, n_valid, k, eps)
    _store_solution(solution_ptr, row, anchor, scale, passes + 1, True)
    y, _ = _select(scores, anchor, scale, rate)
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
    columns = (tl.program_id(0) % chunks) * (REPEATS * WIDTH) + _columns(REPEATS, WIDTH)
    scores = _load_scores(scores_ptr + row * scores_stride, mask_ptr + row * mask_stride, columns, n, HAS_MASK)
    least, largest, n_valid, total, squares = _survey(scores, WIDTH)
    partials_ptr += tl.program_id(0).to(tl.int64) * (2 * PROBES)
    tl.store(partials_ptr, least)
    tl.store(partials_ptr + 1, largest)
    tl.store(partials_ptr + 2, n_valid)
    tl.store(partials_ptr + 3, total)
    tl.store(partials_ptr + 4, squares)


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
    """One more pass over rows of several chunks: every program of a row works out its state, then probes its chunk."""
    rate = _wide(rate)
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    k = _load_k(k_ptr, row, k, HAS_K)

    # This pass reads what the one before wrote, and writes to the next place.
    partials_ptr += ((search - 1) * n_rows + row) * chunks * (2 * PROBES)
    states_ptr += ((search - 1) * n_rows + row) * STATE
    if FIRST:
        bracket, aim, n_valid, passes = _first_state(partials_ptr, chunks, k, eps, PROBES, SLOTS)
    else:
        bracket, aim, n_valid, passes = _next_state(states_ptr, partials_ptr, chunks, k, eps, PROBES, SLOTS)
    _store_state(states_ptr + n_rows * STATE, bracket, aim, n_valid, passes, chunk == 0)

    if _searching(bracket, n_valid, k, eps):
        columns = chunk * (REPEATS * WIDTH) + _columns(REPEATS, WIDTH)
        scores = _load_scores(scores_ptr + row * scores_stride, mask_ptr + row * mask_stride, columns, n, HAS_MASK)
        counts, totals = _measure(scores, _probes(bracket, aim, PROBES), rate, WIDTH, PROBES)
        partial_ptrs = partials_ptr + (n_rows * chunks + chunk) * (2 * PROBES) + tl.arange(0, PROBES)
        tl.store(partial_ptrs, counts)
        tl.store(partial_ptrs + PROBES, totals)


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
    """Last pass over rows of several chunks; a search that is still open goes on over the whole row."""
    rate = _wide(rate)
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    scores_ptr += row * scores_stride
    mask_ptr += row * mask_stride
    k = _load_k(k_ptr, row, k, HAS_K)

    bracket, aim, n_valid, passes = _next_state(
        state_ptr + row * STATE, partials_ptr + row * chunks * (2 * PROBES), chunks, k, eps, PROBES, SLOTS
    )
    while _searching(bracket, n_valid, k, eps):
        probes = _probes(bracket, aim, PROBES)
        counts = tl.zeros([PROBES], tl.float64)
        totals = tl.zeros([PROBES], tl.float64)
        for tile in range(chunks):
            columns = tile * (REPEATS * WIDTH) + _columns(REPEATS, WIDTH)
            scores = _load_scores(scores_ptr, mask_ptr, columns, n, HAS_MASK)
            tile_counts, tile_totals = _measure(scores, probes, rate, WIDTH, PROBES)
            counts += tile_counts
            totals += tile_totals
        bracket, aim = _refine(bracket, aim, probes, counts, totals, k, eps)
        passes += 1

    anchor, scale = _conclude(bracket, n_valid, k, eps)
    _store_solution(solution_ptr, row, anchor, scale, passes + 1, chunk == 0)
    columns = chunk * (REPEATS * WIDTH) + _columns(REPEATS, WIDTH)
    scores = _load_scores(scores_ptr, mask_ptr, columns, n, HAS_MASK)
    y, _ = _select(scores, anchor, scale, rate)
    tl.store(y_ptr + row * n + columns, y.to(y_ptr.dtype.element_ty), mask=columns < n)


@triton.jit
def _load_for_gradient(grad_ptr, scores_ptr, mask_ptr, solution_ptr, columns, n, rate, HAS_MASK: tl.constexpr):
    """Upstream gradient and y, both 0 at entries that pass no gradient on."""
    scores = _load_scores(scores_ptr, mask_ptr, columns, n, HAS_MASK)
    y, free = _select(scores, tl.load(solution_ptr), tl.load(solution_ptr + 1).to(tl.float32), rate)
    grad = tl.load(grad_ptr + columns, mask=free & (columns < n), other=0.0).to(tl.float32)
    return grad, tl.where(free, y, 0.0)


@triton.jit
def _gradient_sums_kernel(
    grad_ptr,  # rows n
    scores_ptr,  # rows n
    mask_ptr,  # rows n
    solution_ptr,  # rows 3, fp64
    sums_ptr,  # rows chunks 2, fp64
    grad_stride,
    scores_stride,
    mask_stride,
    n,
    chunks,
    rate: "fp64",
    REPEATS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Each chunk's part of sum g y and sum y."""
    rate = _wide(rate)
    row = (tl.program_id(0) // chunks).to(tl.int64)
    columns = (tl.program_id(0) % chunks) * (REPEATS * WIDTH) + _columns(REPEATS, WIDTH)
    grad, y = _load_for_gradient(
        grad_ptr + row * grad_stride, scores_ptr + row * scores_stride, mask_ptr + row * mask_stride,
        solution_ptr + row * 3, columns, n, rate, HAS_MASK,
    )  # fmt: skip
    weighted, total = _sum_pair(grad * y, y, WIDTH)
    tl.store(sums_ptr + tl.program_id(0) * 2, weighted)
    tl.store(sums_ptr + tl.program_id(0) * 2 + 1, total)


@triton.jit
def _gradient_kernel(
    grad_ptr,  # rows n
    scores_ptr,  # rows n
    mask_ptr,  # rows n
    solution_ptr,  # rows 3, fp64
    sums_ptr,  # rows chunks 2, fp64
    ds_ptr,  # rows n
    dk_ptr,  # rows, fp64
    grad_stride,
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
    """Gradient of one chunk of a row, which is the whole row where SLOTS is 1."""
    rate, inverse_eps = _wide(rate), _wide(inverse_eps)
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    columns = chunk * (REPEATS * WIDTH) + _columns(REPEATS, WIDTH)
    grad, y = _load_for_gradient(
        grad_ptr + row * grad_stride, scores_ptr + row * scores_stride, mask_ptr + row * mask_stride,
        solution_ptr + row * 3, columns, n, rate, HAS_MASK,
    )  # fmt: skip
    if SLOTS == 1:
        weighted, total = _sum_pair(grad * y, y, WIDTH)
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

    # Without an entry below 1 nothing depends on the scores or on k.
    mean = tl.where(total == 0, 0.0, _ratio(weighted, total))
    ds = (grad - mean) * y * inverse_eps.to(tl.float32)
    tl.store(ds_ptr + row * n + columns, ds.to(ds_ptr.dtype.element_ty), mask=columns < n)
    tl.store(dk_ptr + row, mean, mask=chunk == 0)


def _tile(entries: int) -> dict[str, int]:
    """Launch settings for a tile of at least `entries`: 16 entries a thread, 32 in the largest.

    The limit on registers is the one there is anyway: without it, ptxas spills some to fit more programs.
    """
    block = max(triton.next_power_of_2(entries), 128)
    num_warps = min(max(block // 512, 1), 16)
    return {
        "REPEATS": block // (128 * num_warps),
        "WIDTH": 128 * num_warps,
        "num_warps": num_warps,
        "maxnreg": min(2048 // num_warps, 255),
    }


def _launch_forward(
    scores: Tensor, mask: Tensor | None, k_rows: Tensor | None, k: float, eps: float, y: Tensor, solution: Tensor
) -> None:
    n_rows, n = scores.shape
    inputs = (scores, scores if mask is None else mask, scores if k_rows is None else k_rows)
    strides = (scores.stride(0), 0 if mask is None else mask.stride(0))
    numbers = (k, eps, math.log2(math.e) / eps)
    variant = {"HAS_MASK": mask is not None, "HAS_K": k_rows is not None}
    if n <= RESIDENT:
        _resident_kernel[(n_rows,)](
            *inputs, y, solution, *strides, n, *numbers, PROBES=RESIDENT_PROBES, **variant, **_tile(n)
        )
        return

    chunks = triton.cdiv(n, CHUNK)
    grid = (n_rows * chunks,)
    partials = scores.new_empty((SEARCHES + 1, n_rows, chunks, 2 * CHUNK_PROBES), dtype=torch.float64)
    states = scores.new_empty((SEARCHES + 1, n_rows, STATE.value), dtype=torch.float64)
    tile = _tile(CHUNK)
    settings = {"PROBES": CHUNK_PROBES, "SLOTS": min(triton.next_power_of_2(chunks), 128), **variant, **tile}

    _survey_kernel[grid](
        *inputs[:2], partials, *strides, n, chunks, PROBES=CHUNK_PROBES, HAS_MASK=mask is not None, **tile
    )
    for search in range(1, SEARCHES + 1):
        _search_kernel[grid](
            *inputs, partials, states, *strides, n_rows, n, chunks, *numbers, search, FIRST=search == 1, **settings
        )
    _finish_kernel[grid](*inputs, partials[-1], states[-1], y, solution, *strides, n, chunks, *numbers, **settings)


def _launch_backward(
    grad: Tensor, scores: Tensor, mask: Tensor | None, solution: Tensor, eps: float, ds: Tensor, dk: Tensor
) -> None:
    n_rows, n = scores.shape
    chunks = 1 if n <= RESIDENT else triton.cdiv(n, CHUNK)
    grid = (n_rows * chunks,)
    inputs = (grad, scores, scores if mask is None else mask, solution)
    strides = (grad.stride(0), scores.stride(0), 0 if mask is None else mask.stride(0))
    rate = math.log2(math.e) / eps
    settings = {"HAS_MASK": mask is not None, **_tile(min(n, CHUNK) if chunks > 1 else n)}

    sums = dk
    if chunks > 1:
        sums = scores.new_empty((n_rows, chunks, 2), dtype=torch.float64)
        _gradient_sums_kernel[grid](*inputs, sums, *strides, n, chunks, rate, **settings)
    slots = min(triton.next_power_of_2(chunks), 128)
    _gradient_kernel[grid](*inputs, sums, ds, dk, *strides, n, chunks, rate, 1.0 / eps, SLOTS=slots, **settings)


def _forward_in_pytorch(
    scores: Tensor, mask: Tensor | None, k_rows: Tensor | None, k: float, eps: float, y: Tensor, solution: Tensor
) -> None:
    """The same equation solved through the largest scores in order, of which the last at 1 is one."""
    n_rows, n = scores.shape
    s = _working_copy(scores, mask)
    wide_k = scores.new_full((n_rows, 1), k, dtype=torch.float64) if k_rows is None else k_rows.double()[:, None]
    wide_k = torch.where(wide_k > 0, wide_k, torch.nan)
    n_valid = mask.sum(dim=-1, keepdim=True) if mask is not None else n

    depth = n if k_rows is not None else min(math.ceil(k), n)
    ordered = s.topk(depth, dim=-1).values
    # The first score that cannot be at 1 lets no digit of those near it be lost.
    pivot = ordered.gather(-1, wide_k.nan_to_num().ceil().long().sub_(1).clamp_(min=0, max=depth - 1))
    exponents = (ordered.double() - pivot) / eps
    # What is not among the largest; they themselves contribute exactly 1 each.
    rest = (s - ordered[:, -1:]).div_(eps).clamp_(max=0.0).exp_().sum(dim=-1, keepdim=True, dtype=torch.float64) - depth
    rest = rest.clamp_(min=0.0).log_() + exponents[:, -1:]
    # log of the sum of exponentials over an entry and all below it
    tails = torch.cat([rest, exponents.flip(-1)], dim=-1).logcumsumexp(dim=-1)[:, 1:].flip(-1)
    larger = torch.arange(depth, device=scores.device)
    n_at_one = (torch.log((wide_k - larger).clamp(min=0.0)) + exponents > tails).cumprod(dim=-1).sum(-1, keepdim=True)

    # Where all entries are at 1 there is no next one.
    following = n_at_one.clamp(max=depth - 1)
    anchor = torch.where(wide_k < n_valid, ordered.double().gather(-1, following), torch.nan)
    anchor = torch.where((wide_k >= n_valid) & ~ordered[:, :1].isnan(), -torch.inf, anchor)
    scale = (wide_k - n_at_one) * torch.exp((exponents - tails).gather(-1, following))
    solution[:, 0], solution[:, 1], solution[:, 2] = anchor[:, 0], scale[:, 0], 1
    selected, at_one = _select_in_pytorch(s, solution, eps)
    selected.masked_fill_(at_one, 1.0)
    y.copy_(selected if mask is None else selected.masked_fill_(~mask, 0.0))


def _backward_in_pytorch(
    grad: Tensor, scores: Tensor, mask: Tensor | None, solution: Tensor, eps: float, ds: Tensor, dk: Tensor
) -> None:
    y, idle = _select_in_pytorch(_working_copy(scores, mask), solution, eps)
    idle = idle if mask is None else idle | ~mask
    y.masked_fill_(idle, 0.0)
    grad = grad.to(y.dtype).masked_fill(idle, 0.0)
    weighted = (grad * y).sum(dim=-1, dtype=torch.float64)
    total = y.sum(dim=-1, dtype=torch.float64)
    torch.div(weighted, total, out=dk).masked_fill_(total == 0, 0.0)
    ds.copy_(grad.sub_(dk[:, None].to(y.dtype)).mul_(y).div_(eps))


def _working_copy(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores in fp32 or fp64, with hidden ones below all others."""
    s = (scores if scores.dtype == torch.float64 else scores.float()).clamp(min=-LARGEST.value)
    return s if mask is None else s.masked_fill_(~mask, -LARGEST.value)


def _select_in_pytorch(s: Tensor, solution: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y of the entries that are not at 1, and which are."""
    anchor, scale = solution[:, :1].to(s.dtype), solution[:, 1:2].to(s.dtype)
    return (s - anchor).div_(eps).exp_().mul_(scale).clamp_(max=1.0), s > anchor


_library = torch.library.Library("colt5", "FRAGMENT")
_library.define("soft_topk(Tensor scores, Tensor? mask, Tensor? k_rows, float k, float eps) -> (Tensor, Tensor)")
_library.define(
    "soft_topk_backward(Tensor grad, Tensor scores, Tensor? mask, Tensor solution, float eps) -> (Tensor, Tensor)"
)


@torch.library.register_fake("colt5::soft_topk", lib=_library)
def _allocate(
    scores: Tensor, mask: Tensor | None, k_rows: Tensor | None, k: float, eps: float
) -> tuple[Tensor, Tensor]:
    """The output, and the solution of each row: anchor, scale, and how often the row was read, the output included."""
    return (
        torch.empty(scores.shape, dtype=scores.dtype, device=scores.device),
        torch.empty((scores.shape[0], 3), dtype=torch.float64, device=scores.device),
    )


def _forward(scores: Tensor, mask: Tensor | None, k_rows: Tensor | None, k: float, eps: float) -> tuple[Tensor, Tensor]:
    y, solution = _allocate(scores, mask, k_rows, k, eps)
    if scores.numel() > 0:
        solve = _launch_forward if _runs_kernel(scores) else _forward_in_pytorch
        solve(scores, mask, k_rows, k, eps, y, solution)
    return y, solution


@torch.library.register_fake("colt5::soft_topk_backward", lib=_library)
def _allocate_gradients(
    grad: Tensor, scores: Tensor, mask: Tensor | None, solution: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(scores.shape, dtype=scores.dtype, device=scores.device),
        torch.empty(scores.shape[0], dtype=torch.float64, device=scores.device),
    )


def _backward(grad: Tensor, scores: Tensor, mask: Tensor | None, solution: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    ds, dk = _allocate_gradients(grad, scores, mask, solution, eps)
    if scores.numel() > 0:
        differentiate = _launch_backward if _runs_kernel(scores) else _backward_in_pytorch
        differentiate(as_rows(grad), scores, mask, solution, eps, ds, dk)
    return ds, dk


def _runs_kernel(scores: Tensor) -> bool:
    """fp64 stays fp64, which the kernels are not."""
    return scores.dtype != torch.float64 and runs_triton(scores)


for _device in ("CPU", "CUDA"):
    _library.impl("soft_topk", _forward, _device)
    _library.impl("soft_topk_backward", _backward, _device)


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    scores, mask, k_rows, _, eps = inputs
    _, solution = output
    ctx.save_for_backward(scores, mask, solution)
    ctx.k_dtype = None if k_rows is None else k_rows.dtype
    ctx.eps = eps
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    ds, dk = torch.ops.colt5.soft_topk_backward(grad, *ctx.saved_tensors, ctx.eps)
    return ds, None, None if ctx.k_dtype is None else dk.to(ctx.k_dtype), None, None


def _refuse(ctx, *_: Tensor) -> None:
    raise NotImplementedError("kernels.soft_topk has no second derivative: use reference.soft_topk")


torch.library.register_autograd("colt5::soft_topk", _differentiate, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("colt5::soft_topk_backward", _refuse, lib=_library)


def soft_topk(scores: Tensor, *, k: float | Tensor, eps: float, mask: Tensor | None = None) -> Tensor:
    """`reference.soft_topk` in a few passes over each row, with the gradient of the implicit function.

    Where y < 1, ds_i = (y_i / eps) (g_i - sum g y / sum y), and dk = sum g y / sum y, both sums over y < 1 (DESIGN
    3.5). The backward pass needs the scores and three numbers a row. Results are bitwise equal from run to run. A CPU
    tensor, and any of fp64, is solved by PyTorch, through its largest scores in order.

    Args:
        scores: `... n`, any float dtype. Any strides.
        k: how many entries a row sums to. A number, or a tensor that broadcasts to `...`, one k a row; it has a
            gradient.
        eps: temperature, in units of the scores.
        mask: bool, broadcasts to `... n`; entries that are False take part in nothing and come out as 0.

    Returns:
        `... n`, in the dtype of the scores. A row with no more than k valid entries is 1 at each of them, with gradient
        0. A row with a NaN among its valid scores is NaN at its valid entries, and so is a row whose k (from a tensor)
        is not positive.

    Raises:
        ValueError: an argument is out of its range, or shapes do not match.
        NotImplementedError: a second derivative is asked for.
    """
    check_scores(scores, mask)
    check_k(k, scores)
    require(eps > 0, "eps", eps, "> 0")
    y, _ = torch.ops.colt5.soft_topk(
        as_rows(scores), mask_as_rows(mask, scores.shape), *k_as_rows(k, scores.shape), float(eps)
    )
    return y.view(scores.shape)
