"""Kernels of `kernels.routed_attention`: a program for a block of queries, or of keys, of one head.

A query attends to a learned key and value, with which its softmax begins, and to the routed ones. Weights w of values
are multiplied with the softmax, not with the values: with p = exp(s - l) and delta = sum g o,

    dp = w (g v),    ds = p (dp - delta),    dv = w sum p g,    dw = sum v (sum p g)

and one kernel sums over keys for the gradient of queries, another over queries for that of keys and values.
"""

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
from kernels._common.launch import COUNTS, Launch, Launcher, Scratch
from kernels._common.plans import Plan, planner
from kernels._common.primitives import LOG2_E


@triton.jit
def _load_keys(
    kv_ptr, weight_ptr, mask_ptr, keys, columns, stride, n_keys, HEAD_DIM: tl.constexpr, HAS_MASK: tl.constexpr,
    WEIGH_KEYS: tl.constexpr,
):  # fmt: skip
    """Keys as they are attended to, values, weights, and a mask of valid entries."""
    present = keys < n_keys
    key = load_rows(kv_ptr, keys, present, columns, stride, HEAD_DIM)
    value = load_rows(kv_ptr + HEAD_DIM, keys, present, columns, stride, HEAD_DIM)
    weight = tl.load(weight_ptr + keys, mask=present, other=0.0).to(tl.float32)
    if WEIGH_KEYS:
        key = (key.to(tl.float32) * weight[:, None]).to(key.dtype)
    if HAS_MASK:
        present = present & (tl.load(mask_ptr + keys, mask=present, other=0) != 0)
    return key, value, weight, present


