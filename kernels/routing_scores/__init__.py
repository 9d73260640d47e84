"""`kernels.routing_scores`, and its parts that other operations use."""

from kernels.routing_scores.api import (
    as_kernels_take,
    count_flops,
    routing_scores,
    score_tokens,
    score_tokens_backward,
)

__all__ = [
    "as_kernels_take",
    "count_flops",
    "routing_scores",
    "score_tokens",
    "score_tokens_backward",
]
