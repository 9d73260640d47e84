"""The branches of a routed layer and its residual in one sum, each of them read once.

A map `b n` tells of every token which routed one stands in its place, if any. The backward pass gathers the gradient of
what was routed; only where a gradient is wanted in another dtype, as that of a light branch under autocast, or the one
of the null token is, does it read the whole. Each program adds up its share of the latter, and PyTorch adds up the
shares.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels._common.launch import (
    as_rows,
    is_traced,
    runs_triton,
)
from kernels._common.operation import backward_of, define, define_backward, define_gradient, eager
from kernels.combine import cpu
from kernels.combine.triton import LONGEST, launch_forward, launch_routed_backward, launch_sweep, map_slots
from reference._shared.arguments import check_combine, result_dtype


def _allocate(
    routed: Tensor,
    scores: Tensor,
    indices: Tensor,
    null: Tensor | None,
    light: Tensor | None,
    residual: Tensor | None,
    n: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The sum `(b n) d` of routed tokens `(b k) d` and what else there is, and the map `b n`."""
    batch = indices.shape[0]
    return (
        routed.new_empty((batch * n, routed.shape[1]), dtype=dtype),
        routed.new_empty((batch, n), dtype=torch.int32),
    )


def _forward(
    routed: Tensor,
    scores: Tensor,
    indices: Tensor,
    null: Tensor | None,
    light: Tensor | None,
    residual: Tensor | None,
    n: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    n_rows, d = indices.shape[0] * n, routed.shape[1]
    out, slots = routed.new_empty((n_rows, d), dtype=dtype), map_slots(indices, n)
    if out.numel():
        launch_forward(routed, scores, slots, null, light, residual, out)
    return out, slots


def _allocate_gradients(
    grad: Tensor,
    routed: Tensor,
    scores: Tensor,
    indices: Tensor,
    slots: Tensor | None,
    light_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of routed tokens and scores; of the light branch in its dtype, if that is given; and of the null token,
    if there is the map."""
    return (
        routed.new_empty(routed.shape),
        scores.new_empty(scores.shape),
        grad.new_empty((0,)) if light_dtype is None else grad.new_empty(grad.shape, dtype=light_dtype),
        grad.new_empty(0 if slots is None else routed.shape[1], dtype=torch.float32),
    )


def _backward(
    grad: Tensor,
    routed: Tensor,
    scores: Tensor,
    indices: Tensor,
    slots: Tensor | None,
    light_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    drouted, dscores, dlight, dnull = _allocate_gradients(grad, routed, scores, indices, slots, light_dtype)
    grad = as_rows(grad)
    if not grad.numel():
        return drouted, dscores.zero_(), dlight, dnull.zero_()
    if routed.numel():
        launch_routed_backward(grad, routed, scores, indices, drouted, dscores)
    if slots is not None or light_dtype is not None:
        of_null = launch_sweep(grad, slots, None if light_dtype is None else dlight)
        dnull = dnull if of_null is None else of_null
    return drouted, dscores, dlight, dnull


define(
    "combine(Tensor routed, Tensor scores, Tensor indices, Tensor? null, Tensor? light, Tensor? residual, SymInt n, "
    "ScalarType dtype) -> (Tensor, Tensor)",
    _forward,
    _allocate,
)
define_backward(
    "combine_backward(Tensor grad, Tensor routed, Tensor scores, Tensor indices, Tensor? slots, "
    "ScalarType? light_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _allocate_gradients,
)


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    routed, scores, indices, null, light, residual, _, dtype = inputs
    _, slots = output
    ctx.mark_non_differentiable(slots)
    ctx.save_for_backward(routed, scores, indices, None if null is None else slots)
    ctx.dtypes = dtype, *(None if tensor is None else tensor.dtype for tensor in (null, light, residual))


def _differentiate(ctx, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    dtype, null_dtype, light_dtype, residual_dtype = ctx.dtypes
    backward = backward_of(grad, torch.ops.colt5.combine_backward, _backward)
    casts = None if light_dtype in (None, dtype) else light_dtype
    drouted, dscores, dlight, dnull = backward(grad, *ctx.saved_tensors, casts)
    return (
        drouted,
        dscores,
        None,
        None if null_dtype is None else dnull.to(null_dtype),
        None if light_dtype is None else dlight if casts else grad,
        None if residual_dtype is None else grad.to(residual_dtype),
        None,
        None,
    )


define_gradient("combine", _setup_context, _differentiate)


_eager = eager(_forward, _setup_context, _differentiate)


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
    """`reference.combine` in one pass, in fp32 and rounded once.

    Results are bitwise equal from run to run. CPU tensors, fp64 ones, and tokens of more than 8192 features get the
    same mathematics in PyTorch.

    Args:
        routed: `b k d`, any float dtype.
        scores: `b k`.
        indices: `b k`, int32 or int64: the places, no two of a row the same; past the end for tokens that have none.
        length: n, of the sequence.
        null: `d`; None stands for 0.
        light, residual: `b n d`; None stands for 0. Any strides.
        dtype: of the result; by default the one that all of these promote to.

    Returns:
        `b n d`.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
        NotImplementedError: a second derivative or forward mode is asked for, but on the CPU.
    """
    check_combine(routed, scores, indices, length, null, light, residual, dtype)
    tensors = (routed, scores, null, light, residual)
    result = result_dtype(dtype, *tensors)
    batch, _, d = routed.shape
    if not runs_triton(routed) or d > LONGEST or any(t is not None and t.dtype == torch.float64 for t in tensors):
        return cpu.combine(routed, scores, indices, length, null, light, residual, result)
    save = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    operation: Callable[..., tuple[Tensor, Tensor]] = _eager if save else _forward
    if is_traced(routed):
        operation = torch.ops.colt5.combine
    out, _ = operation(
        as_rows(routed),
        scores.contiguous(),
        indices.contiguous(),
        null if null is None else null.contiguous(),
        None if light is None else as_rows(light),
        None if residual is None else as_rows(residual),
        length,
        result,
    )
    return out.view(batch, length, d)
