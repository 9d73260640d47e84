"""What every operator says to PyTorch: its schema, its shapes, its gradient, and the shortest way to it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels._launch import is_traced

_library = torch.library.Library("colt5", "FRAGMENT")


def define(schema: str, function: Callable[..., Any], allocate: Callable[..., Any]) -> None:
    """An operator `colt5::name`, by a schema that begins with the name. One function for a CPU and for CUDA chooses
    between kernels and PyTorch; `allocate` gives what has the shapes of the results."""
    name = _name(schema)
    _library.define(schema)
    torch.library.register_fake(f"colt5::{name}", allocate, lib=_library)
    for device in ("CPU", "CUDA"):
        _library.impl(name, function, device)


def define_backward(
    schema: str, function: Callable[..., Any], allocate: Callable[..., Any], *, reference: str | None = None
) -> None:
    """The operator `name_backward` of the backward pass of `name`, which has no gradient of its own.

    Args:
        reference: the operation of `reference` that has one, if it goes by another name.
    """
    define(schema, function, allocate)
    name = _name(schema).removesuffix("_backward")

    def refuse(ctx, *_: Tensor) -> None:
        raise NotImplementedError(f"kernels.{name} has no second derivative: use reference.{reference or name}")

    torch.library.register_autograd(f"colt5::{name}_backward", refuse, lib=_library)


def define_gradient(name: str, setup_context: Callable[..., None], differentiate: Callable[..., Any]) -> None:
    """What `torch.library.register_autograd` takes, for an operator that is defined."""
    torch.library.register_autograd(f"colt5::{name}", differentiate, setup_context=setup_context, lib=_library)


def eager(
    forward: Callable[..., Any], setup_context: Callable[..., None], differentiate: Callable[..., Any]
) -> Callable[..., Any]:
    """An operator with its gradient, and without PyTorch's dispatcher, whose way through Python takes longer than some
    of the kernels."""

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            # Not as a `setup_context`, for which PyTorch inspects the signature of `forward` on each call.
            output = forward(*inputs)
            setup_context(ctx, inputs, output)
            return output

        backward = staticmethod(differentiate)

    return Eager.apply


def backward_of(grad: Tensor, operator: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """Of a backward pass: its operator where somebody is to see it or a second derivative may be asked for, which only
    the operator can refuse; else the function that it calls."""
    return operator if torch.is_grad_enabled() or is_traced(grad) else function


def _name(schema: str) -> str:
    return schema.partition("(")[0]
