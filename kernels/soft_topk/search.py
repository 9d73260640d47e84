"""Parts of the search of `kernels.soft_topk`: surveys, probes and brackets of one row."""

import triton
import triton.language as tl

UNIT: tl.constexpr = tl.constexpr(0.25)
"""Factor of scores, and of the temperature, in the kernel. It prevents overflow of the difference of two scores. A
power of two causes no rounding."""

LARGEST: tl.constexpr = tl.constexpr(8.6e37)
"""Bound on scores."""

HIDDEN: tl.constexpr = tl.constexpr(-1e38)
"""Stands for a score that takes no part: it is below every other, its exponential is 0, and it is finite."""

NARROW: tl.constexpr = tl.constexpr(2.0**-22)
"""Width of a bracket, in temperatures, in which fp32 cannot distinguish a score from one at the kink."""

FAR: tl.constexpr = tl.constexpr(3000.0)
"""exp(8): at more than 8 temperatures from the solution, an anchor would reduce the precision of the exponents."""

STATE: tl.constexpr = tl.constexpr(16)
"""Size of the state of a search, which uses eleven numbers."""


@triton.jit
def wide(x):
    """A number as an fp64 tensor, because an argument is not a tensor in the interpreter."""
    return x + tl.zeros((), tl.float64)


@triton.jit
def load_k(k_ptr, row, k, HAS_K: tl.constexpr):
    """k of a row as fp64. It is NaN, and makes the row NaN, if it is not positive."""
    k = tl.load(k_ptr + row).to(tl.float64) if HAS_K else wide(k)
    return tl.where(k > 0, k, float("nan"))


@triton.jit
def ratio_of(x, y):
    """x / y of fp64 numbers in fp32: an fp64 division is a function call, around which registers are spilled."""
    return x.to(tl.float32) / y.to(tl.float32)


@triton.jit
def columns_of(REPEATS: tl.constexpr, WIDTH: tl.constexpr):
    """Column numbers of a tile, REPEATS x WIDTH; a thread has four neighbours in each of the REPEATS."""
    return tl.arange(0, REPEATS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def load_scores(scores_ptr, mask_ptr, columns, n, HAS_MASK: tl.constexpr):
    """Scores as fp32 in UNITs, HIDDEN for entries that take no part: REPEATS x WIDTH."""
    valid = columns < n
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr + columns, mask=valid, other=0) != 0)
    scores = tl.load(scores_ptr + columns, mask=valid, other=0.0).to(tl.float32) * UNIT
    return tl.where(valid, tl.where(scores < HIDDEN, HIDDEN, scores), HIDDEN)


