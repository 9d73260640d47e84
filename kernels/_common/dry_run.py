"""A dry run of a layer: a step without values that lists all kernels of the step."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only
from triton import next_power_of_2


class DryRun(FakeTensorMode):
    """A mode in which tensors are only shapes, and launchers list their launches instead of starting them."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.launches: list[Any] = []


def dry_run_of(x: Tensor) -> DryRun | None:
    """The dry run of a tensor. None if the tensor has values, or belongs to a compiler."""
    return x.fake_mode if type(x) is FakeTensor and isinstance(x.fake_mode, DryRun) else None


_announced: ContextVar[Callable[[], Iterable[Any]]] = ContextVar("_announced", default=list)


@contextmanager
def announced(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[None]:
    """Name the call of a layer to which the operations within belong. Of nested layers, the outermost counts."""
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


def launches_of_layer() -> Callable[[], Iterable[Any]]:
    """A function that lists all launches of the layer that is being called, with its backward pass. Outside of layers
    the list is empty."""
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
) -> Iterator[Any]:
    """Run a step in its own thread, hidden from hooks of saved tensors, modes and transforms.

    If lengths have changed, the lengths that may follow have their dry runs next. A layer that cannot run without
    values lists fewer launches, or none. A layer with hooks inside lists none. Nor does a layer that is called within a
    backward pass, for example from a checkpoint: such a call holds the only backward thread of its GPU, for which the
    backward pass of a dry run would wait.
    """
    if _has_hooks(layer) or _is_sharded(layer) or torch._C._current_graph_task_id() != -1:
        return

    def step(dry_run: DryRun, lengths: Mapping[int, int]) -> None:
        with dry_run, torch.set_grad_enabled(grad):
            inputs, options = tree_map_only(Tensor, partial(_without_values, lengths=lengths), (args, kwargs))
            # Casts of weights have no values either, so they must not enter the cache.
            with torch.autocast(device, autocast_dtype, autocast, cache_enabled=False):
                outputs = _differentiable(forward(layer, *inputs, **options))
            if outputs:
                leaves = _differentiable([inputs, options, *layer.parameters()])
                # Unlike `backward`, this leaves the gradients of parameters alone.
                torch.autograd.grad(outputs, leaves, [torch.empty_like(y) for y in outputs], allow_unused=True)

    with ThreadPoolExecutor(1, "colt5-dry-run") as thread:
        for lengths in ({}, *_lengths_to_come(layer, (args, kwargs))):
            dry_run = DryRun()
            wait([thread.submit(step, dry_run, lengths)])
            yield from dry_run.launches


_first_shapes: WeakKeyDictionary[nn.Module, list[torch.Size]] = WeakKeyDictionary()
"""Shapes of the tensors of a layer at the first call that lacked a kernel."""


def _lengths_to_come(layer: nn.Module, given: Any) -> list[dict[int, int]]:
    """New values for sizes, as later calls of a layer may have them. Empty until sizes have changed.

    Each size except the first of a tensor, the batch, is a length if it changes. Kernels differ between powers of two,
    and for lengths that are not multiples of 16.
    """
    shapes = [x.shape for x in tree_leaves(given) if isinstance(x, Tensor)]
    known = _first_shapes.setdefault(layer, shapes)
    sizes = [pair for pairs in map(zip, known, shapes) for pair in [*pairs][1:]]
    changed = [(old, new) for old, new in sizes if old != new]
    if not changed:
        return []
    longest = 4 * next_power_of_2(max(map(max, changed)))
    odd = any(new % 16 for _, new in changed)
    return [dict.fromkeys([new for _, new in changed], longest // 2**halvings - odd) for halvings in range(7)]


def _has_hooks(layer: nn.Module) -> bool:
    """True if user functions would run with the layer: hooks of inner modules, or of gradients of parameters."""
    return any(
        each._forward_pre_hooks or each._forward_hooks or each._backward_pre_hooks or each._backward_hooks
        for each in layer.modules()
        if each is not layer
    ) or any(each._backward_hooks for each in layer.parameters())


def _is_sharded(layer: nn.Module) -> bool:
    """True if a call exchanges tensors with other processes, which do not take part in a dry run."""
    return getattr(getattr(layer, "operations", None), "shards_of", None) is not None


def _without_values(x: Tensor, lengths: Mapping[int, int]) -> Tensor:
    """A tensor in the current dry run, of the same shape except for replaced lengths."""
    shape = (*x.shape[:1], *(lengths.get(size, size) for size in x.shape[1:]))
    strides = x.stride() if shape == x.shape else torch.empty(shape, device="meta").stride()
    return torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device).requires_grad_(x.requires_grad)


def _differentiable(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.requires_grad]
