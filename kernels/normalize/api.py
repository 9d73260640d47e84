"""RMSNorm and LayerNorm with a result in the dtype that the next layer needs: one read, one write.

PyTorch's own `rms_norm` and `layer_norm` are one kernel each, too, but return the dtype of their input: under autocast
fp32, which another kernel rounds, and one more kernel widens its gradient. The backward pass is one sweep: each program
adds up its share of the gradients of weight and bias, row by row, and the last programs add up the shares.
"""

import torch
from torch import Tensor

from kernels._common.operation import Operation
from kernels._common.shares import new_arrivals
from kernels._common.tensors import as_rows, has_values, runs_triton
from kernels.normalize import cpu
from kernels.normalize.triton import LONGEST, launch_backward, launch_forward
from reference._shared.arguments import check_normalize, result_dtype


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, center: bool, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result; for each row, the mean if it is subtracted, and the scale; and counters."""
    n_rows = x.numel() // x.shape[-1]
    y = x.new_empty(x.shape, dtype=dtype)
    mean = x.new_empty(n_rows if center else 0, dtype=torch.float32)
    scale = x.new_empty(n_rows, dtype=torch.float32)
    arrivals = new_arrivals(x)
    if has_values(x):
        launch_forward(as_rows(x), weight, bias, center, eps, y, mean, scale, arrivals)
    return y, mean, scale, arrivals


def _backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    scale: Tensor,
    arrivals: Tensor,
    center: bool,
    has_bias: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and in fp32 those of weight and bias, if any, as rows of one tensor."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if has_values(x):
        rows = as_rows(grad_y), as_rows(x)
        return dx, launch_backward(*rows, weight, mean, scale, arrivals, center, has_bias, eps, dx)
    return dx, x.new_zeros((1 + has_bias, x.shape[-1]), dtype=torch.float32)


_operation = Operation(
    "normalize",
    _forward,
    _backward,
    outputs=("y", "mean", "scale", "arrivals"),
    gradients=("x", "weight", "bias"),
    chosen={"has_bias": lambda bias: bias is not None},
    hand_back=lambda grad_y, dx, sums: (dx, sums[0], sums[-1]),
)


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

    The backward pass needs x and one or two numbers per row. Results are bitwise equal from run to run. PyTorch
    computes CPU tensors, fp64, and rows of more than 8192 features by the same mathematics.

    Args:
        x: `... d`, any float dtype. Any strides.
        weight, bias: `d`.
        center: True for LayerNorm, False for RMSNorm.
        eps: the smallest norm to divide by; with `center`, the number added to the variance.
        dtype: dtype of the result, by default the promoted dtype of x, weight and bias.

    Returns:
        `... d`. A row with a NaN is NaN.

    Raises:
        ValueError: an argument is out of its range, or shapes do not match.
        NotImplementedError: for a second derivative or forward mode, except on the CPU.
    """
    check_normalize(x, weight, bias, eps, dtype)
    result = result_dtype(dtype, x, weight, bias)
    if x.dtype == torch.float64 or x.shape[-1] > LONGEST or not runs_triton(x):
        return cpu.normalize(x, weight, bias, center, eps).to(result)
    bias = None if bias is None else bias.contiguous()
    y, *_ = _operation(x, weight.contiguous(), bias, center, eps, result)
    return y
