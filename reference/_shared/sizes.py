"""Arithmetic on sizes, which may be symbolic under a compiler. A comparison fixes a symbolic size, and so does a
conversion to float."""

import torch
from torch import Tensor

WIDEST_BIASED_GELU = 8192
"""Most features of a row for which `biased_gelu` has kernels."""


def ceil_div(n: int, size: int) -> int:
    """Number of blocks of a size that contain n."""
    return (n + size - 1) // size


def missing(n: int, size: int) -> int:
    """Number of entries that pad the last block of a size after n entries."""
    return ceil_div(n, size) * size - n


def is_certain(holds: bool) -> bool:
    """True if a relation of sizes holds for all values that a compiler allows."""
    if not torch.compiler.is_compiling():
        return holds
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(holds)


def without_padding(x: Tensor, *sizes: int) -> Tensor:
    """The first entries `b *sizes ...` of x, which was padded to more than these."""
    for dim, (filled_up, size) in enumerate(zip(x.shape[1:], sizes, strict=False), start=1):
        if is_certain(filled_up == size):
            continue
        # PyTorch checks if a slice is dense, which depends on both sizes.
        is_open = not is_certain(filled_up != size)
        x = x.index_select(dim, torch.arange(size, device=x.device)) if is_open else x.narrow(dim, 0, size)
    return x


def window_for(n: int, window_size: int) -> int:
    """The size of the windows of n tokens, which is at most n but at least 1."""
    return max(n, 1) if is_certain(n < window_size) else window_size


def windows_with_a_prefix(n: int, window_size: int) -> int:
    """Number of windows of n tokens after the first."""
    return max(ceil_div(n, window_size) - 1, 0)


def mask_of_prefixes(scores: Tensor, window_size: int, num_selected: int) -> Tensor | None:
    """A mask `b w r s` of the selected tokens that are before the window, as a view of `w s`. None if all are."""
    if window_size >= num_selected:
        return None
    batch, routes, n = scores.shape
    windows = windows_with_a_prefix(n, window_size)
    lengths = torch.arange(window_size, (windows + 1) * window_size, window_size, device=scores.device)
    before = torch.arange(num_selected, device=scores.device) < lengths[:, None]
    return before[None, :, None].expand(batch, -1, routes, -1)
