"""Functions that two or more kernels share.

Scores are in registers as a tile of REPEATS x ROWS x WIDTH, where WIDTH is four entries per thread. A thread adds up
its own entries of a row in fp32 without communication, and contributes one number to the wider sum of the row. Short
rows share a warp, so that computations per row are done for ROWS of them at a time.
"""

import triton
import triton.language as tl

from kernels._common import tensors

INTERPRETED: tl.constexpr = tl.constexpr(tensors.INTERPRETED)

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)

EXP2_LACKS: tl.constexpr = tl.constexpr(0.0 if tensors.INTERPRETED else 3.5e-8)
"""Mean error by which `exp2` is too small, relative to its result. Rounding errors cancel in a sum, but this bias does
not: at a warm temperature it would shift the thresholds of all later iterations. A test measures it."""


@triton.jit
def tile_columns(REPEATS: tl.constexpr, WIDTH: tl.constexpr):
    """Column numbers of a tile: REPEATS x 1 x WIDTH."""
    return (tl.arange(0, REPEATS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])[:, None, :]


@triton.jit
def per_row(x):
    """A number per row in the shape that broadcasts to a tile: 1 x ROWS x 1."""
    return x[None, :, None]


@triton.jit
def tile_pointers(ptr, rows, columns, stride):
    """Pointers to a tile of a matrix `rows n` whose last stride is 1."""
    # A thread gets four neighbours for any size of an entry. Otherwise it would load up to sixteen entries of a mask at
    # once, and each tile that is combined with the mask would go through shared memory. In the other two directions,
    # which have no neighbours, a warp is to be spread over rows, not over repeats, as Triton 3.6 would do.
    ROWS_FIRST: tl.constexpr = 2 if rows.shape[0] > 1 else 1
    return tl.max_contiguous(ptr + per_row(rows) * stride + columns, [1, ROWS_FIRST, 4])


@triton.jit
def opaque(x):
    """int64 x, hidden from the compiler, so that it does not precompute values that depend on x."""
    if INTERPRETED:
        return x
    return tl.inline_asm_elementwise("mov.b64 $0, $1;", "=l,l", [x], tl.int64, is_pure=False, pack=1)


@triton.jit
def load_tile(
    scores_ptr,
    mask_ptr,
    rows,
    columns,
    scores_stride,
    mask_stride,
    n_rows,
    n,
    HAS_MASK: tl.constexpr,
    AGAIN: tl.constexpr = False,
):
    """Scores as fp32, -inf for entries that take no part: REPEATS x ROWS x WIDTH.

    Loads with AGAIN come from the L2 cache. Without it, the compiler would see the repeated load and keep the entries
    in registers.
    """
    CACHE: tl.constexpr = ".cg" if AGAIN else ""
    if AGAIN:
        rows = opaque(rows)
    exists = (per_row(rows) < n_rows) & (columns < n)
    score_ptrs = tile_pointers(scores_ptr, rows, columns, scores_stride)
    scores = tl.load(score_ptrs, mask=exists, other=-float("inf"), cache_modifier=CACHE).to(tl.float32)
    if HAS_MASK:
        # Masked entries are loaded, too. To skip them, entries would be loaded one by one in another layout, and each
        # tile that is combined with this one would go through shared memory.
        mask_ptrs = tile_pointers(mask_ptr, rows, columns, mask_stride)
        taking_part = tl.load(mask_ptrs, mask=exists, other=0, cache_modifier=CACHE) != 0
        scores = tl.where(taking_part, scores, -float("inf"))
    return scores


@triton.jit
def load_k(k_ptr, rows, k, n_rows, HAS_K: tl.constexpr):
    """k of each row as fp64. It is NaN, and makes the row NaN, if it is not positive."""
    k += tl.zeros([rows.shape[0]], tl.float64)
    if HAS_K:
        k = tl.load(k_ptr + rows, mask=rows < n_rows, other=1.0).to(tl.float64)
    return tl.where(k > 0, k, float("nan"))


