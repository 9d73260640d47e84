"""Linear layers whose weights are rounded together, while autocast would need one kernel for each.

Another kernel widens all their gradients. Values are those of autocast.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from reference._shared.autocast import autocast_dtype

Rounded: TypeAlias = Mapping[nn.Module, tuple[Tensor, Tensor | None]]
"""Weight and bias of linear layers in the dtype of autocast."""

_BATCHES_OF_GRADIENTS = torch._C._dispatch_key_parse("VmapMode")
"""Dispatch key while `torch.autograd.grad` has `is_grads_batched`."""


def round_weights(x: Tensor, *layers: nn.Module) -> Rounded:
    """Rounded weights and biases of layers without observers, for tokens on the device of x; none without autocast."""
    dtype = autocast_dtype(x)
    if dtype is None or _is_transformed():
        return {}
    plain = [layer for layer in layers if _is_linear_in_fp32(layer, x.device)]
    parameters = [each for layer in plain for each in layer._parameters.values() if each is not None]
    if not parameters:
        return {}
    rounded = iter(_Together.apply(dtype, *parameters))
    return {layer: (next(rounded), None if layer._parameters["bias"] is None else next(rounded)) for layer in plain}


def linear(layer: nn.Module, x: Tensor, rounded: Rounded) -> Tensor:
    """The layer's result for x."""
    if layer not in rounded:
        result: Tensor = layer(x)
        return result
    return F.linear(x, *rounded[layer])


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """True if a call of the module computes exactly as PyTorch's module of that kind, without observers. An adapter, a
    quantiser or a hook has to see the call."""
    # Bypasses `nn.Module.__getattr__`, which takes longer than everything else here.
    return (
        type(module) is kind
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and not _has_any_global_hook()
        and not any(is_traceable_wrapper_subclass(each) for each in module._parameters.values())
    )


def _is_linear_in_fp32(layer: nn.Module, device: torch.device) -> bool:
    return is_plain(layer, nn.Linear) and all(
        each is None or (each.dtype == torch.float32 and each.device == device) for each in layer._parameters.values()
    )


def _is_transformed() -> bool:
    """True if a gradient may be needed that `_Together` does not support."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


class _Together(torch.autograd.Function):
    """Tensors in another dtype, and their gradients in the original one, by one kernel each."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        ctx.set_materialize_grads(False)
        return tuple(_copied(tensors, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [each for each in grads if each is not None]
        in_batches = torch._C._dispatch_tls_is_dispatch_key_included(_BATCHES_OF_GRADIENTS)
        if torch.is_grad_enabled() or in_batches or not there:
            return None, *(None if each is None else each.to(ctx.dtype) for each in grads)
        wide = iter(_copied(there, ctx.dtype))
        return None, *(None if each is None else next(wide) for each in grads)


def _copied(tensors: Any, dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(each, dtype=dtype) for each in tensors]
    torch._foreach_copy_(copies, list(tensors))
    return copies
