"""Lists of tokens by their tokens: entries of all lists sorted by token, and tokens by their last window.

PyTorch sorts entries. A kernel before the sort writes its keys, and one after it what it says of each entry and token.
That kernel also sorts tokens, by stretches, where lists are long enough: tokens that are near each other begin to be
listed together as well. Of a stretch of a long sequence a list has few tokens, and PyTorch sorts all of them.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common.launch import COUNTS, Launch, Launcher
from kernels._common.plans import Plan, planner

BLOCK = 1024
"""Entries, or tokens, of a program."""

LISTED = 32
"""Fewest tokens of a stretch of `BLOCK` tokens that an average list has, for tokens to be sorted by stretches. With as
many, blocks of `kernels.gathered_attention.backward` go through fewer windows than with all tokens sorted."""


class Inverse(NamedTuple):
    """Lists `b w r s` of tokens of sequences `b r n`, by token."""

    windows: Tensor
    """int32: the windows of the entries of all lists in the order of their tokens, then of windows."""

    weights: Tensor
    """Weights of the same entries."""

    ends: Tensor
    """`b r n+1` flat: where the entries of each token begin, and so those of the one before end."""

    order: Tensor
    """`b r n` flat: the tokens of each sequence, or of each stretch of it, by their last window. Later windows are
    first, and tokens without a window last."""

    stretch: int
    """Number of tokens that are in order."""


@triton.jit
def _lowest(keys_ptr):
    """The number that keys count from: the least of their type, all of whose bits they use."""
    return -(1 << (keys_ptr.dtype.element_ty.primitive_bitwidth - 1))


@triton.jit(do_not_specialize=[*COUNTS, "n_entries", "of_batch", "slots", "routes", "total"])
def _keys_kernel(
    lists_ptr,  # b w r s, int32
    keys_ptr,  # b w r s
    n_entries,
    of_batch,
    slots,
    routes,
    n_tokens,
    total,
    BLOCK: tl.constexpr,
):
    """The number of an entry's token among those of all sequences; after all of them where there is none."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(lists_ptr + entry, mask=entry < n_entries, other=-1)
    sequence = entry // of_batch * routes + entry // slots % routes
    key = tl.where(token >= 0, sequence * n_tokens + token, total) + _lowest(keys_ptr)
    tl.store(keys_ptr + entry, key.to(keys_ptr.dtype.element_ty), mask=entry < n_entries)


@triton.jit
def _first_at_least(keys_ptr, key, low, high, halvings):
    """The place of the first of sorted keys, from low to high, that is not less than a key. This counts from 0."""
    key += _lowest(keys_ptr)
    for _ in range(halvings):
        middle = (low + high) // 2
        is_less = tl.load(keys_ptr + middle, mask=low < high, other=0).to(tl.int64) < key
        low, high = tl.where((low < high) & is_less, middle + 1, low), tl.where(is_less, high, middle)
    return low


