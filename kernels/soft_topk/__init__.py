"""`kernels.soft_topk`, and its parts that other operations use."""

from kernels.soft_topk.api import soft_topk, solve_rows, solve_rows_backward

__all__ = ["soft_topk", "solve_rows", "solve_rows_backward"]
