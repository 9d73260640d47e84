"""A real slowdown of an implementation, which a comparison has to find."""

from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from colt5_bench.case import FORWARD, FORWARD_BACKWARD
from colt5_bench.measuring.call import Call
from colt5_bench.measuring.rounds import CPU_COLUMNS, GPU_COLUMNS
from colt5_bench.measuring.spin import Spin
from colt5_bench.measuring.timing import time_interleaved
from colt5_bench.suite import C, Operation, Suite

LONGEST_CALIBRATION = 0.5
"""Time limit in seconds."""


def slowed(suite: Suite[C], name: str, share: float) -> Suite[C]:
    """A copy of a suite in which each call of one implementation takes longer.

    Args:
        suite: the suite with the implementation.
        name: name of the implementation.
        share: share of its time by which a call takes longer, with a spin of the host or of a kernel on the GPU.
    """
    honest = suite.implementations[name]

    def build(case: C) -> "_Slowed":
        return _Slowed(honest.build(case), honest.operation or suite, case, share)

    return replace(suite, implementations={**suite.implementations, name: replace(honest, build=build)})


class _Slowed:
    """A function that waits at its end. It measures the time of a call when it is first called, before the
    harness takes times."""

    def __init__(self, function: Callable[..., Tensor], operation: Operation[Any], case: Any, share: float) -> None:
        self._function, self._operation, self._case, self._share = function, operation, case, share
        self._spin: Spin | None = None

    def __call__(self, **inputs: Tensor) -> Tensor:
        if self._spin is None:
            self._spin = self._calibrated(inputs)
        output = self._function(**inputs)
        self._spin()
        return output

    def _calibrated(self, inputs: dict[str, Tensor]) -> Spin:
        """A spin for a share of the time of a call, including the backward pass if there is one."""
        device = next(iter(inputs.values())).device
        direction = FORWARD_BACKWARD if any(tensor.requires_grad for tensor in inputs.values()) else FORWARD
        seconds = call_seconds(Call(self._function, self._operation.problem(self._case, device), direction), device)
        return Spin(self._share * seconds, device)


def call_seconds(call: Call, device: torch.device) -> float:
    """The time of a call in the first time column."""
    column = (GPU_COLUMNS if device.type == "cuda" else CPU_COLUMNS)[0]
    timings = time_interleaved(
        {"call": call},
        device=device,
        columns=(column,),
        before={"call": call.renew},
        max_seconds=LONGEST_CALIBRATION,
    )
    return median(timings["call"][column].samples)