@triton.jit
def sum_pair(x, y, WIDTH: tl.constexpr):
    """Sums of two tiles as fp64, with one exchange between threads. A thread adds up its own entries in fp32."""
    pair = tl.reshape(tl.join(tl.sum(x, axis=0), tl.sum(y, axis=0)), [WIDTH // 4, 4, 2])
    return tl.split(tl.sum(tl.sum(pair, axis=1).to(tl.float64), axis=0))


@triton.jit
def _exp_over(difference, rate):
    """exp(difference / eps) of an fp32 tile. The rate, log2(e) / eps, is fp64, because rounding it to fp32 would be a
    bias."""
    high = rate.to(tl.float32)
    low = (rate - high.to(tl.float64)).to(tl.float32)
    return tl.exp2(difference * high + difference * low)


@triton.jit
def _key(x):
    """Position of an fp64 number, rounded to fp32, among all fp32 numbers: int64 in the order of the numbers."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -2147483648 - bits, bits)


@triton.jit
def _number(key):
    """The fp32 number at a position, as fp64."""
    bits = tl.where(key < 0, -2147483648 - key, key)
    return bits.to(tl.int32).to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def survey(scores, WIDTH: tl.constexpr):
    """Least and largest score, number, sum and sum of squares of a tile. The number is NaN if a score is NaN or
    +inf."""
    hidden = scores < -LARGEST
    least = tl.min(tl.min(tl.where(hidden, LARGEST, scores), axis=0), axis=0).to(tl.float64)
    largest = tl.max(tl.max(scores, axis=0), axis=0).to(tl.float64)
    present = tl.where(hidden, 0.0, tl.where(scores < float("inf"), 1.0, float("nan")))
    known = tl.where(hidden, 0.0, scores)
    n_valid, total = sum_pair(present, known, WIDTH)
    # A bare product would be fused with the addition of another lane's sum, and lanes would get different sums. They
    # have to agree on all numbers that a search depends on.
    squares = tl.sum(tl.sum(tl.where(hidden, 0.0, scores * scores), axis=0).to(tl.float64), axis=0)
    return least, largest, n_valid, total, squares


@triton.jit
def open_bracket(least, largest, n_valid, total, squares, k, eps):
    """A bracket that is valid for any scores, and a first aim that is good for normally distributed ones.

    F(v) is between n exp((least - v) / e) and n exp((largest - v) / e), for v above the respective score.
    """
    share = ratio_of(k, n_valid)
    rise = -eps * tl.log(share)
    low = _number(_key(tl.maximum(least + rise - eps, -LARGEST)) - 1)
    high = _number(_key(tl.minimum(largest + rise + eps, LARGEST)) + 1)

    # The normal quantile of Abramowitz and Stegun, 26.2.23.
    t = tl.sqrt(-2.0 * tl.log(tl.maximum(tl.minimum(share, 1.0 - share), 1e-12)))
    quantile = t - (2.515517 + t * (0.802853 + t * 0.010328)) / (1.0 + t * (1.432788 + t * (0.189269 + t * 0.001308)))
    mean = ratio_of(total, n_valid).to(tl.float64)
    variance = ratio_of(squares - mean * total, n_valid)
    deviation = tl.sqrt(tl.maximum(variance, 0.0)).to(tl.float64)
    center = mean + deviation * tl.where(share < 0.5, quantile, -quantile)
    center = tl.minimum(tl.maximum(center, low), high)
    reach = tl.where(deviation < high - low, 4.0 * deviation, 0.0)
    # Before an end is evaluated, its sums give F = k or F = 0 there. No estimate uses these as a slope.
    return (low, n_valid, k - n_valid, high, 0.0 * k, 0.0 * k), (center, reach, center)


@triton.jit
def place_probes(bracket, aim, PROBES: tl.constexpr):
    """Points at which to evaluate F: PROBES fp32 numbers strictly inside of the bracket, as fp64."""
    low, _, _, high, _, _ = bracket
    center, reach, newton = aim
    low_key, high_key = _key(low), _key(high)
    probe = tl.arange(0, PROBES)
    # Two probes are close to `newton`, the others in pairs at 2**-2 to 2**-8 of the reach around the center.
    at_newton = probe >= PROBES - 2
    halvings = tl.where(at_newton, 20 - 10 * (probe % 2), 2 + probe // 2 * (24 // PROBES))
    step = reach * (1 - 2 * (probe % 2)) * tl.exp2(-halvings.to(tl.float32))
    aimed = tl.where(at_newton, newton, center) + step
    even = low_key + (high_key - low_key) * (probe + 1) // (PROBES + 1)
    key = tl.where(reach > 0, _key(aimed), even)
    return _number(tl.minimum(tl.maximum(key, low_key + 1), high_key - 1))


@triton.jit
def measure(scores, probes, rate, WIDTH: tl.constexpr, PROBES: tl.constexpr):
    """Number of scores of a tile above each probe, and sum of the exponentials of the others, both PROBES."""
    place = tl.arange(0, PROBES)
    counts = tl.zeros([PROBES], tl.float64)
    totals = tl.zeros([PROBES], tl.float64)
    for i in range(PROBES):
        probe = tl.sum(tl.where(place == i, probes, 0.0), axis=0)
        difference = scores - probe.to(tl.float32)
        above = difference > 0
        count, total = sum_pair(tl.where(above, 1.0, 0.0), tl.where(above, 0.0, _exp_over(difference, rate)), WIDTH)
        counts = tl.where(place == i, count, counts)
        totals = tl.where(place == i, total, totals)
    return counts, totals


@triton.jit
def _log_ratio(x, y):
    """log(x / y) in fp32, with full precision also for x close to y; finite for x = 0."""
    excess = ratio_of(x - y, y)
    return tl.where(tl.abs(excess) < 1e-3, excess, tl.log(tl.maximum(1.0 + excess, 1e-30)))


@triton.jit
def refine(bracket, aim, probes, counts, totals, k, eps):
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

    # The solution if the entries above an end are those at 1. It is never too low, and exact if no score is in between.
    from_low = low + eps * tl.log(ratio_of(low_total, k - low_count))
    from_high = high + eps * tl.log(ratio_of(high_total, k - high_count))
    newton = tl.minimum(tl.where(low_count < k, from_low, high), tl.where(high_total > 0, from_high, high))
    newton = tl.minimum(newton, high)

    # log F is interpolated linearly between the ends, but falls no faster than with a slope of 1 / e.
    above, below = _log_ratio(low_count + low_total, k), _log_ratio(high_count + high_total, k)
    known = (above > 0) & (high_count + high_total > 0)
    center = low + (high - low) * tl.where(known, above / (above - below), 0.5)
    center = tl.minimum(tl.maximum(center, low + eps * above), newton)
    gained = (4.0 * (high - low) < width) | (reach == 0)
    bracket = (low, low_count, low_total, high, high_count, high_total)
    return bracket, (center, tl.where(gained, high - low, 0.0), newton)


@triton.jit
def _settle(bracket, k, eps):
    """True if the bracket identifies the entries at 1, which are those above the anchor. Then the scale of the
    others."""
    low, low_count, low_total, high, high_count, high_total = bracket
    adjacent = _key(high) - _key(low) <= 1
    empty = low_count == high_count
    at_low = adjacent | empty
    anchor = tl.where(at_low, low, high)
    scale = ratio_of(k - tl.where(at_low, low_count, high_count), tl.where(at_low, low_total, high_total))
    near = (scale < FAR) & (scale * FAR > 1)
    return adjacent | (near & (empty | (high - low <= NARROW * eps))), anchor, scale


@triton.jit
def is_searching(bracket, n_valid, k, eps):
    """True if the equation of a row exists and is not solved yet. With a NaN among its numbers a row has none."""
    settled, _, _ = _settle(bracket, k, eps)
    return (k < n_valid) & (settled == 0)


@triton.jit
def conclude(bracket, n_valid, k, eps):
    """Anchor and scale of a row. Without an equation to solve, all its entries are above the anchor, or NaN."""
    _, anchor, scale = _settle(bracket, k, eps)
    return tl.where(k < n_valid, anchor, tl.where(k >= n_valid, -float("inf"), float("nan"))), scale


@triton.jit
def select(scores, anchor, scale, rate):
    """y of a tile, and a mask of the entries that are below 1 and not hidden."""
    anchor = anchor.to(tl.float32)
    at_one = scores > anchor
    y = _exp_over(scores - anchor, rate) * scale
    y = tl.where(at_one | (y > 1), 1.0, y)
    hidden = scores < -LARGEST
    return tl.where(hidden, 0.0, y), (at_one | hidden) == 0


@triton.jit
def store_survey(partials_ptr, least, largest, n_valid, total, squares):
    tl.store(partials_ptr, least)
    tl.store(partials_ptr + 1, largest)
    tl.store(partials_ptr + 2, n_valid)
    tl.store(partials_ptr + 3, total)
    tl.store(partials_ptr + 4, squares)


@triton.jit
def store_partials(partials_ptr, counts, totals, PROBES: tl.constexpr):
    """Counts and totals of a chunk."""
    probe = tl.arange(0, PROBES)
    tl.store(partials_ptr + probe, counts)
    tl.store(partials_ptr + PROBES + probe, totals)


@triton.jit
def store_solution(solution_ptr, row, anchor, scale, passes, wanted):
    tl.store(solution_ptr + row * 3, anchor, mask=wanted)
    tl.store(solution_ptr + row * 3 + 1, scale, mask=wanted)
    tl.store(solution_ptr + row * 3 + 2, passes, mask=wanted)


@triton.jit
def store_state(state_ptr, bracket, aim, n_valid, passes, wanted):
    for i in tl.static_range(6):
        tl.store(state_ptr + i, bracket[i], mask=wanted)
    for i in tl.static_range(3):
        tl.store(state_ptr + 6 + i, aim[i], mask=wanted)
    tl.store(state_ptr + 9, n_valid, mask=wanted)
    tl.store(state_ptr + 10, passes, mask=wanted)


@triton.jit
def first_state(partials_ptr, chunks, k, eps, PROBES: tl.constexpr, SLOTS: tl.constexpr):
    """State of a search after the survey of all chunks. Programs that write it may still run, so it is read from the L2
    cache."""
    least = tl.full([SLOTS], LARGEST, tl.float64)
    largest = tl.full([SLOTS], -LARGEST, tl.float64)
    n_valid = tl.zeros([SLOTS], tl.float64)
    total = tl.zeros([SLOTS], tl.float64)
    squares = tl.zeros([SLOTS], tl.float64)
    for start in range(0, chunks, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        present = slot < chunks
        slot_ptrs = partials_ptr + slot * (2 * PROBES)
        least = tl.minimum(least, tl.load(slot_ptrs, mask=present, other=LARGEST, cache_modifier=".cg"))
        largest = tl.maximum(largest, tl.load(slot_ptrs + 1, mask=present, other=-LARGEST, cache_modifier=".cg"))
        n_valid += tl.load(slot_ptrs + 2, mask=present, other=0.0, cache_modifier=".cg")
        total += tl.load(slot_ptrs + 3, mask=present, other=0.0, cache_modifier=".cg")
        squares += tl.load(slot_ptrs + 4, mask=present, other=0.0, cache_modifier=".cg")
    n_valid = tl.sum(n_valid, axis=0)
    bracket, aim = open_bracket(
        tl.min(least, axis=0), tl.max(largest, axis=0), n_valid, tl.sum(total, axis=0), tl.sum(squares, axis=0), k, eps
    )
    return bracket, aim, n_valid, wide(1.0)


@triton.jit
def sum_partials(partials_ptr, chunks, PROBES: tl.constexpr, SLOTS: tl.constexpr):
    """Counts and totals of all chunks in order. Programs that write them may still run, so they are read from the L2
    cache."""
    counts = tl.zeros([PROBES], tl.float64)
    totals = tl.zeros([PROBES], tl.float64)
    for start in range(0, chunks, SLOTS):
        slot = start + tl.arange(0, SLOTS)[:, None]
        partial_ptrs = partials_ptr + slot * (2 * PROBES) + tl.arange(0, PROBES)[None, :]
        counts += tl.sum(tl.load(partial_ptrs, mask=slot < chunks, other=0.0, cache_modifier=".cg"), axis=0)
        totals += tl.sum(tl.load(partial_ptrs + PROBES, mask=slot < chunks, other=0.0, cache_modifier=".cg"), axis=0)
    return counts, totals


@triton.jit
def next_state(state_ptr, partials_ptr, chunks, k, eps, PROBES: tl.constexpr, SLOTS: tl.constexpr):
    """State of a search after a pass over all chunks; a finished search does not change."""
    bracket = (
        tl.load(state_ptr), tl.load(state_ptr + 1), tl.load(state_ptr + 2),
        tl.load(state_ptr + 3), tl.load(state_ptr + 4), tl.load(state_ptr + 5),
    )  # fmt: skip
    aim = (tl.load(state_ptr + 6), tl.load(state_ptr + 7), tl.load(state_ptr + 8))
    n_valid = tl.load(state_ptr + 9)
    passes = tl.load(state_ptr + 10)
    if is_searching(bracket, n_valid, k, eps):
        counts, totals = sum_partials(partials_ptr, chunks, PROBES, SLOTS)
        bracket, aim = refine(bracket, aim, place_probes(bracket, aim, PROBES), counts, totals, k, eps)
        passes += 1
    return bracket, aim, n_valid, passes
