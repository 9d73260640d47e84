"""`kernels.combine`, in a folder of its own."""

from kernels.combine.api import combine

__all__ = ["combine"]
