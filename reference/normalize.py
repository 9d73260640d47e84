"""Tokens scaled by their root mean square, or centered and scaled by their standard deviation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from reference._shared.arguments import check_normalize, result_dtype


def normalize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    center: bool = False,
    eps: float = 1e-12,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """RMSNorm (Zhang and Sennrich, 1910.07467), or LayerNorm (Ba et al., 1607.06450) if `center`.

    The first is `x / max(|x|, eps) * sqrt(d) * weight + bias`, the second `(x - mean) / sqrt(variance + eps) * weight +
    bias`, in fp32 at least and rounded once.

    Args:
        x: `... d`, any float dtype.
        weight, bias: `d`.
        center: whether the mean is subtracted.
        eps: the smallest norm to divide by; with `center`, the number added to the variance.
        dtype: dtype of the result, by default the promoted dtype of x, weight and bias. The next operation may need
            less precision, as a linear layer under autocast does.

    Returns:
        `... d`.

    Raises:
        ValueError: an argument is out of its range, or shapes do not match.
    """
    check_normalize(x, weight, bias, eps, dtype)
    result = result_dtype(dtype, x, weight, bias)
    # In fp16 a norm can overflow, and the smallest norm to divide by, 1e-12, is 0.
    wide = torch.promote_types(result_dtype(None, x, weight, bias), torch.float32)
    x, weight = x.to(wide), weight.to(wide)
    bias = None if bias is None else bias.to(wide)
    if center:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps).to(result)
    out = F.normalize(x, dim=-1, eps=eps) * (x.shape[-1] ** 0.5 * weight)
    return (out if bias is None else out + bias).to(result)
