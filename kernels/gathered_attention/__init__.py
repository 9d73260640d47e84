"""`kernels.gathered_attention`, in a folder of its own."""

from kernels.gathered_attention.api import gathered_attention

__all__ = ["gathered_attention"]
