"""`kernels.select`, and its parts that other operations use."""

from kernels.select.api import select, select_rows
from kernels.select.order import sort_rows

__all__ = ["select", "select_rows", "sort_rows"]
