"""How far from fp64 a result may be: what plain PyTorch is off by when all that it computes moves by a rounding."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FACTOR = 4.0
"""Over the largest error of the draws: another order of summation, and a maximum over few draws that is not the last
word."""

ROUNDINGS = 4
"""Roundings of itself that any result may be off by."""

ENOUGH = 256
"""Errors of elements of like magnitude that a largest one is taken of."""

SMALLEST = -60
"""Exponent of two below which all magnitudes are alike."""

_MOVES = (
    "add",
    "addmm",
    "baddbmm",
    "bmm",
    "cos",
    "cumsum",
    "div",
    "exp",
    "gelu",
    "linalg_vector_norm",
    "log",
    "logsumexp",
)
_MOVES += (
    "mean",
    "mm",
    "mul",
    "native_layer_norm",
    "pow",
    "rsqrt",
    "rsub",
    "scaled_dot_product",
    "sin",
    "softmax",
    "sqrt",
)
_MOVES += ("sub", "sum", "var", "_to_copy", "logcumsumexp", "gelu_backward", "softmax_backward", "index_put", "einsum")


class Moved(TorchDispatchMode):
    """Moves each number that is computed by up to a unit in the last place of its dtype, at random.

    Half of one would mostly be rounded away.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.removeprefix("_").rstrip("_")
        if not any(name.startswith(each.removeprefix("_")) for each in _MOVES):
            return out
        if name == "to_copy" and not _narrows(args[0], out):
            return out
        in_place = any(
            argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments
        )
        if isinstance(out, Tensor):
            return out.copy_(moved(out)) if in_place else moved(out)
        return type(out)(moved(each) if isinstance(each, Tensor) else each for each in out)


def _narrows(source: Tensor, out: Tensor) -> bool:
    if not out.is_floating_point() or not source.is_floating_point():
        return False
    return torch.finfo(out.dtype).eps > torch.finfo(source.dtype).eps


def moved(x: Tensor) -> Tensor:
    """Each number of a float tensor times 1 plus or minus the eps of its dtype at most."""
    if not x.is_floating_point() or not x.numel():
        return x
    wide = x.double()
    return (wide + wide * (2 * torch.rand_like(wide) - 1) * torch.finfo(x.dtype).eps).to(x.dtype)


def allowed(truth: Tensor, draws: list[Tensor], dtype: torch.dtype) -> Tensor:
    """For each element, `FACTOR` times the largest error of the draws at elements of about its magnitude: of magnitudes
    that few elements have, with those beside these."""
    information = torch.finfo(dtype)
    roundings = ROUNDINGS * information.eps * truth.abs() + 4 * information.tiny
    if not draws or not truth.numel():
        return roundings
    exponents = (
        truth.abs().clamp(min=2.0**SMALLEST).nan_to_num(1.0, 2.0**60).log2().floor().clamp(SMALLEST, 60).long()
        - SMALLEST
    )
    places = exponents.reshape(-1)
    size = 61 - SMALLEST
    errors, counts = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.int64)
    for draw in draws:
        error = (draw.double() - truth).abs().reshape(-1).nan_to_num(torch.inf, torch.inf)
        error = error.masked_fill(~truth.isfinite().reshape(-1), 0.0)
        largest = error.new_zeros(size).scatter_reduce(0, places, error, "amax")
        errors = torch.maximum(errors, largest.cpu())
        counts += places.bincount(minlength=size).cpu()
    table = [_largest_around(errors, counts, place) for place in range(size)]
    return roundings + FACTOR * torch.tensor(table, dtype=torch.float64, device=truth.device)[exponents]


def _largest_around(errors: Tensor, counts: Tensor, place: int) -> float:
    """Of the magnitude and those a factor of four beside it, and of as many more as it takes to have enough."""
    if not counts[place]:
        return 0.0
    for reach in range(2, len(counts)):
        around = slice(max(place - reach, 0), place + reach + 1)
        if counts[around].sum() >= ENOUGH or reach == len(counts) - 1:
            return errors[around].max().item()
    return errors.max().item()