@triton.jit
def sum_in_thread(x, REPEATS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """One sum per thread and row of a tile: ROWS x WIDTH // 4, fp64.

    In fp32, four entries are added at a time: a longer fp32 sum has a larger rounding error. Only the result becomes
    fp64, because a conversion takes as long as an exponential.
    """
    if REPEATS >= 8:
        x = tl.sum(tl.reshape(x, [REPEATS // 4, 4, ROWS, WIDTH]), axis=1)
    columns = tl.sum(x, axis=0)
    return tl.sum(tl.reshape(columns, [ROWS, WIDTH // 4, 4]), axis=2).to(tl.float64)


@triton.jit
def larger_or_nan(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def max_or_nan(x, axis: tl.constexpr):
    """Max along an axis, NaN if an entry is NaN. It takes as many instructions as a max that ignores NaN."""
    if INTERPRETED:
        # The interpreter calls a Python function for each pair of numbers.
        return tl.where(tl.max((x != x).to(tl.int32), axis=axis) > 0, float("nan"), tl.max(x, axis=axis))
    return tl.reduce(x, axis, larger_or_nan)


@triton.jit
def highest_in_thread(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Largest entry of a thread and row of a tile, NaN if an entry is NaN: ROWS x WIDTH // 4."""
    return max_or_nan(tl.reshape(max_or_nan(x, 0), [ROWS, WIDTH // 4, 4]), 2)


@triton.jit
def is_above(x, threshold):
    """1.0 if x is above the threshold, else 0.0: one instruction, while a comparison and a selection are two."""
    if INTERPRETED:
        return tl.where(x > threshold, 1.0, 0.0)
    return tl.inline_asm_elementwise(
        "set.gt.f32.f32 $0, $1, $2;", "=f,f,f", [x, threshold], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def count_in_thread(ones, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Sum of the ones and zeros of a thread and row of a tile: ROWS x WIDTH // 4, int32."""
    columns = tl.sum(ones, axis=0)
    count = tl.sum(tl.reshape(columns, [ROWS, WIDTH // 4, 4]), axis=2)
    return (count + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000  # 2**23, where fp32 has steps of 1


@triton.jit
def sum_and_count(x, ones, REPEATS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """fp64 sum of each row of x, and of each row of ones and zeros, 0 unless COUNT. Entries of x are in [0, 1], so one
    reduction computes both.

    The two numbers of a thread form one integer: the count is above the sum, which is in steps of 2**-31 and has room
    for tiles of up to 2**15 entries. A sum of integers is the same in any order. Conversions from and to fp64 use an
    addition that leaves the integer in the lowest bits, because a conversion instruction takes several times as long.
    """
    steps = sum_in_thread(x, REPEATS, ROWS, WIDTH) + 3145728.0  # 1.5 * 2**21, where fp64 has steps of 2**-31
    both = steps.to(tl.int64, bitcast=True) - 0x4148000000000000
    if COUNT:
        both += count_in_thread(ones, ROWS, WIDTH).to(tl.int64) << 47
    both = tl.sum(both, axis=1)
    return integer_as_fp64(both & 0x7FFFFFFFFFFF) * (1.0 / 2147483648.0), integer_as_fp64(both >> 47)


@triton.jit
def integer_as_fp64(x):
    """int64 x as fp64, for x from -2**51 to 2**51."""
    return (x + 0x4338000000000000).to(tl.float64, bitcast=True) - 6755399441055744.0  # 1.5 * 2**52


@triton.jit
def inverse(x):
    """1 / x for a positive normal fp64 x whose inverse is normal, to 1e-12."""
    if INTERPRETED:
        return 1.0 / x
    estimate = tl.inline_asm_elementwise("rcp.approx.ftz.f64 $0, $1;", "=d,d", [x], tl.float64, is_pure=True, pack=1)
    return estimate + estimate * (1.0 - x * estimate)


@triton.jit
def log2_e_over(temperature):
    """The factor that turns an exponent over a temperature into an exponent of 2, for `exponent_line`."""
    return inverse(temperature) * LOG2_E


@triton.jit
def exp2(x):
    """2**x for fp32 x, with results below 2**-126 as 0: one instruction, while exact small results take four."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def clip_scaled(x, scale):
    """min(x * scale, 1) for x >= 0, and 0 for NaN: one instruction."""
    if INTERPRETED:
        return tl.minimum(x * scale, 1.0)
    return tl.inline_asm_elementwise(
        "mul.ftz.sat.f32 $0, $1, $2;", "=f,f,f", [x, scale], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def nearest_fp32(x):
    """Round fp64 x to the 24 bits of an fp32, still as fp64. Integer operations are cheaper here than a conversion."""
    bits = x.to(tl.int64, bitcast=True)
    return ((bits + 0x10000000) & -0x20000000).to(tl.float64, bitcast=True)


@triton.jit
def clip_enlarged(x, more):
    """min(x + x * more, 1) for x >= 0, including infinity, and more > 0; 0 for NaN. It is one instruction with one
    rounding per entry: a rounded factor 1 + more would shift a whole row."""
    if INTERPRETED:
        return tl.minimum((x.to(tl.float64) * (1.0 + more.to(tl.float64))).to(tl.float32), 1.0)
    return tl.inline_asm_elementwise(
        "fma.rn.ftz.sat.f32 $0, $1, $2, $1;", "=f,f,f", [x, more], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def exp2_minus_1(x):
    """2**x - 1 as fp32 for fp64 x from 0 to 1, with a relative error of at most 2**-20, and never 0."""
    x = (x * 0.34657359027997264).to(tl.float32) + 1e-30
    half = x * (1.0 + x * (0.5 + x * (0.16666667 + x * (0.041666668 + x * (0.008333334 + x * 0.0013888889)))))
    return half * (half + 2.0)


@triton.jit
def lower_fp32(x):
    """The largest fp32 number that is not above fp64 x, still as fp64."""
    bits = x.to(tl.int64, bitcast=True)
    return ((bits + ((bits >> 63) & 0x1FFFFFFF)) & -0x20000000).to(tl.float64, bitcast=True)


@triton.jit
def split(x):
    """An fp64 number as an unevaluated sum of two fp32."""
    high = nearest_fp32(x)
    return high.to(tl.float32), (x - high).to(tl.float32)


@triton.jit
def exponent_line(threshold, factor):
    """The exponent (s - threshold) * factor as an fp32 line slope * s + offset. The last result, in fp64, is the error
    of the offset.

    Threshold and factor, per row, are fp64. One fused multiply-add evaluates the line with a single rounding of the
    exponent, however far from zero scores are. The rounding error of the slope grows with the exponent, like that
    rounding, and is negligible where the exponential counts. The error of the offset is never negative. It shifts all
    exponents of a row in the same direction, and so the next threshold; therefore it must go into the scale of the
    exponentials.
    """
    slope = nearest_fp32(factor)
    offset = -threshold * slope
    lower = lower_fp32(offset)
    return slope.to(tl.float32), lower.to(tl.float32), offset - lower


@triton.jit
def exp2_line(scores, slope, offset):
    """2**(slope * s + offset) for fp32 scores and one offset per row."""
    if INTERPRETED:
        # The interpreter has no fused operation.
        return exp2((scores.to(tl.float64) * slope + per_row(offset)).to(tl.float32))
    return exp2(tl.fma(scores, slope, per_row(offset)))


@triton.jit
def fma_if_at_most(x, factor, y, scores, limit):
    """x + factor * y if scores are at most the limit, else x. These are two instructions; a selection would make
    three."""
    if INTERPRETED:
        return tl.where(scores <= limit, x + factor * y, x)
    return tl.inline_asm_elementwise(
        """{
        .reg .pred at_most;
        setp.le.f32 at_most, $4, $5;
        @at_most fma.rn.f32 $0, $2, $3, $1;
        @!at_most mov.f32 $0, $1;
        }""",
        "=f,f,f,f,f,f",
        [x, factor, y, scores, limit],
        tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def exp2_wide(x):
    """2**x as fp32 for fp64 x. The result is corrected for the rounding of x to fp32."""
    high, low = split(x)
    power = exp2(high)
    return tl.fma(power, low * 0.6931471805599453, power)


@triton.jit
def log_normal(x):
    """Natural logarithm of a positive normal fp64 number, to 2e-11.

    x = m 2**e with m in [sqrt(1/2), sqrt(2)), and log m = 2 artanh(z) with z = (m - 1) / (m + 1), for which six terms
    are enough. It takes a fraction of the instructions of the library function, which every thread of a program would
    run.
    """
    bits = x.to(tl.int64, bitcast=True)
    exponent = (bits - 0x3FE6A09E667F3BCD) >> 52
    mantissa = (bits - (exponent << 52)).to(tl.float64, bitcast=True)
    z = (mantissa - 1.0) * inverse(mantissa + 1.0)
    square = z * z
    # Terms are added in pairs, not one by one, because the next iteration waits for the result.
    low = 1.0 + square * (1.0 / 3.0)
    middle = (1.0 / 5.0) + square * (1.0 / 7.0)
    high = (1.0 / 9.0) + square * (1.0 / 11.0)
    fourth = square * square
    series = low + fourth * (middle + fourth * high)
    return integer_as_fp64(exponent) * 0.6931471805599453 + 2.0 * z * series


@triton.jit
def round_down(x):
    """The largest fp32 number that is not above fp64 x. It compares with fp32 scores as x does."""
    if not INTERPRETED:
        return tl.inline_asm_elementwise("cvt.rm.f32.f64 $0, $1;", "=f,d", [x], tl.float32, is_pure=True, pack=1)
    nearest = x.to(tl.float32)
    bits = nearest.to(tl.int32, bitcast=True)
    below = tl.where(nearest > 0, bits - 1, bits + 1).to(tl.float32, bitcast=True)
    below = tl.where(nearest == 0, -1.1754943508222875e-38, below)
    return tl.where(nearest.to(tl.float64) > x, below, nearest)


def slots_for(programs: int, num_warps: int) -> int:
    """Number of slots of `exchange`: enough for each thread of a program to read its own words."""
    return max(triton.next_power_of_2(programs), 32 * num_warps // 4)


@triton.jit
def exchange(mailbox_ptr, step, part, first, second, third, PROGRAMS: tl.constexpr, SLOTS: tl.constexpr):
    """Send three fp32 numbers to all PROGRAMS programs of a row, and receive theirs. The result is SLOTS x 4, of which
    3 are used.

    Every word has the number of the step in its upper half and is written by one 64-bit store, so a reader sees from
    the word itself that it has arrived: no counter, no fence, one trip to the L2 cache each way. Steps alternate
    between two halves of the mailbox: a program writes step t + 2 over step t only after all have sent t + 1, which
    they do only after they have read t. All programs of a row must be running, so the grid is launched cooperatively.
    The mailbox starts as zeros and steps count from 1.

    Several warps read the same word at different times, and one may see a value that another does not see yet. So no
    word is read twice (`slots_for`).
    """
    word = tl.arange(0, 4)
    slot = tl.arange(0, SLOTS)
    number = tl.where(word == 0, first, tl.where(word == 1, second, third))
    stamp = tl.cast(step, tl.int64) << 32
    mailbox_ptr += (step % 2) * (4 * PROGRAMS)
    letter = stamp | (number.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)
    tl.atomic_xchg(mailbox_ptr + part * 4 + word, letter, sem="relaxed")

    letter_ptrs = mailbox_ptr + slot[:, None] * 4 + word[None, :]
    present = (slot < PROGRAMS)[:, None] & (word < 4)[None, :]
    letters = tl.load(letter_ptrs, mask=present, other=stamp, volatile=True)
    while tl.min((letters >> 32).to(tl.int32)) < step:
        letters = tl.load(letter_ptrs, mask=present, other=stamp, volatile=True)
    return (letters & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def wait_for_all(arrived_ptr, goal):
    """Wait until `goal` programs have arrived. All their earlier writes can then be read from the L2 cache.

    One thread counts and waits, so that all threads of a program see the same.
    """
    tl.debug_barrier()
    arrived = tl.atomic_add(arrived_ptr, 1, sem="acq_rel") + 1
    while arrived < goal:
        arrived = tl.atomic_add(arrived_ptr, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def exchange_sum(mailbox_ptr, step, part, total, count, PROGRAMS: tl.constexpr, SLOTS: tl.constexpr):
    """Sum an fp64 total and a count over the programs of a row, in order. The count is exact below 2**24."""
    high, low = split(total)
    numbers = exchange(mailbox_ptr, step, part, high, low, count.to(tl.float32), PROGRAMS, SLOTS).to(tl.float64)
    word = tl.arange(0, 4)
    sums = tl.sum(numbers, axis=0)
    total = tl.sum(tl.where(word < 2, sums, 0.0), axis=0)
    count = tl.sum(tl.where(word == 2, sums, 0.0), axis=0)
    return total + tl.zeros([1], tl.float64), count + tl.zeros([1], tl.float64)


@triton.jit
def exchange_highest(mailbox_ptr, step, part, max_score, count, PROGRAMS: tl.constexpr, SLOTS: tl.constexpr):
    """Reduce over the programs of a row. The results are the largest fp32 number, NaN if there is one, and the sum of a
    count."""
    numbers = exchange(mailbox_ptr, step, part, max_score, max_score, count.to(tl.float32), PROGRAMS, SLOTS)
    word = tl.arange(0, 4)[None, :]
    sent = (tl.arange(0, SLOTS) < PROGRAMS)[:, None]
    max_score = max_or_nan(max_or_nan(tl.where(sent & (word == 0), numbers, -float("inf")), 1), 0)
    count = tl.sum(tl.sum(tl.where(word == 2, numbers, 0.0).to(tl.float64), axis=1), axis=0)
    return max_score + tl.zeros([1], tl.float32), count + tl.zeros([1], tl.float64)
