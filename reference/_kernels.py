"""The one place where the reference reaches for `kernels`, which are imported by name when one is first wanted."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

Operation = Callable[..., Any]


def kernel(name: str) -> Operation:
    """The function of that name in `kernels`."""
    operation: Operation = getattr(import_module("kernels"), name)
    return operation
