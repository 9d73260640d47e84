"""Positions in both passes: rotary embedding, and the position bias.

With rotary position embedding, a separate kernel rotates all keys, since each block of queries would have to rotate the
same keys again. The forward kernel rotates its queries, and keeps them for the backward pass.

Cosines and sines of a position are computed from two angles: that of its place in a stretch of positions, which the L1
cache holds, and that of the first position of the stretch.
"""

import math
from collections.abc import Generator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common.launch import Launch, Scratch
from kernels._common.plans import Plan, planner
from kernels.windowed_attention.tiles import place_of, tile_at

QUARTER_TURN = tl.constexpr(math.pi / 2)

STRETCH = tl.constexpr(64)
"""Positions per stretch, a multiple of the rows of a block."""


@triton.jit
def _cos_and_sin(angle):
    """Both in fp32, of an angle in fp64. The functions of libdevice spill, because they support angles of any size."""
    quarters = tl.floor(angle * (1 / QUARTER_TURN) + 0.5)
    x = (angle - quarters * QUARTER_TURN).to(tl.float32)
    # Taylor series: up to an eighth of a turn on either side of 0, the omitted terms are below 3e-8.
    xx = x * x
    cos = 1 + xx * (-1 / 2 + xx * (1 / 24 + xx * (-1 / 720 + xx * (1 / 40320))))
    sin = x * (1 + xx * (-1 / 6 + xx * (1 / 120 + xx * (-1 / 5040 + xx * (1 / 362880)))))
    quarter = quarters.to(tl.int64) & 3
    swapped = (quarter & 1) == 1
    cos, sin = tl.where(swapped, sin, cos), tl.where(swapped, cos, sin)
    return tl.where((quarter == 1) | (quarter == 2), -cos, cos), tl.where(quarter >= 2, -sin, sin)


