"""Kernels of `kernels.windowed_attention`: one program for a block of queries, or of keys, of one head.

What queries may attend to is an interval of positions, and so is what attends to a key. Its two ends decide which tiles
a program looks at and which entries of a tile count.
"""

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernels._common.attention import Settings, dot, options_for, settings_for
from kernels._common.launch import Launch, Launcher, Plan, planner
from kernels._common.primitives import LOG2_E

PRECISION = tl.constexpr("tf32x3")
"""Factors of fp32 are sums of two of tf32."""

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
def _forward_kernel(
    qkv_ptr,  # b n 3 h d
    mask_ptr,  # b n
    out_ptr,  # b n h d
    lse_ptr,  # b h n, fp32, to the base 2
    n,
    window_size,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """The output of a block of queries, and the lse of each query."""
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    start, row, column, numbers = _place(tl.program_id(0), n, HEADS, HEAD_DIM, BLOCK)
    qkv_ptr += row * (3 * WIDTH) + column

    query = start + tl.arange(0, BLOCK)
    first, end = _keys_of(query, n, window_size, CAUSAL)
    first_key, _ = _keys_of(start, n, window_size, CAUSAL)
    _, end_key = _keys_of(tl.minimum(start + BLOCK, n) - 1, n, window_size, CAUSAL)

    own, owned = _tile(qkv_ptr, start, n, BLOCK, HEAD_DIM, BLOCK_D, 3 * WIDTH)
    q = tl.load(own, mask=owned, other=0.0)
    max_logit = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    out = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for tile in range(tl.cdiv(end_key - first_key, TILE)):
        start_n = first_key + tile * TILE
        at, inside = _tile(qkv_ptr, start_n, n, TILE, HEAD_DIM, BLOCK_D, 3 * WIDTH)
        k = tl.load(at + WIDTH, mask=inside, other=0.0)
        v = tl.load(at + 2 * WIDTH, mask=inside, other=0.0)
        key = start_n + tl.arange(0, TILE)
        key = tl.where(_are_present(mask_ptr + row, key, n, HAS_MASK), key, NOWHERE)
        logits = dot(q, k.T, None, PRECISION)
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
    own, owned = _tile(qkv_ptr, start, n, BLOCK, HEAD_DIM, BLOCK_D, 3 * WIDTH)
    q = tl.load(own, mask=owned, other=0.0)
    dq = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for tile in range(tl.cdiv(end_key - first_key, TILE)):
        start_n = first_key + tile * TILE
        key = start_n + tl.arange(0, TILE)
        key = tl.where(_are_present(mask_ptr, key, n, HAS_MASK), key, NOWHERE)
        at, inside = _tile(qkv_ptr, start_n, n, TILE, HEAD_DIM, BLOCK_D, 3 * WIDTH)
        k = tl.load(at + WIDTH, mask=inside, other=0.0)
        v = tl.load(at + 2 * WIDTH, mask=inside, other=0.0)
        logits = dot(q, k.T, None, PRECISION)
        p = tl.exp2(logits * scale - lse[:, None])
        p = tl.where(_within(key[None, :], first[:, None], end[:, None]), p, 0.0)
        dp = dot(grad_output, v.T, None, PRECISION)
        dlogits = p * (dp - delta[:, None])
        dq = dot(dlogits.to(k.dtype), k, dq, PRECISION)
    own, owned = _tile(dqkv_ptr, start, n, BLOCK, HEAD_DIM, BLOCK_D, 3 * WIDTH)
    tl.store(own, (dq * dim_scale).to(dqkv_ptr.dtype.element_ty), mask=owned)


@triton.jit
def _key_value_gradient(
    grad_output_ptr,
    qkv_ptr,
    mask_ptr,
    out_ptr,
    lse_ptr,
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
    k = tl.load(own + WIDTH, mask=owned, other=0.0)
    v = tl.load(own + 2 * WIDTH, mask=owned, other=0.0)
    dk = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for tile in range(tl.cdiv(end_query - first_query, TILE)):
        start_m = first_query + tile * TILE
        query = start_m + tl.arange(0, TILE)
        at, inside = _tile(qkv_ptr, start_m, n, TILE, HEAD_DIM, BLOCK_D, 3 * WIDTH)
        q = tl.load(at, mask=inside, other=0.0)
        at, inside = _tile(grad_output_ptr, start_m, n, TILE, HEAD_DIM, BLOCK_D, WIDTH)
        grad_output = tl.load(at, mask=inside, other=0.0)
        at, inside = _tile(out_ptr, start_m, n, TILE, HEAD_DIM, BLOCK_D, WIDTH)
        out = tl.load(at, mask=inside, other=0.0)
        delta = tl.sum(grad_output.to(tl.float32) * out.to(tl.float32), axis=1)
        lse = tl.load(lse_ptr + query, mask=query < n, other=float("inf"))
        logits = dot(k, q.T, None, PRECISION)
        p = tl.exp2(logits * scale - lse[None, :])
        p = tl.where(_within(query[None, :], first[:, None], end[:, None]), p, 0.0)
        dv = dot(p.to(grad_output.dtype), grad_output, dv, PRECISION)
        dp = dot(v, grad_output.T, None, PRECISION)
        dlogits = p * (dp - delta[None, :])
        dk = dot(dlogits.to(q.dtype), q, dk, PRECISION)
    own, owned = _tile(dqkv_ptr, start, n, BLOCK, HEAD_DIM, BLOCK_D, 3 * WIDTH)
    tl.store(own + WIDTH, (dk * dim_scale).to(dqkv_ptr.dtype.element_ty), mask=owned)
    tl.store(own + 2 * WIDTH, dv.to(dqkv_ptr.dtype.element_ty), mask=owned)


@triton.jit
def _backward_kernel(
    grad_output_ptr,  # b n h d
    qkv_ptr,  # b n 3 h d
    mask_ptr,  # b n
    out_ptr,  # b n h d
    lse_ptr,  # b h n, fp32, to the base 2
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
    if tl.program_id(0) % 2 == 0:
        _query_gradient(
            grad_output_ptr,
            qkv_ptr,
            mask_ptr,
            out_ptr,
            lse_ptr,
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
            BLOCK,
            TILE,
        )


# By bytes of a number and by the dimensions of a head that there is place for. Those of 2 bytes and 64 were the fastest
# in a sweep on an H100; the others are smaller than what was, where that spilled on sm_80 or sm_90.
FORWARD = {
    (2, 64): Settings(64, 32, 4, 3),
    (2, 128): Settings(64, 32, 4, 2),
    (4, 64): Settings(32, 32, 4, 1),
    (4, 128): Settings(16, 32, 4, 1),
}
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


def _plan_blocks(settings: Settings, programs: int, n: int, head_dim: int, itemsize: int) -> Plan:
    """So many programs for each block of a sequence."""
    tile = {"BLOCK": settings.block, "TILE": settings.tile, **options_for(settings, head_dim, itemsize)}
    return Plan(programs * triton.cdiv(n, settings.block), tile)


@planner
def _plan_forward(batch: int, n: int, heads: int, head_dim: int, itemsize: int) -> Plan:
    settings = settings_for(FORWARD, head_dim, itemsize, ragged=FORWARD)
    return _plan_blocks(settings, batch * heads, n, head_dim, itemsize)


@planner
def _plan_backward(batch: int, n: int, heads: int, head_dim: int, itemsize: int) -> Plan:
    """Two programs for each block: for its queries, and for its keys."""
    settings = settings_for(BACKWARD, head_dim, itemsize, ragged=BACKWARD_RAGGED)
    return _plan_blocks(settings, 2 * batch * heads, n, head_dim, itemsize)


@Launcher
def launch_forward(
    qkv: Tensor, heads: int, window_size: int, causal: bool, mask: Tensor | None, out: Tensor, lse: Tensor
) -> Iterator[Launch]:
    """Fill in the output `b n (h d)` and the logarithms `b h n`, from contiguous tensors."""
    batch, n, width = out.shape
    head_dim = width // heads
    yield Launch(
        _forward_kernel,
        _plan_forward(batch, n, heads, head_dim, out.itemsize),
        qkv,
        qkv if mask is None else mask,
        out,
        lse,
        n,
        min(window_size, n),
        LOG2_E.value * head_dim**-0.5,
        **_constants(heads, head_dim, causal, mask),
    )


@Launcher
def launch_backward(
    grad_output: Tensor,
    qkv: Tensor,
    heads: int,
    window_size: int,
    causal: bool,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dqkv: Tensor,
) -> Iterator[Launch]:
    """Fill in the gradient `b n (3 h d)`, from contiguous tensors."""
    batch, n, width = out.shape
    head_dim = width // heads
    yield Launch(
        _backward_kernel,
        _plan_backward(batch, n, heads, head_dim, out.itemsize),
        grad_output,
        qkv,
        qkv if mask is None else mask,
        out,
        lse,
        dqkv,
        n,
        min(window_size, n),
        LOG2_E.value * head_dim**-0.5,
        head_dim**-0.5,
        **_constants(heads, head_dim, causal, mask),
    )


def _constants(heads: int, head_dim: int, causal: bool, mask: Tensor | None) -> dict[str, Any]:
    return {"HEADS": heads, "HEAD_DIM": head_dim, "CAUSAL": causal, "HAS_MASK": mask is not None}
