"""`kernels.normalize`, and the parts of it that other operations take."""

from kernels.normalize.api import normalize
from kernels.normalize.triton import Routes, launch_backward, launch_forward

__all__ = ["Routes", "launch_backward", "launch_forward", "normalize"]
