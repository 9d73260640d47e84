"""`kernels.combine`, in its own folder."""

from kernels.combine.api import combine

__all__ = ["combine"]
