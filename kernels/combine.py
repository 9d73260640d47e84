"""The branches of a routed layer and its residual in one sum, each of them read once.

A map `b n` tells of every token which routed one stands in its place, if any. The backward pass gathers the gradient of
what was routed; only where a gradient is wanted in another dtype, as that of a light branch under autocast, or the one
of the null token is, does it read the whole. Each program adds up its share of the latter, and PyTorch adds up the
shares.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._launch import Plan, as_rows, is_traced, multiprocessors, plan_rows, plan_sweep, planner, runs_triton
from kernels._operators import backward_of, define, define_backward, define_gradient, eager
from reference._arguments import check_combine, result_dtype

LONGEST = 8192
"""Most features that the kernel takes; more are left to PyTorch."""

PLACES = 1024
"""Routed tokens that a program of the map writes."""


@triton.jit
def _places_kernel(
    indices_ptr,  # b k
    slots_ptr,  # b n, int32, filled with -1
    n_routed,
    k,
    n,
    BLOCK: tl.constexpr,
):
    """Of each token that is routed, which of all `b k` it is."""
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    places = tl.load(indices_ptr + slots, mask=slots < n_routed, other=n).to(tl.int64)
    tl.store(slots_ptr + (slots // k).to(tl.int64) * n + places, slots, mask=places < n)


@triton.jit
def _forward_kernel(
    routed_ptr,  # b k d
    scores_ptr,  # b k
    slots_ptr,  # b n, int32
    null_ptr,  # d
    light_ptr,  # b n d
    residual_ptr,  # b n d
    out_ptr,  # b n d
    routed_stride,
    light_stride,
    residual_stride,
    n_rows,
    d,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_NULL: tl.constexpr,
    HAS_LIGHT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """ROWS tokens."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)[None, :]
    there = (rows < n_rows)[:, None] & (columns < d)
    slots = tl.load(slots_ptr + rows, mask=rows < n_rows, other=-1)
    is_routed = (slots >= 0)[:, None]

    score = tl.load(scores_ptr + slots, mask=slots >= 0, other=0.0).to(tl.float32)[:, None]
    routed_ptrs = routed_ptr + slots.to(tl.int64)[:, None] * routed_stride + columns
    out = tl.load(routed_ptrs, mask=there & is_routed, other=0.0).to(tl.float32) * score
    if HAS_NULL:
        null = tl.load(null_ptr + columns, mask=columns < d, other=0.0).to(tl.float32)
        out = tl.where(is_routed, out, null)
    if HAS_LIGHT:
        out += tl.load(light_ptr + rows[:, None] * light_stride + columns, mask=there, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        out += tl.load(residual_ptr + rows[:, None] * residual_stride + columns, mask=there, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows[:, None] * d + columns, out.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def _routed_backward_kernel(
    grad_ptr,  # b n d
    routed_ptr,  # b k d
    scores_ptr,  # b k
    indices_ptr,  # b k
    drouted_ptr,  # b k d
    dscores_ptr,  # b k
    grad_stride,
    routed_stride,
    n_routed,
    k,
    n,
    d,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """ROWS routed tokens. What has no place has no gradient."""
    slots = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)[None, :]
    there = (slots < n_routed)[:, None] & (columns < d)
    places = tl.load(indices_ptr + slots, mask=slots < n_routed, other=n).to(tl.int64)
    grad_ptrs = grad_ptr + ((slots // k).to(tl.int64) * n + places)[:, None] * grad_stride + columns
    grad = tl.load(grad_ptrs, mask=there & (places < n)[:, None], other=0.0).to(tl.float32)

    rows = slots.to(tl.int64)
    routed = tl.load(routed_ptr + rows[:, None] * routed_stride + columns, mask=there, other=0.0).to(tl.float32)
    score = tl.load(scores_ptr + slots, mask=slots < n_routed, other=0.0).to(tl.float32)
    dscores = tl.sum(grad * routed, axis=1)
    tl.store(dscores_ptr + slots, dscores.to(dscores_ptr.dtype.element_ty), mask=slots < n_routed)
    drouted = grad * score[:, None]
    tl.store(drouted_ptr + rows[:, None] * d + columns, drouted.to(drouted_ptr.dtype.element_ty), mask=there)


@triton.jit
def _backward_kernel(
    grad_ptr,  # b n d
    slots_ptr,  # b n, int32
    dlight_ptr,  # b n d
    dnull_ptr,  # programs d, fp32
    grad_stride,
    n_rows,
    d,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_NULL: tl.constexpr,
    CASTS_LIGHT: tl.constexpr,
):
    """Every so many-th tile of ROWS tokens."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    dnull = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, ROWS), tl.num_programs(0)):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        there = (rows < n_rows)[:, None] & (columns < d)
        grad = tl.load(grad_ptr + rows[:, None] * grad_stride + columns, mask=there, other=0.0)
        if CASTS_LIGHT:
            tl.store(dlight_ptr + rows[:, None] * d + columns, grad.to(dlight_ptr.dtype.element_ty), mask=there)
        if HAS_NULL:
            slots = tl.load(slots_ptr + rows, mask=rows < n_rows, other=0)
            dnull += tl.where((slots < 0)[:, None], grad.to(tl.float32), 0.0)
    if HAS_NULL:
        share = tl.sum(dnull, axis=0)[None, :]
        tl.store(dnull_ptr + tl.program_id(0) * d + columns, share, mask=columns < d)


@planner
def _plan_places(n_routed: int) -> Plan:
    return Plan(triton.cdiv(n_routed, PLACES), {"BLOCK": PLACES})


def _map_slots(indices: Tensor, n: int) -> Tensor:
    """`b n`, int32: which of all `b k` routed tokens stands in the place of a token; -1 where none does."""
    batch, k = indices.shape
    slots = torch.full((batch, n), -1, dtype=torch.int32, device=indices.device)
    if indices.numel():
        plan = _plan_places(batch * k)
        _places_kernel[plan.grid](indices, slots, batch * k, k, n, **plan.settings)
    return slots


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
    out, slots = routed.new_empty((n_rows, d), dtype=dtype), _map_slots(indices, n)
    if out.numel():
        plan = plan_rows(n_rows, d)
        _forward_kernel[plan.grid](
            routed,
            scores,
            slots,
            scores if null is None else null,
            out if light is None else light,
            out if residual is None else residual,
            out,
            routed.stride(0),
            0 if light is None else light.stride(0),
            0 if residual is None else residual.stride(0),
            n_rows,
            d,
            **plan.settings,
            HAS_NULL=null is not None,
            HAS_LIGHT=light is not None,
            HAS_RESIDUAL=residual is not None,
        )
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
    (n_rows, d), (batch, k) = grad.shape, indices.shape
    if not grad.numel():
        return drouted, dscores.zero_(), dlight, dnull.zero_()
    if routed.numel():
        plan = plan_rows(batch * k, d)
        _routed_backward_kernel[plan.grid](
            grad,
            routed,
            scores,
            indices,
            drouted,
            dscores,
            grad.stride(0),
            routed.stride(0),
            batch * k,
            k,
            n_rows // batch,
            d,
            **plan.settings,
        )
    if slots is not None or light_dtype is not None:
        plan = plan_sweep(n_rows, d, multiprocessors(grad.device))
        shares = torch.empty((0 if slots is None else plan.programs, d), dtype=torch.float32, device=grad.device)
        _backward_kernel[plan.grid](
            grad,
            grad if slots is None else slots,
            dlight,
            shares,
            grad.stride(0),
            n_rows,
            d,
            **plan.settings,
            HAS_NULL=slots is not None,
            CASTS_LIGHT=light_dtype is not None,
        )
        dnull = dnull if slots is None else shares.sum(0)
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
        return _in_pytorch(routed, scores, indices, length, null, light, residual, result)
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


def _in_pytorch(
    routed: Tensor,
    scores: Tensor,
    indices: Tensor,
    n: int,
    null: Tensor | None,
    light: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The sum of what is there for all tokens, to which routed ones are added."""
    (batch, _, d), device = routed.shape, routed.device
    wide = torch.promote_types(dtype, torch.float32)
    out = torch.zeros(1, 1, d, dtype=wide, device=device)
    if null is not None:
        is_routed = torch.zeros(batch, n + 1, dtype=torch.bool, device=device)
        is_routed = is_routed.scatter(1, indices.long().clamp(max=n), True)[:, :n]
        out = null.to(wide) * ~is_routed.unsqueeze(-1)
    for each in (light, residual):
        out = out if each is None else out + each.to(wide)
    heavy = (routed.to(wide) * scores.unsqueeze(-1).to(wide)).masked_fill((indices >= n).unsqueeze(-1), 0.0)
    places = torch.arange(batch, device=device)[:, None] * n + indices.clamp(max=n - 1)
    out = out.expand(batch, n, d).reshape(-1, d).index_add(0, places.flatten(), heavy.flatten(0, 1))
    return out.view(batch, n, d).to(dtype)
