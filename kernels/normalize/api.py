"""RMSNorm and LayerNorm with a result in the dtype that the next layer wants: one read, one write.

PyTorch's own `rms_norm` and `layer_norm` are one kernel each, too, but give what they are given: under autocast fp32,
which is rounded by another kernel, as its gradient is widened by one more. The backward pass is one sweep; each program
adds up its share of the gradients of weight and bias, row after row, and PyTorch adds up the shares.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels._common.launch import as_rows, is_traced, runs_triton
from kernels._common.operation import backward_of, define, define_backward, define_gradient, eager
from kernels.normalize import cpu
from kernels.normalize.triton import LONGEST, launch_backward, launch_forward
from reference._shared.arguments import check_normalize, result_dtype


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
        launch_forward(x, weight, bias, center, eps, outputs)
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
        sums = launch_backward(as_rows(grad), x, weight, mean, scale, center, has_bias, eps, dx)
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
        return cpu.normalize(x, weight, bias, center, eps).to(result)
    tensors = (x, weight, bias)
    save = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    operation: Callable[..., tuple[Tensor, ...]] = _eager if save else _forward
    if is_traced(x):
        operation = torch.ops.colt5.normalize
    y, *_ = operation(as_rows(x), weight.contiguous(), None if bias is None else bias.contiguous(), center, eps, result)
    return y.view(x.shape)
