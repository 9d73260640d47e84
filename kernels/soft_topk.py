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

SEARCHES = 4
"""Launches that search a longer row. What they leave open, the last launch finishes with every program on its own."""

RESIDENT_PROBES = 8
CHUNK_PROBES = 16
"""More probes, fewer passes: where a pass is a launch, it takes longer than the exponentials in it."""

LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))

LARGEST: tl.constexpr = tl.constexpr(3.0e38)
"""A bound on scores. Its negative stands for a score that takes no part: its exponential is 0."""

NARROW: tl.constexpr = tl.constexpr(2.0**-22)
"""Width of a bracket, in temperatures, at which fp32 tells no score in it from one at the kink."""

FAR: tl.constexpr = tl.constexpr(3000.0)
"""exp(8): at more than 8 temperatures from the solution, an anchor would cost the exponents some of their digits."""

STATE: tl.constexpr = tl.constexpr(16)
"""Room for the state of a search, of which eleven numbers are used."""


@triton.jit
def _load_k(k_ptr, row, k, HAS_K: tl.constexpr):
    """k of a row as fp64; NaN, and with it the row, where it is not positive."""
    k += tl.zeros((), tl.float64)
    if HAS_K:
        k = tl.load(k_ptr + row).to(tl.float64)
    return tl.where(k > 0, k, float("nan"))


@triton.jit
def _columns(REPEATS: tl.constexpr, WIDTH: tl.constexpr):
    """Column numbers of a tile, REPEATS x WIDTH, of which a thread holds four neighbours in each of the REPEATS."""
    return tl.arange(0, REPEATS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _load_scores(scores_ptr, mask_ptr, columns, n, HAS_MASK: tl.constexpr):
    """Scores as fp32, -LARGEST where there is none that takes part, and which take part: both REPEATS x WIDTH."""
    valid = columns < n
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr + columns, mask=valid, other=0) != 0)
    scores = tl.load(scores_ptr + columns, mask=valid, other=-float("inf")).to(tl.float32)
    return tl.where(scores < -LARGEST, -LARGEST, scores), valid


@triton.jit
def _add_pair(a, b, c, d):
    return a + c, b + d