@triton.jit
def _rotations_kernel(
    rotations_ptr,  # STRETCH+stretches 2 d/2, fp32: cosines, sines
    rows,
    LOG2_THETA: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Cosines and sines of the angles at each position of the first stretch, and at the start of each stretch."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    position = tl.where(row < STRETCH, row, (row - STRETCH) * STRETCH)
    column = tl.arange(0, BLOCK_H)
    frequency = tl.exp2(column.to(tl.float64) * (-LOG2_THETA / HALF))
    cos, sin = _cos_and_sin(position.to(tl.float64)[:, None] * frequency[None, :])
    at = rotations_ptr + row.to(tl.int64)[:, None] * (2 * HALF) + column[None, :]
    inside = (row < rows)[:, None] & (column < HALF)[None, :]
    tl.store(at, cos, mask=inside)
    tl.store(at + HALF, sin, mask=inside)


@triton.jit
def _load_rotations(ptr, start, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr):
    """Cosines and sines `ROWS BLOCK_H` of the angles from position start on."""
    HALF: tl.constexpr = HEAD_DIM // 2
    tl.static_assert(STRETCH % ROWS == 0, "a block may not reach into another stretch")
    column = tl.arange(0, BLOCK_H)
    there = column < HALF
    first = ptr + (STRETCH + start // STRETCH) * HEAD_DIM + column
    first_cos = tl.load(first, mask=there, other=0.0)[None, :]
    first_sin = tl.load(first + HALF, mask=there, other=0.0)[None, :]
    at = ptr + (start % STRETCH + tl.arange(0, ROWS))[:, None] * HEAD_DIM + column[None, :]
    cos, sin = tl.load(at, mask=there[None, :], other=0.0), tl.load(at + HALF, mask=there[None, :], other=0.0)
    return cos * first_cos - sin * first_sin, sin * first_cos + cos * first_sin


@triton.jit
def _load_and_rotate(
    ptr,
    rotations_ptr,
    start,
    n,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """Both halves `ROWS BLOCK_H` of rotated queries or keys from position start on."""
    at, inside = tile_at(ptr, start, n, ROWS, HEAD_DIM // 2, BLOCK_H, STRIDE)
    first, second = tl.load(at, mask=inside, other=0.0), tl.load(at + HEAD_DIM // 2, mask=inside, other=0.0)
    cos, sin = _load_rotations(rotations_ptr, start, ROWS, HEAD_DIM, BLOCK_H)
    x, y = first.to(tl.float32), second.to(tl.float32)
    return (x * cos - y * sin).to(first.dtype), (y * cos + x * sin).to(first.dtype)


@triton.jit
def _store_halves(
    ptr,
    start,
    n,
    first,
    second,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STRIDE: tl.constexpr,
):
    at, inside = tile_at(ptr, start, n, ROWS, HEAD_DIM // 2, BLOCK_H, STRIDE)
    tl.store(at, first.to(ptr.dtype.element_ty), mask=inside)
    tl.store(at + HEAD_DIM // 2, second.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def rotated_queries(
    qkv_ptr,
    rotations_ptr,
    rotated_ptr,
    start,
    n,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROTATED: tl.constexpr,
):
    """Rotated queries `BLOCK BLOCK_D` of a block, arranged as by `load_arranged`, and stored if there is memory for
    them."""
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    BLOCK_H: tl.constexpr = BLOCK_D // 2
    first, second = _load_and_rotate(qkv_ptr, rotations_ptr, start, n, BLOCK, HEAD_DIM, BLOCK_H, 3 * WIDTH)
    if ROTATED == 2:
        _store_halves(rotated_ptr + WIDTH, start, n, first, second, BLOCK, HEAD_DIM, BLOCK_H, 2 * WIDTH)
    return tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), [BLOCK, BLOCK_D])


@triton.jit
def load_arranged(
    ptr, start, n, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, STRIDE: tl.constexpr
):
    """Rows `ROWS BLOCK_D` with each half at the start of half of the columns, if there are more columns than
    dimensions."""
    if HEAD_DIM == BLOCK_D:
        at, inside = tile_at(ptr, start, n, ROWS, HEAD_DIM, BLOCK_D, STRIDE)
        return tl.load(at, mask=inside, other=0.0)
    row, column = start + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    in_half = column % (BLOCK_D // 2)
    at = ptr + row.to(tl.int64)[:, None] * STRIDE + (column // (BLOCK_D // 2) * (HEAD_DIM // 2) + in_half)[None, :]
    return tl.load(at, mask=(row < n)[:, None] & (in_half < HEAD_DIM // 2)[None, :], other=0.0)


@triton.jit
def store_rotated_back(
    ptr,
    start,
    n,
    x,
    rotations_ptr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """Write the gradient of queries or keys from that of the rotated ones, arranged in the same way."""
    BLOCK_H: tl.constexpr = BLOCK_D // 2
    first, second = tl.split(tl.permute(tl.reshape(x, [ROWS, 2, BLOCK_H]), (0, 2, 1)))
    cos, sin = _load_rotations(rotations_ptr, start, ROWS, HEAD_DIM, BLOCK_H)
    back = first * cos + second * sin
    _store_halves(ptr, start, n, back, second * cos - first * sin, ROWS, HEAD_DIM, BLOCK_H, STRIDE)


@triton.jit
def _rotated_keys_kernel(
    qkv_ptr,  # b n 3 h d
    rotations_ptr,  # STRETCH+stretches 2 d/2, fp32: cosines, sines
    rotated_ptr,  # b n ROTATED h d: rotated keys, then queries if they are kept; qkv has queries first
    n,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rotated keys of a block and head."""
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    start, first_row, first_column, _ = place_of(tl.program_id(0), n, HEADS, HEAD_DIM, BLOCK)
    keys_ptr = qkv_ptr + first_row * (3 * WIDTH) + (WIDTH + first_column)
    first, second = _load_and_rotate(keys_ptr, rotations_ptr, start, n, BLOCK, HEAD_DIM, BLOCK_H, 3 * WIDTH)
    rotated_ptr += first_row * (ROTATED * WIDTH) + first_column
    _store_halves(rotated_ptr, start, n, first, second, BLOCK, HEAD_DIM, BLOCK_H, ROTATED * WIDTH)


@triton.jit
def bias_of_head(ptr, head, BIAS_REACH: tl.constexpr):
    """Pointer to the bias of distance 0."""
    if BIAS_REACH is not None:
        ptr += head * (2 * BIAS_REACH + 1) + BIAS_REACH
    return ptr


@triton.jit
def load_bias(ptr, distance, HEAD_DIM: tl.constexpr, BIAS_REACH: tl.constexpr):
    """The position bias of distances, in the units of logits before they are scaled."""
    near = tl.minimum(tl.maximum(distance, -BIAS_REACH), BIAS_REACH)
    return tl.load(ptr + near).to(tl.float32) * (HEAD_DIM**0.5)


def _plan_rotations(rows: int, half: int) -> Plan:
    columns = triton.next_power_of_2(half)
    block = max(128 // columns, 1)
    settings = {"BLOCK": block, "BLOCK_H": columns, "num_warps": 4, "num_stages": 1}
    return Plan(triton.cdiv(rows, block), settings)


def launch_rotations(theta: float | None, n: int, head_dim: int) -> Generator[Launch, None, Scratch | None]:
    """Cosines and sines of angles for other kernels; None without rotary position embedding."""
    if theta is None:
        return None
    rows = STRETCH.value + triton.cdiv(n, STRETCH.value)
    rotations = Scratch(rows, head_dim, dtype=torch.float32)
    options = {"LOG2_THETA": math.log2(theta), "HALF": head_dim // 2}
    yield Launch(_rotations_kernel, _plan_rotations(rows, head_dim // 2), rotations, rows, **options)
    return rotations


@planner
def _plan_rotated_keys(batch: int, n: int, heads: int, head_dim: int) -> Plan:
    columns = triton.next_power_of_2(triton.cdiv(head_dim, 2))
    block = min(2048 // columns, STRETCH.value)
    settings = {"BLOCK": block, "BLOCK_H": columns, "num_warps": 4, "num_stages": 1}
    return Plan(batch * heads * triton.cdiv(n, block), settings)


def launch_rotated_keys(qkv: Tensor, heads: int, rotations: Scratch, rotated: Tensor) -> Launch:
    """Write rotated keys to `rotated`, `b n t (h d)`, as the first of t. They are before queries, unlike in `qkv`,
    because queries are kept only for a backward pass."""
    batch, n, width = qkv.shape
    head_dim = width // (3 * heads)
    options = {"HEADS": heads, "HEAD_DIM": head_dim, "ROTATED": rotated.shape[2]}
    return Launch(
        _rotated_keys_kernel, _plan_rotated_keys(batch, n, heads, head_dim), qkv, rotations, rotated, n, **options
    )
