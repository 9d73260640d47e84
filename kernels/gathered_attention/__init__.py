"""`kernels.gathered_attention`, in its own folder."""

from kernels.gathered_attention.api import gathered_attention

__all__ = ["gathered_attention"]
