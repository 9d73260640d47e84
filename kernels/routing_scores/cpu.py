"""`kernels.routing_scores` and the gathering of `kernels.route` in PyTorch, for CPU tensors."""

import torch
from torch import Tensor

from kernels.routing_scores.constants import SMALLEST_NORM
from reference._shared.autocast import without_autocast


def scores(
    x: Tensor, routing_tokens: Tensor, scores: Tensor, inverse_norms: Tensor | None, slots: Tensor | None
) -> None:
    """The same as `launch_scores`."""
    n, is_padded = x.shape[1], x.shape[1] < scores.shape[-1]
    if slots is not None:
        slots.fill_(-1)
    x = x.to(scores.dtype)
    products = scores[..., :n] if is_padded else scores
    with without_autocast(x):
        torch.matmul(routing_tokens.to(scores.dtype), x.mT, out=products)
    if is_padded:
        scores[..., n:] = 0.0
    if inverse_norms is None:
        return
    inverse_norms[:, n:] = 0.0
    inverse_norms[:, :n] = 1.0 / x.norm(dim=-1).clamp(min=SMALLEST_NORM)
    products.mul_(inverse_norms[:, None, :n])


def gradients(
    x: Tensor,
    routing_tokens: Tensor,
    scores: Tensor,
    inverse_norms: Tensor | None,
    grad_scores: Tensor,
    gathered: tuple[Tensor, Tensor, Tensor] | None,
    dx: Tensor | None,
) -> Tensor:
    """The same as `launch_gradients`."""
    n, wide = x.shape[1], scores.dtype
    x, grad, scores = x.to(wide), grad_scores[..., :n], scores[..., :n]
    if inverse_norms is not None:
        inverse_norms = inverse_norms[:, :n]
        along = (grad * scores).sum(dim=1) * inverse_norms.square()
        along.masked_fill_(inverse_norms >= 1.0 / SMALLEST_NORM, 0.0)
        grad = grad * inverse_norms[:, None]
    with without_autocast(x):
        if dx is not None:
            # The first access to memory takes longer than the product.
            grad_x = dx if dx.dtype == wide else dx.new_empty(dx.shape, dtype=wide)
            torch.matmul(grad.mT, routing_tokens.to(wide), out=grad_x)
            if inverse_norms is not None:
                grad_x.addcmul_(along[..., None], x, value=-1.0)
            if gathered is not None:
                indices, _, grad_tokens = gathered
                _add_gathered(grad_x, indices, grad_tokens)
            if grad_x is not dx:
                dx.copy_(grad_x)
        dr = grad @ x
    return dr.sum(dim=0, keepdim=True) if routing_tokens.shape[0] == 1 else dr


def _add_gathered(grad_x: Tensor, indices: Tensor, grad_tokens: Tensor) -> None:
    """Routes are added one by one, because each has a token at most once."""
    batch = torch.arange(grad_x.shape[0], device=grad_x.device)[:, None]
    for route in range(indices.shape[1]):
        grad_x[batch, indices[:, route]] += grad_tokens[:, route].to(grad_x.dtype)
