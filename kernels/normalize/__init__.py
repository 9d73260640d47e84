"""`kernels.normalize`, and its parts that other operations use."""

from kernels.normalize.api import normalize
from kernels.normalize.triton import Routes, launch_backward, launch_forward

__all__ = ["Routes", "launch_backward", "launch_forward", "normalize"]
