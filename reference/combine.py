"""The end of a routed layer: routed tokens go back to their places and are added to the light branch."""

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor

from reference._shared.arguments import check_combine, result_dtype


def combine(
    routed: Tensor,
    scores: Tensor,
    indices: Tensor,
    *,
    length: int,
    null: Tensor | None = None,
    light: Tensor | None = None,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    routed_bias: Tensor | None = None,
    start: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The output of a routed layer: `light + heavy + residual + bias`. At the places of routed tokens, heavy is the
    routed token times its score; elsewhere it is null (CoLT5, 2303.09752, 3.2).

    Args:
        routed: `b k d`, the output of the heavy branch.
        scores: `b k`.
        indices: `b k`, int32 or int64: places of the routed tokens, all different within a row; past the end for tokens
            without a place.
        length: n, of the sequence.
        null: `d`; None means 0.
        light, residual: `b n d`; None means 0.
        bias, routed_bias: `d`, added to a light branch and to routed tokens computed without them; None means 0.
        start: the first token that may be null.
        dtype: dtype of the result, by default the promoted dtype of all these.

    Returns:
        `b n d`.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    check_combine(routed, scores, indices, length, null, light, residual, bias, routed_bias, start, dtype)
    result = result_dtype(dtype, routed, scores, null, light, residual, bias, routed_bias)
    (batch, _, d), device = routed.shape, routed.device
    heavy = routed.to(result) if routed_bias is None else routed.to(result) + routed_bias.to(result)
    heavy = heavy * scores.unsqueeze(-1).to(result)
    empty = torch.zeros(d, dtype=result, device=device) if null is None else null.to(result)
    places = repeat(indices.long().clamp(max=length), "b k -> b k d", d=d)
    # Tokens without a place are written to an additional row.
    rows = F.pad(empty.expand(batch, length - start, d), (0, 0, start, 1))
    out = rows.scatter(1, places, heavy)[:, :length]
    if light is not None:
        out = light.to(result) + out
    if bias is not None:
        out = out + bias.to(result)
    return out if residual is None else out + residual.to(result)
