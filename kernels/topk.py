"""Differentiable top-k in one kernel: coordinate descent, selection and gates of a row while it is in registers."""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._descent_forward import cooling_iterations, descend, origin_of, soft_selection
from kernels._descent_state import allocate_state
from kernels._launch import (
    Plan,
    as_rows,
    is_traced,
    mask_as_rows,
    most_registers,
    planner,
    runs_triton,
    tile_settings,
)
from kernels._operators import backward_of, define, define_backward, define_gradient, eager
from kernels._primitives import highest_in_thread, load_tile, max_or_nan, per_row, tile_columns
from kernels.coor_descent import _gradients as descent_gradients
from kernels.coor_descent import coor_descent
from kernels.select import select
from reference._arguments import check_schedule, check_scores, first_temperature
from reference.topk import TopkReturn, check_topk, largest, select_topk
from reference.topk import topk as plain_topk

LONGEST = 4096
"""Longest row that the kernel takes; longer ones go through `coor_descent` and torch.topk."""

MOST = 32
"""Most entries that the kernel selects from a row, one after the other."""


IN_THREAD = 16
"""Entries of a row in a thread: selection keeps two more registers for each."""


@triton.jit
def _sortable(scores, columns):
    """int64 in the order of the scores, those of equal scores in the reverse order of their columns."""
    bits = scores.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - columns).to(tl.int64)


@triton.jit
def _topk_kernel(
    x_ptr,  # rows n
    mask_ptr,  # rows n
    values_ptr,  # rows selected
    indices_ptr,  # rows selected, int64
    soft_ptr,  # rows selected
    gates_ptr,  # rows selected
    state_ptr,  # rows+1 2 n_iters+1, fp64
    x_stride,
    mask_stride,
    n_rows,
    n,
    n_iters,
    selected,
    k: "fp64",
    first: "fp64",
    eps_decay: "fp64",
    eps: "fp64",
    cooling,
    REPEATS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SELECTED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SAVE: tl.constexpr,
):
    """The largest entries of ROWS rows, one by one, with the relaxed selection at these."""
    columns = tile_columns(REPEATS, WIDTH)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    x = load_tile(x_ptr, mask_ptr, rows, columns, x_stride, mask_stride, n_rows, n, HAS_MASK)
    _, _, a, factor, _ = descend(
        x, rows, columns, 0, 0, x_ptr, mask_ptr, x_ptr, state_ptr, x_ptr, x_stride, mask_stride, n_rows, n, n_iters, k,
        first, eps_decay, eps, cooling, REPEATS, ROWS, WIDTH, 1, 1, HAS_MASK, False, SAVE,
    )  # fmt: skip

    # Columns beyond the row stand behind its masked entries, which stand behind all others.
    left = tl.where(columns < n, _sortable(x, columns), -9223372036854775808)
    place = tl.arange(0, SELECTED)[None, :]
    chosen = tl.zeros([ROWS, SELECTED], tl.int64)
    for i in range(selected):
        best = tl.max(tl.max(left, axis=0), axis=1)
        chosen = tl.where(place == i, best[:, None], chosen)
        left = tl.where(left == per_row(best), -9223372036854775808, left)

    ordered = (chosen >> 32).to(tl.int32)
    value = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    moved = value - origin_of(max_or_nan(highest_in_thread(x, ROWS, WIDTH), 1), eps)[:, None]
    soft = tl.reshape(soft_selection(moved[None, :, :], a, factor, True), [ROWS, SELECTED])
    is_surplus = value == -float("inf")
    gate = tl.where(is_surplus, 0.0, soft + (1.0 - soft))
    value = tl.where(is_surplus, 0.0, value)

    out = rows[:, None] * selected + place
    writes = (rows[:, None] < n_rows) & (place < selected)
    tl.store(indices_ptr + out, 0x7FFFFFFF - (chosen & 0x7FFFFFFF), mask=writes)
    tl.store(values_ptr + out, (value * gate).to(values_ptr.dtype.element_ty), mask=writes)
    tl.store(soft_ptr + out, soft.to(soft_ptr.dtype.element_ty), mask=writes)
    tl.store(gates_ptr + out, gate.to(gates_ptr.dtype.element_ty), mask=writes)


