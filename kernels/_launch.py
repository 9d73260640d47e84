"""What every launcher needs: tensors as rows, and which path and how much of a machine a tensor gets."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, which is settled when they are defined."""

_compiling_on_cpu = False


def as_rows(x: Tensor) -> Tensor:
    """`... n` as `rows n` whose last stride is 1: a view where the strides allow one, else a copy."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def mask_as_rows(mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    """A mask that broadcasts to `shape` as `rows n`; rows that it repeats are not copied where strides allow that."""
    return None if mask is None else as_rows(mask.expand(shape))


def k_as_rows(k: float | Tensor, shape: torch.Size) -> tuple[Tensor | None, float]:
    """k as one entry a row, next to each other, if it is a tensor, else as a number: a kernel reads one of the two."""
    if isinstance(k, Tensor):
        return k.expand(shape[:-1]).reshape(-1).contiguous(), 0.0
    return None, float(k)


def runs_triton(x: Tensor) -> bool:
    """Whether a tensor goes to the Triton kernel: on a GPU, in Triton's interpreter, or to be compiled only."""
    return x.is_cuda or INTERPRETED or _compiling_on_cpu


def is_traced(x: Tensor) -> bool:
    """Whether somebody is to see the operator that a tensor goes through, and not its result alone: a compiler, a
    dispatch mode, a function transform, or a subclass of Tensor; and that of a meta tensor, which has a shape alone."""
    return (
        torch.compiler.is_compiling()
        or x.is_meta
        or type(x) not in (Tensor, torch.nn.Parameter)
        or is_in_torch_dispatch_mode()
        or torch._C._are_functorch_transforms_active()
    )


def multiprocessors(device: torch.device) -> int:
    """How many programs can run at the same time at least. The interpreter runs one after the other."""
    if device.type == "cuda":
        return _multiprocessors_of_gpu(device.index if device.index is not None else torch.cuda.current_device())
    return 132 if _compiling_on_cpu else 1


@cache
def _multiprocessors_of_gpu(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@cache
def tile_settings(entries: int, in_thread: int) -> Mapping[str, int]:
    """Launch settings for rows of up to `entries`, `in_thread` of them in each thread.

    At least 4 threads share a row, and rows that leave threads of a warp free share the warp.
    """
    threads = max(triton.next_power_of_2(entries) // in_thread, 4)
    width = 4 * threads
    return {
        "REPEATS": triton.cdiv(triton.next_power_of_2(entries), width),
        "ROWS": max(32 // threads, 1),
        "WIDTH": width,
        "num_warps": max(threads // 32, 1),
    }


@cache
def feature_tile(d: int) -> Mapping[str, int]:
    """Launch settings for rows of d features, each row in a tile as a whole: 2048 entries, of which a thread has 16, or
    a longer row."""
    block = triton.next_power_of_2(d)
    return {"ROWS": max(2048 // block, 1), "BLOCK_D": block, "num_warps": max(block, 2048) // 512}


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
