"""Tokens brought to one scale: by their root mean square, or by their standard deviation about their mean."""

import torch
import torch.nn.functional as F
from torch import Tensor

from reference._arguments import FLOAT_DTYPES, require


def check_normalize(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype | None) -> None:
    """x is `... d` with d >= 1, weight and bias are `d` on its device, and eps is positive."""
    require(x.dtype in FLOAT_DTYPES, "x", x.dtype, "a tensor of a float dtype")
    require(x.ndim >= 1 and x.shape[-1] >= 1, "x", f"shape {tuple(x.shape)}", "of shape (..., d) with d >= 1")
    for name, each in (("weight", weight), ("bias", bias)):
        if each is not None:
            require(each.dtype in FLOAT_DTYPES, name, each.dtype, "a tensor of a float dtype")
            fits, shape = each.shape == x.shape[-1:], tuple(each.shape)
            require(fits, name, f"shape {shape}", f"of shape {tuple(x.shape[-1:])}, one entry a feature of x")
            require(each.device == x.device, name, f"on {each.device}", f"on {x.device} as x is")
    require(eps > 0, "eps", eps, "> 0")
    require(dtype is None or dtype in FLOAT_DTYPES, "dtype", dtype, "None or a float dtype")


def normalized_dtype(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> torch.dtype:
    """What dtype the result has if `dtype` is what is asked for."""
    if dtype is not None:
        return dtype
    promoted = torch.promote_types(x.dtype, weight.dtype)
    return promoted if bias is None else torch.promote_types(promoted, bias.dtype)


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
        eps: the least norm to divide by; if `center`, what is added to the variance.
        dtype: of the result; by default the one that x, weight and bias promote to. What comes next may want less than
            they have, as a linear layer under autocast does.

    Returns:
        `... d`.

    Raises:
        ValueError: an argument is out of its range, or shapes do not match.
    """
    check_normalize(x, weight, bias, eps, dtype)
    result = normalized_dtype(x, weight, bias, dtype)
    # In fp16 a norm can overflow, and the least norm to divide by, 1e-12, is 0.
    wide = torch.promote_types(normalized_dtype(x, weight, bias, None), torch.float32)
    x, weight = x.to(wide), weight.to(wide)
    bias = None if bias is None else bias.to(wide)
    if center:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps).to(result)
    out = F.normalize(x, dim=-1, eps=eps) * (x.shape[-1] ** 0.5 * weight)
    return (out if bias is None else out + bias).to(result)
