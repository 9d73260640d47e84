"""Kernels of `kernels.normalize`: one program for some rows forward, a sweep over all of them backward."""

from collections.abc import Iterator
from math import sqrt

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common.launch import COUNTS, Launch, Launcher, Part, multiprocessors, plan_rows, plan_sweep

LONGEST = 8192
"""Most features that the kernel takes; more are left to PyTorch."""


@triton.jit(do_not_specialize=COUNTS)
def _forward_kernel(
    x_ptr,  # rows d
    weight_ptr,  # d
    bias_ptr,  # d
    y_ptr,  # rows d
    mean_ptr,  # rows, fp32
    scale_ptr,  # rows, fp32
    x_stride,
    n_rows,
    d,
    eps,
    most,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CENTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """ROWS rows; `most` is the largest scale where there is no center."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    there = (rows < n_rows)[:, None] & (columns < d)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=there, other=0.0).to(tl.float32)
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


@triton.jit(do_not_specialize=COUNTS)
def _backward_kernel(
    grad_output_ptr,  # rows d
    x_ptr,  # rows d
    weight_ptr,  # d
    mean_ptr,  # rows, fp32
    scale_ptr,  # rows, fp32
    dx_ptr,  # rows d
    dweight_ptr,  # programs d, fp32
    dbias_ptr,  # programs d, fp32
    grad_output_stride,
    x_stride,
    n_rows,
    d,
    most,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CENTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Every so many-th tile of ROWS rows."""
    columns = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + columns, mask=columns < d, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, BLOCK_D], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, ROWS), tl.num_programs(0)):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        there = (rows < n_rows)[:, None] & (columns < d)[None, :]
        grad_output = tl.load(
            grad_output_ptr + rows[:, None] * grad_output_stride + columns[None, :], mask=there, other=0.0
        ).to(tl.float32)
        x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=there, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + rows, mask=rows < n_rows, other=0.0)
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
            # A row with less than the least norm was divided by a constant.
            dx = grad_output - x * tl.where(scale == most, 0.0, along)[:, None]
        tl.store(
            dx_ptr + rows[:, None] * d + columns[None, :],
            (dx * scale[:, None]).to(dx_ptr.dtype.element_ty),
            mask=there,
        )

    share = tl.program_id(0) * d + columns
    tl.store(dweight_ptr + share, tl.sum(dweight, axis=0), mask=columns < d)
    if HAS_BIAS:
        tl.store(dbias_ptr + share, tl.sum(dbias, axis=0), mask=columns < d)


@Launcher
def launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, center: bool, eps: float, *outputs: Tensor
) -> Iterator[Launch]:
    n_rows, d = x.shape
    yield Launch(
        _forward_kernel,
        plan_rows(n_rows, d),
        x,
        weight,
        weight if bias is None else bias,
        *outputs,
        x.stride(0),
        n_rows,
        d,
        eps,
        sqrt(d) / eps,
        CENTER=center,
        HAS_BIAS=bias is not None,
    )


def launch_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    scale: Tensor,
    center: bool,
    has_bias: bool,
    eps: float,
    dx: Tensor,
) -> Tensor:
    """Write the gradient of x. Return those of weight and, if there is one, bias, one below the other."""
    n_rows, d = x.shape
    programs = plan_sweep(n_rows, d, multiprocessors(x.device)).programs
    shares = torch.empty((1 + has_bias, programs, d), dtype=torch.float32, device=x.device)
    _launch_sweep(grad_output, x, weight, mean, scale, center, eps, dx, shares)
    return shares.sum(1)


@Launcher
def _launch_sweep(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    scale: Tensor,
    center: bool,
    eps: float,
    dx: Tensor,
    shares: Tensor,
) -> Iterator[Launch]:
    n_rows, d = x.shape
    sums, programs, _ = shares.shape
    yield Launch(
        _backward_kernel,
        plan_sweep(n_rows, d, multiprocessors(x.device)),
        grad_output,
        x,
        weight,
        mean,
        scale,
        dx,
        shares,
        Part(shares, (sums - 1) * programs * d),
        grad_output.stride(0),
        x.stride(0),
        n_rows,
        d,
        sqrt(d) / eps,
        CENTER=center,
        HAS_BIAS=sums > 1,
    )
