"""Coordinate descent and selection on every prefix of a row of scores, without copies.

Each window after the first routes from the tokens before it. The prefixes are rows that share storage, each with its
length. All windows select from one order of the row by score: the first entries that are in their prefix. A longer
prefix has a higher limit, so a token is selected by consecutive windows. Its gradients from these windows have
separate, adjacent places, and are added up in order. See `forward.py` and `backward.py`.
"""

import torch
from torch import Tensor

from kernels._common.operation import Operation
from kernels._common.tensors import as_rows, has_values, runs_triton
from kernels.route_prefixes import cpu
from kernels.route_prefixes.backward import launch_backward
from kernels.route_prefixes.forward import launch_forward, launch_part
from reference._shared.arguments import check_prefixes, check_schedule, first_temperature
from reference._shared.ranks import Ranks
from reference._shared.returns import PrefixSelection
from reference._shared.sizes import mask_of_prefixes, windows_with_a_prefix


def _forward(
    scores: Tensor,
    descents: Tensor | None,
    window_size: int,
    num_selected: int,
    k: float,
    n_iters: int,
    eps: float,
    first: float,
    eps_decay: float,
    straight_through: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weights and indices `b w r s`, a mask, counts, and the state of the descents.

    The mask is `b w r s`, and empty if all prefixes have at least as many tokens as are selected. Counts are `b r n`:
    the number of windows that select a token; empty if nothing is saved. The state may be known, from `descents`.
    """
    schedule = (n_iters, eps, first, eps_decay)
    batch, routes, n = scores.shape
    windows = windows_with_a_prefix(n, window_size)
    shape = (batch, windows, routes, num_selected)
    weights = scores.new_empty(shape, dtype=torch.promote_types(scores.dtype, torch.float32))
    indices = scores.new_empty(shape, dtype=torch.int64)
    mask = scores.new_empty(shape if window_size < num_selected else (0,), dtype=torch.bool)
    counts = scores.new_zeros(scores.shape if save else (0,), dtype=torch.int32)
    state = scores.new_empty(_state_shape(batch * windows * routes, n_iters), dtype=torch.float64)
    if not has_values(indices):
        return weights, indices, mask, counts, state
    if runs_triton(scores):
        if descents is not None:
            state.copy_(descents)
        outputs = (indices, weights, mask, counts, state, descents is not None)
        launch_forward(as_rows(scores), window_size, k, schedule, straight_through, *outputs)
    else:
        cpu.forward(scores, window_size, k, schedule, straight_through, indices, weights, state.zero_())
        if (before := mask_of_prefixes(scores, window_size, num_selected)) is not None:
            mask.copy_(before)
    return weights, indices, mask, counts, state


def _backward(
    grad_weights: Tensor,
    scores: Tensor,
    indices: Tensor,
    counts: Tensor,
    state: Tensor,
    window_size: int,
    k: float,
    n_iters: int,
    eps: float,
    first: float,
    eps_decay: float,
) -> Tensor:
    if not has_values(indices):
        return torch.zeros_like(scores, memory_format=torch.contiguous_format)
    ds = torch.empty_like(scores, memory_format=torch.contiguous_format)
    if runs_triton(scores):
        launch_backward(grad_weights.contiguous(), as_rows(scores), window_size, k, indices, counts, state, ds)
    else:
        cpu.backward(grad_weights, scores, window_size, k, (n_iters, eps, first, eps_decay), indices, state, ds)
    return ds


_operation = Operation(
    "route_prefixes",
    _forward,
    _backward,
    outputs=("weights", "indices", "mask", "counts", "state"),
    gradients=("scores",),
)


def _state_shape(prefixes: int, n_iters: int) -> tuple[int, int, int]:
    """The shape of the state of descents: thresholds and ratios of each prefix, followed by the schedule."""
    return prefixes + 1, 2, n_iters + 1


def _descend_together(
    scores: Tensor, window_size: int, k: float, schedule: tuple[int, float, float, float], save: bool, ranks: Ranks
) -> Tensor:
    """The state of the descents on all prefixes of scores `b r n`, with a part computed by each rank.

    Long prefixes take longer, and every rank has equally many of them. The state is 2 n_iters + 2 numbers per prefix.
    """
    batch, routes, n = scores.shape
    windows = windows_with_a_prefix(n, window_size)
    shape = _state_shape(batch * windows * routes, schedule[0])
    state = scores.new_zeros(shape, dtype=torch.float64)
    launch_part(as_rows(scores), routes, windows, window_size, k, *schedule, ranks.number, ranks.size, save, state)
    # As integers: each rank has zeros outside of its part, so a sum keeps any bits.
    every = torch.stack(ranks.gather(state.view(torch.int64)))
    together = every.sum(dim=0).view(torch.float64)
    together[-1] = state[-1]
    return together


def route_prefixes(
    scores: Tensor,
    *,
    window_size: int,
    num_selected: int,
    k: float,
    n_iters: int,
    eps: float = 0.1,
    eps_init: float | None = None,
    eps_decay: float = 1.0,
    straight_through: bool = False,
    ranks: Ranks | None = None,
) -> PrefixSelection:
    """`reference.route_prefixes` without a copy of the scores for each window, with a closed-form gradient.

    Memory is linear in n and in the number of selected tokens, plus some 700 bytes per window, route and batch element
    for 20 iterations. Results are bitwise equal from run to run. PyTorch computes a CPU tensor by the same mathematics,
    window by window.

    Args:
        scores: `b r n`: fp32, bf16 or fp16, and fp64 on the CPU (computed in fp32 on a GPU). Any strides.
        window_size: tokens of a window; the last one may be shorter.
        num_selected: s, number of tokens to select, from 1 to n.
        k: the sum that each row of coordinate descent approaches, for any length.
        n_iters, eps, eps_init, eps_decay: as in `reference.coor_descent`.
        straight_through: weights are 1, with the gradient of the relaxed selection.
        ranks: processes that call this together, with the same scores and options. If kernels compute the descents, the
            processes share them. Results are those of one process.

    Returns:
        Indices, weights and mask, `b w r s` for the w = ceil(n / window_size) - 1 windows after the first. Weights have
        a gradient; weight and gradient of a score of -inf are 0. All weights of a window are NaN if a score before it
        is NaN or +inf; NaN counts as the largest score.

    Raises:
        ValueError: an argument is out of its range, or shapes do not match.
        NotImplementedError: for a second derivative or forward mode.
    """
    check_prefixes(scores, window_size, num_selected, k)
    check_schedule(n_iters, eps, eps_init, eps_decay)
    schedule = (n_iters, eps, first_temperature(eps, eps_init), eps_decay)
    descents = None
    if ranks is not None and runs_triton(scores):
        save = torch.is_grad_enabled() and scores.requires_grad
        descents = _descend_together(scores.detach(), window_size, float(k), schedule, save, ranks)
    sizes = (window_size, num_selected, float(k))
    weights, indices, mask, *_ = _operation(scores, descents, *sizes, *schedule, straight_through)
    return PrefixSelection(indices, weights, mask if window_size < num_selected else None)
