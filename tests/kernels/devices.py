"""Devices of the tests of kernels, and CUDA graphs."""

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

from colt5_bench.process.workspaces import clear_workspaces
from kernels._common.tensors import INTERPRETED

T = TypeVar("T")

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
"""Device of the kernels: a GPU if there is one, else the interpreter or the CPU path."""

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def capture(step: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """A CUDA graph of a step, and the tensors that each replay writes. A first run compiles, in a separate stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    clear_workspaces()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return graph, captured


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normally distributed, on the device of the tests."""
    return torch.randn(shape, device=DEVICE).to(dtype)


def rounding(actual: torch.Tensor) -> float:
    """The allowed error for functions and sums over rows in fp32, and one conversion to the dtype of the result. It is
    relative to the largest element."""
    return 8 * torch.finfo(torch.float32).eps + (torch.finfo(actual.dtype).eps if actual.dtype.itemsize < 4 else 0)
