"""The hard top-k of long rows by a radix search instead of a sort; see `triton.py`."""

import torch
from torch import Tensor

from kernels._common.operation import Operation
from kernels._common.tensors import as_rows, has_values, mask_as_rows, runs_triton
from kernels.select import cpu
from kernels.select.triton import launch_select
from reference._shared.arguments import check_select


def select_rows(scores: Tensor, mask: Tensor | None, num_selected: int) -> Tensor:
    """`select` for scores `rows n` with a mask of that shape, both with a last stride of 1."""
    if has_values(scores) and (scores.dtype == torch.float64 or not runs_triton(scores)):
        return cpu.select_rows(scores, mask, num_selected)
    indices = torch.empty((scores.shape[0], num_selected), dtype=torch.int64, device=scores.device)
    if has_values(scores):
        launch_select(scores, mask, indices)
    return indices


_operation = Operation("select", select_rows)


def select(scores: Tensor, *, num_selected: int, mask: Tensor | None = None) -> Tensor:
    """`reference.select` by a radix search over each row. Only the selected entries are sorted.

    PyTorch computes CPU tensors and fp64, with the same results. Results are equal from run to run.

    Args:
        scores: `... n`, any float dtype. Any strides.
        num_selected: number of entries to select, from 1 to n.
        mask: bool, broadcasts to `... n`; False entries come last, in the order of their indices, and entries of -inf
            just before them.

    Returns:
        int64 `... num_selected`, the largest first, and equal ones in the order of their indices; NaN counts as larger
        than any number, as in torch.topk. It has no gradient.

    Raises:
        ValueError: an argument is out of its range, or shapes do not match.
    """
    check_select(scores, num_selected, mask)
    scores = scores.detach()
    indices = _operation(as_rows(scores), mask_as_rows(mask, scores.shape), num_selected)
    return indices.view(*scores.shape[:-1], num_selected)
