"""`kernels.biased_gelu`, in a folder of its own."""

from kernels.biased_gelu.api import biased_gelu

__all__ = ["biased_gelu"]
