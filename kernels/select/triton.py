"""Kernels of `kernels.select`: counting narrows down the candidates of a row; these are then sorted.

The key of an entry is an integer: its score, and below that its index, so that no two keys are equal and the largest
come first. A program reads a row and counts entries by the highest 11 bits of their keys, in shared memory. Then it
counts by the next 11 bits among the entries that agree so far with the last selected one, until the candidates fit into
a list. For most scores one round is enough. Another read collects the list. Counting also sorts the list: a bucket of
entries whose order is not known yet is divided by the next bits of their keys into as many buckets as it has entries.
At first one bucket has all entries. The last few entries of a bucket are compared.

If rows are few, several programs share a row and wait for each other. Their counts are added as integers, whose sum is
the same in any order, and the last program sorts the list.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common.launch import COUNTS, Launch, Launcher, Scratch
from kernels._common.plans import MOST_THREADS, Plan, planner
from kernels._common.primitives import wait_for_all
from kernels._common.shared_memory import (
    INTERPRETED,
    add_word,
    count_word,
    load_four,
    load_pair,
    load_word,
    shared_words,
    stand_in,
    store_four,
    store_pair,
    store_word,
    take_place,
)
from kernels._common.tensors import multiprocessors

LISTED = 4096
"""Most entries of a list in shared memory, which needs 8 bytes for each."""

IN_THREAD = 8
"""Entries per thread that are read at a time."""

CHUNK = 8192
"""Entries for each of the programs that share a row, or collect a longer list from it."""

LONGEST_ALONE = 32768
"""Longest row for a single program if several programs could share it."""

SHORT = 16384
"""Longest row that stays in the L2 cache until many programs read their rows again."""

RANKED, RANKED_AGAINST = 16, 256
"""Selected entries that one program ranks, and the number of others that it reads at a time."""

MOST_RANKED = 16384
"""Most selected entries of a row for which ranking, with quadratic work, takes less time than PyTorch's sort."""

SMALLEST: tl.constexpr = tl.constexpr(-(2**63))

DIGIT: tl.constexpr = tl.constexpr(11)
BINS: tl.constexpr = tl.constexpr(2**11)

MOST_ROUNDS: tl.constexpr = tl.constexpr(6)
"""Digits of a key: of the 32 bits of a score and the 30 bits of an index."""

MOST_COMPARED: tl.constexpr = tl.constexpr(8)
"""Most entries of a bucket that are compared with each other instead of divided."""


@triton.constexpr_function
def words_of(listed: int) -> int:
    """Words of shared memory for a list or for counts, and one counter."""
    return max(2 * listed, BINS.value) + 1


@triton.jit
def load_ordered(scores_ptr, mask_ptr, columns, n, HAS_MASK: tl.constexpr):
    """uint32 in the order of the scores of a row: NaN above all, masked entries, as 0, below all."""
    exists = columns < n
    scores = tl.load(tl.max_contiguous(scores_ptr + columns, 4), mask=exists, other=0.0).to(tl.float32)
    # The addition makes zeros of either sign equal. On a GPU it also turns every NaN into the same one, so NaNs are
    # equal, too.
    scores += 0.0
    bits = scores.to(tl.int32, bitcast=True)
    if INTERPRETED:
        bits = tl.where(scores != scores, 0x7FFFFFFF, bits)
    ordered = (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)
    if HAS_MASK:
        is_valid = tl.load(tl.max_contiguous(mask_ptr + columns, 4), mask=exists, other=0) != 0
        ordered = tl.where(is_valid, ordered, 0)
    return ordered


@triton.jit
def _before_end(columns, n):
    """uint32 that orders entries of equal scores."""
    return (n - 1 - columns).to(tl.uint32, bitcast=True)


@triton.jit
def _is_listed(ordered, columns, n, value, tie):
    return (columns < n) & ((ordered > value) | ((ordered == value) & (_before_end(columns, n) >= tie)))


@triton.jit
def keys_of(ordered, columns, n):
    """int64 in the order of the entries of a row."""
    return ((ordered ^ 0x80000000).to(tl.int32, bitcast=True).to(tl.int64) << 32) | _before_end(columns, n).to(tl.int64)


