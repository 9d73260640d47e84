"""`kernels.routed_attention`, in its own folder."""

from kernels.routed_attention.api import routed_attention

__all__ = ["routed_attention"]
