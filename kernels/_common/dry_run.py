"""A dry run of a layer: a step without values, which tells all kernels that the step launches."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only


class DryRun(FakeTensorMode):
    """A mode under which tensors are shapes alone, and launchers note what they would launch."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.launches: list[Any] = []


def dry_run_of(x: Tensor) -> DryRun | None:
    """The dry run that a tensor belongs to. None: it has values, or is of a compiler."""
    return x.fake_mode if type(x) is FakeTensor and isinstance(x.fake_mode, DryRun) else None


_announced: ContextVar[Callable[[], list[Any]]] = ContextVar("_announced", default=list)


@contextmanager
def announced(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[None]:
    """Say which call of a layer the operations within belong to. Of nested layers, the outermost counts."""
    if _announced.get() is not list:
        yield
        return
    device = next(x.device.type for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
    modes = (torch.is_grad_enabled(), torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
    token = _announced.set(partial(_launches_of, layer, forward, device, *modes, args, kwargs))
    try:
        yield
    finally:
        _announced.reset(token)


def launches_of_layer() -> Callable[[], list[Any]]:
    """A function that returns all launches of the layer that is being called, with its backward pass. Outside of layers
    there are none."""
    return _announced.get()


def _launches_of(
    layer: nn.Module,
    forward: Callable[..., Any],
    device: str,
    grad: bool,
    autocast: bool,
    autocast_dtype: torch.dtype,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> list[Any]:
    """Run a step in a thread of its own, where no hooks of saved tensors, modes and transforms see it.

    A layer that cannot run without values tells fewer launches, or none. One with hooks inside tells none.
    """
    if _has_hooks(layer):
        return []
    dry_run = DryRun()

    def step() -> None:
        with dry_run, torch.set_grad_enabled(grad):
            inputs, options = tree_map_only(Tensor, _without_values, (args, kwargs))
            # Casts of weights are without values too: nobody else may find them in a cache.
            with torch.autocast(device, autocast_dtype, autocast, cache_enabled=False):
                outputs = _differentiable(forward(layer, *inputs, **options))
            if outputs:
                leaves = _differentiable([inputs, options, *layer.parameters()])
                # Unlike `backward`, this leaves the gradients of parameters alone.
                torch.autograd.grad(outputs, leaves, [torch.empty_like(y) for y in outputs], allow_unused=True)

    with ThreadPoolExecutor(1, "colt5-dry-run") as thread:
        thread.submit(step)
    return dry_run.launches


def _has_hooks(layer: nn.Module) -> bool:
    """True if somebody's functions would run with the layer: on modules within, or on gradients of parameters."""
    return any(
        each._forward_pre_hooks or each._forward_hooks or each._backward_pre_hooks or each._backward_hooks
        for each in layer.modules()
        if each is not layer
    ) or any(each._backward_hooks for each in layer.parameters())


def _without_values(x: Tensor) -> Tensor:
    """A tensor of the same shape in the dry run that is going on."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).requires_grad_(x.requires_grad)


def _differentiable(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.requires_grad]
