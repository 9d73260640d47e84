"""Speed of the host, by two calls that do almost nothing.

Hosts differ by a factor of two. Beside these times, host times of two machines can be compared.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
import triton

CALLS, SERIES = 200, 5
"""Number of calls in a row, and of times that this is repeated. The GPU takes less time than the host, and their queue
has more places than calls."""

SIZE = 16
"""Rows and columns of the factors of the linear layer."""


@dataclass(frozen=True)
class HostSeconds:
    """Seconds that the host takes for each call, of many in a row."""

    linear: float
    """A linear layer of 16 x 16."""

    empty_kernel: float | None
    """Launch of a Triton kernel that does nothing; None without a GPU."""


@cache
@torch.inference_mode()
def measure_host(device: torch.device) -> HostSeconds:
    """The speed of the host with this device, once per process: measured code may break the context of a GPU."""
    small = torch.ones(SIZE, SIZE, device=device)
    launches = device.type == "cuda" and not triton.knobs.runtime.interpret
    # Triton launches on the current device.
    with torch.cuda.device(device) if launches else nullcontext():
        return HostSeconds(
            linear=_seconds(lambda: F.linear(small, small), device),
            empty_kernel=_seconds(lambda: _empty_kernel[(1,)](small), device) if launches else None,
        )


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, from the typical one of several series after one that is not timed."""
    series = [_series(call, device) for _ in range(1 + SERIES)]
    return median(series[1:]) / CALLS


def _series(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = perf_counter()
    for _ in range(CALLS):
        call()
    return perf_counter() - began


@triton.jit
def _empty_kernel(x_ptr) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    """Take an argument, as any kernel does."""
