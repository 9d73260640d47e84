"""The CoLT5 system in plain PyTorch: the definition every kernel is compared with."""

from reference.coor_descent import coor_descent
from reference.soft_topk import soft_topk
from reference.topk import TopkReturn, topk

__all__ = ["TopkReturn", "coor_descent", "soft_topk", "topk"]
