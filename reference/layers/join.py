"""`combine` for layers, including the case that all tokens are routed."""

from torch import Tensor

from reference._kernels import Operation
from reference._shared.arguments import result_dtype


def join(
    combine: Operation,
    routed: Tensor,
    scores: Tensor,
    indices: Tensor | None,
    x: Tensor,
    *,
    null: Tensor | None = None,
    light: Tensor | None = None,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    routed_bias: Tensor | None = None,
    start: int = 0,
) -> Tensor:
    """`combine` for a layer of tokens x `b n d`. Without indices, all tokens are routed, in their order."""
    if indices is not None:
        dtype = result_dtype(None, x, light, residual)
        branches = {"null": null, "light": light, "residual": residual, "bias": bias, "routed_bias": routed_bias}
        options = {"length": x.shape[1], "start": start, "dtype": dtype}
        return combine(routed, scores=scores, indices=indices, **branches, **options)
    routed = routed if routed_bias is None else routed + routed_bias.to(routed.dtype)
    out = routed * scores.unsqueeze(-1).to(routed.dtype)
    out = out if light is None else light + out
    out = out if bias is None else out + bias.to(out.dtype)
    return out if residual is None else out + residual
