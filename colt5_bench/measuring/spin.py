"""A call that takes a known time, on a CPU or a GPU."""

from time import perf_counter

import torch
import triton
from triton.language.extra.cuda import globaltimer


class Spin:
    """A call that waits for a number of seconds."""

    def __init__(self, seconds: float, device: torch.device) -> None:
        self._seconds, self._on_gpu = seconds, device.type == "cuda"
        self._took: list[float] = []

    def __call__(self) -> None:
        if self._on_gpu:
            _spin_kernel[(1,)](int(self._seconds * 1e9), num_warps=1)
            return
        start = now = perf_counter()
        while now < start + self._seconds:
            now = perf_counter()
        self._took.append(now - start)

    def durations(self, count: int) -> list[float]:
        """Durations of the last calls. On a CPU a call measures its duration, as another program may make it longer."""
        return [self._seconds] * count if self._on_gpu else self._took[-count:]


@triton.jit
def _spin_kernel(nanoseconds) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    """Wait by the clock of the GPU."""
    start = globaltimer()
    while globaltimer() - start < nanoseconds:
        pass