@triton.jit
def _load_null(null_ptr, head, columns, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The learned key and value of a head, in fp32."""
    inside = columns < HEAD_DIM
    key = tl.load(null_ptr + head * HEAD_DIM + columns, mask=inside, other=0.0)
    value = tl.load(null_ptr + (HEADS + head) * HEAD_DIM + columns, mask=inside, other=0.0)
    return key.to(tl.float32), value.to(tl.float32)


@triton.jit
def _place(n, n_queries, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Block of n queries or keys, head and sequence of a program, and the number of queries before these."""
    blocks = tl.cdiv(n, BLOCK)
    program = tl.program_id(0) // blocks
    batch = (program // HEADS).to(tl.int64)
    return tl.program_id(0) % blocks, program % HEADS, batch, program.to(tl.int64) * n_queries


@triton.jit
def _kv_offset(
    batch, head, batch_stride, route_stride, HEADS: tl.constexpr, ROUTES: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Pointers to the keys of a head, and its row of weights and mask."""
    shared: tl.constexpr = HEADS // ROUTES
    route = head // shared
    offset = batch * batch_stride + route.to(tl.int64) * route_stride + (head % shared) * (2 * HEAD_DIM)
    return offset, batch * ROUTES + route


@triton.jit(do_not_specialize=COUNTS)
def _forward_kernel(
    query_ptr,  # b i h d
    kv_ptr,  # b r j (h/r kv d)
    weight_ptr,  # b r j
    mask_ptr,  # b r j
    null_ptr,  # kv h d
    out_ptr,  # b i h d
    wide_ptr,  # b i h d, fp32
    lse_ptr,  # b h i, fp32, to the base 2
    n_queries,
    n_keys,
    kv_batch_stride,
    kv_route_stride,
    kv_stride,
    scale,
    HEADS: tl.constexpr,
    ROUTES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_MASK: tl.constexpr,
    WEIGH_KEYS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Compute a block of queries; scale includes log2(e)."""
    block, head, batch, numbers = _place(n_queries, n_queries, HEADS, BLOCK)
    queries = block * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    own = batch * n_queries * (HEADS * HEAD_DIM) + head * HEAD_DIM
    kv_offset, row = _kv_offset(batch, head, kv_batch_stride, kv_route_stride, HEADS, ROUTES, HEAD_DIM)
    kv_ptr += kv_offset
    weight_ptr += row * n_keys
    mask_ptr += row * n_keys

    query = load_rows(query_ptr + own, queries, queries < n_queries, columns, HEADS * HEAD_DIM, HEAD_DIM)
    null_key, null_value = _load_null(null_ptr, head, columns, HEADS, HEAD_DIM)
    max_logit = tl.sum(query.to(tl.float32) * null_key[None, :], axis=1) * scale
    total = tl.full([BLOCK], 1.0, tl.float32)
    out = tl.zeros([BLOCK, BLOCK_D], tl.float32) + null_value[None, :]
    for start in range(0, n_keys, TILE):
        keys = start + tl.arange(0, TILE)
        key, value, weight, present = _load_keys(
            kv_ptr, weight_ptr, mask_ptr, keys, columns, kv_stride, n_keys, HEAD_DIM, HAS_MASK, WEIGH_KEYS
        )
        logits = dot(query, tl.trans(key), None, PRECISION) * scale
        logits = tl.where(present[None, :], logits, float("-inf"))
        # The learned key is always valid, so that the max is finite.
        p, rescale, max_logit, total = softmax_step(logits, 1.0, max_logit, total)
        weighted = (p * weight[None, :]).to(value.dtype)
        out = out * rescale[:, None] + dot(weighted, value, None, PRECISION)

    inside = (queries < n_queries)[:, None] & (columns < HEAD_DIM)[None, :]
    places = own + queries.to(tl.int64)[:, None] * (HEADS * HEAD_DIM) + columns[None, :]
    out = out / total[:, None]
    tl.store(out_ptr + places, out.to(out_ptr.dtype.element_ty), mask=inside)
    if WIDE:
        tl.store(wide_ptr + places, out, mask=inside)
    tl.store(lse_ptr + numbers + queries, max_logit + tl.log2(total), mask=queries < n_queries)


@triton.jit(do_not_specialize=COUNTS)
def _query_kernel(
    grad_output_ptr,  # b i h d
    query_ptr,  # b i h d
    kv_ptr,  # b r j (h/r kv d)
    weight_ptr,  # b r j
    mask_ptr,  # b r j
    null_ptr,  # kv h d
    out_ptr,  # b i h d, fp32
    lse_ptr,  # b h i
    dquery_ptr,  # b i h d
    dnull_ptr,  # b blocks kv h d, fp32
    delta_ptr,  # b h i, fp32
    n_queries,
    n_keys,
    kv_batch_stride,
    kv_route_stride,
    kv_stride,
    scale,
    dim_scale,
    HEADS: tl.constexpr,
    ROUTES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_MASK: tl.constexpr,
    WEIGH_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Gradients of a block of queries, and their share in those of the learned key and value."""
    block, head, batch, numbers = _place(n_queries, n_queries, HEADS, BLOCK)
    queries = block * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    own = batch * n_queries * (HEADS * HEAD_DIM) + head * HEAD_DIM
    kv_offset, row = _kv_offset(batch, head, kv_batch_stride, kv_route_stride, HEADS, ROUTES, HEAD_DIM)
    kv_ptr += kv_offset
    weight_ptr += row * n_keys
    mask_ptr += row * n_keys
    numbers += queries

    query = load_rows(query_ptr + own, queries, queries < n_queries, columns, HEADS * HEAD_DIM, HEAD_DIM)
    grad_output = load_rows(grad_output_ptr + own, queries, queries < n_queries, columns, HEADS * HEAD_DIM, HEAD_DIM)
    # Not the output rounded to half precision: its rounding error would remain where dp and delta should cancel.
    out = load_rows(out_ptr + own, queries, queries < n_queries, columns, HEADS * HEAD_DIM, HEAD_DIM)
    lse = tl.load(lse_ptr + numbers, mask=queries < n_queries, other=0.0)
    wide_grad, wide_query = grad_output.to(tl.float32), query.to(tl.float32)
    delta = tl.sum(wide_grad * out, axis=1)
    tl.store(delta_ptr + numbers, delta, mask=queries < n_queries)

    null_key, null_value = _load_null(null_ptr, head, columns, HEADS, HEAD_DIM)
    null_p = tl.exp2(tl.sum(wide_query * null_key[None, :], axis=1) * scale - lse)
    null_ds = null_p * (tl.sum(wide_grad * null_value[None, :], axis=1) - delta) * dim_scale
    dnull_ptr += (batch * tl.cdiv(n_queries, BLOCK) + block) * (2 * HEADS * HEAD_DIM) + head * HEAD_DIM
    # Absent queries are 0, and so is their gradient.
    dnull_key = tl.sum(null_ds[:, None] * wide_query, axis=0)
    dnull_value = tl.sum(null_p[:, None] * wide_grad, axis=0)
    tl.store(dnull_ptr + columns, dnull_key, mask=columns < HEAD_DIM)
    tl.store(dnull_ptr + HEADS * HEAD_DIM + columns, dnull_value, mask=columns < HEAD_DIM)

    dquery = null_ds[:, None] * null_key[None, :]
    for start in range(0, n_keys, TILE):
        keys = start + tl.arange(0, TILE)
        key, value, weight, present = _load_keys(
            kv_ptr, weight_ptr, mask_ptr, keys, columns, kv_stride, n_keys, HEAD_DIM, HAS_MASK, WEIGH_KEYS
        )
        logits = dot(query, tl.trans(key), None, PRECISION) * scale
        p = tl.where(present[None, :], tl.exp2(logits - lse[:, None]), 0.0)
        dp = dot(grad_output, tl.trans(value), None, PRECISION) * weight[None, :]
        dlogits = p * (dp - delta[:, None]) * dim_scale
        dquery += dot(dlogits.to(key.dtype), key, None, PRECISION)

    inside = (queries < n_queries)[:, None] & (columns < HEAD_DIM)[None, :]
    dquery_ptrs = dquery_ptr + own + queries.to(tl.int64)[:, None] * (HEADS * HEAD_DIM) + columns[None, :]
    tl.store(dquery_ptrs, dquery.to(dquery_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def _key_value_kernel(
    grad_output_ptr,  # b i h d
    query_ptr,  # b i h d
    kv_ptr,  # b r j (h/r kv d)
    weight_ptr,  # b r j
    mask_ptr,  # b r j
    lse_ptr,  # b h i
    delta_ptr,  # b h i
    dkv_ptr,  # b r j (h/r kv d)
    dweight_ptr,  # b h j, fp32
    n_queries,
    n_keys,
    kv_batch_stride,
    kv_route_stride,
    kv_stride,
    scale,
    dim_scale,
    HEADS: tl.constexpr,
    ROUTES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_MASK: tl.constexpr,
    WEIGH_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Gradients of a block of keys and values, and this head's share of the gradient of their weights."""
    block, head, batch, numbers = _place(n_keys, n_queries, HEADS, BLOCK)
    keys = block * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    own = batch * n_queries * (HEADS * HEAD_DIM) + head * HEAD_DIM
    kv_offset, row = _kv_offset(batch, head, kv_batch_stride, kv_route_stride, HEADS, ROUTES, HEAD_DIM)
    key, value, weight, present = _load_keys(
        kv_ptr + kv_offset, weight_ptr + row * n_keys, mask_ptr + row * n_keys, keys, columns, kv_stride, n_keys,
        HEAD_DIM, HAS_MASK, WEIGH_KEYS,
    )  # fmt: skip

    dkey = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    attended = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for start in range(0, n_queries, TILE):
        queries = start + tl.arange(0, TILE)
        query = load_rows(query_ptr + own, queries, queries < n_queries, columns, HEADS * HEAD_DIM, HEAD_DIM)
        grad_output = load_rows(
            grad_output_ptr + own, queries, queries < n_queries, columns, HEADS * HEAD_DIM, HEAD_DIM
        )
        lse = tl.load(lse_ptr + numbers + queries, mask=queries < n_queries, other=0.0)
        delta = tl.load(delta_ptr + numbers + queries, mask=queries < n_queries, other=0.0)
        logits = dot(key, tl.trans(query), None, PRECISION) * scale
        p = tl.where(present[:, None], tl.exp2(logits - lse[None, :]), 0.0)
        attended += dot(p.to(grad_output.dtype), grad_output, None, PRECISION)
        dp = dot(value, tl.trans(grad_output), None, PRECISION) * weight[:, None]
        dlogits = p * (dp - delta[None, :]) * dim_scale
        dkey += dot(dlogits.to(query.dtype), query, None, PRECISION)

    dweight = tl.sum(attended * value.to(tl.float32), axis=1)
    if WEIGH_KEYS:
        plain_key = load_rows(kv_ptr + kv_offset, keys, keys < n_keys, columns, kv_stride, HEAD_DIM)
        dweight += tl.sum(dkey * plain_key.to(tl.float32), axis=1)
        dkey = dkey * weight[:, None]
    tl.store(dweight_ptr + (batch * HEADS + head) * n_keys + keys, dweight, mask=keys < n_keys)
    inside = (keys < n_keys)[:, None] & (columns < HEAD_DIM)[None, :]
    shared: tl.constexpr = HEADS // ROUTES
    dkv_ptr += row * n_keys * (2 * shared * HEAD_DIM) + (head % shared) * (2 * HEAD_DIM)
    dkv_ptrs = dkv_ptr + keys.to(tl.int64)[:, None] * (2 * shared * HEAD_DIM) + columns[None, :]
    tl.store(dkv_ptrs, dkey.to(dkv_ptr.dtype.element_ty), mask=inside)
    tl.store(dkv_ptrs + HEAD_DIM, (attended * weight[:, None]).to(dkv_ptr.dtype.element_ty), mask=inside)


FORWARD = {
    (2, 64): Settings(64, 64, 4, 3),
    (2, 128): Settings(64, 64, 8, 2),
    (4, 64): Settings(16, 64, 4, 2),
    (4, 128): Settings(16, 32, 8, 2),
}
"""Settings by the bytes of an entry and the dimension of a head."""

QUERY = {
    (2, 64): Settings(64, 64, 4, 3),
    (2, 128): Settings(64, 64, 8, 2),
    (4, 64): Settings(16, 64, 4, 2),
    (4, 128): Settings(16, 16, 8, 2),
}
KEY_VALUE = {
    (2, 64): Settings(64, 32, 4, 3),
    (2, 128): Settings(64, 64, 8, 2),
    (4, 64): Settings(16, 32, 4, 1),
    (4, 128): Settings(16, 16, 8, 2),
}


def _plan_blocks(by_size: SettingsBySize, batch: int, n: int, heads: int, head_dim: int, itemsize: int) -> Plan:
    """A program for each block of n queries or keys of a head. Pieces are these blocks."""
    settings = settings_for(by_size, head_dim, itemsize)
    blocks = triton.cdiv(n, settings.block)
    tile = {"BLOCK": settings.block, "TILE": settings.tile, **options_for(settings, head_dim, itemsize)}
    return Plan(batch * heads * blocks, tile, blocks)


@planner
def _plan_forward(batch: int, n: int, heads: int, head_dim: int, itemsize: int) -> Plan:
    return _plan_blocks(FORWARD, batch, n, heads, head_dim, itemsize)


@planner
def _plan_queries(batch: int, n: int, heads: int, head_dim: int, itemsize: int) -> Plan:
    return _plan_blocks(QUERY, batch, n, heads, head_dim, itemsize)


@planner
def _plan_keys(batch: int, n: int, heads: int, head_dim: int, itemsize: int) -> Plan:
    return _plan_blocks(KEY_VALUE, batch, n, heads, head_dim, itemsize)


@Launcher
def launch_forward(
    query: Tensor,
    key_value: Tensor,
    weights: Tensor,
    null_kv: Tensor,
    mask: Tensor | None,
    multiply_keys: bool,
    out: Tensor,
    wide: Tensor,
    lse: Tensor,
) -> Iterator[Launch]:
    batch, n_queries, _ = query.shape
    _, heads, head_dim = null_kv.shape
    yield Launch(
        _forward_kernel,
        _plan_forward(batch, n_queries, heads, head_dim, query.itemsize),
        query,
        key_value,
        weights,
        weights if mask is None else mask,
        null_kv,
        out,
        wide,
        lse,
        n_queries,
        key_value.shape[2],
        *key_value.stride()[:3],
        LOG2_E.value * head_dim**-0.5,
        **_constants(query, key_value, null_kv, mask, multiply_keys),
        WIDE=wide.numel() > 0,
    )


def launch_backward(
    grad_output: Tensor,
    query: Tensor,
    key_value: Tensor,
    weights: Tensor,
    null_kv: Tensor,
    mask: Tensor | None,
    multiply_keys: bool,
    out: Tensor,
    lse: Tensor,
    dquery: Tensor,
    dkey_value: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write the gradients of queries, keys and values, and return those of weights `b r j` and the learned pair."""
    (batch, n_queries, _), (_, routes, n_keys, _) = query.shape, key_value.shape
    _, heads, head_dim = null_kv.shape
    blocks = _plan_queries(batch, n_queries, heads, head_dim, query.itemsize).pieces
    dnull = torch.empty((batch * blocks, 2, heads, head_dim), dtype=torch.float32, device=query.device)
    dweights = torch.empty((batch, routes, heads // routes, n_keys), dtype=torch.float32, device=query.device)
    inputs = (grad_output, query, key_value, weights, null_kv, mask, multiply_keys, out, lse)
    _launch_gradients(*inputs, dquery, dkey_value, dweights, dnull)
    return dweights.sum(2), dnull.sum(0)


@Launcher
def _launch_gradients(
    grad_output: Tensor,
    query: Tensor,
    key_value: Tensor,
    weights: Tensor,
    null_kv: Tensor,
    mask: Tensor | None,
    multiply_keys: bool,
    out: Tensor,
    lse: Tensor,
    dquery: Tensor,
    dkey_value: Tensor,
    dweights: Tensor,
    dnull: Tensor,
) -> Iterator[Launch]:
    (batch, n_queries, _), n_keys = query.shape, key_value.shape[2]
    _, heads, head_dim = null_kv.shape
    given = (query, key_value, weights, weights if mask is None else mask)
    sizes = (n_queries, n_keys, *key_value.stride()[:3], LOG2_E.value * head_dim**-0.5, head_dim**-0.5)
    constants = _constants(query, key_value, null_kv, mask, multiply_keys)
    delta = Scratch(*lse.shape, dtype=lse.dtype)
    plan = _plan_queries(batch, n_queries, heads, head_dim, query.itemsize)
    made = (null_kv, out, lse)
    yield Launch(_query_kernel, plan, grad_output, *given, *made, dquery, dnull, delta, *sizes, **constants)
    if n_keys:
        plan = _plan_keys(batch, n_keys, heads, head_dim, query.itemsize)
        outputs = (dkey_value, dweights)
        yield Launch(_key_value_kernel, plan, grad_output, *given, lse, delta, *outputs, *sizes, **constants)


def _constants(
    query: Tensor, key_value: Tensor, null_kv: Tensor, mask: Tensor | None, multiply_keys: bool
) -> dict[str, Any]:
    _, heads, head_dim = null_kv.shape
    return {
        "HEADS": heads,
        "ROUTES": key_value.shape[1],
        "HEAD_DIM": head_dim,
        "HAS_MASK": mask is not None,
        "WEIGH_KEYS": multiply_keys,
        "PRECISION": precision_for_heads(head_dim) if query.dtype == torch.float32 else "ieee",
    }
