"""The forward kernel of `kernels.windowed_attention`: one program for a block of queries of one head."""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from kernels._common.attention import Settings, dot, settings_for
from kernels._common.launch import Launch, Launcher
from kernels._common.plans import Plan, planner
from kernels._common.primitives import LOG2_E
from kernels.windowed_attention.positions import (
    bias_of_head,
    launch_rotated_keys,
    launch_rotations,
    load_arranged,
    load_bias,
    rotated_queries,
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
    rotations_ptr,  # STRETCH+stretches 2 d/2, fp32: cosines, sines
    rotated_ptr,  # b n ROTATED h d: rotated keys, then queries if they are kept; qkv has queries first
    n,
    window_size,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BIAS_REACH: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """The output of a block of queries, and the lse of each query."""
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    start, first_row, first_column, first_lse = place_of(tl.program_id(0), n, HEADS, HEAD_DIM, BLOCK)
    qkv_ptr += first_row * (3 * WIDTH) + first_column
    bias_ptr = bias_of_head(bias_ptr, first_column // HEAD_DIM, BIAS_REACH)

    query = start + tl.arange(0, BLOCK)
    first, end = keys_of(query, n, window_size, CAUSAL)
    first_key, _ = keys_of(start, n, window_size, CAUSAL)
    _, end_key = keys_of(tl.minimum(start + BLOCK, n) - 1, n, window_size, CAUSAL)

    if ROTATED == 0:
        block_at, in_block = tile_at(qkv_ptr, start, n, BLOCK, HEAD_DIM, BLOCK_D, 3 * WIDTH)
        q = tl.load(block_at, mask=in_block, other=0.0)
    else:
        rotated_ptr += first_row * (ROTATED * WIDTH) + first_column
        q = rotated_queries(qkv_ptr, rotations_ptr, rotated_ptr, start, n, BLOCK, HEADS, HEAD_DIM, BLOCK_D, ROTATED)
    max_logit = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    out = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for tile in range(tl.cdiv(end_key - first_key, TILE)):
        start_n = first_key + tile * TILE
        at, inside = tile_at(qkv_ptr, start_n, n, TILE, HEAD_DIM, BLOCK_D, 3 * WIDTH)
        if ROTATED == 0:
            k = tl.load(at + WIDTH, mask=inside, other=0.0)
        else:
            k = load_arranged(rotated_ptr, start_n, n, TILE, HEAD_DIM, BLOCK_D, ROTATED * WIDTH)
        v = tl.load(at + 2 * WIDTH, mask=inside, other=0.0)
        key = start_n + tl.arange(0, TILE)
        key = tl.where(are_present(mask_ptr + first_row, key, n, HAS_MASK), key, NOWHERE)
        logits = dot(q, k.T, None, PRECISION)
        if BIAS_REACH is not None:
            logits += load_bias(bias_ptr, key[None, :] - query[:, None], HEAD_DIM, BIAS_REACH)
        logits = tl.where(within(key[None, :], first[:, None], end[:, None]), logits, float("-inf"))
        new_max = tl.maximum(max_logit, tl.max(logits, axis=1))
        # No key was within reach of a query whose max is -inf. The difference of close numbers is exact.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2((logits - shift[:, None]) * scale)
        rescale = tl.exp2((max_logit - shift) * scale)
        total = total * rescale + tl.sum(p, axis=1)
        out = dot(p.to(v.dtype), v, out * rescale[:, None], PRECISION)
        max_logit = new_max

    nothing = total == 0
    out = out / tl.where(nothing, 1.0, total)[:, None]
    block_at, in_block = tile_at(out_ptr + first_row * WIDTH + first_column, start, n, BLOCK, HEAD_DIM, BLOCK_D, WIDTH)
    tl.store(block_at, out.to(out_ptr.dtype.element_ty), mask=in_block)
    # p is exp2(logits * scale - lse): 0 without keys to attend to.
    lse = tl.where(nothing, float("inf"), max_logit * scale + tl.log2(total))
    tl.store(lse_ptr + first_lse + query, lse, mask=query < n)


# By the bytes of a number and the largest dimension of a head. Settings for 2 bytes and 64 were the fastest in a sweep
# on an H100; the others are smaller than the fastest ones, which spilled on sm_80 or sm_90.
FORWARD = {
    (2, 64): Settings(64, 32, 4, 3),
    (2, 128): Settings(64, 32, 4, 2),
    (4, 64): Settings(32, 32, 4, 1),
    (4, 128): Settings(16, 32, 4, 1),
}


@planner
def _plan_forward(batch: int, n: int, heads: int, head_dim: int, itemsize: int) -> Plan:
    # Ragged heads need no settings of their own here: nothing spills.
    settings = settings_for(FORWARD, head_dim, itemsize, ragged=FORWARD)
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
    rotated: Tensor,
) -> Iterator[Launch]:
    """Fill in the output `b n (h d)`, the lse `b h n`, and rotated keys and queries `b n t (h d)`, from contiguous
    tensors. Without rotary position embedding t is 0; queries are not kept if t is 1."""
    batch, n, width = out.shape
    head_dim = width // heads
    rotations = yield from launch_rotations(rotary_theta, n, head_dim)
    if rotations is not None:
        yield launch_rotated_keys(qkv, heads, rotations, rotated)
    yield Launch(
        _forward_kernel,
        _plan_forward(batch, n, heads, head_dim, out.itemsize),
        qkv,
        qkv if mask is None else mask,
        out,
        lse,
        qkv if position_bias is None else position_bias,
        qkv if rotations is None else rotations,
        qkv if rotations is None else rotated,
        n,
        min(window_size, n),
        LOG2_E.value * head_dim**-0.5,
        **constants_of(heads, head_dim, causal, mask, position_bias),
        ROTATED=rotated.shape[2],
    )
