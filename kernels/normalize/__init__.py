"""`kernels.normalize`, in a folder of its own."""

from kernels.normalize.api import normalize

__all__ = ["normalize"]
