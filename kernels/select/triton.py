"""Kernels of `kernels.select`: a radix search for the last selected score, then a collection, then a ranking.

Scores become unsigned integers of the same order. Four passes over a row, one for each byte of these from the highest
to the lowest, count the entries that agree with what is known of the last selected one by the value of the next byte;
after them it is known whole. Where programs share a row, counts meet in integers, which add up to the same in any
order. These programs wait for each other between passes if all can run at the same time; else each pass is a launch.
Entries above it go into a list as they come, and the first by index of those equal to it. The list is put in order by
counting, for each of its entries, those that go before it; where there are many rows, by a sorting network.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common.launch import COUNTS, Launch, Launcher, Plan, Scratch, most_registers, multiprocessors, planner
from kernels.select import constants

CHUNK = 4096
"""Entries of a row that one program handles."""

IN_THREAD = 16
"""Entries of a thread."""

RANKED, RANKED_AGAINST = 16, 256
"""Selected entries that one program ranks, and how many others it looks at in one go."""

MOST_RANKED = 16384
"""Selected entries of a row up to which ranking, whose work is their square, takes less time than PyTorch's sort."""

MOST_SORTED, LEAST_COMPARED = 4096, 2**20
"""Most selected entries of a row that one program sorts, where ranking would take a multiprocessor so many comparisons.
"""

BYTES: tl.constexpr = tl.constexpr(4)
BINS: tl.constexpr = tl.constexpr(256)

LAST_INDEX: tl.constexpr = tl.constexpr(constants.LAST_INDEX)


@triton.jit
def _load_ordered(scores_ptr, mask_ptr, columns, n, HAS_MASK: tl.constexpr):
    """uint32 in the order of the scores of a row: NaN above all, masked entries, as 0, below all."""
    exists = columns < n
    scores = tl.load(scores_ptr + columns, mask=exists, other=0.0).to(tl.float32)
    # Zeros of either sign are equal.
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ordered = tl.where(scores != scores, 0x7FFFFFFF, ordered).to(tl.uint32, bitcast=True) ^ 0x80000000
    if HAS_MASK:
        ordered = tl.where(tl.load(mask_ptr + columns, mask=exists, other=0) != 0, ordered, 0)
    return ordered


@triton.jit
def _count_byte(ordered, exists, known, byte):
    """Counts of each value of this byte, int32, among entries whose bytes before it are as known."""
    up_to_this = ordered >> (24 - 8 * byte)
    candidates = exists & ((up_to_this >> 8) == known)
    counts = tl.zeros([BINS], tl.int32)
    # Most programs have nothing to count of the last bytes.
    if tl.max(candidates.to(tl.int32), axis=0) > 0:
        counts = tl.histogram((up_to_this & 0xFF).to(tl.int32), BINS, mask=candidates)
    return counts


@triton.jit
def _narrow(counts, known, remaining):
    """One more byte of the last selected entry. Then the number of selected entries that agree with it in all known
    bytes."""
    values = tl.arange(0, BINS)
    at_least = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0) + counts
    byte = tl.max(tl.where(at_least >= remaining, values, 0), axis=0)
    above = tl.sum(tl.where(values > byte, counts, 0), axis=0)
    return (known << 8) | byte.to(tl.uint32), remaining - above


@triton.jit
def _places(above, equal):
    """For each entry, the number of entries before it that are above, and of those that are equal."""
    both = above.to(tl.int32) + (equal.to(tl.int32) << 16)
    before = tl.cumsum(both, axis=0) - both
    return before & 0xFFFF, before >> 16


@triton.jit
def _collect(keys_ptr, ordered, columns, above, equal, first_above, first_equal, remaining, selected):
    """Write keys that order scores, and indices of equal ones, of what a program has found to be selected."""
    above_before, equal_before = _places(above, equal)
    tie = first_equal + equal_before
    place = tl.where(above, first_above + above_before, selected - remaining + tie)
    keys = (ordered.to(tl.int64) << 31) | (columns ^ LAST_INDEX).to(tl.int64)
    tl.store(keys_ptr + place, keys, mask=above | (equal & (tie < remaining)))


