"""What every launcher needs: tensors as rows, and which path and how much of a machine a tensor gets."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import triton
from torch import Tensor

_compiling_on_cpu = False


def as_rows(x: Tensor) -> Tensor:
    """`... n` as `rows n` whose last stride is 1: a view where the strides allow one, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def mask_as_rows(mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    """A mask that broadcasts to `shape` as `rows n`; rows that it repeats are not copied where strides allow that."""
    return None if mask is None else as_rows(mask.expand(shape))


def k_as_rows(k: float | Tensor, shape: torch.Size) -> tuple[Tensor | None, float]:
    """k as one entry a row where it is a tensor, else as a number: a pair of which a kernel reads one."""
    if isinstance(k, Tensor):
        return k.expand(shape[:-1]).reshape(-1), 0.0
    return None, float(k)


def runs_triton(x: Tensor) -> bool:
    """Whether a tensor goes to the Triton kernel: on a GPU, in Triton's interpreter, or to be compiled only."""
    return x.is_cuda or triton.knobs.runtime.interpret or _compiling_on_cpu


def multiprocessors(device: torch.device) -> int:
    """How many programs can run at the same time at least. The interpreter runs one after the other."""
    if device.type == "cuda":
        return _multiprocessors_of_gpu(device.index if device.index is not None else torch.cuda.current_device())
    return 132 if _compiling_on_cpu else 1


@cache
def _multiprocessors_of_gpu(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@contextmanager
def triton_for_cpu_tensors() -> Iterator[None]:
    """Send CPU tensors to the Triton kernels at an H200's launch settings, to compile them where there is no GPU.

    Launching is up to the caller to prevent, as `colt5_bench.static_facts` does.
    """
    global _compiling_on_cpu
    _compiling_on_cpu = True
    try:
        yield
    finally:
        _compiling_on_cpu = False
