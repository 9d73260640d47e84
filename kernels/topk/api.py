"""Differentiable top-k in one kernel: coordinate descent, selection and gates of a row in registers."""

from typing import Any

import torch
from torch import Tensor

from kernels._common.operation import Operation
from kernels._common.tensors import as_rows, has_values, mask_as_rows, runs_triton
from kernels.coor_descent import (
    allocate_state,
    coor_descent,
    descend_rows_backward,
)
from kernels.select import select
from kernels.topk.triton import LONGEST, MOST, launch_topk
from reference._shared.arguments import check_schedule, check_scores, check_topk, first_temperature
from reference._shared.returns import TopkReturn
from reference._shared.topk import largest, select_topk


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Values, indices, relaxed selection and gates, then the tensors for the backward pass of `coor_descent`."""
    shape = (x.shape[0], selected)
    values, soft, gates = x.new_empty(shape), x.new_empty(shape), x.new_empty(shape)
    outputs = values, x.new_empty(shape, dtype=torch.int64), soft, gates, allocate_state(x, n_iters, save)
    if has_values(x):
        launch_topk(x, mask, selected, k, n_iters, eps, first, eps_decay, *outputs)
    return outputs


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
    """The gradient of x; None stands for a gradient of 0. It is rounded once: its two terms may cancel."""
    if not has_values(x):
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, values = x.to(wide), values.to(wide)
    grad_values, grad_soft, grad_gates = (
        None if grad is None else grad.to(wide) for grad in (grad_values, grad_soft, grad_gates)
    )
    # A value is its score, but 0 for an entry that was not selected. The gradient of the descent ignores such entries.
    through_value = None if grad_values is None else grad_values * values
    through_gate = _sum(grad_gates, through_value)
    grad = torch.zeros_like(x).scatter_(-1, indices, _sum(through_gate, grad_soft))
    dx, _ = descend_rows_backward(grad, x, mask, None, state, k, n_iters, eps, first, eps_decay)
    return (dx if grad_values is None else dx.scatter_add_(-1, indices, grad_values * gates)).to(dtype)


def _sum(one: Tensor | None, other: Tensor | None) -> Any:
    """None stands for a gradient of 0."""
    if one is None or other is None:
        return other if one is None else one
    return one + other


_operation = Operation(
    "topk", _forward, _backward, outputs=("values", "indices", "soft", "gates", "state"), gradients=("x",)
)


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
    """`reference.topk` with the kernels `coor_descent` and `select`. With `fused` it is one kernel if rows have up to
    4096 entries and up to 32 are selected. The first of equal entries is selected. For a CPU tensor or fp64, torch.topk
    selects.

    Arguments, results and errors are those of `reference.topk`.
    """
    rest = (coor_descent_k_ratio, n_iters, eps, eps_init, eps_decay, mask)
    check_scores(x, mask)
    check_topk(x, k, coor_descent_k_ratio)
    if not fused or non_differentiable or k > MOST or x.shape[-1] > LONGEST or not runs_triton(x):
        choose = _choose if runs_triton(x) and x.dtype != torch.float64 else largest
        return select_topk(coor_descent, choose, x, k, *rest, non_differentiable)

    check_schedule(n_iters, eps, eps_init, eps_decay)
    selected = _operation(
        as_rows(x),
        mask_as_rows(mask, x.shape),
        k,
        float(min(k * coor_descent_k_ratio, x.shape[-1])),
        n_iters,
        eps,
        first_temperature(eps, eps_init),
        eps_decay,
    )[:4]
    return TopkReturn(*(selected if x.dim() == 2 else (tensor.view(*x.shape[:-1], k) for tensor in selected)))
