"""Devices of the tests of kernels, and CUDA graphs."""

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

from kernels._common.launch import INTERPRETED

T = TypeVar("T")

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
"""Where kernels run: on a GPU if there is one, else in the interpreter or by their CPU path."""

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def capture(step: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """A CUDA graph of a step, and the tensors that each replay writes. A first run compiles, in a stream of its own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return graph, captured
