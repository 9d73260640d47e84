"""Launchers share this: tensors as rows, which path and how much of a machine a tensor gets, and plans."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache, wraps
from inspect import signature
from typing import Any, NamedTuple, ParamSpec

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

INTERPRETED: bool = triton.knobs.runtime.interpret
"""True if kernels run in Triton's interpreter, which is settled when they are defined."""

_compiling_for = 0
"""Multiprocessors of the GPU that kernels are only compiled for; 0: they run."""

MOST_PROGRAMS = 2**31 - 1
"""Programs of a launch, in the first dimension of a grid. The other two dimensions end at 65535."""

MOST_THREADS = 1024
"""Threads of a program."""

REGISTERS = 65536
"""Registers of a multiprocessor, and so of a program."""

MOST_REGISTERS = 255
"""Registers of a thread."""

LARGEST = 2**30
"""Largest size that kernels count in 32 bits, where a tile may overhang. Numbers of rows and sequences may be larger.
"""

COUNTS = [
    "n_rows", "n_tokens", "n_windows", "n_queries", "n_keys", "n_slots", "n_batches", "n_routed", "n_blocks",
    "blocks", "parts", "chunks", "tiles", "groups",
]  # fmt: skip
"""Arguments that Triton is not to specialize on. They are bounds, which change with the length of sequences and make no
address any better aligned. Strides and lengths of rows do that, and stay as they are."""

P = ParamSpec("P")


def as_rows(x: Tensor) -> Tensor:
    """`... n` as `rows n` whose last stride is 1: a view where the strides allow one, else a copy."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def mask_as_rows(mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    """A mask that broadcasts to `shape` as `rows n`; rows that it repeats are not copied where strides allow that."""
    return None if mask is None else as_rows(mask.expand(shape))


def k_as_rows(k: float | Tensor, shape: torch.Size) -> tuple[Tensor | None, float]:
    """k as one entry a row, next to each other, if it is a tensor, else as a number. A kernel reads one of the two."""
    if isinstance(k, Tensor):
        return k.expand(shape[:-1]).reshape(-1).contiguous(), 0.0
    return None, float(k)


def runs_triton(x: Tensor) -> bool:
    """True if a tensor goes to the Triton kernel: on a GPU, in Triton's interpreter, or to be compiled only."""
    return x.is_cuda or INTERPRETED or _compiling_for > 0


def has_values(x: Tensor) -> bool:
    """True if there is something to compute with. An empty tensor has nothing, and one of a compiler or of the meta
    device has a shape alone."""
    return type(x) is not FakeTensor and not x.is_meta and x.numel() > 0


def multiprocessors(device: torch.device) -> int:
    """Least number of programs that can run at the same time. The interpreter runs one after the other."""
    if device.type == "cuda":
        return _multiprocessors_of_gpu(device.index if device.index is not None else torch.cuda.current_device())
    return max(_compiling_for, 1)


@cache
def _multiprocessors_of_gpu(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


class Plan(NamedTuple):
    """Launch settings of a kernel, which depend on sizes alone."""

    programs: int

    settings: Mapping[str, Any]
    """Tile sizes, and options of the launch."""

    pieces: int = 1
    """Into how many a row is divided, or what else programs share."""

    @property
    def grid(self) -> tuple[int]:
        """Programs in one direction: the other two have too few."""
        return (self.programs,)


PLANNERS: list[Any] = []
"""All functions that plan, for tests to try all that they may choose."""


def planner(function: Callable[P, Plan]) -> Callable[P, Plan]:
    """Remember what a pure function from sizes to a plan returned, and refuse what no GPU can launch."""
    names = tuple(signature(function).parameters)

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> Plan:
        sizes = {**dict(zip(names, args, strict=False)), **kwargs}
        check_sizes(sizes)
        plan = function(*args, **kwargs)
        check_plan(plan, sizes)
        return plan

    remembering: Any = lru_cache(maxsize=4096)(checked)
    PLANNERS.append(remembering)
    return remembering


def check_sizes(sizes: Mapping[str, Any]) -> None:
    """Raise a NotImplementedError that names a size that kernels cannot count."""
    for name, size in sizes.items():
        if name not in ("n_rows", "batch", "n_entries", "total") and size > LARGEST:
            raise NotImplementedError(f"{name} = {size}: kernels take up to {LARGEST}")


def check_plan(plan: Plan, sizes: Mapping[str, Any]) -> None:
    """Raise a NotImplementedError where no GPU has what a plan for these sizes asks for."""
    threads = 32 * plan.settings.get("num_warps", 4)
    # Without a limit of their own, the assembler gives threads what a multiprocessor has.
    registers = plan.settings.get("maxnreg", most_registers(threads // 32))
    wanted = {
        "programs": (plan.programs, MOST_PROGRAMS),
        "threads of a program": (threads, MOST_THREADS),
        "registers of a thread": (registers, MOST_REGISTERS),
        "registers of a program": (threads * registers, REGISTERS),
    }
    for what, (number, most) in wanted.items():
        if number > most:
            given = ", ".join(f"{name} = {size}" for name, size in sizes.items())
            raise NotImplementedError(f"{given} would take {number} {what}; a GPU has up to {most}")


def most_registers(num_warps: int) -> int:
    """Registers that a thread can have where a program has a multiprocessor to itself."""
    return min(MOST_REGISTERS, REGISTERS // (32 * num_warps))


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


def registers_of_addresses(tile: Mapping[str, int], aligned: bool) -> int:
    """Additional registers of a thread of a tile where rows are not aligned. Entries are loaded one by one, with
    addresses for each of them. More where a program has several rows, and eight warps leave room for no second one."""
    if aligned:
        return 0
    return 16 if tile["ROWS"] == 1 and tile["num_warps"] < 8 else 96


def _feature_tile(d: int) -> dict[str, int]:
    """Launch settings for rows of d features, each row in a tile as a whole. A tile has 2048 entries, of which a thread
    has 16, or a longer row."""
    block = triton.next_power_of_2(d)
    return {"ROWS": max(2048 // block, 1), "BLOCK_D": block, "num_warps": max(block, 2048) // 512}


@planner
def plan_rows(n_rows: int, d: int) -> Plan:
    """A program for each tile of rows of d features."""
    tile = _feature_tile(d)
    return Plan(triton.cdiv(n_rows, tile["ROWS"]), tile)


@planner
def plan_sweep(n_rows: int, d: int, available: int) -> Plan:
    """Eight programs for each multiprocessor, which go through the tiles of all rows and add up."""
    tile = _feature_tile(d)
    return Plan(min(triton.cdiv(n_rows, tile["ROWS"]), 8 * available), tile)


@contextmanager
def triton_for_cpu_tensors(multiprocessors: int = 132) -> Iterator[None]:
    """Send CPU tensors to the Triton kernels, to compile them where there is no GPU. Launch settings are those of a GPU
    with so many multiprocessors, by default an H200.

    Launching is up to the caller to prevent, as `colt5_bench.measuring.static_facts` does.
    """
    global _compiling_for
    _compiling_for = multiprocessors
    try:
        yield
    finally:
        _compiling_for = 0
