"""Parts of both passes: positions in reach, tiles of rows, and the place of a program.

Positions that queries may attend to are an interval, and so are those that attend to a key. Its two ends decide which
tiles a program reads and which entries of a tile count.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernels._common.attention import Settings, options_for
from kernels._common.plans import Plan

PRECISION = tl.constexpr("tf32x3")
"""Each fp32 factor is a sum of two tf32 numbers."""

NOWHERE = tl.constexpr(-(2**30))
"""Position of an absent key: before every interval."""


@triton.jit
def keys_of(query, n, window_size, CAUSAL: tl.constexpr):
    """First key that a query may attend to, and the one after the last."""
    if CAUSAL:
        return tl.maximum((query // window_size - 1) * window_size, 0), query + 1
    return tl.maximum(query - window_size, 0), tl.minimum(query + window_size + 1, n)


@triton.jit
def queries_of(key, n, window_size, CAUSAL: tl.constexpr):
    """First query that may attend to a key, and the one after the last."""
    if CAUSAL:
        return key, tl.minimum((key // window_size + 2) * window_size, n)
    return tl.maximum(key - window_size, 0), tl.minimum(key + window_size + 1, n)


@triton.jit
def within(position, first, end):
    """True if a position is in an interval. One comparison is enough, since a position before it is a large unsigned
    number."""
    return (position - first).to(tl.uint32) < (end - first).to(tl.uint32)


@triton.jit
def are_present(mask_ptr, position, n, HAS_MASK: tl.constexpr):
    """True for keys that exist and are not masked."""
    present = position < n
    if HAS_MASK:
        present = tl.load(mask_ptr + position, mask=present, other=0) != 0
    return present


@triton.jit
def tile_at(ptr, start, n, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, STRIDE: tl.constexpr):
    """Pointers to `ROWS BLOCK_D` from position start on, and a mask of those inside."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside = start + row < n
    if HEAD_DIM < BLOCK_D:
        inside = inside & (column < HEAD_DIM)
    return ptr + start.to(tl.int64) * STRIDE + (row * STRIDE + column), inside


@triton.jit
def place_of(program, n, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """The first position of the program's block, and the place where its head begins. The place is a row and a column
    of `b n (h d)`, and an entry of `b h n`.

    Programs for the heads of a block are adjacent, as the heads are in memory.
    """
    head = program % HEADS
    block = program // HEADS
    blocks = tl.cdiv(n, BLOCK)
    batch = (block // blocks).to(tl.int64)
    return block % blocks * BLOCK, batch * n, head * HEAD_DIM, (batch * HEADS + head) * n


def plan_blocks(settings: Settings, programs: int, n: int, head_dim: int, itemsize: int) -> Plan:
    """`programs` programs for each block of a sequence."""
    tile = {"BLOCK": settings.block, "TILE": settings.tile, **options_for(settings, head_dim, itemsize)}
    return Plan(programs * triton.cdiv(n, settings.block), tile)


def constants_of(
    heads: int, head_dim: int, causal: bool, mask: Tensor | None, position_bias: Tensor | None
) -> dict[str, Any]:
    """Constants that kernels of both passes are compiled for."""
    return {
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "CAUSAL": causal,
        "HAS_MASK": mask is not None,
        "BIAS_REACH": None if position_bias is None else position_bias.shape[1] // 2,
    }
