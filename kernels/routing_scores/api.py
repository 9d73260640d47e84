"""Scores of all routes in one read of the tokens, and their gradients in one pass; see `triton.py`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels._common.operation import Operation
from kernels._common.tensors import has_values, runs_triton
from kernels.routing_scores import cpu
from kernels.routing_scores.triton import MOST_ROUTES, launch_gradients, launch_scores
from reference._shared.arguments import check_routing_tokens, check_scale


def score_tokens(
    x: Tensor, routing_tokens: Tensor, cosine: bool, padded: int, slots: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scores `b r padded` of tokens `b n d`, and inverse norms `b padded` if scores are cosines. Padding has a score of
    0. The last stride of both inputs is 1. Slots, int32 of the shape of scores, are filled with -1."""
    wide = torch.promote_types(x.dtype, torch.float32)
    scores = x.new_empty((x.shape[0], routing_tokens.shape[1], padded), dtype=wide)
    inverse_norms = x.new_empty((x.shape[0], padded) if cosine else (0,), dtype=wide)
    if has_values(scores):
        write = launch_scores if _runs_kernel(x, routing_tokens) else cpu.scores
        write(x, routing_tokens, scores, inverse_norms if cosine else None, slots)
    return scores, inverse_norms


def score_tokens_backward(
    x: Tensor,
    routing_tokens: Tensor,
    scores: Tensor,
    inverse_norms: Tensor,
    grad_scores: Tensor,
    gathered: tuple[Tensor, Tensor, Tensor] | None,
    needs_x: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of tokens, of size 0 if they need none, and of routing tokens; see `launch_gradients`."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else x.new_empty(0)
    if not has_values(scores):
        return dx, torch.zeros_like(routing_tokens)
    differentiate = launch_gradients if _runs_kernel(x, routing_tokens) else cpu.gradients
    norms = inverse_norms if inverse_norms.numel() else None
    dr = differentiate(x, routing_tokens, scores, norms, grad_scores, gathered, dx if needs_x else None)
    return dx, dr.to(routing_tokens.dtype)


def _runs_kernel(x: Tensor, routing_tokens: Tensor) -> bool:
    """fp64 stays fp64, which the kernels do not support; and they keep all routes in registers."""
    return x.dtype != torch.float64 and routing_tokens.shape[1] <= MOST_ROUTES and runs_triton(x)


def _forward(x: Tensor, routing_tokens: Tensor, cosine: bool) -> tuple[Tensor, Tensor]:
    return score_tokens(x, routing_tokens, cosine, x.shape[1])


def _backward(
    grad_scores: Tensor, x: Tensor, routing_tokens: Tensor, scores: Tensor, inverse_norms: Tensor, needs_x: bool
) -> tuple[Tensor, Tensor]:
    return score_tokens_backward(x, routing_tokens, scores, inverse_norms, grad_scores.contiguous(), None, needs_x)


_operation = Operation(
    "routing_scores",
    _forward,
    _backward,
    outputs=("scores", "inverse_norms"),
    gradients=("x", "routing_tokens"),
)


def count_flops(x_shape: torch.Size, routing_shape: torch.Size, *_: object, **__: object) -> int:
    """A multiplication and an addition for each column of each token and each route."""
    batch, n, d = x_shape
    return 2 * batch * n * d * routing_shape[1]


register_flop_formula(torch.ops.colt5.routing_scores)(count_flops)


@register_flop_formula(torch.ops.colt5.routing_scores_backward)
def _count_backward_flops(*arguments: Any, **_: object) -> int:
    needs_x = arguments[-1]
    return count_flops(*arguments[1:3]) * (2 if needs_x else 1)


def as_kernels_take(x: Tensor, routing_tokens: Tensor, cosine_sim_scale: float | None) -> tuple[Tensor, Tensor]:
    """Tokens and routing tokens with a last stride of 1. With `cosine_sim_scale`, routing tokens are scaled to this
    norm."""
    check_scale(cosine_sim_scale)
    if cosine_sim_scale is not None:
        wide = torch.promote_types(routing_tokens.dtype, torch.float32)
        routing_tokens = F.normalize(routing_tokens.to(wide), dim=-1) * cosine_sim_scale
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    return x, routing_tokens.contiguous()


def routing_scores(x: Tensor, routing_tokens: Tensor, *, cosine_sim_scale: float | None = None) -> Tensor:
    """`reference.routing_scores` in one read of the tokens, without copies or conversions in memory.

    One pass computes the gradients of both, bitwise equal from run to run. Products and sums are fp32. PyTorch computes
    fp64 tokens, more than 8 routes, and CPU tensors.

    Args:
        x: tokens `b n d`, any float dtype.
        routing_tokens: `b r d`, or `1 r d` for the whole batch; any float dtype.
        cosine_sim_scale: the score is the cosine times this, instead of the product.

    Returns:
        `b r n` in fp32 at least.

    Raises:
        ValueError: shapes do not match.
        NotImplementedError: for a second derivative or forward mode.
    """
    check_routing_tokens(x, routing_tokens)
    inputs = as_kernels_take(x, routing_tokens, cosine_sim_scale)
    scores, _ = _operation(*inputs, cosine_sim_scale is not None)
    return scores
