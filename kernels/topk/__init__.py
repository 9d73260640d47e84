"""`kernels.topk`, in a folder of its own."""

from kernels.topk.api import topk

__all__ = ["topk"]
