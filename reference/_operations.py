"""The one seam between the plain layers and the kernels, which are imported by name and only when they are wanted."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

Operation = Callable[..., Any]


def fused(name: str) -> Operation:
    """The function of that name in `kernels`."""
    operation: Operation = getattr(import_module(f"kernels.{name}"), name)
    return operation


def choose(name: str, plain: Operation, use_triton: bool | None) -> Operation:
    """An operation as a function of its first tensor: the kernel if `use_triton`; if it is None, for CUDA tensors
    alone."""
    if use_triton is None and torch.cuda.is_available():
        return partial(_by_device, fused(name), plain)
    return fused(name) if use_triton else plain


def _by_device(on_gpu: Operation, elsewhere: Operation, x: Tensor, /, *tensors: Tensor, **options: object) -> Any:
    return (on_gpu if x.is_cuda else elsewhere)(x, *tensors, **options)


def path(name: str, use_triton: bool | None) -> str:
    """Which way `choose` goes, for people."""
    if use_triton:
        return f"kernels.{name}"
    if use_triton is None and torch.cuda.is_available():
        return f"kernels.{name} for CUDA tensors, else reference.{name}"
    return f"reference.{name} ({'there is no GPU' if use_triton is None else 'use_triton=False'})"
