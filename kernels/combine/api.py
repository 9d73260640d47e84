"""The branches of a routed layer and its residual in one sum that reads each of them once.

A map `b n` has, for each token, the index of its routed token, if any. The backward pass gathers the gradient of routed
tokens. It reads the gradients of all tokens only for the gradient of the null token, or for a gradient in another
dtype, as of a light branch under autocast. For the null token, each program adds up its share of the sum, and the last
programs add up the shares.
"""

import torch
from torch import Tensor

from kernels._common.operation import Operation
from kernels._common.shares import new_arrivals
from kernels._common.tensors import as_rows, has_values, runs_triton
from kernels.combine import cpu
from kernels.combine.triton import LONGEST, launch_backward, launch_forward, launch_places
from reference._shared.arguments import check_combine, result_dtype


def _forward(
    routed: Tensor,
    scores: Tensor,
    indices: Tensor,
    null: Tensor | None,
    light: Tensor | None,
    residual: Tensor | None,
    bias: Tensor | None,
    routed_bias: Tensor | None,
    n: int,
    start: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum `b n d` of routed tokens `b k d` and the optional terms, the map `b n`, and counters."""
    batch, _, d = routed.shape
    out = routed.new_empty((batch, n, d), dtype=dtype)
    slots = indices.new_empty((batch, n), dtype=torch.int32)
    arrivals = new_arrivals(routed)
    if has_values(out):
        launch_places(indices, slots, arrivals)
        terms = (None if each is None else as_rows(each) for each in (light, residual))
        launch_forward(as_rows(routed), scores, slots, null, *terms, bias, routed_bias, start, out)
    return out, slots, arrivals


def _backward(
    grad_output: Tensor,
    routed: Tensor,
    scores: Tensor,
    indices: Tensor,
    routed_bias: Tensor | None,
    kept_slots: Tensor | None,
    arrivals: Tensor,
    light_dtype: torch.dtype | None,
    start: int,
    has_null: bool,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of routed tokens and scores, of vectors, and of a light branch of another dtype. Vectors are the null
    token, or null token, bias and bias of routed tokens as rows of one tensor, or none."""
    drouted, dscores = routed.new_empty(routed.shape), scores.new_empty(scores.shape)
    dlight = None if light_dtype is None else grad_output.new_empty(grad_output.shape, dtype=light_dtype)
    n_sums = 3 if has_bias or routed_bias is not None else int(has_null)
    sums = grad_output.new_empty((n_sums, routed.shape[2]), dtype=torch.float32)
    if not has_values(grad_output):
        return drouted, dscores.zero_(), sums.zero_(), dlight
    given = (as_rows(grad_output), as_rows(routed), scores, indices, routed_bias, kept_slots, arrivals)
    launch_backward(*given, start, has_null, has_bias, drouted, dscores, dlight, sums)
    return drouted, dscores, sums, dlight


def _hand_back(
    grad_output: Tensor, drouted: Tensor, dscores: Tensor, sums: Tensor, dlight: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of all inputs: light branch and residual have that of the sum."""
    has_own = dlight is not None and dlight.shape == grad_output.shape
    vectors = [*(sums[row] for row in range(len(sums))), None, None, None][:3]
    return drouted, dscores, dlight if has_own else grad_output, grad_output, *vectors


_operation = Operation(
    "combine",
    _forward,
    _backward,
    outputs=("output", "slots", "arrivals"),
    gradients=("routed", "scores", "light", "residual", "null", "bias", "routed_bias"),
    chosen={
        "kept_slots": lambda null, routed_bias, slots: None if null is None and routed_bias is None else slots,
        "has_null": lambda null: null is not None,
        "has_bias": lambda bias: bias is not None,
        "light_dtype": lambda light, dtype: None if light is None or light.dtype == dtype else light.dtype,
    },
    hand_back=_hand_back,
)


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
    """`reference.combine` in one pass, computed in fp32 and rounded once.

    Results are bitwise equal from run to run. PyTorch computes CPU tensors, fp64, and tokens of more than 8192 features
    by the same mathematics.

    Args:
        routed: `b k d`, any float dtype.
        scores: `b k`.
        indices: `b k`, int32 or int64: places of the routed tokens, all different within a row; past the end for tokens
            without a place.
        length: n, of the sequence.
        null: `d`; None means 0.
        light, residual: `b n d`; None means 0. Any strides.
        bias, routed_bias: `d`, added to a light branch and to routed tokens computed without them; None means 0.
        start: the first token that may be null.
        dtype: dtype of the result, by default the promoted dtype of all these.

    Returns:
        `b n d`.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
        NotImplementedError: for a second derivative or forward mode, except on the CPU.
    """
    check_combine(routed, scores, indices, length, null, light, residual, bias, routed_bias, start, dtype)
    tensors = (routed, scores, null, light, residual, bias, routed_bias)
    result = result_dtype(dtype, *tensors)
    if (
        not runs_triton(routed)
        or routed.shape[2] > LONGEST
        or any(t is not None and t.dtype == torch.float64 for t in tensors)
    ):
        return cpu.combine(routed, scores, indices, length, null, light, residual, bias, routed_bias, start, result)
    out, *_ = _operation(
        routed,
        scores.contiguous(),
        indices.contiguous(),
        null if null is None else null.contiguous(),
        light,
        residual,
        bias if bias is None else bias.contiguous(),
        routed_bias if routed_bias is None else routed_bias.contiguous(),
        length,
        start,
        result,
    )
    return out
