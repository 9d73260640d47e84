"""Kernels of `kernels.windowed_attention`: one program for a block of queries, or of keys, of one head.

What queries may attend to is an interval of positions, and so is what attends to a key. Its two ends decide which tiles
a program looks at and which entries of a tile count.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._primitives import INTERPRETED, LOG2_E

LARGEST_HEAD = 128
"""Largest dimension of a head for which tiles fit into registers."""

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
    """Whether a position is in an interval: one comparison, as what is before it is a large unsigned number."""
    return (position - first).to(tl.uint32) < (end - first).to(tl.uint32)


@triton.jit
def _product(a, b, plus, PRECISION: tl.constexpr):
    """The matrix product in fp32, plus what there is if it is not None."""
    if INTERPRETED:
        # Which has bf16 as integers. A product of two of them is exact in fp32.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, plus, input_precision=PRECISION)


@triton.jit
def _are_present(mask_ptr, position, n, HAS_MASK: tl.constexpr):
    """Which keys there are to attend to."""
    present = position < n
    if HAS_MASK:
        present = tl.load(mask_ptr + position, mask=present, other=0) != 0
    return present


@triton.jit
def _offsets(ROWS: tl.constexpr, BLOCK_D: tl.constexpr, stride):
    return tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _inside(start, n, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    inside = (start + tl.arange(0, ROWS) < n)[:, None]
    if HEAD_DIM < BLOCK_D:
        inside = inside & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    return inside


@triton.jit
def _load_tile(ptr, start, n, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, STRIDE: tl.constexpr):
    """`ROWS BLOCK_D` from position start on, 0 past the end."""
    ptr += start.to(tl.int64) * STRIDE
    inside = _inside(start, n, ROWS, HEAD_DIM, BLOCK_D)
    return tl.load(ptr + _offsets(ROWS, BLOCK_D, STRIDE), mask=inside, other=0.0)


@triton.jit
def _store_tile(
    ptr, tile, start, n, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, STRIDE: tl.constexpr
):
    ptr += start.to(tl.int64) * STRIDE
    inside = _inside(start, n, ROWS, HEAD_DIM, BLOCK_D)
    tl.store(ptr + _offsets(ROWS, BLOCK_D, STRIDE), tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _place(program, n, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Start of the program's block, and how many rows, entries of a row and numbers a position are before its own.

    The heads of one block run side by side, as they are in memory.
    """
    head = program % HEADS
    batch = tl.program_id(1).to(tl.int64)
    return program // HEADS * BLOCK, batch * n, head * HEAD_DIM, (batch * HEADS + head) * n


