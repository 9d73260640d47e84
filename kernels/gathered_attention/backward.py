"""Gradients of gathered attention: of queries and weights by window, of keys and values by token.

The gradient of a key needs the queries of all windows that list its token. Sorted by token, the entries of all lists
give each token's windows in order. A program takes a block of tokens and goes through the windows from the first to the
last that has any of them. Each token has a pointer to its next entry, which is of the current window or of a later one.
So a block uses matrix products, and the queries of a window are read once for all tokens of the block. Tokens with
nearly the same last window share a block: a token selected from a prefix stays selected for several consecutive
windows, and so programs go through only about 1.5 times as many windows as necessary.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common.attention import Settings, SettingsBySize, dot, load_rows, options_for, settings_for
from kernels._common.launch import Launch, Launcher
from kernels._common.plans import Plan, planner
from kernels.gathered_attention.forward import (
    LN2,
    arguments,
    load_null,
    load_slots,
    place,
    plan_windows,
    queries_at_a_time,
)
from kernels.gathered_attention.inverse import invert

QUERIES: SettingsBySize = {
    (2, 64): Settings(32, 32, 1, 3),
    (2, 128): Settings(32, 64, 4, 3),
    (4, 64): Settings(16, 32, 4, 2),
    (4, 128): Settings(16, 16, 8, 1),
}

KEYS: SettingsBySize = {
    (2, 64): Settings(64, 64, 4, 2),
    (2, 128): Settings(32, 32, 4, 3),
    (4, 64): Settings(32, 16, 4, 2),
    (4, 128): Settings(16, 16, 8, 2),
}


@planner
def _plan_queries(batch: int, n_windows: int, heads: int, n_queries: int, dim: int, itemsize: int) -> Plan:
    return plan_windows(QUERIES, batch, n_windows, heads, n_queries, dim, itemsize)


@planner
def _plan_keys(batch: int, n_tokens: int, heads: int, n_queries: int, dim: int, itemsize: int, pairs: bool) -> Plan:
    """One program for each block of the tokens of a head. It processes windows in pairs, if allowed, when a block holds
    all queries of a window. Pieces are blocks of tokens."""
    settings = settings_for(KEYS, dim, itemsize)
    queries = queries_at_a_time(n_queries, settings.tile)
    blocks = triton.cdiv(n_queries, queries)
    in_pairs = pairs and blocks == 1 and 2 * queries <= settings.tile
    tile = {"BLOCK_I": queries, "BLOCK_N": settings.block, "WINDOWS": 2 if in_pairs else 1}
    options = options_for(settings, dim, itemsize)
    return Plan(batch * triton.cdiv(n_tokens, settings.block) * heads, {**tile, **options}, blocks)


@triton.jit(do_not_specialize=["n_windows", "n_tokens"])
def _query_kernel(
    query_ptr,  # b w h i d
    key_value_ptr,  # b r n (h kv d)
    lists_ptr,  # b w r s, -1 for absent entries
    weights_ptr,  # b w r s
    null_ptr,  # 2 h d
    out_ptr,  # b w i h d
    grad_output_ptr,  # b w h i d
    lse_ptr,  # b w h i, log2
    delta_ptr,  # b w h i
    dquery_ptr,  # b w i h d
    dweights_ptr,  # b w blocks h s, fp32
    dnull_ptr,  # b w blocks 2 h d, fp32
    query_batch,
    query_window,
    query_head,
    query_stride,
    key_value_batch,
    key_value_route,
    key_value_stride,
    grad_output_batch,
    grad_output_window,
    grad_output_head,
    grad_output_stride,
    n_slots,
    n_windows,
    n_blocks,
    n_heads,
    n_routes,
    n_queries,
    scale,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WEIGH_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of a block of queries, and its part of the gradients of weights and learned pair. Blocks are those
    of the forward kernel."""
    row, block, head = place(n_heads, n_blocks)
    batch, window = row // n_windows, row % n_windows
    share = n_heads // n_routes
    route = head // share
    dims = tl.arange(0, BLOCK_D)
    queries = block * BLOCK_I + tl.arange(0, BLOCK_I)
    there = queries < n_queries
    query_ptr += batch * query_batch + window * query_window + head.to(tl.int64) * query_head
    query = load_rows(query_ptr, queries, there, dims, query_stride, DIM)
    grad_output_ptr += batch * grad_output_batch + window * grad_output_window + head.to(tl.int64) * grad_output_head
    grad_output = load_rows(grad_output_ptr, queries, there, dims, grad_output_stride, DIM)
    flat = row * n_queries * n_heads * DIM + head * DIM
    out = load_rows(out_ptr + flat, queries, there, dims, n_heads * DIM, DIM)
    delta = tl.sum(out.to(tl.float32) * grad_output.to(tl.float32), axis=1)
    of_head = (row * n_heads + head) * n_queries + queries
    tl.store(delta_ptr + of_head, delta, mask=there)
    lse = tl.load(lse_ptr + of_head, mask=there, other=float("inf"))
    key_ptr = key_value_ptr + batch * key_value_batch + route.to(tl.int64) * key_value_route + head % share * (2 * DIM)
    listed = (row * n_routes + route) * n_slots
    program = (row * n_blocks + block) * n_heads + head
    dweights_ptr += program * n_slots

    null_key, null_value = load_null(null_ptr, n_heads, head, dims, DIM, query.dtype)
    wide_query, wide_grad = query.to(tl.float32), grad_output.to(tl.float32)
    null_shares = tl.exp2(tl.sum(wide_query * null_key[None, :], axis=1) * scale - lse)
    null_dlogits = null_shares * (tl.sum(wide_grad * null_value[None, :], axis=1) - delta)
    natural = scale * LN2
    dnull_ptr += ((row * n_blocks + block) * (2 * n_heads) + head) * DIM + dims
    tl.store(dnull_ptr, tl.sum(null_dlogits[:, None] * wide_query, axis=0) * natural, mask=dims < DIM)
    tl.store(dnull_ptr + n_heads * DIM, tl.sum(null_shares[:, None] * wide_grad, axis=0), mask=dims < DIM)
    dquery = null_dlogits[:, None] * null_key[None, :]

    for start in range(0, n_slots, BLOCK_S):
        slots = start + tl.arange(0, BLOCK_S)
        tokens, weights, valid = load_slots(lists_ptr + listed, weights_ptr + listed, slots, n_slots)
        key = load_rows(key_ptr, tokens, valid, dims, key_value_stride, DIM)
        value = load_rows(key_ptr + DIM, tokens, valid, dims, key_value_stride, DIM)
        logits = dot(query, key.T, None, PRECISION) * scale
        factor = weights[None, :] if WEIGH_KEYS else 1.0
        shares = tl.where(valid[None, :], tl.exp2(logits * factor - lse[:, None]), 0.0)
        dshares = dot(grad_output, value.T, None, PRECISION)
        dlogits = shares * (dshares * weights[None, :] - delta[:, None])
        dweights = shares * dshares
        if WEIGH_KEYS:
            dweights += dlogits * logits * LN2
        tl.store(dweights_ptr + slots, tl.sum(dweights, axis=0), mask=slots < n_slots)
        dquery = dot((dlogits * factor).to(key.dtype), key, dquery, PRECISION)

    places = queries[:, None] * (n_heads * DIM) + dims[None, :]
    dquery = (dquery * natural).to(dquery_ptr.dtype.element_ty)
    tl.store(dquery_ptr + flat + places, dquery, mask=there[:, None] & (dims < DIM)[None, :])


