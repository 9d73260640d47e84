"""Kernels of `kernels.biased_gelu`: forward, a program computes some rows; backward, programs sweep over all rows."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common.launch import COUNTS, Launch, Launcher
from kernels._common.plans import plan_rows, plan_wide_sweep
from kernels._common.shares import add_up_shares, clear_arrivals, new_shares, share_ptrs
from kernels._common.tensors import multiprocessors

SQRT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)
DENSITY_AT_0: tl.constexpr = tl.constexpr(0.3989422804014327)
"""Density of the normal distribution: 1 / sqrt(2 pi)."""


@triton.jit
def _load(x_ptr, bias_ptr, rows, columns, stride, n_rows, d):
    """Rows with the bias added, in fp32, and a mask of valid entries."""
    there = (rows < n_rows)[:, None] & (columns < d)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride + columns[None, :], mask=there, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=columns < d, other=0.0).to(tl.float32)
    return x + bias[None, :], there


@triton.jit
def _normal_cdf(x):
    return 0.5 * (1.0 + tl.erf(x * SQRT_HALF))


@triton.jit(do_not_specialize=COUNTS)
def _forward_kernel(
    x_ptr,  # rows d
    bias_ptr,  # d
    y_ptr,  # rows d
    arrivals_ptr,
    x_stride,
    n_rows,
    d,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute ROWS rows."""
    clear_arrivals(arrivals_ptr)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    x, there = _load(x_ptr, bias_ptr, rows, columns, x_stride, n_rows, d)
    y = x * _normal_cdf(x)
    tl.store(y_ptr + rows[:, None] * d + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=COUNTS)
def _backward_kernel(
    grad_output_ptr,  # rows d
    x_ptr,  # rows d
    bias_ptr,  # d
    dx_ptr,  # rows d
    shares_ptr,  # 1 programs+groups d, fp32
    dbias_ptr,  # d, fp32
    arrivals_ptr,
    grad_output_stride,
    x_stride,
    n_rows,
    d,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute every `programs`-th tile of ROWS rows."""
    columns = tl.arange(0, BLOCK_D)
    dbias = tl.zeros([ROWS, BLOCK_D], tl.float32)
    program, programs = tl.program_id(0), tl.num_programs(0)
    for tile in range(program, tl.cdiv(n_rows, ROWS), programs):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        x, there = _load(x_ptr, bias_ptr, rows, columns, x_stride, n_rows, d)
        grad_output_ptrs = grad_output_ptr + rows[:, None] * grad_output_stride + columns[None, :]
        grad_output = tl.load(grad_output_ptrs, mask=there, other=0.0).to(tl.float32)
        dx = grad_output * (_normal_cdf(x) + x * (DENSITY_AT_0 * tl.exp(-0.5 * x * x)))
        tl.store(dx_ptr + rows[:, None] * d + columns[None, :], dx.to(dx_ptr.dtype.element_ty), mask=there)
        dbias += dx

    share = share_ptrs(shares_ptr, 0, program, programs, d, columns)
    tl.store(share, tl.sum(dbias, axis=0), mask=columns < d)
    add_up_shares(shares_ptr, dbias_ptr, arrivals_ptr, program, programs, d, 1, BLOCK_D)


@Launcher
def launch_forward(x: Tensor, bias: Tensor, y: Tensor, arrivals: Tensor) -> Iterator[Launch]:
    """Write the result of rows `rows d` to y, and clear the counters."""
    n_rows, d = x.shape
    yield Launch(_forward_kernel, plan_rows(n_rows, d), x, bias, y, arrivals, x.stride(0), n_rows, d)


def launch_backward(grad_output: Tensor, x: Tensor, bias: Tensor, arrivals: Tensor, dx: Tensor) -> Tensor:
    """Write the gradient of x. Return that of the bias."""
    n_rows, d = x.shape
    programs = plan_wide_sweep(n_rows, d, multiprocessors(x.device)).programs
    dbias = x.new_empty(d, dtype=torch.float32)
    _launch_sweep(grad_output, x, bias, arrivals, dx, new_shares(1, programs, d, x), dbias)
    return dbias


@Launcher
def _launch_sweep(
    grad_output: Tensor, x: Tensor, bias: Tensor, arrivals: Tensor, dx: Tensor, shares: Tensor, dbias: Tensor
) -> Iterator[Launch]:
    n_rows, d = x.shape
    pointers = (grad_output, x, bias, dx, shares, dbias, arrivals)
    strides = grad_output.stride(0), x.stride(0)
    yield Launch(
        _backward_kernel, plan_wide_sweep(n_rows, d, multiprocessors(x.device)), *pointers, *strides, n_rows, d
    )
