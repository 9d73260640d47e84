"""`kernels.route`, in a folder of its own."""

from kernels.route.api import route

__all__ = ["route"]
