"""`kernels.route_prefixes` in PyTorch, for CPU tensors, in groups of windows."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.coor_descent import backward_in_pytorch, forward_in_pytorch, views_of, wide_k
from reference._shared.arguments import epsilon_schedule

ENTRIES_AT_ONCE = 32768
"""Approximate number of entries of windows that are computed together. With fewer, the overhead of calls exceeds the
computation."""


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
    *_, selected = indices.shape
    temperatures = list(epsilon_schedule(*schedule))
    for windows, prefixes in _side_by_side(scores, window_size, indices.shape[1]):
        of_windows = indices[:, windows]
        kept = [_of_windows(numbers, indices, windows).flatten(0, 2).clone() for numbers in views_of(state)]
        y = forward_in_pytorch(prefixes, None, wide_k(prefixes, None, k), temperatures, kept)
        for of_all, numbers in zip(views_of(state), kept, strict=True):
            of_group = _of_windows(of_all, indices, windows)
            of_group.copy_(numbers.view(of_group.shape))
        # Entries after a prefix come last, in order.
        largest = prefixes.sort(dim=-1, descending=True, stable=True).indices[:, :selected]
        found = largest.shape[-1]
        of_largest = y.gather(-1, largest)
        if straight_through:
            of_largest = torch.where(of_largest.isnan(), of_largest, 1.0)
        own = window_size * torch.arange(windows.start + 1, windows.stop + 1, device=scores.device)[:, None, None]
        of_windows[..., :found] = largest.view(*of_windows.shape[:3], -1)
        of_windows[..., found:] = torch.arange(found, selected, device=scores.device)
        weights[:, windows, :, :found] = of_largest.view(*of_windows.shape[:3], -1)
        weights[:, windows].masked_fill_(of_windows >= own, 0.0)


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
    total = torch.zeros(scores.shape, dtype=torch.promote_types(scores.dtype, torch.float32), device=scores.device)
    temperatures = list(epsilon_schedule(*schedule))
    for windows, prefixes in _side_by_side(scores, window_size, indices.shape[1]):
        kept = [_of_windows(numbers, indices, windows).flatten(0, 2) for numbers in views_of(state)]
        length = prefixes.shape[1]
        of_selected, position = (x[:, windows].flatten(0, 2)[:, :length] for x in (grad_output, indices))
        of_prefixes = torch.zeros_like(prefixes, dtype=grad_output.dtype).scatter_(-1, position, of_selected)
        of_scores, _ = backward_in_pytorch(of_prefixes, prefixes, None, wide_k(prefixes, None, k), temperatures, *kept)
        total[..., :length] += of_scores.view(scores.shape[0], -1, scores.shape[1], length).sum(dim=1)
    ds.copy_(total)


def _side_by_side(scores: Tensor, window_size: int, windows: int) -> Iterator[tuple[slice, Tensor]]:
    """Groups of windows, and the scores before each of them as rows `(b w r) length`.

    They are in fp32 at least, as weights are. Rows have the length of the longest one, with -inf after their own
    length."""
    batch, routes, _ = scores.shape
    wide, start = scores.to(torch.promote_types(scores.dtype, torch.float32)), 0
    while start < windows:
        stop = start + 1
        while stop < windows and batch * routes * (stop + 1 - start) * (stop + 1) * window_size <= ENTRIES_AT_ONCE:
            stop += 1
        group = torch.arange(start + 1, stop + 1, device=scores.device)
        after = torch.arange(stop * window_size, device=scores.device) >= window_size * group[:, None, None]
        prefixes = wide[:, None, :, : stop * window_size].masked_fill(after, -torch.inf)
        yield slice(start, stop), prefixes.flatten(0, 2)
        start = stop


def _of_windows(numbers: Tensor, indices: Tensor, windows: slice) -> Tensor:
    """The numbers of some windows, `b w r t`, from `(b w r) t`."""
    return numbers.view(*indices.shape[:3], -1)[:, windows]