@planner
def _plan(n_rows: int, n: int, selected: int) -> Plan:
    tile = tile_settings(n, IN_THREAD)
    # Where entries are loaded one by one, an assembler left to itself may spill to make room for another program.
    limit = {"maxnreg": most_registers(tile["num_warps"])} if n % 16 else {}
    return Plan(triton.cdiv(n_rows, tile["ROWS"]), {**tile, **limit, "SELECTED": triton.next_power_of_2(selected)})


def _launch(
    x: Tensor,
    mask: Tensor | None,
    selected: int,
    k: float,
    schedule: tuple[int, float, float, float],
    outputs: tuple[Tensor, ...],
) -> None:
    n_rows, n = x.shape
    n_iters, eps, first, eps_decay = schedule
    plan = _plan(n_rows, n, selected)
    _topk_kernel[plan.grid](
        x,
        x if mask is None else mask,
        *outputs,
        x.stride(0),
        0 if mask is None else mask.stride(0),
        n_rows,
        n,
        n_iters,
        selected,
        k,
        first,
        eps_decay,
        eps,
        cooling_iterations(*schedule),
        **plan.settings,
        HAS_MASK=mask is not None,
        SAVE=outputs[4].numel() > 0,
    )


def _allocate(
    x: Tensor,
    mask: Tensor | None,
    selected: int,
    k: float,
    n_iters: int,
    eps: float,
    first: float,
    eps_decay: float,
    save: bool,
) -> tuple[Tensor, ...]:
    """Values, indices, relaxed selection and gates, then what the backward pass of `coor_descent` needs."""
    shape = (x.shape[0], selected)
    return (
        x.new_empty(shape),
        x.new_empty(shape, dtype=torch.int64),
        x.new_empty(shape),
        x.new_empty(shape),
        allocate_state(x, n_iters, save),
    )


def _forward(
    x: Tensor,
    mask: Tensor | None,
    selected: int,
    k: float,
    n_iters: int,
    eps: float,
    first: float,
    eps_decay: float,
    save: bool,
) -> tuple[Tensor, ...]:
    outputs = _allocate(x, mask, selected, k, n_iters, eps, first, eps_decay, save)
    if x.numel():
        _launch(x, mask, selected, k, (n_iters, eps, first, eps_decay), outputs)
    return outputs