@triton.jit(
    do_not_specialize=[*COUNTS, "n_entries", "total", "of_window", "halvings", "halvings_of_token", "of_entries"]
)
def _sorted_kernel(
    keys_ptr,  # entries, sorted
    entries_ptr,  # entries, int64: which these are
    weights_ptr,  # b w r s
    windows_ptr,  # entries, int32
    sorted_weights_ptr,  # entries
    ends_ptr,  # tokens+1
    order_ptr,  # tokens: their order, or keys to sort them by
    n_entries,
    total,
    n_tokens,
    of_window,
    n_windows,
    halvings,
    halvings_of_token,
    of_entries,
    BLOCK: tl.constexpr,
    ORDERS: tl.constexpr,
):
    """The first programs write windows and weights of sorted entries. Others find where the entries of each token
    begin, and how many windows there are after its last, and order a stretch of tokens by that."""
    program = tl.program_id(0).to(tl.int64)
    if program < of_entries:
        place = program * BLOCK + tl.arange(0, BLOCK)
        exists = place < n_entries
        entry = tl.load(entries_ptr + place, mask=exists, other=0)
        tl.store(windows_ptr + place, (entry // of_window % n_windows).to(tl.int32), mask=exists)
        weight = tl.load(weights_ptr + entry, mask=exists, other=0.0)
        tl.store(sorted_weights_ptr + place, weight, mask=exists)
    else:
        token = (program - of_entries) * BLOCK + tl.arange(0, BLOCK)
        all_entries = tl.zeros_like(token) + n_entries
        begin = _first_at_least(keys_ptr, token, tl.zeros_like(token), all_entries, halvings)
        # A token is in the list of a window once.
        end = _first_at_least(keys_ptr, token + 1, begin, tl.minimum(begin + n_windows, all_entries), halvings_of_token)
        last = tl.load(entries_ptr + end - 1, mask=(token < total) & (begin < end), other=0)
        missed = tl.where(begin < end, n_windows - 1 - last // of_window % n_windows, n_windows)
        missed += token // n_tokens * (n_windows + 1)
        tl.store(ends_ptr + token, begin.to(ends_ptr.dtype.element_ty), mask=token <= total)
        if ORDERS:
            # Those past the end have the highest keys.
            sorted_lanes = tl.sort(missed * BLOCK + tl.arange(0, BLOCK)) % BLOCK
            missed = (program - of_entries) * BLOCK + sorted_lanes
        else:
            missed += _lowest(order_ptr)
        tl.store(order_ptr + token, missed.to(order_ptr.dtype.element_ty), mask=token < total)


@planner
def _plan_keys(n_entries: int) -> Plan:
    return Plan(triton.cdiv(n_entries, BLOCK), {"BLOCK": BLOCK})


@planner
def _plan_sorted(n_entries: int, total: int) -> Plan:
    """Programs for entries, which are the pieces, then for tokens and the end of the last."""
    of_entries = triton.cdiv(n_entries, BLOCK)
    return Plan(of_entries + triton.cdiv(total + 1, BLOCK), {"BLOCK": BLOCK}, of_entries)


def invert(lists: Tensor, weights: Tensor, n_tokens: int) -> Inverse:
    """The inverse of lists `b w r s`, int32 and -1 where there is nothing, with their weights; both contiguous."""
    (batch, windows, routes, slots), device = lists.shape, lists.device
    n_entries, total = lists.numel(), batch * routes * n_tokens
    keys = torch.empty(n_entries, dtype=_narrow(total + 1), device=device)
    _launch_keys(lists, keys, windows * routes * slots, slots, routes, n_tokens, total)
    keys, entries = keys.sort(stable=True)

    windows_of = torch.empty(n_entries, dtype=torch.int32, device=device)
    sorted_weights = weights.new_empty(n_entries)
    ends = torch.empty(total + 1, dtype=torch.int32 if n_entries < 2**31 else torch.int64, device=device)
    by_stretches = slots * BLOCK >= LISTED * n_tokens
    kind = torch.int64 if by_stretches else _narrow(batch * routes * (windows + 1))
    order = torch.empty(total, dtype=kind, device=device)
    sizes = (n_tokens, routes * slots, windows)
    _launch_sorted(keys, entries, weights, windows_of, sorted_weights, ends, order, *sizes, by_stretches)
    if by_stretches:
        return Inverse(windows_of, sorted_weights, ends, order, BLOCK)
    return Inverse(windows_of, sorted_weights, ends, order.sort(stable=True).indices, n_tokens)


@Launcher
def _launch_keys(lists: Tensor, keys: Tensor, *sizes: int) -> Iterator[Launch]:
    n_entries = keys.shape[0]
    yield Launch(_keys_kernel, _plan_keys(n_entries), lists, keys, n_entries, *sizes)


@Launcher
def _launch_sorted(
    keys: Tensor,
    entries: Tensor,
    weights: Tensor,
    windows_of: Tensor,
    sorted_weights: Tensor,
    ends: Tensor,
    order: Tensor,
    n_tokens: int,
    in_window: int,
    windows: int,
    by_stretches: bool,
) -> Iterator[Launch]:
    n_entries, total = keys.shape[0], order.shape[0]
    plan = _plan_sorted(n_entries, total)
    yield Launch(
        _sorted_kernel,
        plan,
        keys,
        entries,
        weights,
        windows_of,
        sorted_weights,
        ends,
        order,
        n_entries,
        total,
        n_tokens,
        in_window,
        windows,
        n_entries.bit_length(),
        windows.bit_length(),
        plan.pieces,
        ORDERS=by_stretches,
    )


def _narrow(n_keys: int) -> torch.dtype:
    """A type of so many numbers: a sort takes its time by the bits of it."""
    types = (torch.int16, torch.int32, torch.int64)
    return next(dtype for dtype in types if n_keys <= 2 ** torch.iinfo(dtype).bits)
