"""RMSNorm and LayerNorm with a result in the dtype that the next layer wants: one read, one write.

PyTorch's own `rms_norm` and `layer_norm` are one kernel each, too, but give what they are given: under autocast fp32,
which is rounded by another kernel, as its gradient is widened by one more. The backward pass is one sweep; each program
adds up its share of the gradients of weight and bias, row after row, and PyTorch adds up the shares.
"""

from collections.abc import Callable
from math import sqrt

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._launch import as_rows, is_traced, multiprocessors, plan_rows, plan_sweep, runs_triton
from kernels._operators import backward_of, define, define_backward, define_gradient, eager
from reference._arguments import check_normalize, result_dtype

LONGEST = 8192
"""Most features that the kernel takes; more are left to PyTorch."""


@triton.jit
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


@triton.jit
def _backward_kernel(
    grad_ptr,  # rows d
    x_ptr,  # rows d
    weight_ptr,  # d
    mean_ptr,  # rows, fp32
    scale_ptr,  # rows, fp32
    dx_ptr,  # rows d
    dweight_ptr,  # programs d, fp32
    dbias_ptr,  # programs d, fp32
    grad_stride,
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
        grad = tl.load(grad_ptr + rows[:, None] * grad_stride + columns[None, :], mask=there, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=there, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + rows, mask=rows < n_rows, other=0.0)
        if CENTER:
            mean = tl.load(mean_ptr + rows, mask=rows < n_rows, other=0.0)
            x = tl.where(there, x - mean[:, None], 0.0)
        x = x * scale[:, None]
        dweight += grad * x
        if HAS_BIAS:
            dbias += grad
        grad = grad * weight[None, :]
        along = tl.sum(grad * x, axis=1) / d
        if CENTER:
            dx = grad - x * along[:, None] - (tl.sum(grad, axis=1) / d)[:, None]
        else:
            # A row with less than the least norm was divided by a constant.
            dx = grad - x * tl.where(scale == most, 0.0, along)[:, None]
        tl.store(
            dx_ptr + rows[:, None] * d + columns[None, :],
            (dx * scale[:, None]).to(dx_ptr.dtype.element_ty),
            mask=there,
        )

    share = tl.program_id(0) * d + columns
    tl.store(dweight_ptr + share, tl.sum(dweight, axis=0), mask=columns < d)
    if HAS_BIAS:
        tl.store(dbias_ptr + share, tl.sum(dbias, axis=0), mask=columns < d)


def _launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, center: bool, eps: float, outputs: tuple[Tensor, ...]
) -> None:
    n_rows, d = x.shape
    plan = plan_rows(n_rows, d)
    _forward_kernel[plan.grid](
        x,
        weight,
        weight if bias is None else bias,
        *outputs,
        x.stride(0),
        n_rows,
        d,
        eps,
        sqrt(d) / eps,
        **plan.settings,
        CENTER=center,
        HAS_BIAS=bias is not None,
    )


def _launch_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    scale: Tensor,
    center: bool,
    has_bias: bool,
    eps: float,
    dx: Tensor,
) -> Tensor:
    n_rows, d = x.shape
    plan = plan_sweep(n_rows, d, multiprocessors(x.device))
    shares = torch.empty((1 + has_bias, plan.programs, d), dtype=torch.float32, device=x.device)
    _backward_kernel[plan.grid](
        grad,
        x,
        weight,
        mean,
        scale,
        dx,
        shares[0],
        shares[-1],
        grad.stride(0),
        x.stride(0),
        n_rows,
        d,
        sqrt(d) / eps,
        **plan.settings,
        CENTER=center,
        HAS_BIAS=has_bias,
    )
    return shares.sum(1)


