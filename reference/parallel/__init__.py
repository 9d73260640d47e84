"""Rows and sequences sharded over the ranks of a process group, on torch.distributed."""

from reference.parallel.layers import shard_sequences
from reference.parallel.operations import coor_descent, route, select, soft_topk, topk

__all__ = ["coor_descent", "route", "select", "shard_sequences", "soft_topk", "topk"]
