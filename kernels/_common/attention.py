"""Parts and settings of attention kernels. A program has a block of queries, or of keys, and reads the other side in
tiles."""

from collections.abc import Mapping
from typing import NamedTuple

import triton
import triton.language as tl

from kernels._common.plans import most_registers
from kernels._common.primitives import INTERPRETED

LARGEST_HEAD = 128
"""Largest dimension of a head for which tiles fit into registers."""


class Settings(NamedTuple):
    """Launch settings of a kernel."""

    block: int
    """Number of queries, or keys, of a program."""

    tile: int
    """Number of keys, or queries, in a tile of the other side."""

    num_warps: int
    num_stages: int


SettingsBySize = Mapping[tuple[int, int], Settings]
"""Settings by the bytes of an entry, and the largest dimension of a head for which they hold."""

RAGGED: SettingsBySize = {
    (2, 64): Settings(32, 32, 4, 2),
    (2, 128): Settings(32, 32, 8, 2),
    (4, 64): Settings(16, 16, 8, 2),
    (4, 128): Settings(16, 16, 8, 1),
}
"""Settings for heads whose loads need more registers, for kernels without their own."""


def settings_for(by_size: SettingsBySize, dim: int, itemsize: int, ragged: SettingsBySize = RAGGED) -> Settings:
    """Settings for heads with `dim` dimensions."""
    return (ragged if is_ragged(dim, itemsize) else by_size)[itemsize, 64 if dim <= 64 else LARGEST_HEAD]


def is_ragged(dim: int, itemsize: int) -> bool:
    """True if loads of heads with `dim` dimensions need more registers: entry by entry, or with a mask."""
    return dim % 16 > 0 or (dim > 32 and dim % (64 if itemsize == 4 else 32) > 0)


def precision_for_heads(dim: int) -> str:
    """Precision of products of fp32 heads. Three tf32 products of parts are as exact as one in fp32, but need twice the
    registers."""
    return "ieee" if is_ragged(dim, 4) else "tf32x3"


def options_for(settings: Settings, dim: int, itemsize: int) -> dict[str, int]:
    """Padded dimension of a head, and the options of a launch that loads such heads."""
    options = {
        "BLOCK_D": max(triton.next_power_of_2(dim), 16),
        "num_warps": settings.num_warps,
        "num_stages": settings.num_stages,
    }
    if is_ragged(dim, itemsize):
        # The assembler might otherwise spill to fit another program.
        options["maxnreg"] = most_registers(settings.num_warps)
    return options


@triton.jit
def dot(a, b, plus, PRECISION: tl.constexpr):
    """The matrix product in fp32, with `plus` added if it is not None."""
    if INTERPRETED:
        # The interpreter represents bf16 as integers. A product of two bf16 numbers is exact in fp32.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, plus, input_precision=PRECISION)


@triton.jit
def load_rows(ptr, rows, present, columns, stride, HEAD_DIM: tl.constexpr):
    """Rows of a head, `rows BLOCK_D`; 0 for absent entries."""
    inside = present[:, None] & (columns < HEAD_DIM)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def softmax_step(logits, scale, max_logit, total):
    """One tile of logits `queries keys` in an online softmax to the base 2, whose max is finite.

    Returns p before the division by the total, the rescale factor for all earlier sums, the new max and the new total.
    """
    new_max = tl.maximum(max_logit, tl.max(logits, axis=1) * scale)
    p = tl.exp2(logits * scale - new_max[:, None])
    rescale = tl.exp2(max_logit - new_max)
    return p, rescale, new_max, total * rescale + tl.sum(p, axis=1)
