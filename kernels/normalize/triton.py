"""Kernels of `kernels.normalize`: forward, a program computes some rows; backward, programs sweep over all rows."""

from collections.abc import Iterator
from math import sqrt
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common.launch import COUNTS, Launch, Launcher
from kernels._common.plans import plan_rows, plan_sweep, plan_wide_sweep
from kernels._common.shares import add_up_shares, clear_arrivals, new_shares, share_ptrs
from kernels._common.tensors import multiprocessors

LONGEST = 8192
"""Most features that the kernel supports; PyTorch computes more."""


@triton.jit(do_not_specialize=[*COUNTS, "n"])
def _forward_kernel(
    x_ptr,  # rows d
    weight_ptr,  # d
    bias_ptr,  # d
    routing_ptr,  # routes d
    y_ptr,  # rows d
    mean_ptr,  # rows, fp32
    scale_ptr,  # rows, fp32
    arrivals_ptr,
    scores_ptr,  # b routes n, fp32
    slots_ptr,  # b routes n, int32
    x_stride,
    n_rows,
    d,
    n,
    eps,
    most,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CENTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROUTES: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
):
    """Normalize ROWS rows; `most` is the largest scale if there is no center. With ROUTES, rows are tokens of sequences
    of length n; the kernel also writes their scores, and -1 to their slots."""
    clear_arrivals(arrivals_ptr)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    there = (rows < n_rows)[:, None] & (columns < d)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=there, other=0.0).to(tl.float32)
    for route in tl.static_range(ROUTES):
        routing = tl.load(routing_ptr + route * d + columns, mask=columns < d, other=0.0).to(tl.float32)
        places = (rows // n * ROUTES + route) * n + rows % n
        tl.store(scores_ptr + places, tl.sum(x * routing[None, :], axis=1), mask=rows < n_rows)
        if HAS_SLOTS:
            tl.store(slots_ptr + places, -1, mask=rows < n_rows)
    if CENTER:
        mean = tl.sum(x, axis=1) / d
        tl.store(mean_ptr + rows, mean, mask=rows < n_rows)
        x = tl.where(there, x - mean[:, None], 0.0)
        scale = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / d + eps)
    else:
        scale = tl.minimum(1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / d), most, propagate_nan=tl.PropagateNan.ALL)
    tl.store(scale_ptr + rows, scale, mask=rows < n_rows)

    weight = tl.load(weight_ptr + columns, mask=columns < d, other=0.0).to(tl.float32)
    y = x * scale[:, None] * weight[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + columns, mask=columns < d, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + rows[:, None] * d + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=[*COUNTS, "n"])
