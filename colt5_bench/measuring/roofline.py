"""The least time that a device needs for a piece of work, by its measured ceilings."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from math import inf
from time import perf_counter

import msgspec
import torch
import triton
import triton.language as tl

from colt5_bench.case import Cost
from colt5_bench.records.environment import device_name

TRYING_SECONDS = 0.2
"""Tries for each ceiling: on a busy machine, few calls are undisturbed."""

GPU_COPY_BYTES = 2**30
"""Bytes of a copy: more than any L2 cache holds."""

CPU_COPY_BYTES = 2**27

CPU_ELEMENTS = 2**15
"""Elements of an exponential: they stay in the L2 cache of a core."""

GPU_EXPONENTIALS = 2048
"""Exponentials in sequence, for each element that `_exponentials_kernel` has in registers."""

GPU_FACTOR, CPU_FACTOR = 8192, 512
"""Rows and columns of the matrices in products: enough to keep every part of the device busy."""

PRODUCT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

SPIN_CYCLES = 500_000
"""Cycles of a spin: a quarter of a millisecond, several times as long as a launch."""

EXPONENTIALS_PER_CLOCK = 16
"""Rate of a multiprocessor of every NVIDIA GPU since Volta: CUDA C++ Programming Guide, arithmetic instructions."""


READING_MARGIN = 1.15
"""Largest rate of reading over the rate of copying. A copy is slower, as memory switches between reads and writes."""


@dataclass(frozen=True)
class Ceilings:
    """Highest rates of a device."""

    copy_bandwidth: float
    """Bytes per second, read plus written."""

    exponentials: float
    """fp32 exponentials per second."""

    products: Mapping[str, float]
    """Floating-point operations per second in matrix products, by dtype, with PyTorch's setting of TF32."""

    device: str
    """Model name of the device."""

    measured: bool
    """True if all were measured on this machine. False if the exponentials are from its data sheet."""


def limit_seconds(cost: Cost, ceilings: Ceilings) -> float:
    """The least time for a cost: the longest of the times for memory traffic, exponentials and products."""
    traffic, exponentials = cost.bytes / ceilings.copy_bandwidth, cost.exponentials / ceilings.exponentials
    return max(traffic, exponentials, cost.flops / ceilings.products[cost.flops_dtype])


def too_fast(seconds: float, *, size: int, ceilings: Ceilings) -> str | None:
    """Reason why a time is impossible, or None: with a cold cache, memory limits the rate of reading.

    Args:
        seconds: of a call with a cold cache.
        size: bytes that it must at least read. Its writes may still be in the cache when it ends.
        ceilings: of the device.
    """
    bandwidth = size / seconds
    if bandwidth <= READING_MARGIN * ceilings.copy_bandwidth:
        return None
    return (
        f"{bandwidth / 1e9:.0f} GB/s from a cold cache, while a device copy reaches {ceilings.copy_bandwidth / 1e9:.0f}"
    )


def read_ceilings(text: str, device: str) -> Ceilings | None:
    """Ceilings from their JSON. None if the format is that of another revision, or the device is another one."""
    with suppress(msgspec.MsgspecError):
        ceilings = msgspec.json.decode(text, type=Ceilings)
        if ceilings.device == device:
            return ceilings
    return None


def measure_ceilings(device: torch.device) -> Ceilings:
    """The ceilings of a device: each is the best of many tries. This takes about a second, once per process."""
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    return _measure_ceilings(device)


@cache
def _measure_ceilings(device: torch.device) -> Ceilings:
    if device.type != "cuda":
        bandwidth = copy_bandwidth(device)
        return Ceilings(bandwidth, _cpu_exponentials(), _products(device, CPU_FACTOR), device_name(device), True)
    with torch.cuda.device(device):
        bandwidth = copy_bandwidth(device)
        compiles = not triton.knobs.runtime.interpret
        exponentials = _gpu_exponentials(device) if compiles else _data_sheet_exponentials(device)
        products = _products(device, GPU_FACTOR)
    return Ceilings(bandwidth, exponentials, products, device_name(device), compiles)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a copy larger than the caches; measured again at each call."""
    size = CPU_COPY_BYTES
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        size = min(GPU_COPY_BYTES, free // 4)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    destination = torch.zeros_like(source)
    return 2 * size / _shortest(lambda: destination.copy_(source), device)


def _products(device: torch.device, size: int) -> dict[str, float]:
    return {str(dtype).removeprefix("torch."): _product_rate(device, size, dtype) for dtype in PRODUCT_DTYPES}


def _product_rate(device: torch.device, size: int, dtype: torch.dtype) -> float:
    """Rate of products of square matrices with random numbers. Zeros would take less power, and so less time."""
    factor = torch.randn(size, size, device=device).to(dtype)
    product = torch.empty_like(factor)
    return 2 * size**3 / _shortest(lambda: torch.matmul(factor, factor, out=product), device)


def _cpu_exponentials() -> float:
    """Rate of one thread, times the threads. On a busy machine they hardly ever all run at the same time."""
    x = torch.linspace(-1, 0, CPU_ELEMENTS)
    y = torch.empty_like(x)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return threads * x.numel() / _shortest(lambda: torch.exp(x, out=y), x.device)
    finally:
        torch.set_num_threads(threads)


def _gpu_exponentials(device: torch.device) -> float:
    call, count = repeated_exponentials(device)
    return count / _shortest(call, device)


def repeated_exponentials(device: torch.device) -> tuple[Callable[[], object], int]:
    """A call that computes only exponentials, and their number."""
    block, programs = 2048, 16 * torch.cuda.get_device_properties(device).multi_processor_count
    out = torch.empty(programs * block, device=device)

    def call() -> None:
        _exponentials_kernel[(programs,)](out, GPU_EXPONENTIALS, block, num_warps=8)

    return call, out.numel() * GPU_EXPONENTIALS


def _data_sheet_exponentials(device: torch.device) -> float:
    properties = torch.cuda.get_device_properties(device)
    return EXPONENTIALS_PER_CLOCK * properties.multi_processor_count * properties.clock_rate * 1e3


@triton.jit
def _exponentials_kernel(out_ptr, repeats, BLOCK: tl.constexpr) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    """Repeat x <- 2^-x: nothing is loaded, and each exponential needs the one before it."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = index.to(tl.float32) * 1e-9
    for _ in range(repeats):
        x = tl.exp2(-x)
    tl.store(out_ptr + index, x)


def _shortest(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the shortest call, of as many as fit into the time, after one that is not timed."""
    call()
    clock = _gpu_seconds if device.type == "cuda" else _cpu_seconds
    began = perf_counter()
    shortest = inf
    while perf_counter() - began < TRYING_SECONDS:
        shortest = min(shortest, clock(call))
    return shortest


def _gpu_seconds(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    # A spin keeps the GPU busy while the host launches the call.
    torch.cuda._sleep(SPIN_CYCLES)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e-3


def _cpu_seconds(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start
