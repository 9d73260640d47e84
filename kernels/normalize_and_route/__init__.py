"""`kernels.normalize_and_route`, in its own folder."""

from kernels.normalize_and_route.api import normalize_and_route

__all__ = ["normalize_and_route"]
