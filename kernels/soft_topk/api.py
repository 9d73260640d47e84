"""The exact soft top-k: one monotone equation per row, solved in a few passes over the row.

`reference.soft_topk` is y_i = min(1, exp((s_i - v) / e)) with the v at which

    F(v) = #{s_i > v} + sum over the others of exp((s_i - v) / e)

falls to k. A pass evaluates F at several probes and keeps the two around the solution, the bracket. The next probes are
at smaller and smaller steps around an interpolation, and close to the solution under the assumption that no other score
is between it and an end of the bracket. If that gains little, the probes divide the fp32 numbers in the bracket evenly,
so that the search ends for any scores. As soon as no score is left in the bracket, the entries at 1 are known, and the
rest has a closed form: with the anchor h at an end of the bracket, y = exp((s - h) / e) (k - #{s > h}) / sum
exp((s - h) / e). The difference s - h of two fp32 numbers is exact where it matters, so that only sums and probes need
fp64.
"""

import torch
from torch import Tensor

from kernels._common.operation import Operation
from kernels._common.tensors import as_rows, has_values, in_shape, k_as_rows, mask_as_rows, runs_triton
from kernels.soft_topk import cpu
from kernels.soft_topk.triton import launch_backward, launch_forward
from reference._shared.arguments import check_k, check_positive, check_scores


def solve_rows(
    scores: Tensor, mask: Tensor | None, k_rows: Tensor | None, k: float, eps: float
) -> tuple[Tensor, Tensor]:
    """The relaxed selection `rows n`, and the solution of each row: anchor, scale, and number of passes, including the
    output."""
    y = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    solution = torch.empty((scores.shape[0], 3), dtype=torch.float64, device=scores.device)
    if has_values(scores):
        solve = launch_forward if _runs_kernel(scores) else cpu.forward
        solve(scores, mask, k_rows, k, eps, y, solution)
    return y, solution


def solve_rows_backward(
    grad_y: Tensor, scores: Tensor, mask: Tensor | None, solution: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The gradients of scores and k."""
    ds = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    dk = torch.empty(scores.shape[0], dtype=torch.float64, device=scores.device)
    if has_values(scores):
        differentiate = launch_backward if _runs_kernel(scores) else cpu.backward
        differentiate(as_rows(grad_y), scores, mask, solution, eps, ds, dk)
    return ds, dk


def _runs_kernel(scores: Tensor) -> bool:
    """fp64 stays fp64, which the kernels do not support."""
    return scores.dtype != torch.float64 and runs_triton(scores)


_operation = Operation(
    "soft_topk", solve_rows, solve_rows_backward, outputs=("y", "solution"), gradients=("scores", "k_rows")
)


def soft_topk(scores: Tensor, *, k: float | Tensor, eps: float, mask: Tensor | None = None) -> Tensor:
    """`reference.soft_topk` in a few passes over each row, with the gradient of the implicit function.

    Where y < 1, ds_i = (y_i / eps) (g_i - sum g y / sum y), and dk = sum g y / sum y, both sums over y < 1
    (docs/design.md, section 5). The backward pass needs the scores and three numbers per row. Results are bitwise equal
    from run to run. For a CPU tensor or fp64, PyTorch solves it by sorting the largest scores.

    Args:
        scores: `... n`, any float dtype. Any strides.
        k: the sum of each row: a number, or a tensor that broadcasts to `...`, with a gradient.
        eps: temperature, in units of the scores.
        mask: bool, broadcasts to `... n`; False entries are left out and give 0. So do entries with a score of -inf.

    Returns:
        `... n`, in the dtype of the scores. In a row with no more than k valid entries each of them is 1, with a
        gradient of 0. The valid entries of a row are NaN if one of their scores is NaN or +inf, or if its k, from a
        tensor, is not positive.

    Raises:
        ValueError: an argument is out of its range, or shapes do not match.
        NotImplementedError: for a second derivative or forward mode.
    """
    check_scores(scores, mask)
    check_k(k, scores)
    check_positive(eps=eps)
    y, _ = _operation(as_rows(scores), mask_as_rows(mask, scores.shape), *k_as_rows(k, scores.shape), float(eps))
    return in_shape(y, scores.shape)
