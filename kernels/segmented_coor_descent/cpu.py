"""`kernels.segmented_coor_descent` in PyTorch, for CPU tensors."""

import torch
from torch import Tensor

from kernels.segmented_coor_descent.steps import borders_of


def _prepare(
    scores: Tensor, mask: Tensor | None, k_rows: Tensor | None, k: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs as the kernels read them, in `dtype`. s is `rows n`, -inf for entries that take no part. The highest s, k
    and log k are each `rows 1`."""
    s = scores.to(dtype)
    s = s if mask is None else s.masked_fill(~mask, -torch.inf)
    max_score = s.amax(dim=-1, keepdim=True)
    k_column = scores.new_full((scores.shape[0], 1), k, dtype=dtype) if k_rows is None else k_rows.to(dtype)[:, None]
    k_column = torch.where(k_column > 0, k_column, torch.nan)
    return s, max_score.masked_fill(max_score == -torch.inf, 0.0), k_column, k_column.log()


def _exponentials(s: Tensor, b: Tensor, largest: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """exp((s + b) / temperature) `rows n`, scaled to a largest entry of 1 in each row, and their sums `rows 1`."""
    exponentials = (s + b).sub_(largest).div_(temperature).exp_()
    total = exponentials.sum(dim=-1, keepdim=True)
    return exponentials, total.masked_fill_(total == 0, 1.0)


def _iterate(
    s: Tensor, max_score: Tensor, log_k: Tensor, b: Tensor, largest: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One iteration: the next a `rows 1`, b `rows n` and the largest s + b `rows 1`."""
    _, total = _exponentials(s, b, largest, temperature)
    a = temperature * (log_k - total.log()) - largest
    return a, (s + a).relu_().neg_(), torch.minimum(max_score, -a)


def forward(
    scores: Tensor,  # rows n
    mask: Tensor | None,  # rows n
    k_rows: Tensor | None,  # rows
    k: float,
    steps: list[float],
    segments: int,
    checkpoint_a: Tensor,  # segments rows
    checkpoint_b: Tensor,  # segments rows n; both without entries if no gradient is needed
) -> Tensor:
    """The relaxed selection `rows n`, as the forward kernels compute it."""
    s, max_score, _, log_k = _prepare(scores, mask, k_rows, k, checkpoint_b.dtype)
    save = checkpoint_b.numel() > 0
    *temperatures, last_temperature = steps
    b = torch.where(s == -torch.inf, 0.0, -s)
    largest = torch.zeros_like(max_score)
    for segment in range(segments):
        if save:
            checkpoint_b[segment] = b
        start, stop = borders_of.fn(segment, len(temperatures), segments)
        for temperature in temperatures[start:stop]:
            a, b, largest = _iterate(s, max_score, log_k, b, largest, temperature)
        if save:
            checkpoint_a[segment] = a[:, 0]
    y = (s + a).add_(b).div_(last_temperature).exp_()
    return y if mask is None else y.masked_fill_(~mask, 0.0)


def backward(
    grad_output: Tensor,  # rows n
    scores: Tensor,  # rows n
    mask: Tensor | None,  # rows n
    k_rows: Tensor | None,  # rows
    k: float,
    steps: list[float],
    checkpoint_a: Tensor,  # segments rows
    checkpoint_b: Tensor,  # segments rows n
) -> tuple[Tensor, Tensor]:
    """Gradients of the scores `rows n` and of k `rows`, as the backward kernels compute them."""
    s, max_score, k_column, log_k = _prepare(scores, mask, k_rows, k, checkpoint_b.dtype)
    segments = len(checkpoint_b)
    *temperatures, last_temperature = steps
    hidden = s == -torch.inf

    slack = s + checkpoint_a[-1][:, None]
    y = slack.clamp(max=0.0).div_(last_temperature).exp_()
    ds = (y * grad_output / last_temperature).masked_fill_((slack > 0) | hidden, 0.0)
    grad_a = ds.sum(dim=-1, keepdim=True)
    dk = torch.zeros_like(grad_a)
    for segment in reversed(range(segments)):
        start, stop = borders_of.fn(segment, len(temperatures), segments)
        # The first iteration of all passes no gradient to the scores.
        for t in reversed(range(max(start, 1), stop)):
            b = checkpoint_b[segment]
            # The largest s + b; in the first segment b = -s.
            largest = torch.minimum(max_score, -checkpoint_a[segment - 1][:, None]) if segment else 0.0 * max_score
            for temperature in temperatures[start:t]:
                _, b, largest = _iterate(s, max_score, log_k, b, largest, temperature)
            exponentials, total = _exponentials(s, b, largest, temperatures[t])
            clipped = b < 0
            dk += grad_a * temperatures[t]
            ds -= (exponentials * (grad_a / total)).masked_fill_(clipped | hidden, 0.0)
            grad_a = grad_a * (exponentials * clipped).sum(dim=-1, keepdim=True) / total
    dk += grad_a * temperatures[0]
    return ds, (dk / k_column)[:, 0]
