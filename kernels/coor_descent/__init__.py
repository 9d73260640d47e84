"""`kernels.coor_descent`, and its parts that other operations use."""

from kernels.coor_descent.api import coor_descent, descend_rows, descend_rows_backward
from kernels.coor_descent.backward import LARGEST, MAX_SHIFT, direct_gradient
from kernels.coor_descent.cpu import backward as backward_in_pytorch
from kernels.coor_descent.cpu import forward as forward_in_pytorch
from kernels.coor_descent.cpu import wide_k
from kernels.coor_descent.forward import cool, cooling_iterations, descend, first_step, origin_of, soft_selection
from kernels.coor_descent.state import allocate_state, iterations_of, row_state, save_step, views_of

__all__ = [
    "LARGEST",
    "MAX_SHIFT",
    "allocate_state",
    "backward_in_pytorch",
    "cool",
    "cooling_iterations",
    "coor_descent",
    "descend",
    "descend_rows",
    "descend_rows_backward",
    "direct_gradient",
    "first_step",
    "forward_in_pytorch",
    "iterations_of",
    "origin_of",
    "row_state",
    "save_step",
    "soft_selection",
    "views_of",
    "wide_k",
]
