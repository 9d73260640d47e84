"""The least time that a device needs for a piece of work, from what it has been seen to do."""

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
"""For each ceiling: a busy machine lets few calls through undisturbed."""

GPU_COPY_BYTES = 2**30
"""Copied at a time: more than any L2 holds."""

CPU_COPY_BYTES = 2**27

CPU_ELEMENTS = 2**15
"""Exponentiated at a time: they stay in a core's L2."""

GPU_EXPONENTIALS = 2048
"""In a row, for each element that `_exponentials_kernel` holds in registers."""

GPU_FACTOR, CPU_FACTOR = 8192, 512
"""Rows and columns of the matrices that are multiplied: enough that every part of the device has its share."""

PRODUCT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

SPIN_CYCLES = 500_000
"""A quarter of a millisecond, several times as long as a launch takes."""

EXPONENTIALS_PER_CLOCK = 16
"""Rate of a multiprocessor of every NVIDIA GPU since Volta: CUDA C++ Programming Guide, arithmetic instructions."""


READING_MARGIN = 1.15
"""Largest rate of reading over that of copying. Memory that is only read has not to turn around to be written."""


@dataclass(frozen=True)
class Ceilings:
    """Highest rates of a device."""

    copy_bandwidth: float
    """Bytes a second, those read plus those written."""

    exponentials: float
    """fp32 exponentials a second."""

    products: Mapping[str, float]
    """Floating-point operations a second in matrix products, by dtype of the factors, at PyTorch's setting of TF32."""

    device: str
    """Model name of the device."""

    measured: bool
    """True if all were measured on this machine. False: the exponentials are from its data sheet."""


def limit_seconds(cost: Cost, ceilings: Ceilings) -> float:
    """The least time for a cost: that of its memory traffic, its exponentials or its products, whichever is longest."""
    traffic, exponentials = cost.bytes / ceilings.copy_bandwidth, cost.exponentials / ceilings.exponentials
    return max(traffic, exponentials, cost.flops / ceilings.products[cost.flops_dtype])


def too_fast(seconds: float, *, size: int, ceilings: Ceilings) -> str | None:
    """Reason why a time is not to be believed, or None. From a cold cache nothing is read faster than memory gives it.

    Args:
        seconds: of a call with a cold cache.
        size: bytes that it has to read at least. What it writes may still be in the cache when it ends.
        ceilings: of the device.
    """
    bandwidth = size / seconds
    if bandwidth <= READING_MARGIN * ceilings.copy_bandwidth:
        return None
    return (
        f"{bandwidth / 1e9:.0f} GB/s from a cold cache, while a device copy reaches {ceilings.copy_bandwidth / 1e9:.0f}"
    )


def read_ceilings(text: str, device: str) -> Ceilings | None:
    """Ceilings from their JSON. None if the text is anything else, as of another revision, or of another device."""
    with suppress(msgspec.MsgspecError):
        ceilings = msgspec.json.decode(text, type=Ceilings)
        if ceilings.device == device:
            return ceilings
    return None


def measure_ceilings(device: torch.device) -> Ceilings:
    """The ceilings of a device, the best of many tries each, measured in about a second and once a process."""
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
    """Bytes read and written a second by a copy of more than the caches hold; measured anew at each call."""
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
    """A call that has nothing to do but exponentials, and how many."""
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
    """x <- 2^-x, again and again: nothing to load, and each exponential needs the one before it."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = index.to(tl.float32) * 1e-9
    for _ in range(repeats):
        x = tl.exp2(-x)
    tl.store(out_ptr + index, x)


def _shortest(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the shortest of as many calls as there is time for, after one that is not timed."""
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
    # The GPU is kept busy while the host launches the call, or it would be seen waiting for that.
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
