"""Positions in both passes: rotary embedding, and the position bias.

Rotary position embedding depends on distances alone. A program counts positions from the first row of its first tile,
so that a short table of cosines and sines serves all programs. Its queries and keys are then of two halves, each
`rows d/2`, whose products add up. In the forward pass in half precision, cosines and sines of a tile come from those
of the tile before.
"""

import math
from collections.abc import Generator

import torch
import triton
import triton.language as tl

from kernels._common.launch import Launch, Plan, Scratch
from kernels.windowed_attention.tiles import tile_at

QUARTER_TURN = tl.constexpr(math.pi / 2)

MOST_ROWS = 64
"""A block or a tile has no more."""


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
def load_turns(ptr, position, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr):
    """Cosines and sines `ROWS BLOCK_H` from a position on."""
    HALF: tl.constexpr = HEAD_DIM // 2
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_H)[None, :]
    at = ptr + (position + row) * HEAD_DIM + column
    if HALF == BLOCK_H:
        return tl.load(at), tl.load(at + HALF)
    return tl.load(at, mask=column < HALF, other=0.0), tl.load(at + HALF, mask=column < HALF, other=0.0)


@triton.jit
def load_turned_by(
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
    at, inside = tile_at(ptr, start, n, ROWS, HALF, BLOCK_H, STRIDE)
    first = tl.load(at, mask=inside, other=0.0)
    second = tl.load(at + HALF, mask=inside, other=0.0)
    x, y = first.to(tl.float32), second.to(tl.float32)
    return (x * cos - y * sin).to(first.dtype), (y * cos + x * sin).to(first.dtype)


@triton.jit
def load_turned(
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
    cos, sin = load_turns(turns_ptr, position, ROWS, HEAD_DIM, BLOCK_H)
    return load_turned_by(ptr, start, n, cos, sin, ROWS, HEAD_DIM, BLOCK_H, STRIDE)


@triton.jit
def store_turned_back(
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
    at, inside = tile_at(ptr, start, n, ROWS, HALF, BLOCK_H, STRIDE)
    cos, sin = load_turns(turns_ptr, position, ROWS, HEAD_DIM, BLOCK_H)
    tl.store(at, (x * cos + y * sin).to(ptr.dtype.element_ty), mask=inside)
    tl.store(at + HALF, (y * cos - x * sin).to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def bias_of_head(ptr, head, BIAS_REACH: tl.constexpr):
    """Pointer to the bias of distance 0."""
    if BIAS_REACH is not None:
        ptr += head * (2 * BIAS_REACH + 1) + BIAS_REACH
    return ptr


@triton.jit
def load_bias(ptr, distance, HEAD_DIM: tl.constexpr, BIAS_REACH: tl.constexpr):
    """The position bias of distances, as large as logits are before they are scaled."""
    near = tl.minimum(tl.maximum(distance, -BIAS_REACH), BIAS_REACH)
    return tl.load(ptr + near).to(tl.float32) * (HEAD_DIM**0.5)


def _plan_turns(positions: int, half: int) -> Plan:
    columns = triton.next_power_of_2(half)
    block = max(128 // columns, 1)
    settings = {"BLOCK": block, "BLOCK_H": columns, "num_warps": 4, "num_stages": 1}
    return Plan(triton.cdiv(positions, block), settings)


def launch_turns(theta: float | None, n: int, half: int, window_size: int) -> Generator[Launch, None, Scratch | None]:
    """Cosines and sines `positions 2 d/2` of as many positions as a program reaches from its first tile on."""
    if theta is None:
        return None
    # The last tile is read past its end, and the tile after it in advance.
    positions = min(2 * window_size, n) + 3 * MOST_ROWS
    turns = Scratch(positions, 2 * half, dtype=torch.float32)
    options = {"LOG2_THETA": math.log2(theta), "HALF": half}
    yield Launch(_turns_kernel, _plan_turns(positions, half), turns, positions, **options)
    return turns
