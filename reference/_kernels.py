"""The only place where the reference uses `kernels`, which it imports by name on first use."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

Operation = Callable[..., Any]


def kernel(name: str) -> Operation:
    """The function of that name in `kernels`."""
    operation: Operation = getattr(import_module("kernels"), name)
    return operation