@triton.jit
def _forward_kernel(
    qkv_ptr,  # b n 3 h d
    mask_ptr,  # b n
    out_ptr,  # b n h d
    log_sum_ptr,  # b h n, fp32
    n,
    window_size,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """The output of a block of queries, and the logarithm of what its softmax divides by."""
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    start, row, column, numbers = _place(tl.program_id(0), n, HEADS, HEAD_DIM, BLOCK)
    qkv_ptr += row * (3 * WIDTH) + column

    query = start + tl.arange(0, BLOCK)
    first, end = _keys_of(query, n, window_size, CAUSAL)
    first_key, _ = _keys_of(start, n, window_size, CAUSAL)
    _, end_key = _keys_of(tl.minimum(start + BLOCK, n) - 1, n, window_size, CAUSAL)

    q = _load_tile(qkv_ptr, start, n, BLOCK, HEAD_DIM, BLOCK_D, 3 * WIDTH)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    out = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for tile in range(tl.cdiv(end_key - first_key, TILE)):
        start_n = first_key + tile * TILE
        k = _load_tile(qkv_ptr + WIDTH, start_n, n, TILE, HEAD_DIM, BLOCK_D, 3 * WIDTH)
        v = _load_tile(qkv_ptr + 2 * WIDTH, start_n, n, TILE, HEAD_DIM, BLOCK_D, 3 * WIDTH)
        key = start_n + tl.arange(0, TILE)
        key = tl.where(_are_present(mask_ptr + row, key, n, HAS_MASK), key, NOWHERE)
        similarity = _product(q, k.T, None, PRECISION)
        similarity = tl.where(_within(key[None, :], first[:, None], end[:, None]), similarity, float("-inf"))
        larger = tl.maximum(largest, tl.max(similarity, axis=1) * scale)
        # Nothing has been within reach of a query whose largest is -inf.
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        weight = tl.exp2(similarity * scale - shift[:, None])
        shrink = tl.exp2(largest - shift)
        total = total * shrink + tl.sum(weight, axis=1)
        out = _product(weight.to(v.dtype), v, out * shrink[:, None], PRECISION)
        largest = larger

    nothing = total == 0
    out = out / tl.where(nothing, 1.0, total)[:, None]
    _store_tile(out_ptr + row * WIDTH + column, out, start, n, BLOCK, HEAD_DIM, BLOCK_D, WIDTH)
    # A weight is exp(similarity - log_sum): 0 where there is nothing to attend to.
    log_sum = tl.where(nothing, float("inf"), (largest + tl.log2(total)) / LOG2_E)
    tl.store(log_sum_ptr + numbers + query, log_sum, mask=query < n)


@triton.jit
def _query_gradient(
    grad_ptr,
    qkv_ptr,
    mask_ptr,
    out_ptr,
    log_sum_ptr,
    dqkv_ptr,
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
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """The gradient of a block of queries."""
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    query = start + tl.arange(0, BLOCK)
    first, end = _keys_of(query, n, window_size, CAUSAL)
    first_key, _ = _keys_of(start, n, window_size, CAUSAL)
    _, end_key = _keys_of(tl.minimum(start + BLOCK, n) - 1, n, window_size, CAUSAL)

    grad = _load_tile(grad_ptr, start, n, BLOCK, HEAD_DIM, BLOCK_D, WIDTH)
    out = _load_tile(out_ptr, start, n, BLOCK, HEAD_DIM, BLOCK_D, WIDTH)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    log_sum = LOG2_E * tl.load(log_sum_ptr + query, mask=query < n, other=float("inf"))
    q = _load_tile(qkv_ptr, start, n, BLOCK, HEAD_DIM, BLOCK_D, 3 * WIDTH)
    dq = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for tile in range(tl.cdiv(end_key - first_key, TILE)):
        start_n = first_key + tile * TILE
        key = start_n + tl.arange(0, TILE)
        key = tl.where(_are_present(mask_ptr, key, n, HAS_MASK), key, NOWHERE)
        k = _load_tile(qkv_ptr + WIDTH, start_n, n, TILE, HEAD_DIM, BLOCK_D, 3 * WIDTH)
        v = _load_tile(qkv_ptr + 2 * WIDTH, start_n, n, TILE, HEAD_DIM, BLOCK_D, 3 * WIDTH)
        similarity = _product(q, k.T, None, PRECISION)
        weight = tl.exp2(similarity * scale - log_sum[:, None])
        weight = tl.where(_within(key[None, :], first[:, None], end[:, None]), weight, 0.0)
        dweight = _product(grad, v.T, None, PRECISION)
        dsimilarity = weight * (dweight - delta[:, None])
        dq = _product(dsimilarity.to(k.dtype), k, dq, PRECISION)
    _store_tile(dqkv_ptr, dq * dim_scale, start, n, BLOCK, HEAD_DIM, BLOCK_D, 3 * WIDTH)


@triton.jit
def _key_value_gradient(
    grad_ptr,
    qkv_ptr,
    mask_ptr,
    out_ptr,
    log_sum_ptr,
    dqkv_ptr,
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
    PRECISION: tl.constexpr,
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

    k = _load_tile(qkv_ptr + WIDTH, start, n, BLOCK, HEAD_DIM, BLOCK_D, 3 * WIDTH)
    v = _load_tile(qkv_ptr + 2 * WIDTH, start, n, BLOCK, HEAD_DIM, BLOCK_D, 3 * WIDTH)
    dk = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for tile in range(tl.cdiv(end_query - first_query, TILE)):
        start_m = first_query + tile * TILE
        query = start_m + tl.arange(0, TILE)
        q = _load_tile(qkv_ptr, start_m, n, TILE, HEAD_DIM, BLOCK_D, 3 * WIDTH)
        grad = _load_tile(grad_ptr, start_m, n, TILE, HEAD_DIM, BLOCK_D, WIDTH)
        out = _load_tile(out_ptr, start_m, n, TILE, HEAD_DIM, BLOCK_D, WIDTH)
        delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
        log_sum = LOG2_E * tl.load(log_sum_ptr + query, mask=query < n, other=float("inf"))
        similarity = _product(k, q.T, None, PRECISION)
        weight = tl.exp2(similarity * scale - log_sum[None, :])
        weight = tl.where(_within(query[None, :], first[:, None], end[:, None]), weight, 0.0)
        dv = _product(weight.to(grad.dtype), grad, dv, PRECISION)
        dweight = _product(v, grad.T, None, PRECISION)
        dsimilarity = weight * (dweight - delta[None, :])
        dk = _product(dsimilarity.to(q.dtype), q, dk, PRECISION)
    _store_tile(dqkv_ptr + WIDTH, dk * dim_scale, start, n, BLOCK, HEAD_DIM, BLOCK_D, 3 * WIDTH)
    _store_tile(dqkv_ptr + 2 * WIDTH, dv, start, n, BLOCK, HEAD_DIM, BLOCK_D, 3 * WIDTH)


@triton.jit
def _backward_kernel(
    grad_ptr,  # b n h d
    qkv_ptr,  # b n 3 h d
    mask_ptr,  # b n
    out_ptr,  # b n h d
    log_sum_ptr,  # b h n, fp32
    dqkv_ptr,  # b n 3 h d
    n,
    window_size,
    scale,
    dim_scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """All gradients of a block by two programs side by side, so that one finds in the L2 cache what the other read."""
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    start, row, column, numbers = _place(tl.program_id(0) // 2, n, HEADS, HEAD_DIM, BLOCK)
    grad_ptr += row * WIDTH + column
    qkv_ptr += row * (3 * WIDTH) + column
    mask_ptr += row
    out_ptr += row * WIDTH + column
    log_sum_ptr += numbers
    dqkv_ptr += row * (3 * WIDTH) + column
    if tl.program_id(0) % 2 == 0:
        _query_gradient(
            grad_ptr,
            qkv_ptr,
            mask_ptr,
            out_ptr,
            log_sum_ptr,
            dqkv_ptr,
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
            PRECISION,
            BLOCK,
            TILE,
        )
    else:
        _key_value_gradient(
            grad_ptr,
            qkv_ptr,
            mask_ptr,
            out_ptr,
            log_sum_ptr,
            dqkv_ptr,
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
            PRECISION,
            BLOCK,
            TILE,
        )


class Settings(NamedTuple):
    """How a kernel is launched."""

    block: int
    """Queries, or keys, of a program."""

    tile: int
    """Keys, or queries, that meet them at a time."""

    num_warps: int
    num_stages: int


FORWARD = {
    (2, 64): Settings(64, 64, 4, 2),
    (2, 128): Settings(64, 32, 4, 2),
    (4, 64): Settings(64, 32, 4, 2),
    (4, 128): Settings(64, 32, 8, 2),
}
BACKWARD = {
    (2, 64): Settings(64, 64, 4, 2),
    (2, 128): Settings(64, 64, 8, 2),
    (4, 64): Settings(32, 32, 4, 2),
    (4, 128): Settings(32, 64, 8, 2),
}


def launch_forward(
    qkv: Tensor, heads: int, window_size: int, causal: bool, mask: Tensor | None, out: Tensor, log_sum: Tensor
) -> None:
    batch, n, width = out.shape
    settings = _settings(FORWARD, qkv, width // heads)
    _forward_kernel[(heads * triton.cdiv(n, settings.block), batch)](
        qkv,
        qkv if mask is None else mask,
        out,
        log_sum,
        n,
        min(window_size, n),
        LOG2_E.value * (width // heads) ** -0.5,
        **_constants(qkv, heads, width // heads, causal, mask, settings),
    )


def launch_backward(
    grad: Tensor,
    qkv: Tensor,
    heads: int,
    window_size: int,
    causal: bool,
    mask: Tensor | None,
    out: Tensor,
    log_sum: Tensor,
    dqkv: Tensor,
) -> None:
    batch, n, width = out.shape
    dim_scale = (width // heads) ** -0.5
    settings = _settings(BACKWARD, qkv, width // heads)
    _backward_kernel[(2 * heads * triton.cdiv(n, settings.block), batch)](
        grad,
        qkv,
        qkv if mask is None else mask,
        out,
        log_sum,
        dqkv,
        n,
        min(window_size, n),
        LOG2_E.value * dim_scale,
        dim_scale,
        **_constants(qkv, heads, width // heads, causal, mask, settings),
    )


def _settings(table, qkv, head_dim):
    return table[qkv.element_size(), 64 if head_dim <= 64 else 128]


PRECISION = "ieee"


def _constants(qkv, heads, head_dim, causal, mask, settings):
    return {
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(triton.next_power_of_2(head_dim), 16),
        "CAUSAL": causal,
        "HAS_MASK": mask is not None,
        "PRECISION": PRECISION,
        "BLOCK": settings.block,
        "TILE": settings.tile,
        "num_warps": settings.num_warps,
        "num_stages": settings.num_stages,
    }
