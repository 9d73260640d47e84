"""`kernels.routed_attention`, in a folder of its own."""

from kernels.routed_attention.api import routed_attention

__all__ = ["routed_attention"]
