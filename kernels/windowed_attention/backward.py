"""The backward kernel of `kernels.windowed_attention`: two programs for a block, of queries and of keys."""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from kernels._common.attention import Settings, dot, settings_for
from kernels._common.launch import Launch, Launcher, Plan, planner
from kernels._common.primitives import LOG2_E
from kernels.windowed_attention.bias_gradient import launch_bias_gradient
from kernels.windowed_attention.positions import bias_of_head, launch_turns, load_bias, load_turned, store_turned_back
from kernels.windowed_attention.tiles import (
    NOWHERE,
    PRECISION,
    are_present,
    constants_of,
    keys_of,
    place_of,
    plan_blocks,
    queries_of,
    tile_at,
    within,
)


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
    first, end = keys_of(query, n, window_size, CAUSAL)
    first_key, _ = keys_of(start, n, window_size, CAUSAL)
    _, end_key = keys_of(tl.minimum(start + BLOCK, n) - 1, n, window_size, CAUSAL)

    own, owned = tile_at(grad_output_ptr, start, n, BLOCK, HEAD_DIM, BLOCK_D, WIDTH)
    grad_output = tl.load(own, mask=owned, other=0.0)
    own, owned = tile_at(out_ptr, start, n, BLOCK, HEAD_DIM, BLOCK_D, WIDTH)
    out = tl.load(own, mask=owned, other=0.0)
    delta = tl.sum(grad_output.to(tl.float32) * out.to(tl.float32), axis=1)
    lse = tl.load(lse_ptr + query, mask=query < n, other=float("inf"))
    if turns_ptr is None:
        own, owned = tile_at(qkv_ptr, start, n, BLOCK, HEAD_DIM, BLOCK_D, 3 * WIDTH)
        q = tl.load(own, mask=owned, other=0.0)
        dq = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    else:
        q, q2 = load_turned(qkv_ptr, start, n, turns_ptr, start - first_key, BLOCK, HEAD_DIM, BLOCK_H, 3 * WIDTH)
        dq = tl.zeros([BLOCK, BLOCK_H], tl.float32)
        dq2 = tl.zeros([BLOCK, BLOCK_H], tl.float32)
    for tile in range(tl.cdiv(end_key - first_key, TILE)):
        start_n = first_key + tile * TILE
        key = start_n + tl.arange(0, TILE)
        key = tl.where(are_present(mask_ptr, key, n, HAS_MASK), key, NOWHERE)
        at, inside = tile_at(qkv_ptr, start_n, n, TILE, HEAD_DIM, BLOCK_D, 3 * WIDTH)
        if turns_ptr is None:
            k = tl.load(at + WIDTH, mask=inside, other=0.0)
        else:
            k, k2 = load_turned(qkv_ptr + WIDTH, start_n, n, turns_ptr, tile * TILE, TILE, HEAD_DIM, BLOCK_H, 3 * WIDTH)
        v = tl.load(at + 2 * WIDTH, mask=inside, other=0.0)
        logits = dot(q, k.T, None, PRECISION)
        if turns_ptr is not None:
            logits = dot(q2, k2.T, logits, PRECISION)
        if BIAS_REACH is not None:
            logits += load_bias(bias_ptr, key[None, :] - query[:, None], HEAD_DIM, BIAS_REACH)
        p = tl.exp2(logits * scale - lse[:, None])
        p = tl.where(within(key[None, :], first[:, None], end[:, None]), p, 0.0)
        dp = dot(grad_output, v.T, None, PRECISION)
        dlogits = p * (dp - delta[:, None])
        dq = dot(dlogits.to(k.dtype), k, dq, PRECISION)
        if turns_ptr is not None:
            dq2 = dot(dlogits.to(k.dtype), k2, dq2, PRECISION)
    if turns_ptr is None:
        own, owned = tile_at(dqkv_ptr, start, n, BLOCK, HEAD_DIM, BLOCK_D, 3 * WIDTH)
        tl.store(own, (dq * dim_scale).to(dqkv_ptr.dtype.element_ty), mask=owned)
    else:
        dq, dq2 = dq * dim_scale, dq2 * dim_scale
        store_turned_back(
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
    first, end = queries_of(key, n, window_size, CAUSAL)
    end = tl.where(are_present(mask_ptr, key, n, HAS_MASK), end, first)
    first_query, _ = queries_of(start, n, window_size, CAUSAL)
    _, end_query = queries_of(tl.minimum(start + BLOCK, n) - 1, n, window_size, CAUSAL)

    own, owned = tile_at(qkv_ptr, start, n, BLOCK, HEAD_DIM, BLOCK_D, 3 * WIDTH)
    if turns_ptr is None:
        k = tl.load(own + WIDTH, mask=owned, other=0.0)
        dk = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    else:
        k, k2 = load_turned(
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
            at, inside = tile_at(qkv_ptr, start_m, n, TILE, HEAD_DIM, BLOCK_D, 3 * WIDTH)
            q = tl.load(at, mask=inside, other=0.0)
        else:
            q, q2 = load_turned(qkv_ptr, start_m, n, turns_ptr, tile * TILE, TILE, HEAD_DIM, BLOCK_H, 3 * WIDTH)
        at, inside = tile_at(grad_output_ptr, start_m, n, TILE, HEAD_DIM, BLOCK_D, WIDTH)
        grad_output = tl.load(at, mask=inside, other=0.0)
        at, inside = tile_at(out_ptr, start_m, n, TILE, HEAD_DIM, BLOCK_D, WIDTH)
        out = tl.load(at, mask=inside, other=0.0)
        delta = tl.sum(grad_output.to(tl.float32) * out.to(tl.float32), axis=1)
        lse = tl.load(lse_ptr + query, mask=query < n, other=float("inf"))
        logits = dot(k, q.T, None, PRECISION)
        if turns_ptr is not None:
            logits = dot(k2, q2.T, logits, PRECISION)
        if BIAS_REACH is not None:
            logits += load_bias(bias_ptr, key[:, None] - query[None, :], HEAD_DIM, BIAS_REACH)
        p = tl.exp2(logits * scale - lse[None, :])
        p = tl.where(within(query[None, :], first[:, None], end[:, None]), p, 0.0)
        dv = dot(p.to(grad_output.dtype), grad_output, dv, PRECISION)
        dp = dot(v, grad_output.T, None, PRECISION)
        dlogits = p * (dp - delta[None, :])
        dk = dot(dlogits.to(q.dtype), q, dk, PRECISION)
        if turns_ptr is not None:
            dk2 = dot(dlogits.to(q.dtype), q2, dk2, PRECISION)
    own, owned = tile_at(dqkv_ptr, start, n, BLOCK, HEAD_DIM, BLOCK_D, 3 * WIDTH)
    if turns_ptr is None:
        tl.store(own + WIDTH, (dk * dim_scale).to(dqkv_ptr.dtype.element_ty), mask=owned)
    else:
        dk, dk2 = dk * dim_scale, dk2 * dim_scale
        store_turned_back(
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
    start, row, column, numbers = place_of(tl.program_id(0) // 2, n, HEADS, HEAD_DIM, BLOCK)
    grad_output_ptr += row * WIDTH + column
    qkv_ptr += row * (3 * WIDTH) + column
    mask_ptr += row
    out_ptr += row * WIDTH + column
    lse_ptr += numbers
    dqkv_ptr += row * (3 * WIDTH) + column
    bias_ptr = bias_of_head(bias_ptr, column // HEAD_DIM, BIAS_REACH)
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


# By bytes of a number and dimensions of a head, as in the forward pass.
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


@planner
def _plan_backward(batch: int, n: int, heads: int, head_dim: int, itemsize: int, positions: bool) -> Plan:
    """Two programs for each block: for its queries, and for its keys."""
    by_size, ragged = (BACKWARD_POSITIONS, BACKWARD_POSITIONS) if positions else (BACKWARD, BACKWARD_RAGGED)
    settings = settings_for(by_size, head_dim, itemsize, ragged=ragged)
    return plan_blocks(settings, 2 * batch * heads, n, head_dim, itemsize)


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
    turns = yield from launch_turns(rotary_theta, n, head_dim // 2, window_size)
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
        **constants_of(heads, head_dim, causal, mask, position_bias),
    )
    if position_bias is not None and dbias is not None:
        inputs = (grad_output, qkv, qkv if mask is None else mask, out, lse)
        yield from launch_bias_gradient(inputs, heads, window_size, causal, mask is not None, position_bias, dbias)
