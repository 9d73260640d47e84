"""`kernels.routing_scores`, and the parts of it that other operations take."""

from kernels.routing_scores.api import (
    allocate_gradients,
    allocate_scores,
    as_kernels_take,
    count_flops,
    gradients,
    routing_scores,
    score_tokens,
)

__all__ = [
    "allocate_gradients",
    "allocate_scores",
    "as_kernels_take",
    "count_flops",
    "gradients",
    "routing_scores",
    "score_tokens",
]
