"""`kernels.route_prefixes` in PyTorch, one window after the other: what a CPU tensor gets."""

import torch
from torch import Tensor

from kernels.coor_descent import backward_in_pytorch, forward_in_pytorch, views_of, wide_k
from reference._shared.arguments import epsilon_schedule


def forward(
    scores: Tensor,  # b r n
    window_size: int,
    k: float,
    schedule: tuple[int, float, float, float],
    straight_through: bool,
    indices: Tensor,  # b w r s
    weights: Tensor,  # b w r s
    state: Tensor,  # b*w*r+1 2 n_iters+1, fp64
) -> None:
    """Write indices, weights and state; see `kernels.route_prefixes`."""
    batch, windows, routes, selected = indices.shape
    rows = _as_rows(scores)
    temperatures = list(epsilon_schedule(*schedule))
    for window in range(windows):
        length = (window + 1) * window_size
        prefix = rows[:, :length]
        kept = [rows.new_empty(len(rows), size, dtype=torch.float64) for size in (schedule[0], schedule[0], 1)]
        y = forward_in_pytorch(prefix, None, wide_k(prefix, None, k), temperatures, kept)
        for of_prefixes, of_window in zip(views_of(state), kept, strict=True):
            _of_window(of_prefixes, indices, window).copy_(of_window.view(batch, routes, -1))
        largest = prefix.sort(dim=-1, descending=True, stable=True).indices[:, :selected]
        found = largest.shape[-1]
        indices[:, window, :, :found] = largest.view(batch, routes, -1)
        indices[:, window, :, found:] = torch.arange(found, selected, device=scores.device)
        of_largest = y.gather(-1, largest)
        if straight_through:
            of_largest = torch.where(of_largest.isnan(), of_largest, 1.0)
        weights[:, window, :, :found] = of_largest.view(batch, routes, -1)
        weights[:, window, :, found:] = 0.0


def backward(
    grad_output: Tensor,  # b w r s
    scores: Tensor,  # b r n
    window_size: int,
    k: float,
    schedule: tuple[int, float, float, float],
    indices: Tensor,  # b w r s
    state: Tensor,  # b*w*r+1 2 n_iters+1, fp64
    ds: Tensor,  # b r n
) -> None:
    """Write the gradient of the scores, the sum over all windows."""
    windows = indices.shape[1]
    rows = _as_rows(scores)
    total = torch.zeros_like(rows)
    temperatures = list(epsilon_schedule(*schedule))
    for window in range(windows):
        length = (window + 1) * window_size
        prefix = rows[:, :length]
        kept = [_of_window(numbers, indices, window).flatten(0, 1) for numbers in views_of(state)]
        of_selected, position = (x[:, window].flatten(0, 1)[:, :length] for x in (grad_output, indices))
        of_prefix = torch.zeros_like(prefix, dtype=grad_output.dtype).scatter_(-1, position, of_selected)
        of_scores, _ = backward_in_pytorch(of_prefix, prefix, None, wide_k(prefix, None, k), temperatures, *kept)
        total[:, :length] += of_scores
    ds.copy_(total.view(ds.shape))


def _as_rows(scores: Tensor) -> Tensor:
    """Scores `b r n` as `(b r) n`, in the fp32 at least that weights are in."""
    return scores.reshape(-1, scores.shape[-1]).to(torch.promote_types(scores.dtype, torch.float32))


def _of_window(numbers: Tensor, indices: Tensor, window: int) -> Tensor:
    """The numbers of one window, from `(b w r) t`:"""
    return numbers.view(*indices.shape[:3], -1)[:, window]
