"""`kernels.biased_gelu`, in its own folder."""

from kernels.biased_gelu.api import biased_gelu

__all__ = ["biased_gelu"]