@triton.jit
def _clear(words, WORDS: tl.constexpr):
    places = 4 * tl.arange(0, WORDS // 4)
    zeros = tl.zeros([WORDS // 4], tl.int32)
    store_four(words, places, zeros, zeros, zeros, zeros)


@triton.jit
def _find(first, second, third, fourth, remaining):
    """The bin of the last one of the remaining entries, from counts of four bins per thread. Then the numbers of
    entries before the bin, and up to its end."""
    total = first + second + third + fourth
    end = tl.cumsum(total, axis=0)
    before = end - total
    after_first = before + first
    after_second = after_first + second
    after_third = after_second + third
    is_here = (before < remaining) & (end >= remaining)
    bins = 4 * tl.arange(0, BINS // 4)
    bins += tl.where(after_first < remaining, 1, 0)
    bins += tl.where(after_second < remaining, 1, 0)
    bins += tl.where(after_third < remaining, 1, 0)
    start = tl.where(after_first < remaining, after_first, before)
    start = tl.where(after_second < remaining, after_second, start)
    start = tl.where(after_third < remaining, after_third, start)
    end = tl.where(after_third >= remaining, after_third, end)
    end = tl.where(after_second >= remaining, after_second, end)
    end = tl.where(after_first >= remaining, after_first, end)
    both = (start.to(tl.int64) << 32) | end.to(tl.int64)
    both = tl.sum(tl.where(is_here, both, 0), axis=0)
    return tl.sum(tl.where(is_here, bins, 0), axis=0), (both >> 32).to(tl.int32), both.to(tl.int32)


@triton.jit
def _count(
    words, scores_ptr, mask_ptr, n, begin, end, value, last, shift, width,
    BLOCK: tl.constexpr, AMONG_EQUAL: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Count entries by the distance of a digit from its last value."""
    _clear(words, BINS)
    tl.debug_barrier()
    for chunk in range(begin, end):
        columns = chunk * BLOCK + tl.arange(0, BLOCK)
        digits = load_ordered(scores_ptr, mask_ptr, columns, n, HAS_MASK)
        counts = columns < n
        if AMONG_EQUAL:
            counts = counts & (digits == value)
            digits = _before_end(columns, n)
        bins = last - (digits >> shift)
        count_word(words, bins.to(tl.int32, bitcast=True), counts & (bins < width))
    tl.debug_barrier()


@triton.jit
def _sum_counts(words, counts_ptr, arrived_ptr, goal, SHARED: tl.constexpr):
    """Counts of four bins per thread, of all programs that share a row."""
    places = 4 * tl.arange(0, BINS // 4)
    first, second, third, fourth = load_four(words, places)
    if SHARED:
        tl.atomic_add(counts_ptr + places, first, mask=first > 0, sem="relaxed")
        tl.atomic_add(counts_ptr + places + 1, second, mask=second > 0, sem="relaxed")
        tl.atomic_add(counts_ptr + places + 2, third, mask=third > 0, sem="relaxed")
        tl.atomic_add(counts_ptr + places + 3, fourth, mask=fourth > 0, sem="relaxed")
        wait_for_all(arrived_ptr, goal)
        # From the L2 cache, because programs that still run have written them.
        first = tl.load(counts_ptr + places, cache_modifier=".cg")
        second = tl.load(counts_ptr + places + 1, cache_modifier=".cg")
        third = tl.load(counts_ptr + places + 2, cache_modifier=".cg")
        fourth = tl.load(counts_ptr + places + 3, cache_modifier=".cg")
    else:
        tl.debug_barrier()
    return first, second, third, fourth


@triton.jit
def _narrow(
    words, scores_ptr, mask_ptr, counts_ptr, arrived_ptr, n, begin, end, parts, rounds, remaining, value, known, shift,
    BLOCK: tl.constexpr, SHARED: tl.constexpr, AMONG_EQUAL: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """One more digit of the last selected entry: of its score or, AMONG_EQUAL, of its distance from the end.

    Results are the bits that are known then, the number of unknown bits, the number of former candidates that are now
    above, and the number of those not below.
    """
    next_shift = tl.maximum(shift - DIGIT, 0)
    width = tl.full([], 1, tl.int64) << (shift - next_shift)
    last = (known + 1) * width - 1
    _count(
        words, scores_ptr, mask_ptr, n, begin, end, value, last.to(tl.uint32), next_shift, width.to(tl.uint32),
        BLOCK, AMONG_EQUAL, HAS_MASK,
    )  # fmt: skip
    counts = _sum_counts(words, counts_ptr + rounds * BINS, arrived_ptr, (rounds + 1) * parts, SHARED)
    found, before, up_to = _find(*counts, remaining)
    return last - found, next_shift, before, up_to


@triton.jit
def _bit_length(x):
    """Bits of x >= 1. It is one more if x has more than 24 bits and the first 24 are ones."""
    return (x.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126


@triton.jit
def _divide(words, distance, bits, bucket, exists, LISTED: tl.constexpr):
    """Divide each bucket by its highest remaining bits, into as many buckets as fit.

    Results are the number of remaining bits; the bucket of each entry, as its start in the upper and its size in the
    lower half; the index of the bucket in shared memory; and the largest size.
    """
    _clear(words, LISTED)
    tl.debug_barrier()
    left = distance & ((tl.full([], 1, tl.int64) << bits.to(tl.int64)) - 1)
    bits = tl.maximum(bits - _bit_length(tl.maximum(bucket & 0xFFFF, 1)) + 1, 0)
    place = (bucket >> 16) + (left >> bits.to(tl.int64)).to(tl.int32)
    count_word(words, place, exists)
    tl.debug_barrier()
    fours = 4 * tl.arange(0, LISTED // 4)
    first, second, third, fourth = load_four(words, fours)
    total = first + second + third + fourth
    begin = tl.cumsum(total, axis=0) - total
    most = tl.max(tl.maximum(tl.maximum(first, second), tl.maximum(third, fourth)), axis=0)
    tl.debug_barrier()
    after_first = begin + first
    after_second = after_first + second
    after_third = after_second + third
    store_four(
        words, fours, (begin << 16) | first, (after_first << 16) | second, (after_second << 16) | third,
        (after_third << 16) | fourth,
    )  # fmt: skip
    tl.debug_barrier()
    bucket = load_word(words, place)
    tl.debug_barrier()
    return bits, bucket, place, most


@triton.jit
def _or(x, y):
    return x | y


@triton.jit
def _sort(words, keys, entries, n, index_bits, LISTED: tl.constexpr):
    """Write the first entries of LISTED to shared memory, in the order of their keys.

    A key is the distance of the score from the largest one, then the index.
    """
    exists = tl.arange(0, LISTED) < entries
    values = (keys >> 32).to(tl.uint32) ^ 0x80000000
    below = tl.where(exists, tl.max(tl.where(exists, values, 0), axis=0) - values, 0)
    # Otherwise bits in which no two keys differ would be processed one by one.
    differ = tl.reduce(below, 0, _or).to(tl.int64)
    zeros = tl.maximum(_bit_length(differ & -differ) - 1, 0)
    distance = ((below.to(tl.int64) >> zeros) << index_bits) | (n - 1 - (keys & 0x7FFFFFFF))
    bits = index_bits + tl.maximum(_bit_length(differ) - zeros, 0) + tl.zeros([LISTED], tl.int32)
    bucket = tl.full([LISTED], LISTED, tl.int32)
    place = bucket
    most = MOST_COMPARED + 1
    while most > MOST_COMPARED:
        bits, bucket, place, most = _divide(words, distance, bits, bucket, exists, LISTED)

    place = add_word(words, place, 1 << 16, exists) >> 16
    tl.debug_barrier()
    store_pair(words, place, distance, exists)
    tl.debug_barrier()
    rank = bucket >> 16
    for other in range(most):
        is_other = exists & (other < (bucket & 0xFFFF))
        rank += (is_other & (load_pair(words, (bucket >> 16) + other, is_other) < distance)).to(tl.int32)
    tl.debug_barrier()
    store_pair(words, rank, distance, exists)
    tl.debug_barrier()


@triton.jit(do_not_specialize=[*COUNTS, "index_bits"])
def _select_kernel(
    scores_ptr,  # rows n
    mask_ptr,  # rows n
    stand_in_ptr,  # shared memory, in the interpreter
    counts_ptr,  # rows MOST_ROUNDS+1 BINS, int32: counts of each round, then three counters; zeros at first
    keys_ptr,  # rows LISTED, int64: for programs that share a row
    results_ptr,  # int64: indices, rows selected; unless SORTED, the last selected value and tie, rows 2
    scores_stride,
    mask_stride,
    n,
    selected,
    parts,
    chunks,
    index_bits,
    BLOCK: tl.constexpr,
    LISTED: tl.constexpr,
    SHARED: tl.constexpr,
    SORTED: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Select from a row. Programs that share it all run at the same time."""
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    scores_ptr += row * scores_stride
    mask_ptr += row * mask_stride
    begin = part * chunks
    end = tl.minimum(begin + chunks, tl.cdiv(n, BLOCK))
    counts_ptr += row * ((MOST_ROUNDS + 1) * BINS)
    arrived_ptr = counts_ptr + MOST_ROUNDS * BINS
    COUNTER: tl.constexpr = words_of(LISTED) - 1
    words = shared_words(stand_in_ptr, COUNTER + 1)

    rounds, above, candidates = 0, 0, n
    most = LISTED if SORTED else selected
    known, shift = tl.full([], 0, tl.int64), 32
    while (candidates > most) & (shift > 0):
        known, shift, before, up_to = _narrow(
            words, scores_ptr, mask_ptr, counts_ptr, arrived_ptr, n, begin, end, parts, rounds, selected - above, 0,
            known, shift, BLOCK, SHARED, False, HAS_MASK,
        )  # fmt: skip
        rounds, above, candidates = rounds + 1, above + before, above + up_to
    value = (known << shift).to(tl.uint32)
    known, shift = tl.full([], 0, tl.int64), index_bits
    while candidates > most:
        known, shift, before, up_to = _narrow(
            words, scores_ptr, mask_ptr, counts_ptr, arrived_ptr, n, begin, end, parts, rounds, selected - above, value,
            known, shift, BLOCK, SHARED, True, HAS_MASK,
        )  # fmt: skip
        rounds, above, candidates = rounds + 1, above + before, above + up_to
    tie = (known << shift).to(tl.uint32)

    if not SORTED:
        tl.store(results_ptr + 2 * row, value.to(tl.int64), mask=part == 0)
        tl.store(results_ptr + 2 * row + 1, tie.to(tl.int64), mask=part == 0)
    else:
        store_word(words, COUNTER, 0, part >= 0)
        tl.debug_barrier()
        for chunk in range(begin, end):
            columns = chunk * BLOCK + tl.arange(0, BLOCK)
            ordered = load_ordered(scores_ptr, mask_ptr, columns, n, HAS_MASK)
            is_listed = _is_listed(ordered, columns, n, value, tie)
            store_pair(words, take_place(words, COUNTER, is_listed), keys_of(ordered, columns, n), is_listed)
        tl.debug_barrier()
        place = tl.arange(0, LISTED)
        own = load_word(words, COUNTER) if SHARED else candidates
        keys = load_pair(words, place, place < own)
        is_last = True
        if SHARED:
            keys_ptr += row * LISTED
            start = tl.atomic_add(arrived_ptr + 1, own, sem="relaxed")
            tl.store(keys_ptr + start + place, keys, mask=place < own)
            tl.debug_barrier()
            is_last = tl.atomic_add(arrived_ptr + 2, 1, sem="acq_rel") == parts - 1
        if is_last:
            if SHARED:
                keys = tl.load(keys_ptr + place, mask=place < candidates, other=0, cache_modifier=".cg")
            tl.debug_barrier()
            _sort(words, keys, candidates, n, index_bits, LISTED)
            indices = load_pair(words, place, place < selected) & ((1 << index_bits) - 1)
            tl.store(results_ptr + row * selected + place, indices, mask=place < selected)


@triton.jit(do_not_specialize=COUNTS)
def _collect_kernel(
    scores_ptr,  # rows n
    mask_ptr,  # rows n
    last_ptr,  # rows 2, int64: the last selected value and tie
    taken_ptr,  # rows, int32, zeros at first
    keys_ptr,  # rows selected, int64
    scores_stride,
    mask_stride,
    n,
    selected,
    parts,
    BLOCK: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """The selected keys of a part of a row, in any order."""
    row = (tl.program_id(0) // parts).to(tl.int64)
    columns = (tl.program_id(0) % parts) * BLOCK + tl.arange(0, BLOCK)
    ordered = load_ordered(scores_ptr + row * scores_stride, mask_ptr + row * mask_stride, columns, n, HAS_MASK)
    value, tie = tl.load(last_ptr + 2 * row).to(tl.uint32), tl.load(last_ptr + 2 * row + 1).to(tl.uint32)
    is_listed = _is_listed(ordered, columns, n, value, tie)
    up_to_here = tl.cumsum(is_listed.to(tl.int32), axis=0)
    start = tl.atomic_add(taken_ptr + row, tl.max(up_to_here, axis=0), sem="relaxed")
    place = row * selected + start + up_to_here - 1
    tl.store(keys_ptr + place, keys_of(ordered, columns, n), mask=is_listed)


@triton.jit(do_not_specialize=COUNTS)
def _rank_kernel(
    keys_ptr,  # rows selected, int64
    indices_ptr,  # rows selected, int64
    selected,
    n,
    blocks,
    BLOCK: tl.constexpr,
    AGAINST: tl.constexpr,
):
    """Write the indices of a block of the selected entries to the ranks of their keys in the row."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    keys_ptr += row * selected
    own = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    keys = tl.load(keys_ptr + own, mask=own < selected, other=SMALLEST)
    larger = tl.zeros([BLOCK, AGAINST], tl.int32)
    for start in range(0, selected, AGAINST):
        other = start + tl.arange(0, AGAINST)
        others = tl.load(keys_ptr + other, mask=other < selected, other=SMALLEST)
        larger += (others[None, :] > keys[:, None]).to(tl.int32)
    place = tl.sum(larger, axis=1)
    tl.store(indices_ptr + row * selected + place, n - 1 - (keys & 0x7FFFFFFF), mask=own < selected)


@planner
def _plan(n_rows: int, n: int, selected: int, available: int) -> Plan:
    """Pieces are the programs that share a row."""
    parts = max(min(available // n_rows, triton.cdiv(n, CHUNK)), 1) if n > LONGEST_ALONE else 1
    # If a multiprocessor has few programs, they need many threads to keep enough loads in flight.
    are_few = n > LISTED and n_rows * parts <= 2 * available
    # For a short row in the L2 cache, another round takes less time than sorting a long list.
    room = 2 * selected if are_few or n > SHORT else max(selected, min(2 * selected, 1024))
    listed = min(max(triton.next_power_of_2(room), 1024 if are_few else 256), LISTED)
    warps = min(listed, MOST_THREADS) // 32 if are_few else max(listed // 256, min(4, listed // 32))
    block = CHUNK if parts > 1 else max(min(triton.next_power_of_2(n), 32 * IN_THREAD * warps), 32 * warps)
    settings = {"BLOCK": block, "LISTED": listed, "SHARED": parts > 1, "SORTED": selected <= LISTED}
    # The assembler would otherwise aim at fewer registers than there are, and spill some.
    limits = {"launch_cooperative_grid": parts > 1, "num_warps": warps, "maxnreg": 72 if warps == 4 else 64}
    return Plan(n_rows * parts, {**settings, **limits}, parts)


@planner
def _plan_collection(n_rows: int, n: int) -> Plan:
    """Pieces are parts of a row, each with a program."""
    parts = triton.cdiv(n, CHUNK)
    return Plan(n_rows * parts, {"BLOCK": CHUNK, "num_warps": max(CHUNK // 1024, 1)}, parts)


@planner
def _plan_ranks(n_rows: int, selected: int) -> Plan:
    """Pieces are blocks of selected entries, each with a program."""
    blocks = triton.cdiv(selected, RANKED)
    return Plan(n_rows * blocks, {"BLOCK": RANKED, "AGAINST": RANKED_AGAINST}, blocks)


def launch_select(scores: Tensor, mask: Tensor | None, indices: Tensor) -> None:
    """Write the indices of the largest scores (rows n), the largest first, to `indices` (rows selected, int64)."""
    if scores.shape[1] == 1:
        # There is nothing to choose, and Triton 3.6 cannot compile a kernel for this case.
        indices.zero_()
        return
    if indices.shape[1] <= MOST_RANKED:
        _launch_select_in_order(scores, mask, indices)
        return
    keys = torch.empty_like(indices)
    _launch_collection(scores, mask, keys)
    indices.copy_(scores.shape[1] - 1 - (keys.sort(dim=1, descending=True).values & 0x7FFFFFFF))


@Launcher
def _launch_select_in_order(scores: Tensor, mask: Tensor | None, indices: Tensor) -> Iterator[Launch]:
    n_rows, selected = indices.shape
    if selected <= LISTED:
        yield _search(scores, mask, indices, selected)
        return
    keys = Scratch(n_rows, selected, dtype=torch.int64)
    yield from _collection(scores, mask, keys, selected)
    plan = _plan_ranks(n_rows, selected)
    yield Launch(_rank_kernel, plan, keys, indices, selected, scores.shape[1], plan.pieces)


@Launcher
def _launch_collection(scores: Tensor, mask: Tensor | None, keys: Tensor) -> Iterator[Launch]:
    yield from _collection(scores, mask, keys, keys.shape[1])


def _arguments(scores: Tensor, mask: Tensor | None, selected: int) -> tuple[tuple[Tensor, Tensor], tuple[int, ...]]:
    """Inputs, then the numbers after the pointers in the arguments of kernels that read them."""
    inputs = (scores, scores if mask is None else mask)
    return inputs, (scores.stride(0), 0 if mask is None else mask.stride(0), scores.shape[1], selected)


def _search(scores: Tensor, mask: Tensor | None, results: Tensor | Scratch, selected: int) -> Launch:
    n_rows, n = scores.shape
    plan = _plan(n_rows, n, selected, multiprocessors(scores.device))
    inputs, numbers = _arguments(scores, mask, selected)
    parts, block, listed = plan.pieces, plan.settings["BLOCK"], plan.settings["LISTED"]
    counts = keys = results
    if parts > 1:
        counts = Scratch(n_rows, MOST_ROUNDS.value + 1, BINS.value, dtype=torch.int32, zeros=True)
        keys = Scratch(n_rows, listed, dtype=torch.int64)
    pointers = (*inputs, stand_in(words_of(listed), scores), counts, keys, results)
    chunks = triton.cdiv(triton.cdiv(n, block), parts)
    numbers = (*numbers, parts, chunks, max(n - 1, 1).bit_length())
    return Launch(_select_kernel, plan, *pointers, *numbers, HAS_MASK=mask is not None)


def _collection(scores: Tensor, mask: Tensor | None, keys: Tensor | Scratch, selected: int) -> Iterator[Launch]:
    """Write the keys (rows selected, int64) of the selected entries, in any order."""
    n_rows, n = scores.shape
    last = Scratch(n_rows, 2, dtype=torch.int64)
    yield _search(scores, mask, last, selected)
    plan = _plan_collection(n_rows, n)
    inputs, numbers = _arguments(scores, mask, selected)
    pointers = (*inputs, last, Scratch(n_rows, dtype=torch.int32, zeros=True), keys)
    yield Launch(_collect_kernel, plan, *pointers, *numbers, plan.pieces, HAS_MASK=mask is not None)
