"""Times of calls that all ranks of a `torchrun` make together, on GPUs or, to try it, on CPUs."""

import os
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

ON_GPU = torch.cuda.is_available()
WARM_UP = 3


def joined(backend_of_gpus: str) -> torch.device:
    """This rank's device, once all ranks are in the process group."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if ON_GPU else torch.device("cpu")
    if ON_GPU:
        torch.cuda.set_device(device)
    dist.init_process_group(backend_of_gpus if ON_GPU else "gloo")
    return device


def seconds(
    call: Callable[[], object], *, in_a_row: int = 1, samples: int = 20, group: ProcessGroup | None = None
) -> float:
    """Median time of a call in a series, on this rank. All ranks of the group begin together."""
    taken = []
    for _ in range(WARM_UP + samples):
        dist.barrier(group)
        _wait()
        start = time.perf_counter()
        for _ in range(in_a_row):
            call()
        _wait()
        taken.append((time.perf_counter() - start) / in_a_row)
    return median(taken[WARM_UP:])


def _wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()