def _allocate(
    x: Tensor, weight: Tensor, bias: Tensor | None, center: bool, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and of each row the mean, if that is subtracted, and what the rest is multiplied with."""
    n_rows = x.shape[0]
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(n_rows if center else 0, dtype=torch.float32),
        x.new_empty(n_rows, dtype=torch.float32),
    )


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, center: bool, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _allocate(x, weight, bias, center, eps, dtype)
    if x.numel():
        _launch_forward(x, weight, bias, center, eps, outputs)
    return outputs


def _allocate_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    scale: Tensor,
    center: bool,
    has_bias: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and those of weight and, if there is one, bias in a tensor `1|2 d`."""
    return x.new_empty(x.shape), x.new_empty((1 + has_bias, x.shape[1]), dtype=torch.float32)


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    scale: Tensor,
    center: bool,
    has_bias: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    dx, sums = x.new_empty(x.shape), None
    if x.numel():
        sums = _launch_backward(as_rows(grad), x, weight, mean, scale, center, has_bias, eps, dx)
    return dx, x.new_zeros((1 + has_bias, x.shape[1]), dtype=torch.float32) if sums is None else sums


define(
    "normalize(Tensor x, Tensor weight, Tensor? bias, bool center, float eps, ScalarType dtype) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _allocate,
)
define_backward(
    "normalize_backward(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor scale, bool center, bool has_bias, "
    "float eps) -> (Tensor, Tensor)",
    _backward,
    _allocate_gradients,
)


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    x, weight, bias, center, eps, _ = inputs
    _, mean, scale = output
    ctx.save_for_backward(x, weight, mean, scale)
    ctx.mark_non_differentiable(mean, scale)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.options = center, bias is not None, eps


def _differentiate(ctx, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, mean, scale = ctx.saved_tensors
    backward = backward_of(grad, torch.ops.colt5.normalize_backward, _backward)
    dx, sums = backward(grad, x, weight, mean, scale, *ctx.options)
    dbias = None if ctx.bias_dtype is None else sums[1].to(ctx.bias_dtype)
    return dx, sums[0].to(weight.dtype), dbias, None, None, None


define_gradient("normalize", _setup_context, _differentiate)


_eager = eager(_forward, _setup_context, _differentiate)


def normalize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    center: bool = False,
    eps: float = 1e-12,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`reference.normalize` in one read and one write, and in one sweep backward.

    The backward pass needs x and one or two numbers a row. Results are bitwise equal from run to run. A CPU tensor, one
    of fp64, and rows of more than 8192 features get the same mathematics in PyTorch.

    Args:
        x: `... d`, any float dtype. Any strides.
        weight, bias: `d`.
        center: LayerNorm, else RMSNorm.
        eps: the least norm to divide by; if `center`, what is added to the variance.
        dtype: of the result; by default the one that x, weight and bias promote to.

    Returns:
        `... d`. A row with a NaN is NaN.

    Raises:
        ValueError: an argument is out of its range, or shapes do not match.
        NotImplementedError: a second derivative or forward mode is asked for, but on the CPU.
    """
    check_normalize(x, weight, bias, eps, dtype)
    result = result_dtype(dtype, x, weight, bias)
    if x.dtype == torch.float64 or x.shape[-1] > LONGEST or not runs_triton(x):
        return _in_pytorch(x, weight, bias, center, eps).to(result)
    tensors = (x, weight, bias)
    save = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    operation: Callable[..., tuple[Tensor, ...]] = _eager if save else _forward
    if is_traced(x):
        operation = torch.ops.colt5.normalize
    y, *_ = operation(as_rows(x), weight.contiguous(), None if bias is None else bias.contiguous(), center, eps, result)
    return y.view(x.shape)


def _in_pytorch(x: Tensor, weight: Tensor, bias: Tensor | None, center: bool, eps: float) -> Tensor:
    wide = torch.promote_types(result_dtype(None, x, weight, bias), torch.float32)
    x, weight, bias = x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)
    if center:
        return torch.layer_norm(x, x.shape[-1:], weight, bias, eps)
    scale = x.shape[-1] ** 0.5 / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(eps)
    return x * scale * weight if bias is None else torch.addcmul(bias, x * scale, weight)
