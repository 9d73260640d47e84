"""The backward kernel of `kernels.windowed_attention`: two programs per block, one for queries and one for keys."""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from kernels._common.attention import Settings, dot, settings_for
from kernels._common.launch import Launch, Launcher
from kernels._common.plans import Plan, planner
from kernels._common.primitives import LOG2_E
from kernels.windowed_attention.bias_gradient import launch_bias_gradient
from kernels.windowed_attention.positions import (
    bias_of_head,
    launch_rotations,
    load_arranged,
    load_bias,
    store_rotated_back,
)
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
    rotations_ptr,
    rotated_ptr,
    start,
    n,
    window_size,
    scale,
    dim_scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BIAS_REACH: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """The gradient of a block of queries."""
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    query = start + tl.arange(0, BLOCK)
    first, end = keys_of(query, n, window_size, CAUSAL)
    first_key, _ = keys_of(start, n, window_size, CAUSAL)
    _, end_key = keys_of(tl.minimum(start + BLOCK, n) - 1, n, window_size, CAUSAL)

    block_at, in_block = tile_at(grad_output_ptr, start, n, BLOCK, HEAD_DIM, BLOCK_D, WIDTH)
    grad_output = tl.load(block_at, mask=in_block, other=0.0)
    block_at, in_block = tile_at(out_ptr, start, n, BLOCK, HEAD_DIM, BLOCK_D, WIDTH)
    out = tl.load(block_at, mask=in_block, other=0.0)
    delta = tl.sum(grad_output.to(tl.float32) * out.to(tl.float32), axis=1)
    lse = tl.load(lse_ptr + query, mask=query < n, other=float("inf"))
    if ROTARY:
        # Queries are after keys here, and before keys in qkv.
        q = load_arranged(rotated_ptr + WIDTH, start, n, BLOCK, HEAD_DIM, BLOCK_D, 2 * WIDTH)
    else:
        block_at, in_block = tile_at(qkv_ptr, start, n, BLOCK, HEAD_DIM, BLOCK_D, 3 * WIDTH)
        q = tl.load(block_at, mask=in_block, other=0.0)
    dq = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for tile in range(tl.cdiv(end_key - first_key, TILE)):
        start_n = first_key + tile * TILE
        key = start_n + tl.arange(0, TILE)
        key = tl.where(are_present(mask_ptr, key, n, HAS_MASK), key, NOWHERE)
        at, inside = tile_at(qkv_ptr, start_n, n, TILE, HEAD_DIM, BLOCK_D, 3 * WIDTH)
        if ROTARY:
            k = load_arranged(rotated_ptr, start_n, n, TILE, HEAD_DIM, BLOCK_D, 2 * WIDTH)
        else:
            k = tl.load(at + WIDTH, mask=inside, other=0.0)
        v = tl.load(at + 2 * WIDTH, mask=inside, other=0.0)
        logits = dot(q, k.T, None, PRECISION)
        if BIAS_REACH is not None:
            logits += load_bias(bias_ptr, key[None, :] - query[:, None], HEAD_DIM, BIAS_REACH)
        p = tl.exp2(logits * scale - lse[:, None])
        p = tl.where(within(key[None, :], first[:, None], end[:, None]), p, 0.0)
        dp = dot(grad_output, v.T, None, PRECISION)
        dlogits = p * (dp - delta[:, None])
        dq = dot(dlogits.to(k.dtype), k, dq, PRECISION)
    if ROTARY:
        store_rotated_back(dqkv_ptr, start, n, dq * dim_scale, rotations_ptr, BLOCK, HEAD_DIM, BLOCK_D, 3 * WIDTH)
    else:
        block_at, in_block = tile_at(dqkv_ptr, start, n, BLOCK, HEAD_DIM, BLOCK_D, 3 * WIDTH)
        tl.store(block_at, (dq * dim_scale).to(dqkv_ptr.dtype.element_ty), mask=in_block)