@triton.jit
def _row_kernel(
    scores_ptr,  # rows n
    mask_ptr,  # rows n
    keys_ptr,  # rows selected, int64
    scores_stride,
    mask_stride,
    n,
    selected,
    BLOCK: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Search and collection of a row that one program keeps in registers."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    exists = columns < n
    ordered = _load_ordered(scores_ptr + row * scores_stride, mask_ptr + row * mask_stride, columns, n, HAS_MASK)
    known = tl.zeros((), tl.uint32)
    remaining = selected + tl.zeros((), tl.int32)
    # Unrolled, since in a loop Triton 3.6 spills registers for sm_90.
    for byte in tl.static_range(BYTES):
        known, remaining = _narrow(_count_byte(ordered, exists, known, byte), known, remaining)
    above, equal = exists & (ordered > known), exists & (ordered == known)
    _collect(keys_ptr + row * selected, ordered, columns, above, equal, 0, 0, remaining, selected)


@triton.jit
def _known_so_far(counts_ptr, row, part, selected, byte):
    """Results of the passes before the one of a byte. The last pass left counts, the others wrote their results."""
    counts_ptr += row * ((BYTES + 1) * BINS)
    found_ptr = counts_ptr + BYTES * BINS + 2 * byte
    known = tl.load(found_ptr - 2, mask=byte > 1, other=0).to(tl.uint32, bitcast=True)
    remaining = tl.load(found_ptr - 1, mask=byte > 1, other=selected)
    if byte > 0:
        counts = tl.load(counts_ptr + (byte - 1) * BINS + tl.arange(0, BINS))
        known, remaining = _narrow(counts, known, remaining)
        tl.store(found_ptr, known.to(tl.int32, bitcast=True), mask=part == 0)
        tl.store(found_ptr + 1, remaining, mask=part == 0)
    return known, remaining


@triton.jit(do_not_specialize=[*COUNTS, "byte"])
def _count_kernel(
    scores_ptr,  # rows n
    mask_ptr,  # rows n
    counts_ptr,  # rows BYTES+1 BINS, int32: counts of each byte, then what is found; zeros at first
    own_counts_ptr,  # rows parts BINS, int32: of the last byte
    scores_stride,
    mask_stride,
    n,
    selected,
    parts,
    byte,
    BLOCK: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """One pass of the search over a part of a row."""
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    columns = part * BLOCK + tl.arange(0, BLOCK)
    ordered = _load_ordered(scores_ptr + row * scores_stride, mask_ptr + row * mask_stride, columns, n, HAS_MASK)
    known, _ = _known_so_far(counts_ptr, row, part, selected, byte)
    counts = _count_byte(ordered, columns < n, known, byte)
    values = tl.arange(0, BINS)
    row_counts_ptr = counts_ptr + row * ((BYTES + 1) * BINS) + byte * BINS
    tl.atomic_add(row_counts_ptr + values, counts, mask=counts > 0, sem="relaxed")
    is_last = byte == BYTES - 1
    tl.store(own_counts_ptr + (row * parts + part) * BINS + values, counts, mask=is_last & (values < BINS))


@triton.jit
def _first_of_equal(own_counts_ptr, row, part, parts, known):
    """The number of entries equal to the last selected one in the parts of a row before this."""
    own_counts_ptr += row * parts * BINS + (known & 0xFF).to(tl.int64)
    found = tl.zeros((), tl.int32)
    for start in range(0, part, BINS):
        earlier = start + tl.arange(0, BINS)
        # From the L2 cache, where programs that still run have written them.
        counts = tl.load(own_counts_ptr + earlier * BINS, mask=earlier < part, other=0, cache_modifier=".cg")
        found += tl.sum(counts, axis=0)
    return found


@triton.jit
def _wait_for_all(arrived_ptr, goal):
    """Go on when so many have arrived. What each of them has written before can then be read from the L2 cache.

    One thread counts and asks, so that all threads of a program find the same.
    """
    tl.debug_barrier()
    arrived = tl.atomic_add(arrived_ptr, 1, sem="acq_rel") + 1
    while arrived < goal:
        arrived = tl.atomic_add(arrived_ptr, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit(do_not_specialize=COUNTS)
def _search_kernel(
    scores_ptr,  # rows n
    mask_ptr,  # rows n
    counts_ptr,  # rows BYTES+1 BINS, int32: counts of each byte, then two counters; zeros at first
    own_counts_ptr,  # rows parts BINS, int32: of the last byte
    keys_ptr,  # rows selected, int64
    scores_stride,
    mask_stride,
    n,
    selected,
    parts,
    BLOCK: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Search and collection of rows whose programs all run at the same time, with the parts of rows in registers."""
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    columns = part * BLOCK + tl.arange(0, BLOCK)
    exists = columns < n
    ordered = _load_ordered(scores_ptr + row * scores_stride, mask_ptr + row * mask_stride, columns, n, HAS_MASK)
    counts_ptr += row * ((BYTES + 1) * BINS)
    taken_ptr = counts_ptr + BYTES * BINS
    values = tl.arange(0, BINS)
    known = tl.zeros((), tl.uint32)
    remaining = selected + tl.zeros((), tl.int32)
    for byte in tl.static_range(BYTES):
        counts = _count_byte(ordered, exists, known, byte)
        tl.atomic_add(counts_ptr + byte * BINS + values, counts, mask=counts > 0, sem="relaxed")
        if byte == BYTES - 1:
            tl.store(own_counts_ptr + (row * parts + part) * BINS + values, counts)
        _wait_for_all(taken_ptr + 1, (byte + 1) * parts)
        counts = tl.load(counts_ptr + byte * BINS + values, cache_modifier=".cg")
        known, remaining = _narrow(counts, known, remaining)

    first_equal = _first_of_equal(own_counts_ptr, row, part, parts, known)
    above, equal = exists & (ordered > known), exists & (ordered == known)
    first_above = tl.atomic_add(taken_ptr, tl.sum(above.to(tl.int32), axis=0), sem="relaxed")
    _collect(keys_ptr + row * selected, ordered, columns, above, equal, first_above, first_equal, remaining, selected)


@triton.jit(do_not_specialize=COUNTS)
def _collect_kernel(
    scores_ptr,  # rows n
    mask_ptr,  # rows n
    counts_ptr,  # rows BYTES+1 BINS, int32
    own_counts_ptr,  # rows parts BINS, int32
    keys_ptr,  # rows selected, int64
    scores_stride,
    mask_stride,
    n,
    selected,
    parts,
    BLOCK: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """The selected entries of a part of a row. The place of an entry among those above depends on which program comes
    first, and does not matter; which of the equal ones it is does."""
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    columns = part * BLOCK + tl.arange(0, BLOCK)
    exists = columns < n
    ordered = _load_ordered(scores_ptr + row * scores_stride, mask_ptr + row * mask_stride, columns, n, HAS_MASK)
    known, remaining = _known_so_far(counts_ptr, row, part, selected, BYTES)
    first_equal = _first_of_equal(own_counts_ptr, row, part, parts, known)
    above, equal = exists & (ordered > known), exists & (ordered == known)
    taken_ptr = counts_ptr + row * ((BYTES + 1) * BINS) + BYTES * BINS
    first_above = tl.atomic_add(taken_ptr, tl.sum(above.to(tl.int32), axis=0), sem="relaxed")
    row_keys_ptr = keys_ptr + row * selected
    _collect(row_keys_ptr, ordered, columns, above, equal, first_above, first_equal, remaining, selected)


@triton.jit(do_not_specialize=COUNTS)
def _rank_kernel(
    keys_ptr,  # rows selected, int64
    indices_ptr,  # rows selected, int64
    selected,
    blocks,
    BLOCK: tl.constexpr,
    AGAINST: tl.constexpr,
):
    """Indices of a block of the selected entries, each in the rank that its key has in its row."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    keys_ptr += row * selected
    own = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    keys = tl.load(keys_ptr + own, mask=own < selected, other=-1)
    larger = tl.zeros([BLOCK, AGAINST], tl.int32)
    for start in range(0, selected, AGAINST):
        other = start + tl.arange(0, AGAINST)
        others = tl.load(keys_ptr + other, mask=other < selected, other=-1)
        larger += (others[None, :] > keys[:, None]).to(tl.int32)
    place = tl.sum(larger, axis=1)
    tl.store(indices_ptr + row * selected + place, (keys & LAST_INDEX) ^ LAST_INDEX, mask=own < selected)


@triton.jit
def _sort_kernel(
    keys_ptr,  # rows selected, int64
    indices_ptr,  # rows selected, int64
    selected,
    BLOCK: tl.constexpr,
):
    """Indices of all selected entries of a row, in the order of their keys."""
    place = tl.program_id(0).to(tl.int64) * selected + tl.arange(0, BLOCK)
    exists = tl.arange(0, BLOCK) < selected
    keys = tl.sort(tl.load(keys_ptr + place, mask=exists, other=-1), descending=True)
    tl.store(indices_ptr + place, (keys & LAST_INDEX) ^ LAST_INDEX, mask=exists)


@planner
def _plan(n_rows: int, n: int) -> Plan:
    """Pieces are parts, each of which has a program."""
    parts = triton.cdiv(n, CHUNK)
    block = min(max(triton.next_power_of_2(n), 128), CHUNK)
    settings = {"BLOCK": block, "num_warps": max(block // (32 * IN_THREAD), 1)}
    # Without a limit on registers, ptxas aims at fewer and spills some. Entries loaded one by one have addresses.
    if parts == 1:
        settings["maxnreg"] = 192 if n % 16 else 128
    elif n % 16:
        settings["maxnreg"] = 128
    return Plan(n_rows * parts, settings, parts)


@planner
def _plan_counts(n_rows: int, n: int) -> Plan:
    """The same; where entries are loaded one by one, ptxas aims at 64 registers and spills some."""
    plan = _plan(n_rows, n)
    return plan._replace(settings={**plan.settings, "maxnreg": 80}) if n % 16 else plan


@planner
def _plan_search(n_rows: int, n: int, available: int) -> Plan:
    """All passes in one launch, if programs share rows and can run at the same time. Else each is a launch."""
    plan = _plan(n_rows, n)
    if plan.pieces == 1 or plan.programs > available:
        return _plan_counts(n_rows, n)
    together = {"launch_cooperative_grid": True, "maxnreg": most_registers(plan.settings["num_warps"])}
    return plan._replace(settings={**plan.settings, **together})


@planner
def _plan_order(n_rows: int, selected: int, available: int) -> Plan:
    """Pieces are blocks of selected entries, each of which has a program that ranks it. None: a program sorts a row."""
    if selected <= MOST_SORTED and n_rows * selected**2 > LEAST_COMPARED * available:
        block = max(triton.next_power_of_2(selected), 256)
        # Without a limit, ptxas aims at fewer and spills some.
        return Plan(n_rows, {"BLOCK": block, "num_warps": block // 256, "maxnreg": 96}, 0)
    blocks = triton.cdiv(selected, RANKED)
    return Plan(n_rows * blocks, {"BLOCK": RANKED, "AGAINST": RANKED_AGAINST}, blocks)


def launch_select(scores: Tensor, mask: Tensor | None, indices: Tensor) -> None:
    """Write to `indices` (rows selected, int64) which of the scores (rows n) are the largest, the largest first."""
    if indices.shape[1] <= MOST_RANKED:
        _launch_search_in_order(scores, mask, indices)
        return
    keys = torch.empty_like(indices)
    _launch_search(scores, mask, keys)
    indices.copy_((keys.sort(dim=1, descending=True).values & constants.LAST_INDEX) ^ constants.LAST_INDEX)


@Launcher
def _launch_search_in_order(scores: Tensor, mask: Tensor | None, indices: Tensor) -> Iterator[Launch]:
    n_rows, selected = indices.shape
    keys = Scratch(n_rows, selected, dtype=torch.int64)
    yield from _search(scores, mask, keys, selected)
    plan = _plan_order(n_rows, selected, multiprocessors(scores.device))
    if plan.pieces:
        yield Launch(_rank_kernel, plan, keys, indices, selected, plan.pieces)
    else:
        yield Launch(_sort_kernel, plan, keys, indices, selected)


@Launcher
def _launch_search(scores: Tensor, mask: Tensor | None, keys: Tensor) -> Iterator[Launch]:
    yield from _search(scores, mask, keys, keys.shape[1])


def _search(scores: Tensor, mask: Tensor | None, keys: Tensor | Scratch, selected: int) -> Iterator[Launch]:
    """Write keys (rows selected, int64) of what is selected, in any order."""
    n_rows, n = scores.shape
    inputs = (scores, scores if mask is None else mask)
    numbers = (scores.stride(0), 0 if mask is None else mask.stride(0), n, selected)
    plan = _plan(n_rows, n)
    parts, variant = plan.pieces, {"HAS_MASK": mask is not None}
    if parts == 1:
        yield Launch(_row_kernel, plan, *inputs, keys, *numbers, **variant)
        return
    counts = Scratch(n_rows, BYTES.value + 1, BINS.value, dtype=torch.int32, zeros=True)
    own_counts = Scratch(n_rows, parts, BINS.value, dtype=torch.int32)
    search = _plan_search(n_rows, n, multiprocessors(scores.device))
    if "launch_cooperative_grid" in search.settings:
        yield Launch(_search_kernel, search, *inputs, counts, own_counts, keys, *numbers, parts, **variant)
        return
    for byte in range(BYTES.value):
        yield Launch(_count_kernel, search, *inputs, counts, own_counts, *numbers, parts, byte, **variant)
    yield Launch(_collect_kernel, plan, *inputs, counts, own_counts, keys, *numbers, parts, **variant)
