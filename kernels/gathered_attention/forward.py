"""Attention of a window's queries to the tokens of its list: the forward kernel, and functions for the backward
ones."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common.attention import (
    Settings,
    SettingsBySize,
    dot,
    load_rows,
    options_for,
    precision_for_heads,
    settings_for,
    softmax_step,
)
from kernels._common.launch import Launch, Launcher
from kernels._common.plans import Plan, planner

LN2 = tl.constexpr(0.6931471805599453)

LISTS_BLOCK = 1024
"""Entries of lists per program."""


@triton.jit
def place(n_heads, n_blocks):
    """The row (batch and window), block of queries and head of a program. Programs for the heads of a list are
    adjacent."""
    program = tl.program_id(0)
    head = program % n_heads
    return (program // n_heads // n_blocks).to(tl.int64), program // n_heads % n_blocks, head


@triton.jit
def load_slots(lists_ptr, weights_ptr, slots, n_slots):
    """Tokens and weights of entries of a list, and a mask of valid ones."""
    tokens = tl.load(lists_ptr + slots, mask=slots < n_slots, other=-1)
    weights = tl.load(weights_ptr + slots, mask=slots < n_slots, other=0.0)
    return tokens, weights.to(tl.float32), tokens >= 0


@triton.jit
def load_null(null_ptr, n_heads, head, dims, DIM: tl.constexpr, kind: tl.constexpr):
    """The learned key and value of a head, rounded as keys are, in fp32.

    If they were not rounded, the output of a query that attends to nothing else would differ from the value by a
    rounding, and the gradient by the product of the two. Other address arithmetic, as in `kernels.routed_attention`,
    would need more registers.
    """
    null_ptr += head * DIM + dims
    key = tl.load(null_ptr, mask=dims < DIM, other=0.0).to(kind)
    value = tl.load(null_ptr + n_heads * DIM, mask=dims < DIM, other=0.0).to(kind)
    return key.to(tl.float32), value.to(tl.float32)


@triton.jit(do_not_specialize=["n_entries"])
def _lists_kernel(
    indices_ptr,  # b w r s, int32 or int64
    mask_ptr,  # b w r s, if there is a mask
    lists_ptr,  # b w r s, int32
    n_entries,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = entry < n_entries
    token = tl.load(indices_ptr + entry, mask=exists, other=0).to(tl.int32)
    if HAS_MASK:
        token = tl.where(tl.load(mask_ptr + entry, mask=exists, other=0) != 0, token, -1)
    tl.store(lists_ptr + entry, token, mask=exists)


@triton.jit(do_not_specialize=["n_windows", "n_tokens"])
def _forward_kernel(
    query_ptr,  # b w h i d
    key_value_ptr,  # b r n (h kv d)
    lists_ptr,  # b w r s, -1 for absent entries
    weights_ptr,  # b w r s
    null_ptr,  # 2 h d
    out_ptr,  # b w i h d
    lse_ptr,  # b w h i, log2
    query_batch,
    query_window,
    query_head,
    query_stride,
    key_value_batch,
    key_value_route,
    key_value_stride,
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
    """A block of the queries of a window and head, by an online softmax that begins with the learned pair."""
    row, block, head = place(n_heads, n_blocks)
    batch, window = row // n_windows, row % n_windows
    share = n_heads // n_routes
    route = head // share
    dims = tl.arange(0, BLOCK_D)
    queries = block * BLOCK_I + tl.arange(0, BLOCK_I)
    there = queries < n_queries
    query_ptr += batch * query_batch + window * query_window + head.to(tl.int64) * query_head
    query = load_rows(query_ptr, queries, there, dims, query_stride, DIM)
    key_ptr = key_value_ptr + batch * key_value_batch + route.to(tl.int64) * key_value_route + head % share * (2 * DIM)
    listed = (row * n_routes + route) * n_slots

    null_key, null_value = load_null(null_ptr, n_heads, head, dims, DIM, query.dtype)
    max_logit = tl.sum(query.to(tl.float32) * null_key[None, :], axis=1) * scale
    total = tl.full([BLOCK_I], 1.0, tl.float32)
    out = tl.zeros([BLOCK_I, BLOCK_D], tl.float32) + null_value[None, :]
    for start in range(0, n_slots, BLOCK_S):
        slots = start + tl.arange(0, BLOCK_S)
        tokens, weights, valid = load_slots(lists_ptr + listed, weights_ptr + listed, slots, n_slots)
        key = load_rows(key_ptr, tokens, valid, dims, key_value_stride, DIM)
        value = load_rows(key_ptr + DIM, tokens, valid, dims, key_value_stride, DIM)
        logits = dot(query, key.T, None, PRECISION)
        if WEIGH_KEYS:
            logits *= weights[None, :]
        logits = tl.where(valid[None, :], logits, -float("inf"))
        p, rescale, max_logit, total = softmax_step(logits, scale, max_logit, total)
        weighted = (p * weights[None, :]).to(value.dtype)
        out = dot(weighted, value, out * rescale[:, None], PRECISION)

    tl.store(lse_ptr + (row * n_heads + head) * n_queries + queries, max_logit + tl.log2(total), mask=there)
    out_ptr += row * n_queries * n_heads * DIM + head * DIM
    places = queries[:, None] * (n_heads * DIM) + dims[None, :]
    out = (out / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + places, out, mask=there[:, None] & (dims < DIM)[None, :])


FORWARD: SettingsBySize = {
    (2, 64): Settings(32, 32, 1, 3),
    (2, 128): Settings(32, 64, 4, 3),
    (4, 64): Settings(32, 32, 4, 2),
    (4, 128): Settings(16, 32, 8, 2),
}


def queries_at_a_time(n_queries: int, most: int) -> int:
    """Queries of a window per program. There are at most as many as it has, and at least as many as a matrix product
    needs."""
    return min(max(16, triton.next_power_of_2(n_queries)), most)


def plan_windows(
    by_size: SettingsBySize, batch: int, n_windows: int, heads: int, n_queries: int, dim: int, itemsize: int
) -> Plan:
    """A program for each block of the queries of a window and head. Pieces are these blocks."""
    settings = settings_for(by_size, dim, itemsize)
    queries = queries_at_a_time(n_queries, settings.block)
    blocks = triton.cdiv(n_queries, queries)
    tile = {"BLOCK_I": queries, "BLOCK_S": settings.tile, **options_for(settings, dim, itemsize)}
    return Plan(batch * n_windows * blocks * heads, tile, blocks)


@planner
def _plan_lists(n_entries: int) -> Plan:
    return Plan(triton.cdiv(n_entries, LISTS_BLOCK), {"BLOCK": LISTS_BLOCK})


@planner
def _plan(batch: int, n_windows: int, heads: int, n_queries: int, dim: int, itemsize: int) -> Plan:
    return plan_windows(FORWARD, batch, n_windows, heads, n_queries, dim, itemsize)


def arguments(query: Tensor, key_value: Tensor, plan: Plan) -> dict[str, Any]:
    """Sizes and settings that the kernels share."""
    _, windows, heads, queries, dim = query.shape
    return {
        "n_windows": windows,
        "n_blocks": plan.pieces,
        "n_heads": heads,
        "n_routes": key_value.shape[1],
        "n_queries": queries,
        "scale": dim**-0.5 / LN2.value,
        "DIM": dim,
        "PRECISION": precision_for_heads(dim) if query.dtype == torch.float32 else "tf32",
    }


@Launcher
def launch_forward(
    query: Tensor,
    key_value: Tensor,
    indices: Tensor,
    weights: Tensor,
    null_kv: Tensor,
    mask: Tensor | None,
    multiply_keys: bool,
    out: Tensor,
    lse: Tensor,
    lists: Tensor,
) -> Iterator[Launch]:
    batch, windows, heads, queries, dim = query.shape
    n_entries = lists.numel()
    given = (indices, indices if mask is None else mask, lists)
    yield Launch(_lists_kernel, _plan_lists(n_entries), *given, n_entries, HAS_MASK=mask is not None)
    plan = _plan(batch, windows, heads, queries, dim, query.itemsize)
    yield Launch(
        _forward_kernel,
        plan,
        query,
        key_value,
        lists,
        weights,
        null_kv,
        out,
        lse,
        *query.stride()[:4],
        *key_value.stride()[:3],
        lists.shape[-1],
        **arguments(query, key_value, plan),
        WEIGH_KEYS=multiply_keys,
    )
