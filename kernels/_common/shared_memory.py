"""Words of shared memory that a program adds to, stores and loads by index, which Triton's language lacks.

Functions that add take as many elements as the program has threads, or a multiple. For fewer elements, Triton would let
several threads add the same one. Triton does not know about these words: a program calls `tl.debug_barrier` between the
writes of some of its threads and the reads of others. The interpreter, which runs programs one by one, uses GPU memory
instead.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from kernels._common import tensors
from kernels._common.launch import Scratch

INTERPRETED: tl.constexpr = tl.constexpr(tensors.INTERPRETED)

MOST_WORDS = 12288
"""Most words that a kernel can declare: 48 KiB."""


def stand_in(words: int, otherwise: Any) -> Any:
    """The argument of `shared_words`: words for the interpreter; otherwise any pointer."""
    return Scratch(words, dtype=torch.int32) if tensors.INTERPRETED else otherwise


@triton.constexpr_function
def _declaration(words: int) -> str:
    return f"{{ .shared .align 16 .b32 words[{words}]; mov.b32 $0, words; }}"


@triton.jit
def shared_words(stand_in_ptr, WORDS: tl.constexpr):
    """Words with undefined values, up to `MOST_WORDS`. A kernel declares them once, outside of loops."""
    if INTERPRETED:
        return stand_in_ptr
    return tl.inline_asm_elementwise(_declaration(WORDS), "=r,r", [tl.program_id(0)], tl.int32, is_pure=False, pack=1)


@triton.jit
def load_word(words, place):
    """int32 at some indices."""
    if INTERPRETED:
        return tl.load(words + place)
    return tl.inline_asm_elementwise(
        "ld.shared.b32 $0, [$1];", "=r,r", [words + 4 * place], tl.int32, is_pure=False, pack=1
    )


@triton.jit
def store_word(words, place, value, mask):
    """Store int32 where a mask is True."""
    if INTERPRETED:
        tl.store(words + place, value, mask=mask)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.shared.b32 [$1], $2; mov.b32 $0, 0; }",
            "=r,r,r,r",
            [words + 4 * place, value, mask.to(tl.int32)],
            tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def load_four(words, place):
    """Four consecutive int32, from indices that are multiples of four."""
    if INTERPRETED:
        return (
            tl.load(words + place),
            tl.load(words + place + 1),
            tl.load(words + place + 2),
            tl.load(words + place + 3),
        )
    return tl.inline_asm_elementwise(
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,r",
        [words + 4 * place],
        (tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def store_four(words, place, first, second, third, fourth):
    """Store four consecutive int32, at indices that are multiples of four."""
    if INTERPRETED:
        tl.store(words + place, first)
        tl.store(words + place + 1, second)
        tl.store(words + place + 2, third)
        tl.store(words + place + 3, fourth)
    else:
        tl.inline_asm_elementwise(
            "{ st.shared.v4.b32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0; }",
            "=r,r,r,r,r,r",
            [words + 4 * place, first, second, third, fourth],
            tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def load_pair(words, place, mask):
    """The int64 in the two words from twice an index on, 0 where a mask is False."""
    if INTERPRETED:
        return tl.load(words.to(tl.pointer_type(tl.int64)) + place, mask=mask, other=0)
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b64 $0, 0; @p ld.shared.b64 $0, [$1]; }",
        "=&l,r,r",
        [words + 8 * place, mask.to(tl.int32)],
        tl.int64,
        is_pure=False,
        pack=1,
    )


@triton.jit
def store_pair(words, place, value, mask):
    """Store int64 in the two words from twice an index on, where a mask is True."""
    if INTERPRETED:
        tl.store(words.to(tl.pointer_type(tl.int64)) + place, value, mask=mask)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.shared.b64 [$1], $2; mov.b32 $0, 0; }",
            "=r,r,l,r",
            [words + 8 * place, value, mask.to(tl.int32)],
            tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def count_word(words, place, mask):
    """Add 1 where a mask is True. Threads of a warp that add to the same word do so at the same time."""
    if INTERPRETED:
        tl.atomic_add(words + place, 1, mask=mask)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p red.shared.add.u32 [$1], 1; mov.b32 $0, 0; }",
            "=r,r,r",
            [words + 4 * place, mask.to(tl.int32)],
            tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def add_word(words, place, amount: tl.constexpr, mask):
    """Add an amount where a mask is True. The results are the previous values, in any order, and 0 elsewhere."""
    if INTERPRETED:
        return tl.where(mask, tl.atomic_add(words + place, amount, mask=mask), 0)
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p atom.shared.add.u32 $0, [$1], $3; }",
        "=&r,r,r,r",
        [words + 4 * place, mask.to(tl.int32), amount],
        tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def take_place(words, place, mask):
    """Add 1 to one word where a mask is True. The results are the previous values, in any order, and undefined
    elsewhere.

    The first thread of a warp adds for all of them.
    """
    if INTERPRETED:
        return tl.atomic_add(words + place + tl.zeros(mask.shape, tl.int32), 1, mask=mask)
    return tl.inline_asm_elementwise(
        """{
        .reg .pred p, asks;
        .reg .b32 takers, earlier, lane, number;
        setp.ne.b32 p, $2, 0;
        vote.sync.ballot.b32 takers, p, 0xffffffff;
        mov.b32 $0, 0;
        setp.eq.b32 p, takers, 0;
        @p bra.uni done;
        popc.b32 number, takers;
        mov.b32 lane, %laneid;
        setp.eq.b32 asks, lane, 0;
        @asks atom.shared.add.u32 $0, [$1], number;
        shfl.sync.idx.b32 $0, $0, 0, 31, 0xffffffff;
        mov.b32 earlier, %lanemask_lt;
        and.b32 earlier, earlier, takers;
        popc.b32 number, earlier;
        add.u32 $0, $0, number;
        done:
        }""",
        "=&r,r,r",
        [words + 4 * place, mask.to(tl.int32)],
        tl.int32,
        is_pure=False,
        pack=1,
    )
