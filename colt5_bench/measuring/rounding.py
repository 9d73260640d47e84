"""Computation in which each operand of each operation is moved at random by about a rounding of its dtype.

An implementation with another order, other pieces or another formula rounds other numbers. Several such computations
show how far apart results may be if every operation is right (stochastic arithmetic: Vignes 1993,
https://doi.org/10.1016/0378-4754(93)90003-D).
"""

from contextlib import nullcontext
from functools import cache, lru_cache
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.utils._python_dispatch import TorchDispatchMode

COMPARING = "eq equal ge gt isfinite isinf isnan le lt ne searchsorted"
CHOOSING = (
    "abs amax amin argmax argmin argsort clamp clamp_max clamp_min max maximum min minimum nan_to_num neg relu relu_ "
    "sign sort threshold_backward topk"
)
CARRYING = (
    "_to_copy _unsafe_view cat clone constant_pad_nd copy copy_ detach embedding empty_like fill fill_ flip full_like "
    "gather gather_backward index index_put index_put_ index_select lift_fresh masked_fill masked_fill_ masked_scatter "
    "narrow_copy new_empty new_empty_strided new_full new_ones new_zeros ones_like repeat roll scatter scatter_ "
    "select_backward select_scatter slice_backward slice_scatter split_with_sizes_copy stack tril triu unfold_backward "
    "where zero_ zeros_like"
)
EXACT = frozenset(f"{COMPARING} {CHOOSING} {CARRYING}".split())
"""Operations that round nothing. Their operands are not moved, because the operations before have moved them."""

IN_PIECES = get_decompositions([torch.ops.aten.native_layer_norm_backward.default])
"""Operations with a fused kernel, and functions that compute them in pieces. Operands of the pieces are moved, too.
Terms may cancel exactly in the kernel, but only by chance: a GPU rounds a multiplication and an addition once."""

MASKS = ("attn_mask", "attn_bias")
"""Arguments that are not moved: they contain zeros and infinities, and kernels require their strides."""

MOVED, WRITTEN, KEPT = "moved", "written", "kept"
"""Roles of arguments. Results are written to those with the second role."""

NUMBERS = 1048573
"""Random numbers that are drawn once, and used again from other offsets. Their count is a prime, so that rows get
different ones."""


class MovedOperands(TorchDispatchMode):
    """Replace operands x of all operations that round by x (1 + r eps), with r uniform in [-1, 1].

    In fp16 they become x (1 + r eps) + r' s, where s is its smallest number, 6e-8: results of that size are rounded to
    multiples of s, and may vanish. The smallest numbers of other dtypes are too small to matter.

    Operands in fp64 are not moved: within a computation of less precision, they count as exact.

    Args:
        seed: seed of the random numbers. Equal calls get equal numbers.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = Random(seed)
        self._seed = seed
        self._drawn: dict[tuple[torch.device, torch.dtype, float], Tensor] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: to skip its compiler, PyTorch would import it, which takes longer than importing PyTorch itself."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        roles = _roles(func)
        if roles is None:
            return func(*args, **kwargs)
        # The operand of an in-place operation is moved after the operation.
        operands = [self._moved(each) if role == MOVED else each for each, role in zip(args, roles, strict=False)]
        with self if func in IN_PIECES else nullcontext():
            result = IN_PIECES.get(func, func)(*operands, **kwargs)
        for each, role in zip(operands, roles, strict=False):
            if role == WRITTEN and _moves(each):
                each.copy_(self._move(each))
        return result

    def _moved(self, argument: Any) -> Any:
        return [*map(self._move, argument)] if isinstance(argument, list | tuple) else self._move(argument)

    def _move(self, x: Any) -> Any:
        if not _moves(x):
            return x
        moved = x * self._factors_for(x)
        return moved.add_(self._offsets_for(x)) if x.dtype == torch.float16 else moved

    def _factors_for(self, x: Tensor) -> Tensor:
        return self._draw(x, 1.0, torch.finfo(x.dtype).eps)

    def _offsets_for(self, x: Tensor) -> Tensor:
        information = torch.finfo(x.dtype)
        return self._draw(x, 0.0, information.smallest_normal * information.eps)

    def _draw(self, x: Tensor, middle: float, most: float) -> Tensor:
        """Numbers in `middle` +- `most` in the shape of x: those drawn once, from a random offset on."""
        key = x.device, x.dtype, middle
        if key not in self._drawn:
            self._drawn[key] = _numbers(self._seed, middle, most, x.dtype).to(x.device)
        numbers, size = self._drawn[key], x.numel()
        start = self._random.randrange(NUMBERS)
        drawn = numbers[start : start + size]
        if rest := size - drawn.numel():
            drawn = torch.cat([drawn, *[numbers] * (rest // NUMBERS), numbers[: rest % NUMBERS]])
        return drawn.view(x.shape)


@lru_cache(maxsize=4)
def _uniform(seed: int) -> Tensor:
    numbers = torch.empty(NUMBERS, dtype=torch.float64, device="cpu")
    return numbers.uniform_(-1.0, 1.0, generator=torch.Generator("cpu").manual_seed(seed))


# Each judgement needs the numbers of the same few seeds. None stay on a GPU, whose context may break.
@lru_cache(maxsize=16)
def _numbers(seed: int, middle: float, most: float, dtype: torch.dtype) -> Tensor:
    """NUMBERS random numbers in `middle` +- `most`, in host memory."""
    return (middle + most * _uniform(seed)).to(dtype)


@cache
def _roles(func: Any) -> tuple[str, ...] | None:
    """A role for each argument of an operation; None if the operation rounds nothing."""
    if func.is_view or func.overloadpacket.__name__ in EXACT:
        return None
    return tuple(_role(declared) for declared in func._schema.arguments)


def _role(declared: torch.Argument) -> str:
    if declared.alias_info is not None and declared.alias_info.is_write:
        return WRITTEN
    return KEPT if declared.name in MASKS else MOVED


def _moves(x: Any) -> bool:
    """False for fake tensors and tensors on the meta device, which have no values."""
    plain = type(x) in (Tensor, torch.nn.Parameter) and not x.is_meta
    return plain and x.is_floating_point() and x.dtype != torch.float64
