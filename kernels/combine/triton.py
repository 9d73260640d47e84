"""Kernels of `kernels.combine`: the map of routed tokens, their sum with the other terms, and the gradients."""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from kernels._common.launch import COUNTS, Launch, Launcher
from kernels._common.plans import Plan, plan_rows, plan_sweep, planner
from kernels._common.shares import add_up_shares, clear_arrivals, new_shares, share_ptrs
from kernels._common.tensors import multiprocessors

LONGEST = 8192
"""Most features that the kernel supports; PyTorch computes more."""


PLACES, INDICES = 8192, 1024
"""Places that a program of the map writes, and indices that it reads at a time."""


@triton.jit(do_not_specialize=[*COUNTS, "n", "k"])
def _places_kernel(
    indices_ptr,  # b k
    slots_ptr,  # b n, int32
    arrivals_ptr,
    k,
    n,
    parts,
    PLACES: tl.constexpr,
    INDICES: tl.constexpr,
):
    """Write some places of one sequence."""
    clear_arrivals(arrivals_ptr)
    batch, start = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts * PLACES
    places = start + tl.arange(0, PLACES)
    tl.store(slots_ptr + batch * n + places, -1, mask=places < n)
    # Threads overwrite places of other threads.
    tl.debug_barrier()
    for first in range(0, k, INDICES):
        numbers = first + tl.arange(0, INDICES)
        routed = tl.load(indices_ptr + batch * k + numbers, mask=numbers < k, other=n).to(tl.int64)
        is_here = (routed >= start) & (routed < tl.minimum(start + PLACES, n))
        tl.store(slots_ptr + batch * n + routed, (batch * k + numbers).to(tl.int32), mask=is_here)


