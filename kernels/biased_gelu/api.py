"""The bias of a product and the GELU after it, in one pass each for forward and backward.

PyTorch's products add a bias to their result, but the gradient of the bias is a sum over all tokens, by a kernel that
reads the gradient of the product once more. Here each program of the backward pass adds up its share of that sum, and
the last programs add up the shares.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._common.operation import Operation
from kernels._common.shares import new_arrivals
from kernels._common.tensors import as_rows, has_values, runs_triton
from kernels.biased_gelu.triton import launch_backward, launch_forward
from reference._shared.arguments import check_biased_gelu
from reference._shared.sizes import WIDEST_BIASED_GELU


def _forward(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and counters."""
    y, arrivals = x.new_empty(x.shape), new_arrivals(x)
    if has_values(x):
        launch_forward(as_rows(x), bias, y, arrivals)
    return y, arrivals


def _backward(grad_y: Tensor, x: Tensor, bias: Tensor, arrivals: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x, and of the bias in fp32."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if has_values(x):
        return dx, launch_backward(as_rows(grad_y), as_rows(x), bias, arrivals, dx)
    return dx, x.new_zeros(x.shape[-1], dtype=torch.float32)


_operation = Operation("biased_gelu", _forward, _backward, outputs=("y", "arrivals"), gradients=("x", "bias"))


def biased_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """`reference.biased_gelu` in one read and one write, and in one sweep backward, with the gradient of the bias.

    The backward pass needs x. Results are bitwise equal from run to run. PyTorch computes CPU tensors, fp64, and rows
    of more than 8192 features by the same mathematics.

    Args:
        x: `... d`, any float dtype. Any strides.
        bias: `d`, any float dtype.

    Returns:
        `... d`, in the dtype of x.

    Raises:
        ValueError: x is not of a float dtype, or shapes do not match.
        NotImplementedError: for a second derivative or forward mode, except on the CPU.
    """
    check_biased_gelu(x, bias)
    if torch.float64 in (x.dtype, bias.dtype) or x.shape[-1] > WIDEST_BIASED_GELU or not runs_triton(x):
        wide = torch.promote_types(torch.promote_types(x.dtype, bias.dtype), torch.float32)
        return F.gelu(x.to(wide) + bias.to(wide)).to(x.dtype)
    y, _ = _operation(x, bias.contiguous())
    return y