def _backward_kernel(
    grad_output_ptr,  # rows d
    x_ptr,  # rows d
    weight_ptr,  # d
    mean_ptr,  # rows, fp32
    scale_ptr,  # rows, fp32
    routing_ptr,  # routes d
    grad_scores_ptr,  # b routes n, fp32
    slots_ptr,  # b routes n, int32
    grad_tokens_ptr,  # b routes selected d
    grad_same_ptr,  # rows d
    dx_ptr,  # rows d
    shares_ptr,  # sums programs+groups d, fp32: weight, bias, and routing tokens
    sums_ptr,  # sums d, fp32
    arrivals_ptr,
    grad_output_stride,
    x_stride,
    grad_tokens_stride,
    grad_route_stride,
    grad_same_stride,
    n_rows,
    d,
    n,
    most,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CENTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROUTES: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
    HAS_SAME: tl.constexpr,
):
    """Compute every `programs`-th tile of ROWS rows. With ROUTES, a row also has a gradient through its scores, one as
    a selected token, and one from a residual."""
    columns = tl.arange(0, BLOCK_D)
    drouting = ()
    for _ in tl.static_range(ROUTES):
        drouting = drouting + (tl.zeros([ROWS, BLOCK_D], tl.float32),)  # type: ignore[assignment] # noqa: RUF005
    weight = tl.load(weight_ptr + columns, mask=columns < d, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, BLOCK_D], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK_D], tl.float32)
    program, programs = tl.program_id(0), tl.num_programs(0)
    for tile in range(program, tl.cdiv(n_rows, ROWS), programs):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        there = (rows < n_rows)[:, None] & (columns < d)[None, :]
        grad_output = tl.load(
            grad_output_ptr + rows[:, None] * grad_output_stride + columns[None, :], mask=there, other=0.0
        ).to(tl.float32)
        x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=there, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + rows, mask=rows < n_rows, other=0.0)
        through_routes = tl.zeros([ROWS, BLOCK_D], tl.float32)
        summed = ()
        for route in tl.static_range(ROUTES):
            batch = rows // n
            place = (batch * ROUTES + route) * n + rows % n
            routing = tl.load(routing_ptr + route * d + columns, mask=columns < d, other=0.0).to(tl.float32)
            grad_score = tl.load(grad_scores_ptr + place, mask=rows < n_rows, other=0.0)[:, None]
            through_routes += grad_score * routing[None, :]
            summed = summed + (drouting[route] + grad_score * x,)  # type: ignore[assignment] # noqa: RUF005
            if HAS_TOKENS:
                slot = tl.load(slots_ptr + place, mask=rows < n_rows, other=-1).to(tl.int64)[:, None]
                start = batch[:, None] * grad_tokens_stride + route * grad_route_stride + slot * d
                is_selected = (slot >= 0) & (columns < d)[None, :]
                grad_token = tl.load(grad_tokens_ptr + start + columns[None, :], mask=is_selected, other=0.0)
                through_routes += grad_token.to(tl.float32)
        drouting = summed
        if CENTER:
            mean = tl.load(mean_ptr + rows, mask=rows < n_rows, other=0.0)
            x = tl.where(there, x - mean[:, None], 0.0)
        x = x * scale[:, None]
        dweight += grad_output * x
        if HAS_BIAS:
            dbias += grad_output
        grad_output = grad_output * weight[None, :]
        along = tl.sum(grad_output * x, axis=1) / d
        if CENTER:
            dx = grad_output - x * along[:, None] - (tl.sum(grad_output, axis=1) / d)[:, None]
        else:
            # A row whose norm is below the smallest norm was divided by a constant.
            dx = grad_output - x * tl.where(scale == most, 0.0, along)[:, None]
        dx *= scale[:, None]
        if ROUTES > 0:
            dx += through_routes
        if HAS_SAME:
            grad_same_ptrs = grad_same_ptr + rows[:, None] * grad_same_stride + columns[None, :]
            dx += tl.load(grad_same_ptrs, mask=there, other=0.0).to(tl.float32)
        tl.store(dx_ptr + rows[:, None] * d + columns[None, :], dx.to(dx_ptr.dtype.element_ty), mask=there)

    tl.store(share_ptrs(shares_ptr, 0, program, programs, d, columns), tl.sum(dweight, axis=0), mask=columns < d)
    if HAS_BIAS or ROUTES > 0:
        tl.store(share_ptrs(shares_ptr, 1, program, programs, d, columns), tl.sum(dbias, axis=0), mask=columns < d)
    for route in tl.static_range(ROUTES):
        of_route = share_ptrs(shares_ptr, 2 + route, program, programs, d, columns)
        tl.store(of_route, tl.sum(drouting[route], axis=0), mask=columns < d)
    sums: tl.constexpr = 2 + ROUTES if HAS_BIAS or ROUTES > 0 else 1
    add_up_shares(shares_ptr, sums_ptr, arrivals_ptr, program, programs, d, sums, BLOCK_D)