@triton.jit
def load_entry(windows_ptr, weights_ptr, entry, end, n_windows):
    """Windows and weights of entries, one per token; past the end of its entries, no window."""
    windows = tl.load(windows_ptr + entry, mask=entry < end, other=n_windows)
    return windows, tl.load(weights_ptr + entry, mask=entry < end, other=0.0).to(tl.float32)


@triton.jit
def _block_of(place, n_blocks, n_stretches, of_stretch):
    """The block of a sequence at a place. First come the first blocks of all stretches, then the second ones; the last
    stretch may have fewer."""
    of_last = n_blocks - (n_stretches - 1) * of_stretch
    later, others = place - of_last * n_stretches, tl.maximum(n_stretches - 1, 1)
    stretch = tl.where(later < 0, place % n_stretches, later % others)
    return stretch * of_stretch + tl.where(later < 0, place // n_stretches, of_last + later // others)


@triton.jit(do_not_specialize=["n_windows", "n_tokens", "n_stretches", "of_stretch"])
def _key_value_kernel(
    query_ptr,  # b w h i d
    key_value_ptr,  # b r n (h kv d)
    windows_ptr,  # windows of the entries of all lists in the order of their tokens
    weights_ptr,  # and their weights
    ends_ptr,  # b r n+1: start of the entries of each token, which is the end of those of the token before
    order_ptr,  # b r n: tokens by their last windows
    grad_output_ptr,  # b w h i d
    lse_ptr,  # b w h i, log2
    delta_ptr,  # b w h i
    dkey_value_ptr,  # b n r (h kv d)
    query_batch,
    query_window,
    query_head,
    query_stride,
    key_value_batch,
    key_value_route,
    key_value_stride,
    grad_output_batch,
    grad_output_window,
    grad_output_head,
    grad_output_stride,
    n_batches,
    n_tokens,
    n_stretches,
    of_stretch,
    n_windows,
    n_blocks,
    n_heads,
    n_routes,
    n_queries,
    scale,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOWS: tl.constexpr,
    WEIGH_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keys and values of a block of tokens for one head, against the queries of their windows. Windows are processed
    one by one, or in pairs if a block holds all queries of a window."""
    # The first blocks of each stretch have the last windows, and the most work.
    program = tl.program_id(0)
    head = program % n_heads
    batch = (program // n_heads % n_batches).to(tl.int64)
    share = n_heads // n_routes
    route = head // share
    sequence = batch * n_routes + route
    dims = tl.arange(0, BLOCK_D)
    of_tokens = _block_of(program // n_heads // n_batches, tl.cdiv(n_tokens, BLOCK_N), n_stretches, of_stretch)
    ranks = of_tokens * BLOCK_N + tl.arange(0, BLOCK_N)
    present = ranks < n_tokens
    tokens = tl.load(order_ptr + sequence * n_tokens + ranks, mask=present, other=0)
    following = tl.load(ends_ptr + tokens, mask=present, other=0)
    end = tl.load(ends_ptr + tokens + 1, mask=present, other=0)
    tokens -= sequence * n_tokens
    key_ptr = key_value_ptr + batch * key_value_batch + route.to(tl.int64) * key_value_route + head % share * (2 * DIM)
    key = load_rows(key_ptr, tokens, present, dims, key_value_stride, DIM)
    value = load_rows(key_ptr + DIM, tokens, present, dims, key_value_stride, DIM)

    listed_in, weights = load_entry(windows_ptr, weights_ptr, following, end, n_windows)
    listed_then, weights_then = load_entry(windows_ptr, weights_ptr, following + 1, end, n_windows)
    first_window = tl.min(listed_in)
    last_window = tl.max(tl.load(windows_ptr + end - 1, mask=following < end, other=-1))

    query_ptr += batch * query_batch + head.to(tl.int64) * query_head
    grad_output_ptr += batch * grad_output_batch + head.to(tl.int64) * grad_output_head
    dkey = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dvalue = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    columns = tl.arange(0, WINDOWS * BLOCK_I)
    for step in range(first_window * n_blocks // WINDOWS, tl.cdiv((last_window + 1) * n_blocks, WINDOWS)):
        window, block = step * WINDOWS // n_blocks, step % n_blocks
        windows = window + columns // BLOCK_I
        if WINDOWS == 1:
            windows = windows.to(tl.int64)
        queries = block * BLOCK_I + columns % BLOCK_I
        if WINDOWS == 1:
            queries = queries.to(tl.int64)
        there = (queries < n_queries) & (windows < n_windows)
        query = load_rows(query_ptr, windows * query_window + queries * query_stride, there, dims, 1, DIM)
        grad_output = load_rows(
            grad_output_ptr, windows * grad_output_window + queries * grad_output_stride, there, dims, 1, DIM
        )
        of_head = ((batch * n_windows + windows) * n_heads + head) * n_queries + queries
        lse = tl.load(lse_ptr + of_head, mask=there, other=float("inf"))
        delta = tl.load(delta_ptr + of_head, mask=there, other=0.0)

        here = listed_in == window
        attended, weight = here[:, None], weights[:, None]
        passed = here & (block == n_blocks - 1 if WINDOWS == 1 else True)
        if WINDOWS == 2:
            # Entries of the first of two windows use their next entry for the second one; all others use this one.
            next_weights = tl.where(here, weights_then, weights)
            here_next = tl.where(here, listed_then, listed_in) == window + 1
            is_next = (windows > window)[None, :]
            attended = tl.where(is_next, here_next[:, None], attended)
            weight = tl.where(is_next, next_weights[:, None], weight)
            following += here_next.to(following.dtype)
        following += passed.to(following.dtype)
        # Loaded early, so that the products of this step hide the latency.
        listed_in, weights = load_entry(windows_ptr, weights_ptr, following, end, n_windows)
        if WINDOWS == 2:
            listed_then, weights_then = load_entry(windows_ptr, weights_ptr, following + 1, end, n_windows)

        factor = weight if WEIGH_KEYS else 1.0
        logits = dot(key, query.T, None, PRECISION) * (scale * factor)
        shares = tl.where(attended, tl.exp2(logits - lse[None, :]), 0.0)
        dvalue = dot((shares * weight).to(grad_output.dtype), grad_output, dvalue, PRECISION)
        dshares = dot(value, grad_output.T, None, PRECISION)
        dlogits = shares * (dshares * weight - delta[None, :]) * factor
        dkey = dot(dlogits.to(query.dtype), query, dkey, PRECISION)

    places = ((batch * n_tokens + tokens) * n_heads + head)[:, None] * (2 * DIM) + dims[None, :]
    written = present[:, None] & (dims < DIM)[None, :]
    kind = dkey_value_ptr.dtype.element_ty
    tl.store(dkey_value_ptr + places, (dkey * (scale * LN2)).to(kind), mask=written)
    tl.store(dkey_value_ptr + places + DIM, dvalue.to(kind), mask=written)


def launch_backward(
    grad_output: Tensor,
    query: Tensor,
    key_value: Tensor,
    lists: Tensor,
    weights: Tensor,
    null_kv: Tensor,
    multiply_keys: bool,
    out: Tensor,
    lse: Tensor,
    dquery: Tensor,
    dkey_value: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write the gradients of queries, keys and values, and return those of weights and learned pair."""
    delta = torch.empty_like(lse)
    dweights, dnull = _launch_queries(
        grad_output, query, key_value, lists, weights, null_kv, multiply_keys, out, lse, delta, dquery
    )
    if lists.numel():
        inverse = invert(lists, weights, key_value.shape[2])
        _launch_keys(grad_output, query, key_value, *inverse, multiply_keys, lse, delta, dkey_value)
    else:
        dkey_value.zero_()
    return dweights, dnull


def _launch_queries(
    grad_output: Tensor,
    query: Tensor,
    key_value: Tensor,
    lists: Tensor,
    weights: Tensor,
    null_kv: Tensor,
    multiply_keys: bool,
    out: Tensor,
    lse: Tensor,
    delta: Tensor,
    dquery: Tensor,
) -> tuple[Tensor, Tensor]:
    (batch, windows, heads, queries, dim), (_, _, routes, slots) = query.shape, lists.shape
    blocks = _plan_queries(batch, windows, heads, queries, dim, query.itemsize).pieces
    dweights = lse.new_empty((batch, windows, blocks, heads, slots))
    dnull = lse.new_empty((batch * windows * blocks, 2, heads, dim))
    inputs = (query, key_value, lists, weights, null_kv, out, grad_output, lse)
    _launch_query_kernel(*inputs, delta, dquery, dweights, dnull, multiply_keys)
    # Sums over the blocks of a window and the heads of a route; over everything but heads.
    dweights = dweights.unflatten(3, (routes, heads // routes)).sum(dim=(2, 4))
    return dweights, dnull.sum(dim=0)


@Launcher
def _launch_query_kernel(
    query: Tensor,
    key_value: Tensor,
    lists: Tensor,
    weights: Tensor,
    null_kv: Tensor,
    out: Tensor,
    grad_output: Tensor,
    lse: Tensor,
    delta: Tensor,
    dquery: Tensor,
    dweights: Tensor,
    dnull: Tensor,
    multiply_keys: bool,
) -> Iterator[Launch]:
    batch, windows, heads, queries, dim = query.shape
    plan = _plan_queries(batch, windows, heads, queries, dim, query.itemsize)
    yield Launch(
        _query_kernel,
        plan,
        query,
        key_value,
        lists,
        weights,
        null_kv,
        out,
        grad_output,
        lse,
        delta,
        dquery,
        dweights,
        dnull,
        *query.stride()[:4],
        *key_value.stride()[:3],
        *grad_output.stride()[:4],
        lists.shape[-1],
        **arguments(query, key_value, plan),
        WEIGH_KEYS=multiply_keys,
    )


@Launcher
def _launch_keys(
    grad_output: Tensor,
    query: Tensor,
    key_value: Tensor,
    windows_of: Tensor,
    weights: Tensor,
    ends: Tensor,
    order: Tensor,
    stretch: int,
    multiply_keys: bool,
    lse: Tensor,
    delta: Tensor,
    dkey_value: Tensor,
) -> Iterator[Launch]:
    """Write the gradient of keys and values; see `Inverse`."""
    batch, _, n_tokens, _ = key_value.shape
    _, windows, heads, queries, dim = query.shape
    # No registers are left for weights of keys, nor for 64-bit offsets.
    reach = max(windows * tensor.stride(1) + queries * tensor.stride(3) for tensor in (query, grad_output))
    pairs = reach < 2**31 and not multiply_keys
    plan = _plan_keys(batch, n_tokens, heads, queries, dim, query.itemsize, pairs)
    yield Launch(
        _key_value_kernel,
        plan,
        query,
        key_value,
        windows_of,
        weights,
        ends,
        order,
        grad_output,
        lse,
        delta,
        dkey_value,
        *query.stride()[:4],
        *key_value.stride()[:3],
        *grad_output.stride()[:4],
        batch,
        n_tokens,
        triton.cdiv(n_tokens, stretch),
        max(stretch // plan.settings["BLOCK_N"], 1),
        **arguments(query, key_value, plan),
        WEIGH_KEYS=multiply_keys,
    )
