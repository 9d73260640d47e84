"""`kernels.select`, and the part of it that other operations take."""

from kernels.select.api import select, select_rows

__all__ = ["select", "select_rows"]