@Launcher
def launch_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    center: bool,
    eps: float,
    y: Tensor,
    mean: Tensor,
    scale: Tensor,
    arrivals: Tensor,
    routing_tokens: Tensor | None = None,
    scores: Tensor | None = None,
    slots: Tensor | None = None,
) -> Iterator[Launch]:
    """Write rows `rows d` normalized to y, and the numbers for the backward pass. With routing tokens `routes d`, rows
    are tokens of b sequences: write their scores `b routes n`, and fill slots of that shape, if they have entries, with
    -1."""
    n_rows, d = x.shape
    yield Launch(
        _forward_kernel,
        plan_rows(n_rows, d),
        x,
        weight,
        weight if bias is None else bias,
        weight if routing_tokens is None else routing_tokens,
        y,
        mean,
        scale,
        arrivals,
        scale if scores is None else scores,
        scale if slots is None else slots,
        x.stride(0),
        n_rows,
        d,
        1 if scores is None else scores.shape[2],
        eps,
        sqrt(d) / eps,
        CENTER=center,
        HAS_BIAS=bias is not None,
        ROUTES=0 if scores is None else scores.shape[1],
        HAS_SLOTS=slots is not None,
    )


class Routes(NamedTuple):
    """Data of routes for a backward pass."""

    routing_tokens: Tensor
    """`routes d`, contiguous."""

    grad_scores: Tensor
    """`b routes n`, contiguous."""

    slots: Tensor
    """`b routes n`, contiguous: index of a token among the selected tokens of its route, or -1."""

    grad_tokens: Tensor | None
    """`b routes selected d` of selected tokens; those of a route are contiguous."""

    grad_same: Tensor | None
    """`rows d`: a gradient that is added to the gradient of x, as that of a residual; its last stride is 1."""


def launch_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    scale: Tensor,
    arrivals: Tensor,
    center: bool,
    has_bias: bool,
    eps: float,
    dx: Tensor,
    routes: Routes | None = None,
) -> Tensor:
    """Write the gradient of x. Return those of weight and, if there is one, bias, as rows of one tensor. With routes,
    the rows are those of weight, bias, 0 if there is none, and all routing tokens."""
    n_rows, d = x.shape
    plan = plan_sweep if routes is None else plan_wide_sweep
    programs = plan(n_rows, d, multiprocessors(x.device)).programs
    sums = 1 + has_bias if routes is None else 2 + routes.routing_tokens.shape[0]
    shares, result = new_shares(sums, programs, d, x), x.new_empty((sums, d), dtype=torch.float32)
    given = (None,) * 5 if routes is None else routes
    _launch_sweep(grad_output, x, weight, mean, scale, arrivals, center, has_bias, eps, *given, dx, shares, result)
    return result


@Launcher
def _launch_sweep(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    scale: Tensor,
    arrivals: Tensor,
    center: bool,
    has_bias: bool,
    eps: float,
    routing_tokens: Tensor | None,
    grad_scores: Tensor | None,
    slots: Tensor | None,
    grad_tokens: Tensor | None,
    grad_same: Tensor | None,
    dx: Tensor,
    shares: Tensor,
    result: Tensor,
) -> Iterator[Launch]:
    n_rows, d = x.shape
    routes, n = (0, 1) if grad_scores is None else grad_scores.shape[1:]
    plan = plan_wide_sweep if routes else plan_sweep
    yield Launch(
        _backward_kernel,
        plan(n_rows, d, multiprocessors(x.device)),
        grad_output,
        x,
        weight,
        mean,
        scale,
        weight if routing_tokens is None else routing_tokens,
        scale if grad_scores is None else grad_scores,
        scale if slots is None else slots,
        grad_output if grad_tokens is None else grad_tokens,
        grad_output if grad_same is None else grad_same,
        dx,
        shares,
        result,
        arrivals,
        grad_output.stride(0),
        x.stride(0),
        0 if grad_tokens is None else grad_tokens.stride(0),
        0 if grad_tokens is None else grad_tokens.stride(1),
        0 if grad_same is None else grad_same.stride(0),
        n_rows,
        d,
        n,
        sqrt(d) / eps,
        CENTER=center,
        HAS_BIAS=has_bias,
        ROUTES=routes,
        HAS_TOKENS=grad_tokens is not None,
        HAS_SAME=grad_same is not None,
    )
