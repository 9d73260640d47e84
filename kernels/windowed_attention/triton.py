"""Kernels of `kernels.windowed_attention`: one program for a block of queries, or of keys, of one head.

What queries may attend to is an interval of positions, and so is what attends to a key. Its two ends decide which tiles
a program looks at and which entries of a tile count.

Rotary position embedding depends on distances alone. A program counts positions from the first row of its first tile,
so that a short table of cosines and sines serves all programs. Its queries and keys are then of two halves, each
`rows d/2`, whose products add up. In the forward pass in half precision, cosines and sines of a tile come from those
of the tile before.
"""

import math
from collections.abc import Generator, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common.attention import Settings, dot, is_ragged, options_for, settings_for
from kernels._common.launch import Launch, Launcher, Plan, Scratch, planner
from kernels._common.primitives import LOG2_E

PRECISION = tl.constexpr("tf32x3")
"""Factors of fp32 are sums of two of tf32."""

QUARTER_TURN = tl.constexpr(math.pi / 2)

MOST_ROWS = 64
"""A block or a tile has no more."""

NOWHERE = tl.constexpr(-(2**30))
"""Position of a key that is not there: before every interval."""


@triton.jit
def _keys_of(query, n, window_size, CAUSAL: tl.constexpr):
    """First key that a query may attend to, and the one after the last."""
    if CAUSAL:
        return tl.maximum((query // window_size - 1) * window_size, 0), query + 1
    return tl.maximum(query - window_size, 0), tl.minimum(query + window_size + 1, n)


@triton.jit
def _queries_of(key, n, window_size, CAUSAL: tl.constexpr):
    """First query that may attend to a key, and the one after the last."""
    if CAUSAL:
        return key, tl.minimum((key // window_size + 2) * window_size, n)
    return tl.maximum(key - window_size, 0), tl.minimum(key + window_size + 1, n)


@triton.jit
def _within(position, first, end):
    """True if a position is in an interval. One comparison is enough, since a position before it is a large unsigned
    number."""
    return (position - first).to(tl.uint32) < (end - first).to(tl.uint32)


@triton.jit
def _are_present(mask_ptr, position, n, HAS_MASK: tl.constexpr):
    """True for keys that are there to attend to."""
    present = position < n
    if HAS_MASK:
        present = tl.load(mask_ptr + position, mask=present, other=0) != 0
    return present


@triton.jit
def _tile(ptr, start, n, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, STRIDE: tl.constexpr):
    """Pointers to `ROWS BLOCK_D` from position start on, and which of them are inside."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside = start + row < n
    if HEAD_DIM < BLOCK_D:
        inside = inside & (column < HEAD_DIM)
    return ptr + start.to(tl.int64) * STRIDE + (row * STRIDE + column), inside


@triton.jit
def _place(program, n, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Start of the program's block, and the numbers of rows, entries of a row and positions before its own.

    The heads of one block run side by side, as they are in memory.
    """
    head = program % HEADS
    block = program // HEADS
    blocks = tl.cdiv(n, BLOCK)
    batch = (block // blocks).to(tl.int64)
    return block % blocks * BLOCK, batch * n, head * HEAD_DIM, (batch * HEADS + head) * n


@triton.jit
def _cos_and_sin(angle):
    """Both in fp32, of an angle in fp64. Those of libdevice spill, to be ready for angles of any size."""
    quarters = tl.floor(angle * (1 / QUARTER_TURN) + 0.5)
    x = (angle - quarters * QUARTER_TURN).to(tl.float32)
    # Taylor series: in an eighth of a turn to either side of 0, the terms left out are below 3e-8.
    xx = x * x
    cos = 1 + xx * (-1 / 2 + xx * (1 / 24 + xx * (-1 / 720 + xx * (1 / 40320))))
    sin = x * (1 + xx * (-1 / 6 + xx * (1 / 120 + xx * (-1 / 5040 + xx * (1 / 362880)))))
    quarter = quarters.to(tl.int64) & 3
    swapped = (quarter & 1) == 1
    cos, sin = tl.where(swapped, sin, cos), tl.where(swapped, cos, sin)
    return tl.where((quarter == 1) | (quarter == 2), -cos, cos), tl.where(quarter >= 2, -sin, sin)


@triton.jit
def _turns_kernel(
    turns_ptr,  # positions 2 d/2, fp32: cosines, sines
    positions,
    LOG2_THETA: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Cosines and sines of the angles of the first positions."""
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_H)
    frequency = tl.exp2(column.to(tl.float64) * (-LOG2_THETA / HALF))
    cos, sin = _cos_and_sin(position.to(tl.float64)[:, None] * frequency[None, :])
    at = turns_ptr + position.to(tl.int64)[:, None] * (2 * HALF) + column[None, :]
    inside = (position < positions)[:, None] & (column < HALF)[None, :]
    tl.store(at, cos, mask=inside)
    tl.store(at + HALF, sin, mask=inside)


@triton.jit
def _turns(ptr, position, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr):
    """Cosines and sines `ROWS BLOCK_H` from a position on."""
    HALF: tl.constexpr = HEAD_DIM // 2
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_H)[None, :]
    at = ptr + (position + row) * HEAD_DIM + column
    if HALF == BLOCK_H:
        return tl.load(at), tl.load(at + HALF)
    return tl.load(at, mask=column < HALF, other=0.0), tl.load(at + HALF, mask=column < HALF, other=0.0)


@triton.jit
def _turned(
    ptr,
    start,
    n,
    cos,
    sin,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """Both halves `ROWS BLOCK_H` of rotated queries or keys."""
    HALF: tl.constexpr = HEAD_DIM // 2
    at, inside = _tile(ptr, start, n, ROWS, HALF, BLOCK_H, STRIDE)
    first = tl.load(at, mask=inside, other=0.0)
    second = tl.load(at + HALF, mask=inside, other=0.0)
    x, y = first.to(tl.float32), second.to(tl.float32)
    return (x * cos - y * sin).to(first.dtype), (y * cos + x * sin).to(first.dtype)


@triton.jit
def _turned_at(
    ptr,
    start,
    n,
    turns_ptr,
    position,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """The same for rows at a position of the table, which the L1 cache holds."""
    cos, sin = _turns(turns_ptr, position, ROWS, HEAD_DIM, BLOCK_H)
    return _turned(ptr, start, n, cos, sin, ROWS, HEAD_DIM, BLOCK_H, STRIDE)


@triton.jit
def _store_turned_back(
    ptr,
    start,
    n,
    x,
    y,
    turns_ptr,
    position,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """Write the gradient of rows from that of both halves of the rotated rows."""
    HALF: tl.constexpr = HEAD_DIM // 2
    at, inside = _tile(ptr, start, n, ROWS, HALF, BLOCK_H, STRIDE)
    cos, sin = _turns(turns_ptr, position, ROWS, HEAD_DIM, BLOCK_H)
    tl.store(at, (x * cos + y * sin).to(ptr.dtype.element_ty), mask=inside)
    tl.store(at + HALF, (y * cos - x * sin).to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _bias_of_head(ptr, head, BIAS_REACH: tl.constexpr):
    """Pointer to the bias of distance 0."""
    if BIAS_REACH is not None:
        ptr += head * (2 * BIAS_REACH + 1) + BIAS_REACH
    return ptr


@triton.jit
def _bias(ptr, distance, HEAD_DIM: tl.constexpr, BIAS_REACH: tl.constexpr):
    """The position bias of distances, as large as logits are before they are scaled."""
    near = tl.minimum(tl.maximum(distance, -BIAS_REACH), BIAS_REACH)
    return tl.load(ptr + near).to(tl.float32) * (HEAD_DIM**0.5)


@triton.jit
def _forward_kernel(
    qkv_ptr,  # b n 3 h d
    mask_ptr,  # b n
    out_ptr,  # b n h d
    lse_ptr,  # b h n, fp32, to the base 2
    bias_ptr,  # h 2r+1
    turns_ptr,  # positions 2 d/2, fp32, or None
    n,
    window_size,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BIAS_REACH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """The output of a block of queries, and the lse of each query."""
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    start, row, column, numbers = _place(tl.program_id(0), n, HEADS, HEAD_DIM, BLOCK)
    qkv_ptr += row * (3 * WIDTH) + column
    bias_ptr = _bias_of_head(bias_ptr, column // HEAD_DIM, BIAS_REACH)

    query = start + tl.arange(0, BLOCK)
    first, end = _keys_of(query, n, window_size, CAUSAL)
    first_key, _ = _keys_of(start, n, window_size, CAUSAL)
    _, end_key = _keys_of(tl.minimum(start + BLOCK, n) - 1, n, window_size, CAUSAL)

    if turns_ptr is None:
        own, owned = _tile(qkv_ptr, start, n, BLOCK, HEAD_DIM, BLOCK_D, 3 * WIDTH)
        q = tl.load(own, mask=owned, other=0.0)
    else:
        q, q2 = _turned_at(qkv_ptr, start, n, turns_ptr, start - first_key, BLOCK, HEAD_DIM, BLOCK_H, 3 * WIDTH)
        cos, sin = _turns(turns_ptr, 0, TILE, HEAD_DIM, BLOCK_H)
        step_cos, step_sin = _turns(turns_ptr, TILE, 1, HEAD_DIM, BLOCK_H)
    max_logit = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    out = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for tile in range(tl.cdiv(end_key - first_key, TILE)):
        start_n = first_key + tile * TILE
        at, inside = _tile(qkv_ptr, start_n, n, TILE, HEAD_DIM, BLOCK_D, 3 * WIDTH)
        if turns_ptr is None:
            k = tl.load(at + WIDTH, mask=inside, other=0.0)
        else:
            k, k2 = _turned(qkv_ptr + WIDTH, start_n, n, cos, sin, TILE, HEAD_DIM, BLOCK_H, 3 * WIDTH)
            if qkv_ptr.dtype.element_ty == tl.float32:
                cos, sin = _turns(turns_ptr, (tile + 1) * TILE, TILE, HEAD_DIM, BLOCK_H)
            else:
                # Asynchronous loads of the table would go past the L1 cache for each tile. Errors grow with tiles:
                # to 4e-5 over 32768 keys, and to 1e-3 over a million.
                cos, sin = cos * step_cos - sin * step_sin, sin * step_cos + cos * step_sin
        v = tl.load(at + 2 * WIDTH, mask=inside, other=0.0)
        key = start_n + tl.arange(0, TILE)
        key = tl.where(_are_present(mask_ptr + row, key, n, HAS_MASK), key, NOWHERE)
        logits = dot(q, k.T, None, PRECISION)
        if turns_ptr is not None:
            logits = dot(q2, k2.T, logits, PRECISION)
        if BIAS_REACH is not None:
            logits += _bias(bias_ptr, key[None, :] - query[:, None], HEAD_DIM, BIAS_REACH)
        logits = tl.where(_within(key[None, :], first[:, None], end[:, None]), logits, float("-inf"))
        new_max = tl.maximum(max_logit, tl.max(logits, axis=1))
        # Nothing has been within reach of a query whose maximum is -inf. A difference of near numbers is exact.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2((logits - shift[:, None]) * scale)
        rescale = tl.exp2((max_logit - shift) * scale)
        total = total * rescale + tl.sum(p, axis=1)
        out = dot(p.to(v.dtype), v, out * rescale[:, None], PRECISION)
        max_logit = new_max

    nothing = total == 0
    out = out / tl.where(nothing, 1.0, total)[:, None]
    own, owned = _tile(out_ptr + row * WIDTH + column, start, n, BLOCK, HEAD_DIM, BLOCK_D, WIDTH)
    tl.store(own, out.to(out_ptr.dtype.element_ty), mask=owned)
    # p is exp2(logits * scale - lse): 0 where there is nothing to attend to.
    lse = tl.where(nothing, float("inf"), max_logit * scale + tl.log2(total))
    tl.store(lse_ptr + numbers + query, lse, mask=query < n)


@triton.jit
def _query_gradient(
    grad_output_ptr,
    qkv_ptr,
    mask_ptr,
    out_ptr,
    lse_ptr,
    dqkv_ptr,
    bias_ptr,
    turns_ptr,
    start,
    n,
    window_size,
    scale,
    dim_scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BIAS_REACH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """The gradient of a block of queries."""
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    query = start + tl.arange(0, BLOCK)
    first, end = _keys_of(query, n, window_size, CAUSAL)
    first_key, _ = _keys_of(start, n, window_size, CAUSAL)
    _, end_key = _keys_of(tl.minimum(start + BLOCK, n) - 1, n, window_size, CAUSAL)

    own, owned = _tile(grad_output_ptr, start, n, BLOCK, HEAD_DIM, BLOCK_D, WIDTH)
    grad_output = tl.load(own, mask=owned, other=0.0)
    own, owned = _tile(out_ptr, start, n, BLOCK, HEAD_DIM, BLOCK_D, WIDTH)
    out = tl.load(own, mask=owned, other=0.0)
    delta = tl.sum(grad_output.to(tl.float32) * out.to(tl.float32), axis=1)
    lse = tl.load(lse_ptr + query, mask=query < n, other=float("inf"))
    if turns_ptr is None:
        own, owned = _tile(qkv_ptr, start, n, BLOCK, HEAD_DIM, BLOCK_D, 3 * WIDTH)
        q = tl.load(own, mask=owned, other=0.0)
        dq = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    else:
        q, q2 = _turned_at(qkv_ptr, start, n, turns_ptr, start - first_key, BLOCK, HEAD_DIM, BLOCK_H, 3 * WIDTH)
        dq = tl.zeros([BLOCK, BLOCK_H], tl.float32)
        dq2 = tl.zeros([BLOCK, BLOCK_H], tl.float32)
    for tile in range(tl.cdiv(end_key - first_key, TILE)):
        start_n = first_key + tile * TILE
        key = start_n + tl.arange(0, TILE)
        key = tl.where(_are_present(mask_ptr, key, n, HAS_MASK), key, NOWHERE)
        at, inside = _tile(qkv_ptr, start_n, n, TILE, HEAD_DIM, BLOCK_D, 3 * WIDTH)
        if turns_ptr is None:
            k = tl.load(at + WIDTH, mask=inside, other=0.0)
        else:
            k, k2 = _turned_at(qkv_ptr + WIDTH, start_n, n, turns_ptr, tile * TILE, TILE, HEAD_DIM, BLOCK_H, 3 * WIDTH)
        v = tl.load(at + 2 * WIDTH, mask=inside, other=0.0)
        logits = dot(q, k.T, None, PRECISION)
        if turns_ptr is not None:
            logits = dot(q2, k2.T, logits, PRECISION)
        if BIAS_REACH is not None:
            logits += _bias(bias_ptr, key[None, :] - query[:, None], HEAD_DIM, BIAS_REACH)
        p = tl.exp2(logits * scale - lse[:, None])
        p = tl.where(_within(key[None, :], first[:, None], end[:, None]), p, 0.0)
        dp = dot(grad_output, v.T, None, PRECISION)
        dlogits = p * (dp - delta[:, None])
        dq = dot(dlogits.to(k.dtype), k, dq, PRECISION)
        if turns_ptr is not None:
            dq2 = dot(dlogits.to(k.dtype), k2, dq2, PRECISION)
    if turns_ptr is None:
        own, owned = _tile(dqkv_ptr, start, n, BLOCK, HEAD_DIM, BLOCK_D, 3 * WIDTH)
        tl.store(own, (dq * dim_scale).to(dqkv_ptr.dtype.element_ty), mask=owned)
    else:
        dq, dq2 = dq * dim_scale, dq2 * dim_scale
        _store_turned_back(
            dqkv_ptr, start, n, dq, dq2, turns_ptr, start - first_key, BLOCK, HEAD_DIM, BLOCK_H, 3 * WIDTH
        )


@triton.jit
def _key_value_gradient(
    grad_output_ptr,
    qkv_ptr,
    mask_ptr,
    out_ptr,
    lse_ptr,
    dqkv_ptr,
    bias_ptr,
    turns_ptr,
    start,
    n,
    window_size,
    scale,
    dim_scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BIAS_REACH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """The gradients of a block of keys and its values, in tiles of keys x queries."""
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    key = start + tl.arange(0, BLOCK)
    first, end = _queries_of(key, n, window_size, CAUSAL)
    end = tl.where(_are_present(mask_ptr, key, n, HAS_MASK), end, first)
    first_query, _ = _queries_of(start, n, window_size, CAUSAL)
    _, end_query = _queries_of(tl.minimum(start + BLOCK, n) - 1, n, window_size, CAUSAL)

    own, owned = _tile(qkv_ptr, start, n, BLOCK, HEAD_DIM, BLOCK_D, 3 * WIDTH)
    if turns_ptr is None:
        k = tl.load(own + WIDTH, mask=owned, other=0.0)
        dk = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    else:
        k, k2 = _turned_at(
            qkv_ptr + WIDTH, start, n, turns_ptr, start - first_query, BLOCK, HEAD_DIM, BLOCK_H, 3 * WIDTH
        )
        dk = tl.zeros([BLOCK, BLOCK_H], tl.float32)
        dk2 = tl.zeros([BLOCK, BLOCK_H], tl.float32)
    v = tl.load(own + 2 * WIDTH, mask=owned, other=0.0)
    dv = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for tile in range(tl.cdiv(end_query - first_query, TILE)):
        start_m = first_query + tile * TILE
        query = start_m + tl.arange(0, TILE)
        if turns_ptr is None:
            at, inside = _tile(qkv_ptr, start_m, n, TILE, HEAD_DIM, BLOCK_D, 3 * WIDTH)
            q = tl.load(at, mask=inside, other=0.0)
        else:
            q, q2 = _turned_at(qkv_ptr, start_m, n, turns_ptr, tile * TILE, TILE, HEAD_DIM, BLOCK_H, 3 * WIDTH)
        at, inside = _tile(grad_output_ptr, start_m, n, TILE, HEAD_DIM, BLOCK_D, WIDTH)
        grad_output = tl.load(at, mask=inside, other=0.0)
        at, inside = _tile(out_ptr, start_m, n, TILE, HEAD_DIM, BLOCK_D, WIDTH)
        out = tl.load(at, mask=inside, other=0.0)
        delta = tl.sum(grad_output.to(tl.float32) * out.to(tl.float32), axis=1)
        lse = tl.load(lse_ptr + query, mask=query < n, other=float("inf"))
        logits = dot(k, q.T, None, PRECISION)
        if turns_ptr is not None:
            logits = dot(k2, q2.T, logits, PRECISION)
        if BIAS_REACH is not None:
            logits += _bias(bias_ptr, key[:, None] - query[None, :], HEAD_DIM, BIAS_REACH)
        p = tl.exp2(logits * scale - lse[None, :])
        p = tl.where(_within(query[None, :], first[:, None], end[:, None]), p, 0.0)
        dv = dot(p.to(grad_output.dtype), grad_output, dv, PRECISION)
        dp = dot(v, grad_output.T, None, PRECISION)
        dlogits = p * (dp - delta[None, :])
        dk = dot(dlogits.to(q.dtype), q, dk, PRECISION)
        if turns_ptr is not None:
            dk2 = dot(dlogits.to(q.dtype), q2, dk2, PRECISION)
    own, owned = _tile(dqkv_ptr, start, n, BLOCK, HEAD_DIM, BLOCK_D, 3 * WIDTH)
    if turns_ptr is None:
        tl.store(own + WIDTH, (dk * dim_scale).to(dqkv_ptr.dtype.element_ty), mask=owned)
    else:
        dk, dk2 = dk * dim_scale, dk2 * dim_scale
        _store_turned_back(
            dqkv_ptr + WIDTH, start, n, dk, dk2, turns_ptr, start - first_query, BLOCK, HEAD_DIM, BLOCK_H, 3 * WIDTH
        )
    tl.store(own + 2 * WIDTH, dv.to(dqkv_ptr.dtype.element_ty), mask=owned)


@triton.jit
def _backward_kernel(
    grad_output_ptr,  # b n h d
    qkv_ptr,  # b n 3 h d
    mask_ptr,  # b n
    out_ptr,  # b n h d
    lse_ptr,  # b h n, fp32, to the base 2
    dqkv_ptr,  # b n 3 h d
    bias_ptr,  # h 2r+1
    turns_ptr,  # positions 2 d/2, fp32, or None
    n,
    window_size,
    scale,
    dim_scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BIAS_REACH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Compute all gradients of a block by two programs side by side. One then finds in the L2 cache what the other
    read."""
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    start, row, column, numbers = _place(tl.program_id(0) // 2, n, HEADS, HEAD_DIM, BLOCK)
    grad_output_ptr += row * WIDTH + column
    qkv_ptr += row * (3 * WIDTH) + column
    mask_ptr += row
    out_ptr += row * WIDTH + column
    lse_ptr += numbers
    dqkv_ptr += row * (3 * WIDTH) + column
    bias_ptr = _bias_of_head(bias_ptr, column // HEAD_DIM, BIAS_REACH)
    if tl.program_id(0) % 2 == 0:
        _query_gradient(
            grad_output_ptr,
            qkv_ptr,
            mask_ptr,
            out_ptr,
            lse_ptr,
            dqkv_ptr,
            bias_ptr,
            turns_ptr,
            start,
            n,
            window_size,
            scale,
            dim_scale,
            HEADS,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_H,
            CAUSAL,
            HAS_MASK,
            BIAS_REACH,
            BLOCK,
            TILE,
        )
    else:
        _key_value_gradient(
            grad_output_ptr,
            qkv_ptr,
            mask_ptr,
            out_ptr,
            lse_ptr,
            dqkv_ptr,
            bias_ptr,
            turns_ptr,
            start,
            n,
            window_size,
            scale,
            dim_scale,
            HEADS,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_H,
            CAUSAL,
            HAS_MASK,
            BIAS_REACH,
            BLOCK,
            TILE,
        )


@triton.jit
def _part(ptr, rows, n, part, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, PART: tl.constexpr):
    """Some dimensions of a head, `rows PART`; 0 where there is nothing."""
    dimension = part + tl.arange(0, PART)
    inside = (rows < n)[:, None] & (dimension < HEAD_DIM)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * STRIDE + dimension[None, :], mask=inside, other=0.0)


@triton.jit
def _bias_gradient_kernel(
    grad_output_ptr,  # b n h d
    qkv_ptr,  # b n 3 h d
    mask_ptr,  # b n
    out_ptr,  # b n h d
    lse_ptr,  # b h n, fp32, to the base 2
    sums_ptr,  # h offsets chunks 2 BLOCK, fp32
    bias_ptr,  # h 2r+1
    n,
    batch,
    window_size,
    scale,
    first_offset,
    offsets,
    chunks,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BIAS_REACH: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    """Sums of the gradient of logits over the diagonals of tiles. There is a tile for each of a chunk of blocks of
    queries, as many blocks before or after it as for the others."""
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    head = tl.program_id(0) % HEADS
    chunk = tl.program_id(0) // HEADS % chunks
    offset = tl.program_id(0) // (HEADS * chunks)
    shift = (first_offset + offset) * BLOCK
    column = head * HEAD_DIM
    bias_ptr = _bias_of_head(bias_ptr, head, BIAS_REACH)
    blocks = tl.cdiv(n, BLOCK)
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for block in range(chunk, batch * blocks, chunks):
        start = block % blocks * BLOCK
        start_n = start + shift
        # Both begin at multiples of a block: a tile is before the sequence, after it, or in it.
        if (start_n >= 0) & (start_n < n):
            element = (block // blocks).to(tl.int64)
            tokens = qkv_ptr + element * n * (3 * WIDTH) + column
            grads = grad_output_ptr + element * n * WIDTH + column
            outs = out_ptr + element * n * WIDTH + column
            query, key = start + tl.arange(0, BLOCK), start_n + tl.arange(0, BLOCK)
            logits = tl.zeros([BLOCK, BLOCK], tl.float32)
            dp = tl.zeros([BLOCK, BLOCK], tl.float32)
            delta = tl.zeros([BLOCK], tl.float32)
            # Whole heads of all five would take more registers than there are.
            for part in range(0, HEAD_DIM, PART):
                q = _part(tokens, query, n, part, 3 * WIDTH, HEAD_DIM, PART)
                k = _part(tokens + WIDTH, key, n, part, 3 * WIDTH, HEAD_DIM, PART)
                logits = dot(q, k.T, logits, PRECISION)
                grad_output = _part(grads, query, n, part, WIDTH, HEAD_DIM, PART)
                out = _part(outs, query, n, part, WIDTH, HEAD_DIM, PART)
                delta += tl.sum(grad_output.to(tl.float32) * out.to(tl.float32), axis=1)
                v = _part(tokens + 2 * WIDTH, key, n, part, 3 * WIDTH, HEAD_DIM, PART)
                dp = dot(grad_output, v.T, dp, PRECISION)
            first, end = _keys_of(query, n, window_size, CAUSAL)
            key = tl.where(_are_present(mask_ptr + element * n, key, n, HAS_MASK), key, NOWHERE)
            lse = tl.load(lse_ptr + (element * HEADS + head) * n + query, mask=query < n, other=float("inf"))
            logits += _bias(bias_ptr, shift + j - i, HEAD_DIM, BIAS_REACH)
            p = tl.exp2(logits * scale - lse[:, None])
            p = tl.where(_within(key[None, :], first[:, None], end[:, None]), p, 0.0)
            total += p * (dp - delta[:, None])

    # Row i is turned by i places. A column is then a diagonal, and its part that has come round is another.
    turned = tl.gather(total, (i + j) % BLOCK, axis=1)
    before = tl.sum(tl.where(i + j < BLOCK, 0.0, turned), axis=0)
    after = tl.sum(tl.where(i + j < BLOCK, turned, 0.0), axis=0)
    sums_ptr += ((head * offsets + offset).to(tl.int64) * chunks + chunk) * (2 * BLOCK)
    tl.store(sums_ptr + tl.arange(0, BLOCK), before)
    tl.store(sums_ptr + BLOCK + tl.arange(0, BLOCK), after)


@triton.jit
def _bias_sum_kernel(
    sums_ptr,  # h offsets chunks DIAGONALS, fp32
    dbias_ptr,  # h 2r+1
    first_offset,
    offsets,
    chunks,
    BIAS_REACH: tl.constexpr,
    MOST_CHUNKS: tl.constexpr,
    DIAGONALS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """The gradient of some entries of a position bias, from sums over diagonals."""
    ALL: tl.constexpr = 2 * BIAS_REACH + 1
    PARTS: tl.constexpr = (ALL + ENTRIES - 1) // ENTRIES
    head = tl.program_id(0) // PARTS
    entry = tl.program_id(0) % PARTS * ENTRIES + tl.arange(0, ENTRIES)
    diagonal, chunk = tl.arange(0, DIAGONALS), tl.arange(0, MOST_CHUNKS)
    total = tl.zeros([ENTRIES], tl.float32)
    for offset in range(offsets):
        at = sums_ptr + (head * offsets + offset).to(tl.int64) * (chunks * DIAGONALS)
        at += chunk[:, None] * DIAGONALS + diagonal[None, :]
        sums = tl.sum(tl.load(at, mask=(chunk < chunks)[:, None], other=0.0), axis=0)
        distance = (first_offset + offset - 1) * (DIAGONALS // 2) + diagonal
        near = tl.minimum(tl.maximum(distance, -BIAS_REACH), BIAS_REACH) + BIAS_REACH
        total += tl.sum(tl.where(near[None, :] == entry[:, None], sums[None, :], 0.0), axis=1)
    tl.store(dbias_ptr + head * ALL + entry, total.to(dbias_ptr.dtype.element_ty), mask=entry < ALL)


# By bytes of a number and by the dimensions of a head that there is place for. Those of 2 bytes and 64 were the fastest
# in a sweep on an H100; the others are smaller than what was, where that spilled on sm_80 or sm_90.
FORWARD = {
    (2, 64): Settings(64, 32, 4, 3),
    (2, 128): Settings(64, 32, 4, 2),
    (4, 64): Settings(32, 32, 4, 1),
    (4, 128): Settings(16, 32, 4, 1),
}
FORWARD_BIAS = {**FORWARD, (4, 64): Settings(16, 32, 4, 1)}
BACKWARD = {
    (2, 64): Settings(64, 32, 4, 1),
    (2, 128): Settings(64, 16, 4, 1),
    (4, 64): Settings(32, 16, 4, 1),
    (4, 128): Settings(16, 16, 8, 1),
}


BACKWARD_RAGGED = {
    (2, 64): Settings(32, 32, 4, 1),
    (2, 128): Settings(32, 16, 8, 1),
    (4, 64): Settings(16, 16, 8, 1),
    (4, 128): Settings(16, 16, 8, 1),
}
"""Settings for heads that take registers to load."""

BACKWARD_POSITIONS = {
    (2, 64): Settings(64, 16, 8, 1),
    (2, 128): Settings(32, 16, 8, 1),
    (4, 64): Settings(16, 16, 4, 1),
    (4, 128): Settings(16, 16, 8, 1),
}
"""Settings with positions: the largest that spill on neither sm_80 nor sm_90."""

BIAS_GRADIENT = {
    (2, False): Settings(64, 64, 8, 1),
    (2, True): Settings(32, 32, 4, 1),
    (4, False): Settings(32, 32, 4, 1),
    (4, True): Settings(16, 16, 4, 1),
}
"""Settings of the gradient of a position bias, by the bytes of a number, and for heads that are ragged. Its tiles are
as wide as they are long."""

PROGRAMS = 1024
"""About as many programs share the blocks of all sequences for that."""

MOST_CHUNKS = 64
"""At most so many chunks of blocks, whose sums a program of the second kernel adds up."""


def _plan_blocks(settings: Settings, programs: int, n: int, head_dim: int, itemsize: int) -> Plan:
    """So many programs for each block of a sequence."""
    tile = {"BLOCK": settings.block, "TILE": settings.tile, **options_for(settings, head_dim, itemsize)}
    return Plan(programs * triton.cdiv(n, settings.block), tile)


@planner
def _plan_forward(batch: int, n: int, heads: int, head_dim: int, itemsize: int, biased: bool) -> Plan:
    by_size = FORWARD_BIAS if biased else FORWARD
    settings = settings_for(by_size, head_dim, itemsize, ragged=by_size)
    return _plan_blocks(settings, batch * heads, n, head_dim, itemsize)


@planner
def _plan_backward(batch: int, n: int, heads: int, head_dim: int, itemsize: int, positions: bool) -> Plan:
    """Two programs for each block: for its queries, and for its keys."""
    by_size, ragged = (BACKWARD_POSITIONS, BACKWARD_POSITIONS) if positions else (BACKWARD, BACKWARD_RAGGED)
    settings = settings_for(by_size, head_dim, itemsize, ragged=ragged)
    return _plan_blocks(settings, 2 * batch * heads, n, head_dim, itemsize)


@planner
def _plan_bias_gradient(tiles: int, chunks: int, head_dim: int, itemsize: int) -> Plan:
    """A program for each tile beside a block, head and chunk of the blocks of all sequences."""
    block, _, num_warps, num_stages = BIAS_GRADIENT[itemsize, is_ragged(head_dim, itemsize)]
    part = min(max(triton.next_power_of_2(head_dim), 16), 64 // itemsize)
    return Plan(tiles * chunks, {"BLOCK": block, "PART": part, "num_warps": num_warps, "num_stages": num_stages})


def _plan_bias_sum(heads: int, reach: int) -> Plan:
    settings = {"MOST_CHUNKS": MOST_CHUNKS, "ENTRIES": 32, "num_warps": 4, "num_stages": 1}
    return Plan(heads * triton.cdiv(2 * reach + 1, 32), settings)


def _plan_turns(positions: int, half: int) -> Plan:
    columns = triton.next_power_of_2(half)
    block = max(128 // columns, 1)
    settings = {"BLOCK": block, "BLOCK_H": columns, "num_warps": 4, "num_stages": 1}
    return Plan(triton.cdiv(positions, block), settings)


@Launcher
def launch_forward(
    qkv: Tensor,
    heads: int,
    window_size: int,
    causal: bool,
    mask: Tensor | None,
    rotary_theta: float | None,
    position_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> Iterator[Launch]:
    """Fill in the output `b n (h d)` and the logarithms `b h n`, from contiguous tensors."""
    batch, n, width = out.shape
    head_dim = width // heads
    turns = yield from _turn(rotary_theta, n, head_dim // 2, window_size)
    yield Launch(
        _forward_kernel,
        _plan_forward(batch, n, heads, head_dim, out.itemsize, position_bias is not None),
        qkv,
        qkv if mask is None else mask,
        out,
        lse,
        qkv if position_bias is None else position_bias,
        turns,
        n,
        min(window_size, n),
        LOG2_E.value * head_dim**-0.5,
        **_constants(heads, head_dim, causal, mask, position_bias),
    )


@Launcher
def launch_backward(
    grad_output: Tensor,
    qkv: Tensor,
    heads: int,
    window_size: int,
    causal: bool,
    mask: Tensor | None,
    rotary_theta: float | None,
    position_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dqkv: Tensor,
    dbias: Tensor | None,
) -> Iterator[Launch]:
    """Fill in the gradients `b n (3 h d)` and, if it is wanted, `h (2 r + 1)`, from contiguous tensors."""
    batch, n, width = out.shape
    head_dim = width // heads
    turns = yield from _turn(rotary_theta, n, head_dim // 2, window_size)
    yield Launch(
        _backward_kernel,
        _plan_backward(batch, n, heads, head_dim, out.itemsize, rotary_theta is not None or position_bias is not None),
        grad_output,
        qkv,
        qkv if mask is None else mask,
        out,
        lse,
        dqkv,
        qkv if position_bias is None else position_bias,
        turns,
        n,
        min(window_size, n),
        LOG2_E.value * head_dim**-0.5,
        head_dim**-0.5,
        **_constants(heads, head_dim, causal, mask, position_bias),
    )
    if position_bias is not None and dbias is not None:
        inputs = (grad_output, qkv, qkv if mask is None else mask, out, lse)
        yield from _differentiate_bias(inputs, heads, window_size, causal, mask is not None, position_bias, dbias)


def _differentiate_bias(
    inputs: tuple[Tensor, ...],
    heads: int,
    window_size: int,
    causal: bool,
    has_mask: bool,
    position_bias: Tensor,
    dbias: Tensor,
) -> Iterator[Launch]:
    """Fill in the gradient `h (2 r + 1)`: first sums of many blocks, then those of diagonals of one distance."""
    out = inputs[3]
    batch, n, width = out.shape
    head_dim = width // heads
    block = BIAS_GRADIENT[out.itemsize, is_ragged(head_dim, out.itemsize)].block
    before = triton.cdiv(min(2 * window_size - 1 if causal else window_size, n - 1), block)
    offsets = before + 1 + (0 if causal else before)
    chunks = min(max(PROGRAMS // (heads * offsets), 1), batch * triton.cdiv(n, block), MOST_CHUNKS)
    sums = Scratch(heads * offsets, chunks, 2 * block, dtype=torch.float32)
    reach = position_bias.shape[1] // 2
    yield Launch(
        _bias_gradient_kernel,
        _plan_bias_gradient(heads * offsets, chunks, head_dim, out.itemsize),
        *inputs,
        sums,
        position_bias,
        n,
        batch,
        min(window_size, n),
        LOG2_E.value * head_dim**-0.5,
        -before,
        offsets,
        chunks,
        HEADS=heads,
        HEAD_DIM=head_dim,
        CAUSAL=causal,
        HAS_MASK=has_mask,
        BIAS_REACH=reach,
    )
    sizes = {"BIAS_REACH": reach, "DIAGONALS": 2 * block}
    yield Launch(_bias_sum_kernel, _plan_bias_sum(heads, reach), sums, dbias, -before, offsets, chunks, **sizes)


def _turn(theta: float | None, n: int, half: int, window_size: int) -> Generator[Launch, None, Scratch | None]:
    """Cosines and sines `positions 2 d/2` of as many positions as a program reaches from its first tile on."""
    if theta is None:
        return None
    # The last tile is read past its end, and the tile after it in advance.
    positions = min(2 * window_size, n) + 3 * MOST_ROWS
    turns = Scratch(positions, 2 * half, dtype=torch.float32)
    options = {"LOG2_THETA": math.log2(theta), "HALF": half}
    yield Launch(_turns_kernel, _plan_turns(positions, half), turns, positions, **options)
    return turns


def _constants(
    heads: int, head_dim: int, causal: bool, mask: Tensor | None, position_bias: Tensor | None
) -> dict[str, Any]:
    return {
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "BLOCK_H": max(triton.next_power_of_2(head_dim) // 2, 16),
        "CAUSAL": causal,
        "HAS_MASK": mask is not None,
        "BIAS_REACH": None if position_bias is None else position_bias.shape[1] // 2,
    }
