"""The layers of `reference` with kernels: arguments, results and checkpoints are the same.

`use_triton` is None by default: kernels for CUDA tensors, plain PyTorch for others.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any, TypeVar

from torch import nn
from torch.compiler import is_compiling

import reference
from kernels._common.dry_run import announced
from kernels._common.replay import replay
from reference.layers.operations import Operations
from reference.layers.replayed import replayed

Layer = TypeVar("Layer", bound=type[nn.Module])
Module = TypeVar("Module", bound=nn.Module)


def played(layer: Module, play: bool = True) -> Module:
    """Switch replay on or off: a layer records its second call of a kind, and plays later ones.

    It is on by default. Each call is then one autograd function. A played call runs no Python between the launches of
    forward or backward: this saves host time if the same shapes come again and again, as in training. All these calls
    give the same bits. A call under hooks, modes or transforms runs the code of the layer: it adds up gradients of a
    tensor in another order, so the two can differ by a rounding. The same holds for every call of a layer in which some
    operations are Python functions instead of kernels.

    Args:
        layer: a layer with kernels, or a model that contains such layers; changed in place.
        play: if False, calls run the code of the layer.

    Returns:
        The layer.
    """
    for module in layer.modules():
        operations = getattr(module, "operations", None)
        if isinstance(operations, Operations) and operations.use_triton is not False:
            module.operations = replace(operations, replay=replay if play else None)  # type: ignore[assignment]
    return layer


def _with_kernels(layer: Layer) -> Layer:
    """The layer class with None as the default of `use_triton`, and all kernels of a call compiled in parallel."""
    init: Callable[..., None] = layer.__init__
    signature = inspect.signature(init)
    (option,) = (name for name in signature.parameters if name.endswith("use_triton"))

    @wraps(init)
    def switched_on(*args: Any, **options: Any) -> None:
        is_given = option in signature.bind_partial(*args, **options).arguments
        init(*args, **options if is_given else {**options, option: None})

    parameters = [each.replace(default=None) if each.name == option else each for each in signature.parameters.values()]
    switched_on.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    layer.__init__ = switched_on  # type: ignore[method-assign]

    # Played calls need no announcement.
    forward: Callable[..., Any] = inspect.unwrap(layer.forward)

    @wraps(forward)
    def announcing(self: nn.Module, *args: Any, **options: Any) -> Any:
        if is_compiling():
            return forward(self, *args, **options)
        with announced(self, forward, *args, **options):
            return forward(self, *args, **options)

    layer.forward = announcing if forward is layer.forward else replayed(announcing)
    return layer


@_with_kernels
class CoordinateDescentRouter(reference.CoordinateDescentRouter):
    """`reference.CoordinateDescentRouter` with kernels for CUDA tensors."""


@_with_kernels
class ConditionalRoutedFeedForward(reference.ConditionalRoutedFeedForward):
    """`reference.ConditionalRoutedFeedForward` with kernels for CUDA tensors."""


@_with_kernels
class ConditionalRoutedAttention(reference.ConditionalRoutedAttention):
    """`reference.ConditionalRoutedAttention` with kernels for CUDA tensors."""


@_with_kernels
class ConditionalRoutedCrossAttention(reference.ConditionalRoutedCrossAttention):
    """`reference.ConditionalRoutedCrossAttention` with kernels for CUDA tensors."""


@_with_kernels
class ConditionalRoutedAutoregressiveAttention(reference.ConditionalRoutedAutoregressiveAttention):
    """`reference.ConditionalRoutedAutoregressiveAttention` with kernels for CUDA tensors."""


@_with_kernels
class ConditionalRoutedImageAttention(reference.ConditionalRoutedImageAttention):
    """`reference.ConditionalRoutedImageAttention` with kernels for CUDA tensors."""


@_with_kernels
class ConditionalRoutedTransformerBlock(reference.ConditionalRoutedTransformerBlock):
    """`reference.ConditionalRoutedTransformerBlock` with kernels for CUDA tensors."""


@_with_kernels
class ConditionalRoutedViT(reference.ConditionalRoutedViT):
    """`reference.ConditionalRoutedViT` with kernels for CUDA tensors."""