@triton.jit
def _sum_in_thread(x, WIDTH: tl.constexpr):
    """One sum a thread of a tile, added up in fp32 and returned in fp64: WIDTH // 4."""
    return tl.sum(tl.reshape(tl.sum(x, axis=0), [WIDTH // 4, 4]), axis=1).to(tl.float64)


@triton.jit
def _sum_pair(x, y, WIDTH: tl.constexpr):
    """Sums of two tiles as fp64."""
    return tl.reduce((_sum_in_thread(x, WIDTH), _sum_in_thread(y, WIDTH)), 0, _add_pair)


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
def _survey(scores, valid, WIDTH: tl.constexpr):
    """Least and largest score, number, sum and sum of squares of a tile; the number is NaN where a score is."""
    least = tl.min(tl.min(tl.where(valid, scores, LARGEST), axis=0), axis=0).to(tl.float64)
    largest = tl.max(tl.max(scores, axis=0), axis=0).to(tl.float64)
    present = tl.where(valid, tl.where(scores == scores, 1.0, float("nan")), 0.0)
    known = tl.where(valid, scores, 0.0)
    total, squares = _sum_pair(known, known * known, WIDTH)
    return least, largest, tl.sum(_sum_in_thread(present, WIDTH), axis=0), total, squares


@triton.jit
def _open(least, largest, n_valid, total, squares, k, eps):
    """The bracket that holds for any scores, and a first aim that is good for normally distributed ones.

    F(v) lies between n exp((least - v) / e) and n exp((largest - v) / e), for v above the respective score.
    """
    share = (k / n_valid).to(tl.float32)
    rise = -eps * tl.log(share)
    low = _number(_key(tl.maximum(least + rise - eps, -LARGEST)) - 1)
    high = _number(_key(tl.minimum(largest + rise + eps, LARGEST)) + 1)

    # The normal quantile of Abramowitz and Stegun, 26.2.23.
    t = tl.sqrt(-2.0 * tl.log(tl.maximum(tl.minimum(share, 1.0 - share), 1e-12)))
    quantile = t - (2.515517 + t * (0.802853 + t * 0.010328)) / (
        1.0 + t * (1.432788 + t * (0.189269 + t * 0.001308))
    )
    mean = total / n_valid
    deviation = tl.sqrt(tl.maximum(squares / n_valid - mean * mean, 0.0))
    center = mean + deviation * tl.where(share < 0.5, quantile, -quantile)
    center = tl.minimum(tl.maximum(center, low), high)
    reach = tl.where(deviation < high - low, 4.0 * deviation, 0.0)
    # Until an end is evaluated, its sums say that F is k, or 0, there, which no estimate takes for a slope.
    return (low, n_valid, k - n_valid, high, 0.0 * k, 0.0 * k), (center, reach, center)


@triton.jit
def _probe(bracket, aim, probe, PROBES: tl.constexpr):
    """Where to evaluate F: an fp32 number strictly inside of the bracket, as fp64."""
    low, _, _, high, _, _ = bracket
    center, reach, newton = aim
    low_key, high_key = _key(low), _key(high)
    # Two probes close around `newton`, the others in pairs at 2**-2 to 2**-8 of the reach around the center.
    at_newton = probe >= PROBES - 2
    halvings = tl.where(at_newton, 20 - 10 * (probe % 2), 2 + probe // 2 * (24 // PROBES))
    step = reach * (1 - 2 * (probe % 2)) * tl.exp2(-halvings.to(tl.float64))
    aimed = tl.where(at_newton, newton, center) + step
    even = low_key + (high_key - low_key) * (probe + 1) // (PROBES + 1)
    key = tl.where(reach > 0, _key(aimed), even)
    return _number(tl.minimum(tl.maximum(key, low_key + 1), high_key - 1))


@triton.jit
def _measure(scores, probe, rate, WIDTH: tl.constexpr):
    """Number of scores of a tile above a probe, and the sum of the others' exponentials."""
    difference = scores - probe.to(tl.float32)
    above = difference > 0
    return _sum_pair(
        tl.where(above, 1.0, 0.0), tl.where(above, 0.0, _exp_over(difference, rate)), WIDTH
    )


@triton.jit
def _narrow(bracket, probe, count, total, k):
    """The bracket with a probe for one of its ends, if the probe is inside."""
    low, low_count, low_total, high, high_count, high_total = bracket
    inside = (probe > low) & (probe < high)
    below = inside & (count + total >= k)
    above = inside & (count + total < k)
    return (
        tl.where(below, probe, low),
        tl.where(below, count, low_count),
        tl.where(below, total, low_total),
        tl.where(above, probe, high),
        tl.where(above, count, high_count),
        tl.where(above, total, high_total),
    )


@triton.jit
def _log_ratio(x, y):
    """log(x / y) in fp32, as exact for x close to y as elsewhere; finite for x = 0."""
    excess = ((x - y) / y).to(tl.float32)
    return tl.where(tl.abs(excess) < 1e-3, excess, tl.log(tl.maximum(1.0 + excess, 1e-30)))


@triton.jit
def _aim(bracket, width, reach, k, eps):
    """Where to probe next, after a pass that began with a bracket of this width and an aim of this reach."""
    low, low_count, low_total, high, high_count, high_total = bracket
    # With the entries above an end at 1, the solution is here: never too low, and exact if no score is in between.
    from_low = low + eps * tl.log((low_total / (k - low_count)).to(tl.float32))
    from_high = high + eps * tl.log((high_total / (k - high_count)).to(tl.float32))
    newton = tl.minimum(tl.where(low_count < k, from_low, high), tl.where(high_total > 0, from_high, high))
    newton = tl.minimum(newton, high)

    # log F between the ends, taken for a straight line; it falls no faster than with a slope of 1 / e.
    above, below = _log_ratio(low_count + low_total, k), _log_ratio(high_count + high_total, k)
    known = (above > 0) & (high_count + high_total > 0)
    center = low + (high - low) * tl.where(known, above / (above - below), 0.5)
    center = tl.minimum(tl.maximum(center, low + eps * above), newton)
    gained = (4.0 * (high - low) < width) | (reach == 0)
    return center, tl.where(gained, high - low, 0.0), newton


@triton.jit
def _settle(bracket, k, eps):
    """Whether the bracket identifies the entries at 1; they are those above the anchor; and the scale of the others."""
    low, low_count, low_total, high, high_count, high_total = bracket
    adjacent = _key(high) - _key(low) <= 1
    empty = low_count == high_count
    at_low = adjacent | empty
    anchor = tl.where(at_low, low, high)
    scale = tl.where(at_low, (k - low_count) / low_total, (k - high_count) / high_total)
    near = (scale < FAR) & (scale * FAR > 1)
    return adjacent | (near & (empty | (high - low <= NARROW * eps))), anchor, scale


@triton.jit
def _conclude(bracket, n_valid, k, eps):
    """Anchor and scale of a row; without an equation to solve, all its entries are above the anchor, or NaN."""
    _, anchor, scale = _settle(bracket, k, eps)
    return tl.where(k < n_valid, anchor, tl.where(k >= n_valid, -float("inf"), float("nan"))), scale


@triton.jit
def _select(scores, anchor, scale, rate):
    """y of a tile, and which of its entries are at 1."""
    anchor = anchor.to(tl.float32)
    at_one = scores > anchor
    y = _exp_over(scores - anchor, rate) * scale.to(tl.float32)
    return tl.where(at_one | (y > 1), 1.0, y), at_one


@triton.jit
def _store_solution(solution_ptr, row, anchor, scale, passes, wanted):
    tl.store(solution_ptr + row * 3, anchor, mask=wanted)
    tl.store(solution_ptr + row * 3 + 1, scale, mask=wanted)
    tl.store(solution_ptr + row * 3 + 2, passes, mask=wanted)


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
    row = tl.program_id(0).to(tl.int64)
    columns = _columns(REPEATS, WIDTH)
    scores, valid = _load_scores(
        scores_ptr + row * scores_stride, mask_ptr + row * mask_stride, columns, n, HAS_MASK
    )
    k = _load_k(k_ptr, row, k, HAS_K)

    least, largest, n_valid, total, squares = _survey(scores, valid, WIDTH)
    bracket, aim = _open(least, largest, n_valid, total, squares, k, eps)
    passes = 1
    searching = k < n_valid
    while searching:
        narrowed = bracket
        for probe in range(PROBES):
            at = _probe(bracket, aim, probe, PROBES)
            count, total = _measure(scores, at, rate, WIDTH)
            narrowed = _narrow(narrowed, at, count, total, k)
        aim = _aim(narrowed, bracket[3] - bracket[0], aim[1], k, eps)
        bracket = narrowed
        settled, _, _ = _settle(bracket, k, eps)
        searching = settled == 0
        passes += 1

    anchor, scale = _conclude(bracket, n_valid, k, eps)
    _store_solution(solution_ptr, row, anchor, scale, passes + 1, True)
    y, _ = _select(scores, anchor, scale, rate)
    y = tl.where(valid, y, 0.0)
    tl.store(y_ptr + row * n + columns, y.to(y_ptr.dtype.element_ty), mask=columns < n)
