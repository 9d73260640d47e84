"""Memory that a call needs at its peak, and memory that it keeps for the backward pass."""

import os
from collections.abc import Callable, Iterable
from itertools import accumulate

import torch
from torch import Tensor

SILENT = "6"
"""A level above all of the profiler's messages."""


def measure_memory(call: Callable[[], object], *, device: torch.device) -> int:
    """Most bytes allocated at once during a call, beyond what was allocated before it; its result counts.

    Run the call once before if it compiles or fills caches. On a GPU these are the bytes of PyTorch's allocator, which
    rounds each allocation up to 512; on a CPU they are what the tensors asked for, to the byte, from every thread that
    works for the call, and memory from before that the call frees makes no room there.
    """
    return _peak_on_gpu(call, device) if device.type == "cuda" else _peak_on_cpu(call)


def saved_bytes(forward: Callable[[], Tensor], inputs: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of `forward`, those of the inputs and of the output not counted.

    Memory that several saved tensors share counts once, and with its whole storage, since that is what stays alive.
    """
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Held until the end, so that no address is given to another storage meanwhile.
        saved[storage.data_ptr()] = storage
        # An output that its own graph holds would never be freed.
        return tensor.detach()

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    not_counted = {tensor.untyped_storage().data_ptr() for tensor in (*inputs, output)}
    return sum(storage.nbytes() for address, storage in saved.items() if address not in not_counted)


def _peak_on_gpu(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak


def _peak_on_cpu(call: Callable[[], object]) -> int:
    # Read when the profiler first starts, which would print a line at each start and stop: through a progress bar.
    os.environ.setdefault("KINETO_LOG_LEVEL", SILENT)
    # Not `torch.profiler.profile`, which makes Python objects of all events: that takes longer than the call.
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        result = call()
        # Here: the profiler takes the next tensor at that address for this one, if it does not see it go.
        del result
    assert profiler.kineto_results is not None
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))
