"""`kernels.topk`, in its own folder."""

from kernels.topk.api import topk

__all__ = ["topk"]
