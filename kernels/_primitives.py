"""Pieces that two or more kernels share.

A kernel that keeps a chunk of a row in registers holds it as a tile of REPEATS x WIDTH, where WIDTH is four elements
a thread: a thread then adds up its own elements without talking to another, in fp32, and only one number a thread goes
into the fp64 sum of the program.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)

LOWEST: tl.constexpr = tl.constexpr(-3.0e38)
"""Stands for a score that takes no part: its exponential is 0, and finite arithmetic on it makes no NaN."""


@triton.jit
def tile_columns(REPEATS: tl.constexpr, WIDTH: tl.constexpr):
    """Column numbers of a tile, REPEATS x WIDTH."""
    return tl.arange(0, REPEATS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def sum_in_thread(x, WIDTH: tl.constexpr):
    """One fp32 sum a thread of a tile: WIDTH // 4."""
    return tl.sum(tl.reshape(tl.sum(x, axis=0), [WIDTH // 4, 4]), axis=1)


@triton.jit
def sum_tile(x, WIDTH: tl.constexpr):
    """Sum of a tile as an fp64 scalar."""
    return tl.sum(sum_in_thread(x, WIDTH).to(tl.float64), axis=0)


@triton.jit
def load_tile(scores_ptr, mask_ptr, columns, n, HAS_MASK: tl.constexpr):
    """Scores of a row as fp32, LOWEST where there is none, and which of them take part."""
    valid = columns < n
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr + columns, mask=valid, other=0) != 0)
    scores = tl.load(scores_ptr + columns, mask=valid, other=-float("inf")).to(tl.float32)
    return tl.where(scores < LOWEST, LOWEST, scores), valid


@triton.jit
def count_tile(scores, valid, WIDTH: tl.constexpr):
    """Valid entries of a tile; NaN where one of them is NaN, which makes the row NaN."""
    return sum_tile(tl.where(valid, tl.where(scores == scores, 1.0, float("nan")), 0.0), WIDTH)


@triton.jit
def subtract(scores, threshold):
    """fp32 scores minus an fp64 threshold, in fp32.

    The high part goes first, which is exact where the two are close (Sterbenz' lemma), and the sign is always right.
    """
    high = threshold.to(tl.float32)
    low = (threshold - high.to(tl.float64)).to(tl.float32)
    return (scores - high) - low


@triton.jit
def exp_over(difference, temperature):
    """exp(difference / temperature) for fp32 differences and an fp64 temperature.

    The factor is an unevaluated fp32 pair: rounded to one fp32 it would shift every exponent of the row the same way,
    and with them the threshold.
    """
    factor = (1.0 / temperature) * LOG2_E
    high = factor.to(tl.float32)
    low = (factor - high.to(tl.float64)).to(tl.float32)
    return tl.exp2(difference * high + difference * low)


@triton.jit
def round_down(x):
    """The largest fp32 that is not above the fp64 x, so that comparing fp32 scores with it is comparing with x."""
    nearest = x.to(tl.float32)
    bits = nearest.to(tl.int32, bitcast=True)
    below = tl.where(nearest > 0, bits - 1, bits + 1).to(tl.float32, bitcast=True)
    below = tl.where(nearest == 0, -1.1754943508222875e-38, below)
    return tl.where(nearest.to(tl.float64) > x, below, nearest)


@triton.jit
def exchange(mailbox_ptr, step, part, first, second, third, PROGRAMS: tl.constexpr, SLOTS: tl.constexpr):
    """Hand three fp32 numbers to all PROGRAMS programs of a row, and receive theirs: SLOTS x 4, of which 3 are used.

    Every word travels with the number of the step in its upper half, in one 64-bit store, so that a reader knows a
    word is there by looking at it: no counter, no fence, one trip to the L2 cache each way. Steps alternate between
    two halves of the mailbox: a program writes step t + 2 over step t only after all have sent t + 1, which they do
    only when they have read t. All programs of a row must be running, so the grid is launched cooperatively; the
    mailbox starts as zeros and steps count from 1.
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
    while tl.min(tl.min(letters, axis=1), axis=0) < stamp:
        letters = tl.load(letter_ptrs, mask=present, other=stamp, volatile=True)
    return (letters & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def exchange_sum(mailbox_ptr, step, part, total, count, PROGRAMS: tl.constexpr, SLOTS: tl.constexpr):
    """Sum an fp64 total and a count (fp64, exact below 2**24) over the programs of a row, in their order."""
    high = total.to(tl.float32)
    low = (total - high.to(tl.float64)).to(tl.float32)
    numbers = exchange(mailbox_ptr, step, part, high, low, count.to(tl.float32), PROGRAMS, SLOTS).to(tl.float64)
    word = tl.arange(0, 4)[None, :]
    total = tl.sum(tl.sum(tl.where(word < 2, numbers, 0.0), axis=1), axis=0)
    count = tl.sum(tl.sum(tl.where(word == 2, numbers, 0.0), axis=1), axis=0)
    return total, count


@triton.jit
def exchange_highest(mailbox_ptr, step, part, highest, count, PROGRAMS: tl.constexpr, SLOTS: tl.constexpr):
    """The largest fp32 number and the sum of a count (fp64) over the programs of a row."""
    numbers = exchange(mailbox_ptr, step, part, highest, highest, count.to(tl.float32), PROGRAMS, SLOTS)
    word = tl.arange(0, 4)[None, :]
    sent = (tl.arange(0, SLOTS) < PROGRAMS)[:, None]
    highest = tl.max(tl.max(tl.where(sent & (word == 0), numbers, -float("inf")), axis=1), axis=0)
    count = tl.sum(tl.sum(tl.where(word == 2, numbers, 0.0).to(tl.float64), axis=1), axis=0)
    return highest, count