@triton.jit
def _key_value_gradient(
    grad_output_ptr,
    qkv_ptr,
    mask_ptr,
    out_ptr,
    lse_ptr,
    dqkv_ptr,
    bias_ptr,
    rotations_ptr,
    rotated_ptr,
    start,
    n,
    window_size,
    scale,
    dim_scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BIAS_REACH: tl.constexpr,
    ROTARY: tl.constexpr,
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

    block_at, in_block = tile_at(qkv_ptr, start, n, BLOCK, HEAD_DIM, BLOCK_D, 3 * WIDTH)
    if ROTARY:
        k = load_arranged(rotated_ptr, start, n, BLOCK, HEAD_DIM, BLOCK_D, 2 * WIDTH)
    else:
        k = tl.load(block_at + WIDTH, mask=in_block, other=0.0)
    dk = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    v = tl.load(block_at + 2 * WIDTH, mask=in_block, other=0.0)
    dv = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for tile in range(tl.cdiv(end_query - first_query, TILE)):
        start_m = first_query + tile * TILE
        query = start_m + tl.arange(0, TILE)
        if ROTARY:
            q = load_arranged(rotated_ptr + WIDTH, start_m, n, TILE, HEAD_DIM, BLOCK_D, 2 * WIDTH)
        else:
            at, inside = tile_at(qkv_ptr, start_m, n, TILE, HEAD_DIM, BLOCK_D, 3 * WIDTH)
            q = tl.load(at, mask=inside, other=0.0)
        at, inside = tile_at(grad_output_ptr, start_m, n, TILE, HEAD_DIM, BLOCK_D, WIDTH)
        grad_output = tl.load(at, mask=inside, other=0.0)
        at, inside = tile_at(out_ptr, start_m, n, TILE, HEAD_DIM, BLOCK_D, WIDTH)
        out = tl.load(at, mask=inside, other=0.0)
        delta = tl.sum(grad_output.to(tl.float32) * out.to(tl.float32), axis=1)
        lse = tl.load(lse_ptr + query, mask=query < n, other=float("inf"))
        logits = dot(k, q.T, None, PRECISION)
        if BIAS_REACH is not None:
            logits += load_bias(bias_ptr, key[:, None] - query[None, :], HEAD_DIM, BIAS_REACH)
        p = tl.exp2(logits * scale - lse[None, :])
        p = tl.where(within(query[None, :], first[:, None], end[:, None]), p, 0.0)
        dv = dot(p.to(grad_output.dtype), grad_output, dv, PRECISION)
        dp = dot(v, grad_output.T, None, PRECISION)
        dlogits = p * (dp - delta[None, :])
        dk = dot(dlogits.to(q.dtype), q, dk, PRECISION)
    block_at, in_block = tile_at(dqkv_ptr, start, n, BLOCK, HEAD_DIM, BLOCK_D, 3 * WIDTH)
    if ROTARY:
        store_rotated_back(
            dqkv_ptr + WIDTH, start, n, dk * dim_scale, rotations_ptr, BLOCK, HEAD_DIM, BLOCK_D, 3 * WIDTH
        )
    else:
        tl.store(block_at + WIDTH, (dk * dim_scale).to(dqkv_ptr.dtype.element_ty), mask=in_block)
    tl.store(block_at + 2 * WIDTH, dv.to(dqkv_ptr.dtype.element_ty), mask=in_block)


@triton.jit
def _backward_kernel(
    grad_output_ptr,  # b n h d
    qkv_ptr,  # b n 3 h d
    mask_ptr,  # b n
    out_ptr,  # b n h d
    lse_ptr,  # b h n, fp32, to the base 2
    dqkv_ptr,  # b n 3 h d
    bias_ptr,  # h 2r+1
    rotations_ptr,  # STRETCH+stretches 2 d/2, fp32: cosines, sines
    rotated_ptr,  # b n 2 h d: rotated keys, then queries; qkv has queries first
    n,
    window_size,
    scale,
    dim_scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BIAS_REACH: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Compute all gradients of a block with two adjacent programs. One then finds data of the other in the L2 cache."""
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    start, first_row, first_column, first_lse = place_of(tl.program_id(0) // 2, n, HEADS, HEAD_DIM, BLOCK)
    grad_output_ptr += first_row * WIDTH + first_column
    qkv_ptr += first_row * (3 * WIDTH) + first_column
    mask_ptr += first_row
    out_ptr += first_row * WIDTH + first_column
    lse_ptr += first_lse
    dqkv_ptr += first_row * (3 * WIDTH) + first_column
    rotated_ptr += first_row * (2 * WIDTH) + first_column
    bias_ptr = bias_of_head(bias_ptr, first_column // HEAD_DIM, BIAS_REACH)
    if tl.program_id(0) % 2 == 0:
        _query_gradient(
            grad_output_ptr,
            qkv_ptr,
            mask_ptr,
            out_ptr,
            lse_ptr,
            dqkv_ptr,
            bias_ptr,
            rotations_ptr,
            rotated_ptr,
            start,
            n,
            window_size,
            scale,
            dim_scale,
            HEADS,
            HEAD_DIM,
            BLOCK_D,
            CAUSAL,
            HAS_MASK,
            BIAS_REACH,
            ROTARY,
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
            rotations_ptr,
            rotated_ptr,
            start,
            n,
            window_size,
            scale,
            dim_scale,
            HEADS,
            HEAD_DIM,
            BLOCK_D,
            CAUSAL,
            HAS_MASK,
            BIAS_REACH,
            ROTARY,
            BLOCK,
            TILE,
        )


# By the bytes of a number and the dimension of a head, as in the forward pass.
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
"""Settings for heads whose loads need more registers."""


@planner
def _plan_backward(batch: int, n: int, heads: int, head_dim: int, itemsize: int) -> Plan:
    """Two programs for each block: for its queries, and for its keys."""
    settings = settings_for(BACKWARD, head_dim, itemsize, ragged=BACKWARD_RAGGED)
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
    rotated: Tensor,
    dqkv: Tensor,
    dbias: Tensor | None,
) -> Iterator[Launch]:
    """Fill in the gradients `b n (3 h d)` and, if it is needed, `h (2 r + 1)`, from contiguous tensors."""
    batch, n, width = out.shape
    head_dim = width // heads
    rotations = yield from launch_rotations(rotary_theta, n, head_dim)
    yield Launch(
        _backward_kernel,
        _plan_backward(batch, n, heads, head_dim, out.itemsize),
        grad_output,
        qkv,
        qkv if mask is None else mask,
        out,
        lse,
        dqkv,
        qkv if position_bias is None else position_bias,
        qkv if rotations is None else rotations,
        qkv if rotations is None else rotated,
        n,
        min(window_size, n),
        LOG2_E.value * head_dim**-0.5,
        head_dim**-0.5,
        **constants_of(heads, head_dim, causal, mask, position_bias),
        ROTARY=rotations is not None,
    )
    if position_bias is not None and dbias is not None:
        inputs = (grad_output, qkv, qkv if mask is None else mask, out, lse)
        yield from launch_bias_gradient(inputs, heads, window_size, causal, mask is not None, position_bias, dbias)
