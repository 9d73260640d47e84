"""Workspaces that cuBLAS computes in."""

import torch


def clear_workspaces() -> None:
    """Free the workspaces of cuBLAS on all GPUs. Right before a capture, this gives the CUDA graph its own one.

    A graph keeps the address of the workspace of its stream. PyTorch frees workspaces that were allocated before the
    capture, or for an earlier graph of that stream, while the graph is alive; then a replay reads memory that is not
    mapped any more (https://github.com/pytorch/pytorch/issues/193402). The memory of one that was allocated within a
    capture stays with its graph.
    """
    torch._C._cuda_clearCublasWorkspaces()
