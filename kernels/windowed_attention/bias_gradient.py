"""The gradient of the position bias of `kernels.windowed_attention`: sums over diagonals, first of tiles, then of
all."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common.attention import Settings, dot, is_ragged
from kernels._common.launch import Launch, Scratch
from kernels._common.plans import Plan, planner
from kernels._common.primitives import LOG2_E
from kernels.windowed_attention.positions import bias_of_head, load_bias
from kernels.windowed_attention.tiles import NOWHERE, PRECISION, are_present, keys_of, within


@triton.jit
def _part(ptr, rows, n, part, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, PART: tl.constexpr):
    """Some dimensions of a head, `rows PART`; 0 for absent entries."""
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
    """Sums of the gradient of logits over the diagonals of tiles. Each block of queries in a chunk has one tile, and
    all these tiles have the same offset, in blocks, from the diagonal."""
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    head = tl.program_id(0) % HEADS
    chunk = tl.program_id(0) // HEADS % chunks
    offset = tl.program_id(0) // (HEADS * chunks)
    shift = (first_offset + offset) * BLOCK
    column = head * HEAD_DIM
    bias_ptr = bias_of_head(bias_ptr, head, BIAS_REACH)
    blocks = tl.cdiv(n, BLOCK)
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for block in range(chunk, batch * blocks, chunks):
        start = block % blocks * BLOCK
        start_n = start + shift
        # Both begin at multiples of a block, so a tile is before the sequence, after it, or in it.
        if (start_n >= 0) & (start_n < n):
            element = (block // blocks).to(tl.int64)
            tokens = qkv_ptr + element * n * (3 * WIDTH) + column
            grads = grad_output_ptr + element * n * WIDTH + column
            outs = out_ptr + element * n * WIDTH + column
            query, key = start + tl.arange(0, BLOCK), start_n + tl.arange(0, BLOCK)
            logits = tl.zeros([BLOCK, BLOCK], tl.float32)
            dp = tl.zeros([BLOCK, BLOCK], tl.float32)
            delta = tl.zeros([BLOCK], tl.float32)
            # Whole heads of all five tensors would need more registers than there are.
            for part in range(0, HEAD_DIM, PART):
                q = _part(tokens, query, n, part, 3 * WIDTH, HEAD_DIM, PART)
                k = _part(tokens + WIDTH, key, n, part, 3 * WIDTH, HEAD_DIM, PART)
                logits = dot(q, k.T, logits, PRECISION)
                grad_output = _part(grads, query, n, part, WIDTH, HEAD_DIM, PART)
                out = _part(outs, query, n, part, WIDTH, HEAD_DIM, PART)
                delta += tl.sum(grad_output.to(tl.float32) * out.to(tl.float32), axis=1)
                v = _part(tokens + 2 * WIDTH, key, n, part, 3 * WIDTH, HEAD_DIM, PART)
                dp = dot(grad_output, v.T, dp, PRECISION)
            first, end = keys_of(query, n, window_size, CAUSAL)
            key = tl.where(are_present(mask_ptr + element * n, key, n, HAS_MASK), key, NOWHERE)
            lse = tl.load(lse_ptr + (element * HEADS + head) * n + query, mask=query < n, other=float("inf"))
            logits += load_bias(bias_ptr, shift + j - i, HEAD_DIM, BIAS_REACH)
            p = tl.exp2(logits * scale - lse[:, None])
            p = tl.where(within(key[None, :], first[:, None], end[:, None]), p, 0.0)
            total += p * (dp - delta[:, None])

    # Row i is rolled by i columns. Then a column is one diagonal, and its wrapped part is another.
    rolled = tl.gather(total, (i + j) % BLOCK, axis=1)
    before = tl.sum(tl.where(i + j < BLOCK, 0.0, rolled), axis=0)
    after = tl.sum(tl.where(i + j < BLOCK, rolled, 0.0), axis=0)
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


BIAS_GRADIENT = {
    (2, False): Settings(64, 64, 8, 1),
    (2, True): Settings(32, 32, 4, 1),
    (4, False): Settings(32, 32, 4, 1),
    (4, True): Settings(16, 16, 4, 1),
}
"""Settings of the gradient of a position bias, by the bytes of a number, and by whether heads are ragged. Its tiles are
square."""

PROGRAMS = 1024
"""Approximate number of programs among which the blocks of all sequences are divided."""

MOST_CHUNKS = 64
"""Most chunks of blocks, whose sums a program of the second kernel adds up."""


@planner
def _plan_bias_gradient(tiles: int, chunks: int, head_dim: int, itemsize: int) -> Plan:
    """A program for each tile offset, head and chunk of the blocks of all sequences."""
    block, _, num_warps, num_stages = BIAS_GRADIENT[itemsize, is_ragged(head_dim, itemsize)]
    part = min(max(triton.next_power_of_2(head_dim), 16), 64 // itemsize)
    return Plan(tiles * chunks, {"BLOCK": block, "PART": part, "num_warps": num_warps, "num_stages": num_stages})


def _plan_bias_sum(heads: int, reach: int) -> Plan:
    settings = {"MOST_CHUNKS": MOST_CHUNKS, "ENTRIES": 32, "num_warps": 4, "num_stages": 1}
    return Plan(heads * triton.cdiv(2 * reach + 1, 32), settings)


def launch_bias_gradient(
    inputs: tuple[Tensor, ...],
    heads: int,
    window_size: int,
    causal: bool,
    has_mask: bool,
    position_bias: Tensor,
    dbias: Tensor,
) -> Iterator[Launch]:
    """Fill in the gradient `h (2 r + 1)`: first sums of many blocks, then sums of diagonals of the same distance."""
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
