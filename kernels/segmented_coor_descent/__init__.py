"""`kernels.segmented_coor_descent`, in its own folder."""

from kernels.segmented_coor_descent.api import segmented_coor_descent

__all__ = ["segmented_coor_descent"]
