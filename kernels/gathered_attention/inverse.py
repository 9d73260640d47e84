"""The inverse of lists of tokens: entries of all lists sorted by token, and tokens sorted by their last window.

PyTorch sorts the entries. A kernel before the sort writes the keys, and a kernel after it writes the results for each
entry and token. If lists are long enough, that kernel also sorts tokens within stretches, because neighbouring tokens
also enter the lists at nearly the same time. In a long sequence, a list has few tokens of a stretch, so PyTorch sorts
all tokens instead.
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
"""Entries, or tokens, per program."""

LISTED = 32
"""Fewest tokens of a stretch of `BLOCK` tokens that an average list must have for sorting by stretches. With this many,
blocks of `kernels.gathered_attention.backward` go through fewer windows than with all tokens sorted."""


class Inverse(NamedTuple):
    """Lists `b w r s` of tokens of sequences `b r n`, by token."""

    windows: Tensor
    """int32: the windows of the entries of all lists in the order of their tokens, then of windows."""

    weights: Tensor
    """Weights of the same entries."""

    ends: Tensor
    """`b r n+1` flat: start of the entries of each token, which is the end of those of the token before."""

    order: Tensor
    """`b r n` flat: the tokens of each sequence, or of each of its stretches, by their last window. Later windows are
    first, and tokens without a window last."""

    stretch: int
    """Number of consecutive tokens that are sorted together."""


@triton.jit
def _lowest(keys_ptr):
    """The smallest number of the type of keys, from which keys count so that they use all its bits."""
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
    """The index of an entry's token among the tokens of all sequences; absent entries have an index after all
    tokens."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(lists_ptr + entry, mask=entry < n_entries, other=-1)
    sequence = entry // of_batch * routes + entry // slots % routes
    key = tl.where(token >= 0, sequence * n_tokens + token, total) + _lowest(keys_ptr)
    tl.store(keys_ptr + entry, key.to(keys_ptr.dtype.element_ty), mask=entry < n_entries)


@triton.jit
def _first_at_least(keys_ptr, key, low, high, halvings):
    """The index, from 0, of the first of ascending keys that is not less than a key."""
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
    entries_ptr,  # entries, int64: the original indices of entries
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
    """The first programs write windows and weights of sorted entries. Others find the start of the entries of each
    token and the number of windows after its last one, by which they sort a stretch of tokens."""
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
        # A token is at most once in the list of a window.
        end = _first_at_least(keys_ptr, token + 1, begin, tl.minimum(begin + n_windows, all_entries), halvings_of_token)
        last = tl.load(entries_ptr + end - 1, mask=(token < total) & (begin < end), other=0)
        missed = tl.where(begin < end, n_windows - 1 - last // of_window % n_windows, n_windows)
        missed += token // n_tokens * (n_windows + 1)
        tl.store(ends_ptr + token, begin.to(ends_ptr.dtype.element_ty), mask=token <= total)
        if ORDERS:
            # Entries past the end have the highest keys.
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
    """Programs for entries, which are the pieces, then for tokens and the end of the last one."""
    of_entries = triton.cdiv(n_entries, BLOCK)
    return Plan(of_entries + triton.cdiv(total + 1, BLOCK), {"BLOCK": BLOCK}, of_entries)


def invert(lists: Tensor, weights: Tensor, n_tokens: int) -> Inverse:
    """The inverse of contiguous lists `b w r s`, int32 with -1 for absent entries, and their contiguous weights."""
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
    """The smallest type with enough numbers: the time of a sort depends on its bits."""
    types = (torch.int16, torch.int32, torch.int64)
    return next(dtype for dtype in types if n_keys <= 2 ** torch.iinfo(dtype).bits)
