"""Checks whether tensors run on kernels, and their shapes as rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kernels._common.dry_run import dry_run_of

INTERPRETED: bool = triton.knobs.runtime.interpret
"""True if kernels run in Triton's interpreter. Triton decides this when it defines a kernel."""

_compiling_for = 0
"""Number of multiprocessors of the GPU that kernels are only compiled for. It is 0 if kernels run."""


def runs_triton(x: Tensor) -> bool:
    """True if Triton kernels take a tensor.

    They do on a GPU, in Triton's interpreter, and while kernels are only compiled.
    """
    return x.is_cuda or INTERPRETED or _compiling_for > 0


def has_values(x: Tensor) -> bool:
    """True if a tensor has values. It has none if it is empty, on the meta device, or fake.

    The fake tensors of a dry run count as if they had values, so that the dry run reaches the launches.
    """
    is_shape = type(x) is FakeTensor and dry_run_of(x) is None
    return not is_shape and not x.is_meta and x.numel() > 0


def address(x: Tensor) -> int:
    """The address of a tensor. In a dry run it is 0, which is aligned like all new memory."""
    return 0 if type(x) is FakeTensor else x.data_ptr()


def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors, each of which runs at least one program at a time. It is 1 in the interpreter."""
    if device.type == "cuda":
        return _multiprocessors_of_gpu(device.index if device.index is not None else torch.cuda.current_device())
    return max(_compiling_for, 1)


@cache
def _multiprocessors_of_gpu(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@contextmanager
def triton_for_cpu_tensors(multiprocessors: int = 132) -> Iterator[None]:
    """Send CPU tensors to the Triton kernels, to compile these without a GPU.

    Launch settings are those of a GPU with the given number of multiprocessors. The default is that of an H200. The
    caller must prevent launches, as `colt5_bench.measuring.static_facts` does.
    """
    global _compiling_for
    _compiling_for = multiprocessors
    try:
        yield
    finally:
        _compiling_for = 0


def as_rows(x: Tensor) -> Tensor:
    """`... n` as `rows n` whose last stride is 1. It is a view if the strides allow one, else a copy."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def in_shape(rows: Tensor, shape: torch.Size) -> Tensor:
    """Rows of a result in the shape of its input. Rows that have this shape are returned without a view, because
    autograd would record it."""
    return rows if rows.shape == shape else rows.view(shape)


def mask_as_rows(mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    """A mask that broadcasts to `shape`, as `rows n`. Repeated rows are not copied if strides allow that."""
    return None if mask is None else as_rows(mask.expand(shape))


def k_as_rows(k: float | Tensor, shape: torch.Size) -> tuple[Tensor | None, float]:
    """A tensor k as contiguous entries, one for each row, or else k as a number. A kernel reads one of the two."""
    if isinstance(k, Tensor):
        return k.expand(shape[:-1]).reshape(-1).contiguous(), 0.0
    return None, float(k)
