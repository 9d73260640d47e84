"""What comes after the branches of a routed layer: routed tokens back in their places, added to the light branch."""

from collections.abc import Callable
from functools import reduce

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor

from reference._arguments import FLOAT_DTYPES, require


def check_combine(
    routed: Tensor,
    scores: Tensor,
    indices: Tensor,
    length: int,
    null: Tensor | None,
    light: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype | None,
) -> None:
    """Shapes match, indices are integers, and everything is on one device."""
    require(routed.ndim == 3, "routed", f"shape {tuple(routed.shape)}", "of shape (b, k, d)")
    require(length >= 1, "length", length, ">= 1")
    batch, k, d = routed.shape
    shapes = {
        "scores": (scores, (batch, k)),
        "indices": (indices, (batch, k)),
        "null": (null, (d,)),
        "light": (light, (batch, length, d)),
        "residual": (residual, (batch, length, d)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is not None:
            require(tensor.shape == shape, name, f"shape {tuple(tensor.shape)}", f"of shape {shape}")
            require(tensor.device == routed.device, name, f"on {tensor.device}", f"on {routed.device} as routed is")
    require(indices.dtype in (torch.int32, torch.int64), "indices", indices.dtype, "a tensor of int32 or int64")
    for name, tensor in (("routed", routed), ("scores", scores)):
        require(tensor.dtype in FLOAT_DTYPES, name, tensor.dtype, "a tensor of a float dtype")
    require(dtype is None or dtype in FLOAT_DTYPES, "dtype", dtype, "None or a float dtype")


def combined_dtype(dtype: torch.dtype | None, *tensors: Tensor | None) -> torch.dtype:
    """What dtype the result has if `dtype` is what is asked for."""
    given = [tensor.dtype for tensor in tensors if tensor is not None]
    return reduce(torch.promote_types, given) if dtype is None else dtype


def combine(
    routed: Tensor,
    scores: Tensor,
    indices: Tensor,
    *,
    length: int,
    null: Tensor | None = None,
    light: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The output of a routed layer: `light + heavy + residual`, where heavy is routed token times score in the places
    of those that are routed, and null in all others (CoLT5, 2303.09752, 3.2).

    Args:
        routed: `b k d`, what comes out of the heavy branch.
        scores: `b k`.
        indices: `b k`, int32 or int64: the places, no two of a row the same; past the end for tokens that have none.
        length: n, of the sequence.
        null: `d`; None stands for 0.
        light, residual: `b n d`; None stands for 0.
        dtype: of the result; by default the one that all of these promote to.

    Returns:
        `b n d`.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    check_combine(routed, scores, indices, length, null, light, residual, dtype)
    result = combined_dtype(dtype, routed, scores, null, light, residual)
    (batch, _, d), device = routed.shape, routed.device
    heavy = routed.to(result) * scores.unsqueeze(-1).to(result)
    empty = torch.zeros(d, dtype=result, device=device) if null is None else null.to(result)
    places = repeat(indices.long().clamp(max=length), "b k -> b k d", d=d)
    # Those without a place end in a row of their own.
    rows = F.pad(empty.expand(batch, length, d), (0, 0, 0, 1))
    out = rows.scatter(1, places, heavy)[:, :length]
    if light is not None:
        out = light.to(result) + out
    return out if residual is None else out + residual.to(result)


def join(
    operation: Callable[..., Tensor],
    routed: Tensor,
    scores: Tensor,
    indices: Tensor | None,
    x: Tensor,
    *,
    null: Tensor | None = None,
    light: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`operation`, one of the two `combine`, for a layer of tokens x `b n d`; without indices all of them are routed,
    in their order."""
    if indices is not None:
        dtype = combined_dtype(None, x, light, residual)
        more = {"null": null, "light": light, "residual": residual}
        return operation(routed, scores=scores, indices=indices, length=x.shape[1], dtype=dtype, **more)
    out = routed * scores.unsqueeze(-1).to(routed.dtype)
    out = out if light is None else light + out
    return out if residual is None else out + residual
