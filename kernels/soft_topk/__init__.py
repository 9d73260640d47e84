"""`kernels.soft_topk`, and the parts of it that other operations take."""

from kernels.soft_topk.api import soft_topk, solve_rows, solve_rows_backward

__all__ = ["soft_topk", "solve_rows", "solve_rows_backward"]
