"""Peak memory of a call, and memory that it keeps for the backward pass."""

import os
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

SILENT = "6"
"""A log level above all messages of the profiler."""


def measure_memory(call: Callable[[], object], *, device: torch.device) -> int:
    """Most bytes allocated at once during a call, in addition to those before it. The result counts.

    Run the call once before if it compiles or fills caches. Bytes are those that tensors ask for, on a CPU from every
    thread that works for the call. There, memory from before the call does not become free for it.
    """
    return _peak_on_gpu(call, device) if device.type == "cuda" else _peak_on_cpu(call)


def saved_bytes(forward: Callable[[], Tensor], inputs: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of `forward`, without inputs and output.

    Memory that several saved tensors share counts once, with its whole storage, because all of it stays alive.
    """
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Kept until the end, so that no other storage gets the same address.
        saved[storage.data_ptr()] = storage
        # Without this, the graph would keep the output alive, and the output the graph.
        return tensor.detach()

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    not_counted = {tensor.untyped_storage().data_ptr() for tensor in (*inputs, output)}
    return sum(storage.nbytes() for address, storage in saved.items() if address not in not_counted)


def requested_bytes(device: torch.device, figure: Literal["current", "peak"]) -> int:
    """Bytes of all tensors on a GPU, now or at most since `torch.cuda.reset_peak_memory_stats`.

    They are not those of `torch.cuda.max_memory_allocated`, which differ between equal calls: PyTorch's allocator may
    give a tensor a larger block than it needs, if one is free.
    """
    # Allocators other than PyTorch's own do not count what is asked for.
    counted = "requested" if torch.cuda.get_allocator_backend() == "native" else "allocated"
    return int(torch.cuda.memory_stats(device)[f"{counted}_bytes.all.{figure}"])


def _peak_on_gpu(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = requested_bytes(device, "current")
    result = call()
    torch.cuda.synchronize(device)
    peak = requested_bytes(device, "peak") - before
    del result
    return peak


def _peak_on_cpu(call: Callable[[], object]) -> int:
    # Read at the first start of the profiler, which would otherwise print lines into the progress bar.
    os.environ.setdefault("KINETO_LOG_LEVEL", SILENT)
    # Not `torch.profiler.profile`: it makes Python objects of all events, which takes longer than the call.
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        result = call()
        # Freed here, so that the profiler does not confuse it with the next tensor at the same address.
        del result
    assert profiler.kineto_results is not None
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))
