"""`kernels.normalize_and_route`, in a folder of its own."""

from kernels.normalize_and_route.api import normalize_and_route

__all__ = ["normalize_and_route"]
