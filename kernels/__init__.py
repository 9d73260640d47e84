"""Fused Triton kernels for the operations of `reference`, with the same signatures."""

from kernels.coor_descent import coor_descent
from kernels.gathered_attention import gathered_attention
from kernels.route_prefixes import route_prefixes
from kernels.segmented_coor_descent import segmented_coor_descent
from kernels.soft_topk import soft_topk
from kernels.topk import topk

__all__ = [
    "coor_descent",
    "gathered_attention",
    "route_prefixes",
    "segmented_coor_descent",
    "soft_topk",
    "topk",
]