def _allocate_gradient(
    grad_values: Tensor | None,
    grad_soft: Tensor | None,
    grad_gates: Tensor | None,
    x: Tensor,
    mask: Tensor | None,
    values: Tensor,
    indices: Tensor,
    gates: Tensor,
    state: Tensor,
    k: float,
    n_iters: int,
    eps: float,
    first: float,
    eps_decay: float,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward(
    grad_values: Tensor | None,
    grad_soft: Tensor | None,
    grad_gates: Tensor | None,
    x: Tensor,
    mask: Tensor | None,
    values: Tensor,
    indices: Tensor,
    gates: Tensor,
    state: Tensor,
    k: float,
    n_iters: int,
    eps: float,
    first: float,
    eps_decay: float,
) -> Tensor:
    """The gradient of x; None stands for one of 0. It is rounded once: its two terms may cancel each other."""
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, values = x.to(wide), values.to(wide)
    grad_values, grad_soft, grad_gates = (
        None if grad is None else grad.to(wide) for grad in (grad_values, grad_soft, grad_gates)
    )
    # A value is its score, but 0 where nothing was selected: what that hands on, the gradient of descent leaves out.
    through_value = None if grad_values is None else grad_values * values
    through_gate = _sum(grad_gates, through_value)
    grad = torch.zeros_like(x).scatter_(-1, indices, _sum(through_gate, grad_soft))
    dx, _ = descent_gradients(grad, x, mask, None, k, n_iters, eps, first, eps_decay, state)
    return (dx if grad_values is None else dx.scatter_add_(-1, indices, grad_values * gates)).to(dtype)


define(
    "topk(Tensor x, Tensor? mask, int selected, float k, int n_iters, float eps, float first, float eps_decay, "
    "bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _allocate,
)
define_backward(
    "topk_backward(Tensor? grad_values, Tensor? grad_soft, Tensor? grad_gates, Tensor x, Tensor? mask, Tensor values, "
    "Tensor indices, Tensor gates, Tensor state, float k, int n_iters, float eps, float first, float eps_decay) "
    "-> Tensor",
    _backward,
    _allocate_gradient,
)


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    x, mask, _, *numbers, _ = inputs
    values, indices, _, gates, state = output
    ctx.save_for_backward(x, mask, values, indices, gates, state)
    ctx.mark_non_differentiable(indices)
    ctx.set_materialize_grads(False)
    ctx.numbers = numbers


def _differentiate(
    ctx, grad_values: Tensor | None, _: None, grad_soft: Tensor | None, grad_gates: Tensor | None, *__: None
) -> tuple[Tensor | None, ...]:
    grads = (grad_values, grad_soft, grad_gates)
    given = [grad for grad in grads if grad is not None]
    if not given:
        return (None,) * 9
    backward = backward_of(given[0], torch.ops.colt5.topk_backward, _backward)
    return backward(*grads, *ctx.saved_tensors, *ctx.numbers), *(None,) * 8


def _sum(one: Tensor | None, other: Tensor | None) -> Any:
    """None stands for a gradient of 0."""
    if one is None or other is None:
        return other if one is None else one
    return one + other


define_gradient("topk", _setup_context, _differentiate)


_eager = eager(_forward, _setup_context, _differentiate)


def _choose(x: Tensor, k: int, mask: Tensor | None) -> Tensor:
    return select(x, num_selected=k, mask=mask)


def topk(
    x: Tensor,
    k: int,
    coor_descent_k_ratio: float = 9 / 8,
    n_iters: int = 20,
    eps: float = 0.1,
    eps_init: float | None = None,
    eps_decay: float = 1.0,
    mask: Tensor | None = None,
    fused: bool = False,
    non_differentiable: bool = False,
) -> TopkReturn:
    """`reference.topk`, which `fused=True` computes with kernels: rows of up to 4096 entries, of which up to 32 are
    selected, in a single one; others with `coor_descent` and `select`. Of equal entries the first is selected. A CPU
    tensor, and one of fp64, is selected from by torch.topk.

    Arguments, results and errors are those of `reference.topk`.
    """
    rest = (coor_descent_k_ratio, n_iters, eps, eps_init, eps_decay, mask)
    if not fused:
        return plain_topk(x, k, *rest, non_differentiable=non_differentiable)
    check_scores(x, mask)
    check_topk(x, k, coor_descent_k_ratio)
    if non_differentiable or k > MOST or x.shape[-1] > LONGEST or not runs_triton(x):
        choose = _choose if runs_triton(x) and x.dtype != torch.float64 else largest
        return select_topk(coor_descent, choose, x, k, *rest, non_differentiable)

    check_schedule(n_iters, eps, eps_init, eps_decay)
    save = x.requires_grad and torch.is_grad_enabled()
    operation: Callable[..., tuple[Tensor, ...]] = _eager if save else _forward
    if is_traced(x):
        operation = torch.ops.colt5.topk
    selected = operation(
        as_rows(x),
        mask_as_rows(mask, x.shape),
        k,
        float(min(k * coor_descent_k_ratio, x.shape[-1])),
        n_iters,
        eps,
        first_temperature(eps, eps_init),
        eps_decay,
        save,
    )[:4]
    return TopkReturn(*(selected if x.dim() == 2 else (tensor.view(*x.shape[:-1], k) for tensor in selected)))