@triton.jit(do_not_specialize=[*COUNTS, "n", "start"])
def _forward_kernel(
    routed_ptr,  # b k d
    scores_ptr,  # b k
    slots_ptr,  # b n, int32
    null_ptr,  # d
    light_ptr,  # b n d
    residual_ptr,  # b n d
    bias_ptr,  # d
    routed_bias_ptr,  # d
    out_ptr,  # b n d
    routed_stride,
    light_stride,
    residual_stride,
    n_rows,
    d,
    n,
    start,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_NULL: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_LIGHT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ROUTED_BIAS: tl.constexpr,
):
    """Compute ROWS tokens."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)[None, :]
    there = (rows < n_rows)[:, None] & (columns < d)
    slots = tl.load(slots_ptr + rows, mask=rows < n_rows, other=-1)
    is_routed = (slots >= 0)[:, None]

    score = tl.load(scores_ptr + slots, mask=slots >= 0, other=0.0).to(tl.float32)[:, None]
    routed_ptrs = routed_ptr + slots.to(tl.int64)[:, None] * routed_stride + columns
    out = tl.load(routed_ptrs, mask=there & is_routed, other=0.0).to(tl.float32)
    if HAS_ROUTED_BIAS:
        out += tl.load(routed_bias_ptr + columns, mask=columns < d, other=0.0).to(tl.float32)
    out *= score
    if HAS_NULL:
        null = tl.load(null_ptr + columns, mask=columns < d, other=0.0).to(tl.float32)
        if HAS_START:
            is_routed = is_routed | (rows % n < start)[:, None]
        out = tl.where(is_routed, out, null)
    if HAS_LIGHT:
        out += tl.load(light_ptr + rows[:, None] * light_stride + columns, mask=there, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        out += tl.load(residual_ptr + rows[:, None] * residual_stride + columns, mask=there, other=0.0).to(tl.float32)
    if HAS_BIAS:
        out += tl.load(bias_ptr + columns, mask=columns < d, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows[:, None] * d + columns, out.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def _differentiate_routed(
    grad_output_ptr, routed_ptr, scores_ptr, indices_ptr, routed_bias_ptr, drouted_ptr, dscores_ptr, grad_output_stride,
    routed_stride, program, n_routed, k, n, d, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Gradients of ROWS routed tokens. A token without a place has no gradient."""
    slots = program * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)[None, :]
    there = (slots < n_routed)[:, None] & (columns < d)
    places = tl.load(indices_ptr + slots, mask=slots < n_routed, other=n).to(tl.int64)
    grad_output_ptrs = (
        grad_output_ptr + ((slots // k).to(tl.int64) * n + places)[:, None] * grad_output_stride + columns
    )
    grad_output = tl.load(grad_output_ptrs, mask=there & (places < n)[:, None], other=0.0).to(tl.float32)

    rows = slots.to(tl.int64)
    routed = tl.load(routed_ptr + rows[:, None] * routed_stride + columns, mask=there, other=0.0).to(tl.float32)
    score = tl.load(scores_ptr + slots, mask=slots < n_routed, other=0.0).to(tl.float32)
    if HAS_BIAS:
        routed += tl.load(routed_bias_ptr + columns, mask=columns < d, other=0.0).to(tl.float32)
    dscores = tl.sum(grad_output * routed, axis=1)
    tl.store(dscores_ptr + slots, dscores.to(dscores_ptr.dtype.element_ty), mask=slots < n_routed)
    drouted = grad_output * score[:, None]
    tl.store(drouted_ptr + rows[:, None] * d + columns, drouted.to(drouted_ptr.dtype.element_ty), mask=there)


@triton.jit
def _differentiate_others(
    grad_output_ptr, scores_ptr, slots_ptr, dlight_ptr, shares_ptr, sums_ptr, arrivals_ptr, grad_output_stride,
    program, programs, n_rows, d, n, start, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, HAS_NULL: tl.constexpr,
    HAS_START: tl.constexpr, CASTS_LIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ROUTED_BIAS: tl.constexpr,
):  # fmt: skip
    """Gradients through every `programs`-th tile of ROWS tokens."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    dnull = tl.zeros([ROWS, BLOCK_D], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK_D], tl.float32)
    drouted_bias = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for tile in range(program, tl.cdiv(n_rows, ROWS), programs):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        there = (rows < n_rows)[:, None] & (columns < d)
        grad_output = tl.load(grad_output_ptr + rows[:, None] * grad_output_stride + columns, mask=there, other=0.0)
        if CASTS_LIGHT:
            tl.store(dlight_ptr + rows[:, None] * d + columns, grad_output.to(dlight_ptr.dtype.element_ty), mask=there)
        if HAS_NULL or HAS_ROUTED_BIAS:
            slots = tl.load(slots_ptr + rows, mask=rows < n_rows, other=0)
        if HAS_ROUTED_BIAS:
            score = tl.load(scores_ptr + slots, mask=(slots >= 0) & (rows < n_rows), other=0.0).to(tl.float32)
            drouted_bias += grad_output.to(tl.float32) * score[:, None]
        if HAS_NULL:
            if HAS_START:
                slots = tl.where(rows % n < start, 0, slots)
            dnull += tl.where((slots < 0)[:, None], grad_output.to(tl.float32), 0.0)
        if HAS_BIAS:
            dbias += grad_output.to(tl.float32)
    if HAS_NULL or HAS_BIAS or HAS_ROUTED_BIAS:
        SUMS: tl.constexpr = 3 if HAS_BIAS or HAS_ROUTED_BIAS else 1
        for number in tl.static_range(SUMS):
            total = dnull if number == 0 else dbias if number == 1 else drouted_bias
            share = share_ptrs(shares_ptr, number, program, programs, d, columns)
            tl.store(share, tl.sum(total, axis=0)[None, :], mask=columns < d)
        add_up_shares(shares_ptr, sums_ptr, arrivals_ptr, program, programs, d, SUMS, BLOCK_D)


@triton.jit(do_not_specialize=[*COUNTS, "n", "k", "start", "of_others"])
def _backward_kernel(
    grad_output_ptr,  # b n d
    routed_ptr,  # b k d
    scores_ptr,  # b k
    indices_ptr,  # b k
    routed_bias_ptr,  # d
    slots_ptr,  # b n, int32
    drouted_ptr,  # b k d
    dscores_ptr,  # b k
    dlight_ptr,  # b n d
    shares_ptr,  # sums programs+groups d, fp32: null token, bias, and bias of routed tokens
    sums_ptr,  # sums d, fp32
    arrivals_ptr,
    grad_output_stride,
    routed_stride,
    n_rows,
    n_routed,
    k,
    d,
    n,
    start,
    of_others,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_NULL: tl.constexpr,
    HAS_START: tl.constexpr,
    CASTS_LIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ROUTED_BIAS: tl.constexpr,
):
    """The first programs sweep over all tokens; each other program has some routed tokens."""
    program = tl.program_id(0)
    if program < of_others:
        _differentiate_others(
            grad_output_ptr, scores_ptr, slots_ptr, dlight_ptr, shares_ptr, sums_ptr, arrivals_ptr, grad_output_stride,
            program, of_others, n_rows, d, n, start, ROWS, BLOCK_D, HAS_NULL, HAS_START, CASTS_LIGHT, HAS_BIAS,
            HAS_ROUTED_BIAS,
        )  # fmt: skip
    else:
        _differentiate_routed(
            grad_output_ptr, routed_ptr, scores_ptr, indices_ptr, routed_bias_ptr, drouted_ptr, dscores_ptr,
            grad_output_stride, routed_stride, program - of_others, n_routed, k, n, d, ROWS, BLOCK_D, HAS_ROUTED_BIAS,
        )  # fmt: skip


@planner
def _plan_places(batch: int, n: int) -> Plan:
    """Pieces are parts of a sequence."""
    parts = triton.cdiv(n, PLACES)
    return Plan(batch * parts, {"PLACES": PLACES, "INDICES": INDICES, "num_warps": 8}, parts)


@Launcher
def launch_places(indices: Tensor, slots: Tensor, arrivals: Tensor) -> Iterator[Launch]:
    """Write the map to slots `b n`, int32: the index of the routed token `b k` in each place, or -1."""
    (batch, k), n = indices.shape, slots.shape[1]
    plan = _plan_places(batch, n)
    yield Launch(_places_kernel, plan, indices, slots, arrivals, k, n, plan.pieces)


@Launcher
def launch_forward(
    routed: Tensor,
    scores: Tensor,
    slots: Tensor,
    null: Tensor | None,
    light: Tensor | None,
    residual: Tensor | None,
    bias: Tensor | None,
    routed_bias: Tensor | None,
    start: int,
    out: Tensor,
) -> Iterator[Launch]:
    """Write the sum `b n d` of routed tokens `(b k) d` and the optional terms `(b n) d`, by the map of `map_slots`. The
    null token is used from the token `start` on."""
    n_rows, d = slots.numel(), routed.shape[1]
    yield Launch(
        _forward_kernel,
        plan_rows(n_rows, d),
        routed,
        scores,
        slots,
        scores if null is None else null,
        out if light is None else light,
        out if residual is None else residual,
        scores if bias is None else bias,
        scores if routed_bias is None else routed_bias,
        out,
        routed.stride(0),
        0 if light is None else light.stride(0),
        0 if residual is None else residual.stride(0),
        n_rows,
        d,
        slots.shape[1],
        start,
        HAS_NULL=null is not None,
        HAS_START=start > 0,
        HAS_LIGHT=light is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_BIAS=bias is not None,
        HAS_ROUTED_BIAS=routed_bias is not None,
    )


@planner
def _plan_backward(n_rows: int, n_routed: int, d: int, available: int, sweeps: bool) -> Plan:
    """Programs that sweep over all rows, which are the pieces, then those for routed tokens."""
    sweep = plan_sweep(n_rows, d, available)
    of_others = sweep.programs if sweeps else 0
    return Plan(of_others + triton.cdiv(n_routed, sweep.settings["ROWS"]), sweep.settings, of_others)


def launch_backward(
    grad_output: Tensor,
    routed: Tensor,
    scores: Tensor,
    indices: Tensor,
    routed_bias: Tensor | None,
    slots: Tensor | None,
    arrivals: Tensor,
    start: int,
    has_null: bool,
    has_bias: bool,
    drouted: Tensor,
    dscores: Tensor,
    dlight: Tensor | None,
    sums: Tensor,
) -> None:
    """Write the gradients of routed tokens and of their scores.

    The gradient of the light branch is written as well, if it is needed. Gradients of vectors are the sums `sums d`, of
    which there may be none.
    """
    n_sums, d = sums.shape
    programs = _plan(grad_output, indices, n_sums > 0).pieces if n_sums else 0
    shares = new_shares(n_sums, programs, d, grad_output)
    inputs = (grad_output, routed, scores, indices, routed_bias, slots, arrivals)
    _launch_backward(*inputs, start, has_null, has_bias, drouted, dscores, dlight, shares, sums)


def _plan(grad_output: Tensor, indices: Tensor, sweeps: bool) -> Plan:
    n_rows, d = grad_output.shape
    return _plan_backward(n_rows, indices.numel(), d, multiprocessors(grad_output.device), sweeps)


@Launcher
def _launch_backward(
    grad_output: Tensor,
    routed: Tensor,
    scores: Tensor,
    indices: Tensor,
    routed_bias: Tensor | None,
    slots: Tensor | None,
    arrivals: Tensor,
    start: int,
    has_null: bool,
    has_bias: bool,
    drouted: Tensor,
    dscores: Tensor,
    dlight: Tensor | None,
    shares: Tensor,
    sums: Tensor,
) -> Iterator[Launch]:
    (n_rows, d), (batch, k) = grad_output.shape, indices.shape
    plan = _plan(grad_output, indices, sums.shape[0] > 0 or dlight is not None)
    if plan.programs:
        yield Launch(
            _backward_kernel,
            plan,
            grad_output,
            routed,
            scores,
            indices,
            scores if routed_bias is None else routed_bias,
            indices if slots is None else slots,
            drouted,
            dscores,
            grad_output if dlight is None else dlight,
            shares,
            sums,
            arrivals,
            grad_output.stride(0),
            routed.stride(0),
            n_rows,
            batch * k,
            k,
            d,
            n_rows // batch,
            start,
            plan.pieces,
            HAS_NULL=has_null,
            HAS_START=start > 0,
            CASTS_LIGHT=dlight is not None,
            HAS_BIAS=has_bias,
            HAS_ROUTED_BIAS=routed_bias is not None,
        )
