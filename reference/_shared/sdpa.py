"""PyTorch's scaled_dot_product_attention, with the derivatives that its kernels lack."""

from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor
from torch.autograd import forward_ad

from reference._shared.autocast import without_autocast


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of queries `b h i d` to keys and values `b h j d` by PyTorch, which picks its fastest kernel for them.

    These kernels have only a first derivative, in reverse mode; other derivatives are those of the formula. A mask
    broadcasts to `b h i j`; each query must have a key that it may attend to.
    """
    tensors = (query, key, value)
    if torch.compiler.is_compiling():
        # Compiled code has no further derivatives.
        return F.scaled_dot_product_attention(*tensors, attn_mask=mask)
    if torch._C._are_functorch_transforms_active() or _are_dual(tensors):
        return attend_by_formula(*tensors, mask)
    out = F.scaled_dot_product_attention(*tensors, attn_mask=mask)
    return _WithSecondDerivative.apply(out, *tensors, mask) if out.requires_grad else out


def attend_by_formula(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None = None
) -> Tensor:
    """The same as a formula, with a bias that is added to the logits."""
    logits = einsum(query * query.shape[-1] ** -0.5, key, "b h i d, b h j d -> b h i j")
    logits = logits if bias is None else logits + bias
    logits = logits if mask is None else logits.masked_fill(~mask, -torch.inf)
    return einsum(logits.softmax(dim=-1).to(value.dtype), value, "b h i j, b h j d -> b h i d")


def _are_dual(tensors: tuple[Tensor, ...]) -> bool:
    in_forward_mode = forward_ad._current_level >= 0
    return in_forward_mode and any(forward_ad.unpack_dual(each).tangent is not None for each in tensors)


class _WithSecondDerivative(torch.autograd.Function):
    """The result of a kernel. If its gradient needs a gradient, it is that of the formula."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        # The tensors that the kernel has saved as well.
        ctx.save_for_backward(query, key, value, mask)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return grad, None, None, None, None
        *tensors, mask = ctx.saved_tensors
        # Autocast has chosen the dtype of the result.
        query, key, value = (each.to(grad.dtype) for each in tensors)
        with without_autocast(grad):
            out = attend_by_formula(query, key, value, mask)
        needed = ctx.needs_input_grad[1:4]
        differentiable = [each for each, wanted in zip(tensors, needed, strict=True) if wanted]
        gradients = iter(torch.autograd.grad(out, differentiable, grad, create_graph=True))
        return None, *(next(gradients) if wanted else None for wanted in needed), None
