"""What every operator says to PyTorch: its schema, its shapes, its gradient, what function transforms make of it, and
the shortest way to it.

An operator has a gradient at each level of `torch.func`, and `torch.vmap` takes one example after the other. It has
neither a second derivative nor forward mode, and says so to whoever asks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from kernels._common.launch import is_traced
from reference._shared.arguments import require

_library = torch.library.Library("colt5", "FRAGMENT")


def define(schema: str, function: Callable[..., Any], allocate: Callable[..., Any]) -> None:
    """An operator `colt5::name`, by a schema that begins with the name. One function for a CPU and for CUDA chooses
    between kernels and PyTorch; `allocate` gives what has the shapes of the results."""
    name = _name(schema)
    _library.define(schema)
    torch.library.register_fake(f"colt5::{name}", allocate, lib=_library)
    torch.library.register_vmap(f"colt5::{name}", partial(_one_by_one, _operator(name)), lib=_library)
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

    def refuse(ctx, *_: Tensor) -> NoReturn:
        _refuse("second derivative", _name(schema), reference)

    define_gradient(_name(schema), lambda ctx, inputs, output: None, refuse, reference=reference)


def define_gradient(
    name: str, setup_context: Callable[..., None], differentiate: Callable[..., Any], *, reference: str | None = None
) -> None:
    """The gradient of an operator that is defined, by what `torch.library.register_autograd` takes. That of PyTorch is
    for autograd alone; this one is for each level of `torch.func`, and refuses forward mode.

    An argument `save` at the end is True wherever there is to be a gradient: who calls the operator cannot know of
    those that are taken outside of `torch.vmap`.

    Args:
        reference: the operation of `reference` that has forward mode, if it goes by another name.
    """
    operator = _operator(name)
    saves = operator._schema.arguments[-1].name == "save"

    def run(keyset: torch._C.DispatchKeySet, inputs: tuple) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    class Differentiable(_SingleLevelFunction):
        @staticmethod
        def forward(ctx, *arguments):
            # The last place leaves `needs_input_grad` as it is.
            *inputs, keyset = arguments
            # For the outer levels of `torch.func`, which come next: autograd turns off both.
            outer = torch._C._are_functorch_transforms_active()
            with torch.set_grad_enabled(outer), forward_ad._set_fwd_grad_enabled(outer):
                output = run(keyset, inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return *differentiate(ctx, *grads), None

    def dispatch(keyset: torch._C.DispatchKeySet, *inputs: Any) -> Any:
        tensors = [each for each in inputs if isinstance(each, Tensor)]
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(each).tangent is not None for each in tensors):
            _refuse("forward mode", name, reference)
        if not torch.is_grad_enabled() or not any(each.requires_grad for each in tensors):
            return run(keyset, inputs)
        with enable_single_level_autograd_function():
            return Differentiable.apply(*inputs[:-1], saves or inputs[-1], keyset)  # type: ignore[attr-defined]

    _library.impl(name, dispatch, "Autograd", with_keyset=True)


def _refuse(what: str, name: str, reference: str | None) -> NoReturn:
    name = name.removesuffix("_backward")
    raise NotImplementedError(f"kernels.{name} has no {what}: use reference.{reference or name}")


def _one_by_one(operator: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
    """The operator under `torch.vmap`, whose results have the new dimension in front."""
    size = info.batch_size
    require(size > 0, "the size of what torch.vmap maps over", size, ">= 1")
    examples = zip(
        *([each] * size if dim is None else each.unbind(dim) for each, dim in zip(inputs, in_dims, strict=True)),
        strict=True,
    )
    # As those who call operators make it, so that kernels may count on it.
    results = [operator(*(_contiguous(each) for each in example)) for example in examples]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    stacked = tuple(map(torch.stack, zip(*results, strict=True)))
    return stacked, (0,) * len(stacked)


def _contiguous(argument: Any) -> Any:
    return argument.contiguous() if isinstance(argument, Tensor) else argument


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


def _operator(name: str) -> Any:
    return getattr(torch.ops.colt5, name).default
