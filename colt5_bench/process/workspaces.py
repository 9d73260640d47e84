"""Workspaces that cuBLAS computes in."""

import torch


def clear_workspaces() -> None:
    """Free the workspaces of cuBLAS on all GPUs. Right before a capture, this gives the CUDA graph its own one.

    A graph keeps the address of the workspace of its stream. If that was allocated before the capture, or for an
    earlier graph of the stream, PyTorch may free it while the graph is alive. Then a replay reads memory that is not
    mapped any more (https://github.com/pytorch/pytorch/issues/193402). The memory of one that was allocated within a
    capture stays with its graph.
    """
    torch._C._cuda_clearCublasWorkspaces()
