"""The forward kernel of `kernels.windowed_attention`: one program for a block of queries of one head."""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from kernels._common.attention import Settings, dot, settings_for
from kernels._common.launch import Launch, Launcher, Plan, planner
from kernels._common.primitives import LOG2_E
from kernels.windowed_attention.positions import (
    bias_of_head,
    launch_turns,
    load_bias,
    load_turned,
    load_turned_by,
    load_turns,
)
from kernels.windowed_attention.tiles import (
    NOWHERE,
    PRECISION,
    are_present,
    constants_of,
    keys_of,
    place_of,
    plan_blocks,
    tile_at,
    within,
)


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
    start, row, column, numbers = place_of(tl.program_id(0), n, HEADS, HEAD_DIM, BLOCK)
    qkv_ptr += row * (3 * WIDTH) + column
    bias_ptr = bias_of_head(bias_ptr, column // HEAD_DIM, BIAS_REACH)

    query = start + tl.arange(0, BLOCK)
    first, end = keys_of(query, n, window_size, CAUSAL)
    first_key, _ = keys_of(start, n, window_size, CAUSAL)
    _, end_key = keys_of(tl.minimum(start + BLOCK, n) - 1, n, window_size, CAUSAL)

    if turns_ptr is None:
        own, owned = tile_at(qkv_ptr, start, n, BLOCK, HEAD_DIM, BLOCK_D, 3 * WIDTH)
        q = tl.load(own, mask=owned, other=0.0)
    else:
        q, q2 = load_turned(qkv_ptr, start, n, turns_ptr, start - first_key, BLOCK, HEAD_DIM, BLOCK_H, 3 * WIDTH)
        cos, sin = load_turns(turns_ptr, 0, TILE, HEAD_DIM, BLOCK_H)
        step_cos, step_sin = load_turns(turns_ptr, TILE, 1, HEAD_DIM, BLOCK_H)
    max_logit = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    out = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for tile in range(tl.cdiv(end_key - first_key, TILE)):
        start_n = first_key + tile * TILE
        at, inside = tile_at(qkv_ptr, start_n, n, TILE, HEAD_DIM, BLOCK_D, 3 * WIDTH)
        if turns_ptr is None:
            k = tl.load(at + WIDTH, mask=inside, other=0.0)
        else:
            k, k2 = load_turned_by(qkv_ptr + WIDTH, start_n, n, cos, sin, TILE, HEAD_DIM, BLOCK_H, 3 * WIDTH)
            if qkv_ptr.dtype.element_ty == tl.float32:
                cos, sin = load_turns(turns_ptr, (tile + 1) * TILE, TILE, HEAD_DIM, BLOCK_H)
            else:
                # Asynchronous loads of the table would go past the L1 cache for each tile. Errors grow with tiles:
                # to 4e-5 over 32768 keys, and to 1e-3 over a million.
                cos, sin = cos * step_cos - sin * step_sin, sin * step_cos + cos * step_sin
        v = tl.load(at + 2 * WIDTH, mask=inside, other=0.0)
        key = start_n + tl.arange(0, TILE)
        key = tl.where(are_present(mask_ptr + row, key, n, HAS_MASK), key, NOWHERE)
        logits = dot(q, k.T, None, PRECISION)
        if turns_ptr is not None:
            logits = dot(q2, k2.T, logits, PRECISION)
        if BIAS_REACH is not None:
            logits += load_bias(bias_ptr, key[None, :] - query[:, None], HEAD_DIM, BIAS_REACH)
        logits = tl.where(within(key[None, :], first[:, None], end[:, None]), logits, float("-inf"))
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
    own, owned = tile_at(out_ptr + row * WIDTH + column, start, n, BLOCK, HEAD_DIM, BLOCK_D, WIDTH)
    tl.store(own, out.to(out_ptr.dtype.element_ty), mask=owned)
    # p is exp2(logits * scale - lse): 0 where there is nothing to attend to.
    lse = tl.where(nothing, float("inf"), max_logit * scale + tl.log2(total))
    tl.store(lse_ptr + numbers + query, lse, mask=query < n)


# By bytes of a number and by the dimensions of a head that there is place for. Those of 2 bytes and 64 were the fastest
# in a sweep on an H100; the others are smaller than what was, where that spilled on sm_80 or sm_90.
FORWARD = {
    (2, 64): Settings(64, 32, 4, 3),
    (2, 128): Settings(64, 32, 4, 2),
    (4, 64): Settings(32, 32, 4, 1),
    (4, 128): Settings(16, 32, 4, 1),
}
FORWARD_BIAS = {**FORWARD, (4, 64): Settings(16, 32, 4, 1)}


@planner
def _plan_forward(batch: int, n: int, heads: int, head_dim: int, itemsize: int, biased: bool) -> Plan:
    by_size = FORWARD_BIAS if biased else FORWARD
    settings = settings_for(by_size, head_dim, itemsize, ragged=by_size)
    return plan_blocks(settings, batch * heads, n, head_dim, itemsize)


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
    turns = yield from launch_turns(rotary_theta, n, head_dim // 2, window_size)
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
        **constants_of(heads, head_dim, causal, mask, position_bias),
    )
