"""Coordinate descent as the CoLT5 system published it: vectors a and b, with checkpoints at the borders of segments.

The forward pass keeps b at the start of each segment of iterations and a at its end. The backward pass recomputes the
iterations between them: for each iteration of a segment, from the last to the first, all earlier ones of the segment.
More segments need more memory and less time, which the suite `segments` shows in comparison with
`kernels.coor_descent`, which needs none.

Gradient. With x = s + b, p = softmax(x / e) and A_t = dL/da_t, the gradients through iteration t are

    b_{t+1} = -relu(s + a_t)                  db := dL/db_{t+1},  A_t = -sum db [s + a_t > 0],  ds -= db [s + a_t > 0]
    a_t = e (log k - logsumexp(x / e))        dx = -A_t p,  ds += dx,  dL/db_t = dx,  dk += A_t e / k

and s + a_{t-1} > 0 if and only if b_t < 0, so the gradient of b_t is passed on as soon as it is known:

    ds += -A_t p where b_t = 0,    A_{t-1} = A_t sum p [b_t < 0]

except for b_0 = -s, where x = 0 for any s. The gradient begins with the output y = exp((s + a + b) / e): ds = A = g
y / e where s + a <= 0, with A summed over the row.
"""

import torch
from torch import Tensor

from kernels._common.operation import Operation
from kernels._common.tensors import as_rows, has_values, in_shape, k_as_rows, mask_as_rows, runs_triton
from kernels.segmented_coor_descent import cpu
from kernels.segmented_coor_descent.triton import launch_backward, launch_forward
from reference._shared.arguments import (
    check_integers,
    check_k,
    check_schedule,
    check_scores,
    epsilon_schedule,
    first_temperature,
    require,
)

LONGEST = 131072
"""Longest supported row: one program computes a row."""


def _forward(
    scores: Tensor,
    mask: Tensor | None,
    k_rows: Tensor | None,
    k: float,
    n_iters: int,
    first: float,
    eps_decay: float,
    eps: float,
    segments: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, and the checkpoints: a at the end of each segment and b at its start, and the temperatures."""
    kept, device = segments if save else 0, scores.device
    # The dtype of b is the dtype of the computation, even if nothing is kept.
    dtype = torch.promote_types(scores.dtype, torch.float32)
    y = torch.empty(scores.shape, dtype=scores.dtype, device=device)
    a = torch.empty((kept, scores.shape[0]), dtype=dtype, device=device)
    b = torch.empty((kept, *scores.shape), dtype=dtype, device=device)
    temperatures = torch.empty(n_iters + 1 if save else 0, dtype=torch.float64, device=device)
    if not has_values(scores):
        return y, a, b, temperatures
    if runs_triton(scores):
        schedule = (n_iters, first, eps_decay, eps)
        launch_forward(scores, mask, k_rows, k, *schedule, segments, y, a, b, temperatures)
    else:
        steps = list(epsilon_schedule(n_iters, eps, first, eps_decay))
        y.copy_(cpu.forward(scores, mask, k_rows, k, steps, segments, a, b))
        if save:
            temperatures.copy_(torch.tensor(steps, dtype=torch.float64, device="cpu"))
    return y, a, b, temperatures


def _backward(
    grad_y: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    k_rows: Tensor | None,
    a: Tensor,
    b: Tensor,
    temperatures: Tensor,
    k: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of the scores and of k."""
    ds = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    dk = torch.empty(scores.shape[0], dtype=b.dtype, device=scores.device)
    if not has_values(scores):
        return ds, dk
    grad_y = as_rows(grad_y)
    if runs_triton(scores):
        launch_backward(grad_y, scores, mask, k_rows, k, a, b, temperatures, ds, dk)
    else:
        gradients = cpu.backward(grad_y, scores, mask, k_rows, k, temperatures.tolist(), a, b)
        ds.copy_(gradients[0]), dk.copy_(gradients[1])
    return ds, dk


_operation = Operation(
    "segmented_coor_descent",
    _forward,
    _backward,
    outputs=("y", "a", "b", "temperatures"),
    gradients=("scores", "k_rows"),
    reference="coor_descent",
)


def segmented_coor_descent(
    scores: Tensor,
    *,
    n_iters: int,
    k: float | Tensor,
    eps: float = 0.1,
    eps_init: float | None = None,
    eps_decay: float = 1.0,
    mask: Tensor | None = None,
    checkpoint_segments: int = 1,
) -> Tensor:
    """`reference.coor_descent` by the published algorithm of colt5-attention, for comparisons.

    CoLT5: https://arxiv.org/abs/2303.09752, section 3.1; checkpoints by segments: Chen et al. 2016,
    https://arxiv.org/abs/1604.06174, section 4.1. The forward pass keeps `segments ... n` numbers for the backward
    pass. The time is linear in the number of iterations and in the length of a segment. Results are bitwise equal from
    run to run. PyTorch computes a CPU tensor by the same algorithm.

    Args:
        scores: `... n` with n up to 131072: fp32, bf16 or fp16, computed in fp32, or fp64. Any strides.
        n_iters: number of iterations, at least 1.
        k: the sum that each row approaches: a number, or a tensor that broadcasts to `...`, with a gradient.
        eps: last temperature, in units of the scores.
        eps_init: first temperature; None, or a value below eps, means eps.
        eps_decay: factor in (0, 1] by which the temperature decays after each iteration, until it reaches eps.
        mask: bool, broadcasts to `... n`; False entries are left out and give 0. So do entries with a score of -inf.
        checkpoint_segments: number of segments into which the iterations are split as evenly as possible, from 1 to
            n_iters.

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
    require(scores.shape[-1] <= LONGEST, "n (the length of a row)", scores.shape[-1], "<= {}", LONGEST)
    check_integers(checkpoint_segments=checkpoint_segments)
    fits = 1 <= checkpoint_segments <= n_iters
    require(fits, "checkpoint_segments", checkpoint_segments, "from 1 to n_iters = {}", n_iters)
    k_rows, k_number = k_as_rows(k, scores.shape)
    y, *_ = _operation(
        as_rows(scores),
        mask_as_rows(mask, scores.shape),
        k_rows,
        k_number,
        n_iters,
        first_temperature(eps, eps_init),
        eps_decay,
        eps,
        checkpoint_segments,
    )
    return in_shape(y, scores.shape)
