"""Coordinate descent on a scalar state: one number per row instead of two vectors, with a closed-form gradient.

After its first step the recurrence of `reference.coor_descent` depends on the scores only through
`a <- e (log k - log sum exp(min(s, -a) / e))`, one fp64 scalar per row (docs/design.md, sections 2 to 4). With

    anchor h = min(max s, -a),     weights w = exp((s - base) / e)

an iteration is `S = sum min(w exp((base - h) / e), 1)` and `a = e (log k - log S) - h`. The weights stay the same while
the temperature does. With r = exp((a + base) / e) an iteration then is `r = k max(r, exp((base - max s) / e)) / S`,
where `S = sum min(w max(r, exp((base - max s) / e)), 1)`: a multiplication, a minimum and an addition per entry.
"""

import torch
from torch import Tensor

from kernels._common.operation import Operation
from kernels._common.tensors import as_rows, has_values, in_shape, k_as_rows, mask_as_rows, runs_triton
from kernels.coor_descent import cpu
from kernels.coor_descent.backward import launch_backward
from kernels.coor_descent.forward import launch_forward
from kernels.coor_descent.state import allocate_state, views_of
from reference._shared.arguments import check_k, check_schedule, check_scores, epsilon_schedule, first_temperature


def descend_rows(
    scores: Tensor,
    mask: Tensor | None,
    k_rows: Tensor | None,
    k: float,
    n_iters: int,
    eps: float,
    first: float,
    eps_decay: float,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """The relaxed selection `rows n`, and the state for its gradient, without a tensor of size n."""
    state = allocate_state(scores, n_iters, save)
    if not runs_triton(scores) and has_values(scores):
        wide_k, steps = cpu.wide_k(scores, k_rows, k), list(epsilon_schedule(n_iters, eps, first, eps_decay))
        return cpu.forward(scores, mask, wide_k, steps, views_of(state.zero_()) if save else None), state
    y = torch.empty_like(scores, memory_format=torch.contiguous_format)
    if has_values(scores):
        launch_forward(scores, mask, k_rows, k, n_iters, eps, first, eps_decay, y, state)
    return y, state


def descend_rows_backward(
    grad_y: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    k_rows: Tensor | None,
    state: Tensor,
    k: float,
    n_iters: int,
    eps: float,
    first: float,
    eps_decay: float,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the scores and, if k has one entry per row, of k."""
    if not runs_triton(scores) and has_values(scores):
        wide_k, steps = cpu.wide_k(scores, k_rows, k), list(epsilon_schedule(n_iters, eps, first, eps_decay))
        ds, wide_dk = cpu.backward(grad_y, scores, mask, wide_k, steps, *views_of(state))
        return ds, None if k_rows is None else wide_dk
    ds = torch.empty_like(scores, memory_format=torch.contiguous_format)
    # Each allocation takes a considerable share of a short call.
    dk = None if k_rows is None else scores.new_empty(scores.shape[0], dtype=torch.float64)
    if has_values(scores):
        given = (as_rows(grad_y), scores, mask, k_rows, k, n_iters, eps, first, eps_decay)
        launch_backward(*given, state, ds, state if dk is None else dk)
    return ds, dk


_operation = Operation(
    "coor_descent",
    descend_rows,
    descend_rows_backward,
    outputs=("y", "state"),
    gradients=("scores", "k_rows"),
)


def coor_descent(
    scores: Tensor,
    *,
    n_iters: int,
    k: float | Tensor,
    eps: float = 0.1,
    eps_init: float | None = None,
    eps_decay: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """`reference.coor_descent` in one kernel, with fp64 scalars and a closed-form gradient.

    The backward pass needs the scores, and 16 bytes per row and iteration. Results are bitwise equal from run to run.
    PyTorch computes a CPU tensor by the same mathematics.

    Args:
        scores: `... n`: fp32, bf16 or fp16, and fp64 on the CPU (computed in fp32 on a GPU). Any strides.
        n_iters: number of iterations, at least 1.
        k: the sum that each row approaches: a number, or a tensor that broadcasts to `...`, with a gradient.
        eps: last temperature, in units of the scores.
        eps_init: first temperature; None, or a value below eps, means eps.
        eps_decay: factor in (0, 1] by which the temperature decays after each iteration, until it reaches eps.
        mask: bool, broadcasts to `... n`; False entries are left out and give 0. So do entries with a score of -inf.

    Returns:
        `... n`, in the dtype of the scores. A row is NaN if a valid score is NaN or +inf, or if its k, from a tensor,
        is not positive.

    Raises:
        ValueError: an argument is out of its range, or shapes do not match.
        NotImplementedError: for a second derivative or forward mode.
    """
    check_scores(scores, mask)
    check_k(k, scores)
    check_schedule(n_iters, eps, eps_init, eps_decay)
    k_rows, k_number = k_as_rows(k, scores.shape)
    y, _ = _operation(
        as_rows(scores),
        mask_as_rows(mask, scores.shape),
        k_rows,
        k_number,
        n_iters,
        eps,
        first_temperature(eps, eps_init),
        eps_decay,
    )
    return in_shape(y, scores.shape)
