"""A case by ours and by the definition, which computes with the selections of ours.

Selections may differ if scores differ by less than a rounding, and all later results would differ, too. So the
selections of ours are kept, and the definition uses the same ones.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from math import ceil, prod
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.func import functional_call

import kernels
import reference
from reference._attention import attend
from reference.layers.operations import Operations
from tests.kernels.fuzz.cases import OPERATIONS, Case

Tensors = dict[str, Tensor]
Function = Callable[[Tensors], Tensors]

WIDE = {"coor_descent", "segmented_coor_descent", "soft_topk", "topk"}
"""Operations that compute half-precision inputs in fp32, and round the result."""

REPLACED_IN = (
    "gathered_attention",
    "layers.operations",
    "route",
    "route_prefixes",
    "routed_attention",
    "windowed_attention",
)
"""Modules whose functions select, relax or attend."""


@dataclass
class Watched:
    """Events of an execution, in the order of the calls."""

    selections: list[Tensor] = field(default_factory=list)
    """Indices: the selections of ours, which the definition has to repeat."""

    ranked: list[tuple[Tensor, Tensor | None, Tensor]] = field(default_factory=list)
    """Scores and mask by which the definition would have selected."""

    relaxed: list[tuple[str, Tensor, dict[str, Any]]] = field(default_factory=list)
    """Relaxations of the definition: the operation, scores and arguments."""

    causal: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """Causal selections: indices, and the scores of the window before and of the window."""


def ours(case: Case, device: torch.device, watched: Watched) -> tuple[Function, Tensors]:
    """The operation, or the layer with kernels, as a function of tensors; and its parameters among these."""
    if case.name not in OPERATIONS:
        module = layer(case, device, use_triton=_watching(watched))
        _watch_causal(module, watched)
        parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
        return lambda tensors: _call(module, case, tensors), parameters

    def function(tensors: Tensors) -> Tensors:
        result = named(getattr(kernels, case.name)(**tensors, **case.arguments()))
        if case.name in ("normalize_and_route", "route"):
            watched.selections.append(_within_blocks(result["indices"], case.options, tensors["x"].shape[1]))
        if case.name == "topk":
            watched.selections.append(result["indices"])
        return result

    return function, {}


def by_kernels(case: Case, device: torch.device) -> Function:
    """The layer with kernels, as a function of inputs and parameters."""
    module = layer(case, device, use_triton=True)
    return lambda tensors: _call(module, case, tensors)


def definition(case: Case, device: torch.device, watched: Watched, dtype: torch.dtype | None = None) -> Function:
    """The reference, which uses the selections in `watched`, and records its computations there.

    Parameters and results are in the dtypes of the case, or all in `dtype` if it is given.
    """
    own = dtype or getattr(torch, case.dtype)

    def function(tensors: Tensors) -> Tensors:
        with _replaying(watched) as operations:
            if case.name not in OPERATIONS:
                module = layer(case, device, use_triton=False).to(own)
                _watch_causal(module, watched)
                return _call(module, case, tensors)
            options = case.arguments()
            if dtype is not None and "dtype" in options:
                options["dtype"] = dtype
            if case.name not in WIDE:
                return named(operations[case.name](**tensors, **options))
            wide = {name: _widened(x) for name, x in tensors.items()}
            results = named(operations[case.name](**wide, **options))
            return {name: x.to(own) if x.is_floating_point() else x for name, x in results.items()}

    return function


def named(result: Any) -> Tensors:
    """The tensors of a result by their names."""
    if isinstance(result, Tensor):
        return {"output": result}
    return {name: value for name, value in result._asdict().items() if value is not None}


def layer(case: Case, device: torch.device, *, use_triton: bool | Operations) -> nn.Module:
    """The layer of a case, with parameters in its dtype."""
    options = case.arguments()
    options["router_use_triton" if case.name.endswith("ViT") else "use_triton"] = use_triton
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        module = getattr(reference, case.name)(**options)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("routing_token"):
                parameter.mul_(case.data["std"] / parameter.shape[-1] ** 0.5)
    return module.to(device, getattr(torch, case.dtype))


def _call(module: nn.Module, case: Case, tensors: Tensors) -> Tensors:
    """A layer called with parameters and inputs by name, and with the numbers of the case."""
    parameters = {name: tensors[name] for name, _ in module.named_parameters()}
    inputs = {name: tensor for name, tensor in tensors.items() if name not in parameters}
    numbers = {
        name: value
        for name, value in case.data["given"].items()
        if name in inspect.signature(module.forward).parameters and not case.is_tensor(name) and value is not None
    }
    return named(functional_call(module, parameters, kwargs={**inputs, **numbers}))


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() and x.dtype.itemsize == 2 else x


# Selections of ours ---------------------------------------------------------------------------------------------------


def _then(function: Callable[..., Any], keep: Callable[..., None]) -> Callable[..., Any]:
    """The function, with `keep` called on the result and the arguments of each call."""

    def watching(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        keep(result, *args, **kwargs)
        return result

    return watching


def _watching(watched: Watched) -> Operations:
    """The kernels, with observed selections."""

    def chosen(result: Tensor, *args: Any, **kwargs: Any) -> None:
        watched.selections.append(result)

    def routed(result: Any, x: Tensor, routing_tokens: Tensor, **options: Any) -> None:
        watched.selections.append(_within_blocks(result.indices, options, x.shape[1]))

    def from_prefixes(result: Any, *args: Any, **kwargs: Any) -> None:
        watched.selections.append(result.indices)

    keep = {"select": chosen, "route": routed, "normalize_and_route": routed, "route_prefixes": from_prefixes}
    fused = Operations.of(True)
    return replace(fused, **{name: _then(getattr(fused, name), each) for name, each in keep.items()})


def _watch_causal(module: nn.Module, watched: Watched) -> None:
    def selected(result: Any, before: Tensor, scores: Tensor, *args: Any) -> None:
        watched.causal.append((result.indices, before.detach(), scores.detach()))

    if isinstance(module, reference.ConditionalRoutedAutoregressiveAttention):
        module._select_causally = _then(module._select_causally, selected)


def _within_blocks(indices: Tensor, options: dict[str, Any], n: int) -> Tensor:
    """Indices `b r (m s)` of the whole as indices within blocks: `b r m s`."""
    size = options.get("block_size")
    if size is None:
        return indices
    blocks = ceil(n / size)
    starts = torch.arange(blocks, device=indices.device)[:, None] * size
    return indices.unflatten(-1, (blocks, -1)) - starts


def as_rows_of(scores: Tensor, indices: Tensor) -> Tensor:
    """Indices selected from rows of scores, in the shape of these. A single route may have a dimension or not."""
    rows = scores.shape[:-1]
    # Not by -1, which is ambiguous if there are no rows.
    return indices.reshape(*rows, indices.shape[-1])


# Their use by the definition ------------------------------------------------------------------------------------------


@contextmanager
def _replaying(watched: Watched) -> Iterator[dict[str, Callable[..., Any]]]:
    """The operations of the reference, whose selections are replaced by the recorded ones in order."""
    given = iter(watched.selections)

    def select(scores: Tensor, *, num_selected: int, mask: Tensor | None = None) -> Tensor:
        indices = next(given)
        expected = (*scores.shape[:-1], num_selected)
        # If ours routes router by router, as in segments, the definition may route for all at once.
        while indices.numel() < prod(expected) and indices.dim() == scores.dim() > 2:
            indices = torch.cat([indices, next(given)], dim=-2)
        fits = indices.shape[-1] == num_selected and indices.numel() == prod(expected)
        assert fits, f"selected are {tuple(indices.shape)}, by the definition {expected}"
        rows = as_rows_of(scores, indices)
        watched.ranked.append((scores.detach(), mask, rows))
        return rows

    def relaxing(name: str) -> Callable[..., Tensor]:
        def relax(scores: Tensor, **options: Any) -> Tensor:
            watched.relaxed.append((name, scores.detach(), options))
            return getattr(reference, name)(scores, **options)

        return relax

    descent, exact = relaxing("coor_descent"), relaxing("soft_topk")

    def segmented(scores: Tensor, checkpoint_segments: int, **options: Any) -> Tensor:
        return descent(scores, **options)

    def topk(x: Tensor, k: int, coor_descent_k_ratio: float, fused: bool, non_differentiable: bool, **rest: Any) -> Any:
        """`reference.topk`, except for the choice among equal entries."""
        mask, indices = rest.get("mask"), next(given)
        there = torch.ones_like(indices, dtype=torch.bool) if mask is None else mask.expand(x.shape).gather(-1, indices)
        values = x.gather(-1, indices).masked_fill(~there, 0.0)
        if non_differentiable:
            return reference.TopkReturn(values, indices, None, None)
        soft = descent(x, k=min(k * coor_descent_k_ratio, x.shape[-1]), **rest).gather(-1, indices)
        gates = (soft + (1.0 - soft).detach()).masked_fill(~there, 0.0)
        return reference.TopkReturn(values * gates, indices, soft, gates)

    def in_steps(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        """Attention by the definition, because roundings within PyTorch's kernels cannot be seen or moved."""
        return attend(query, key, value, mask, **{**options, "use_flash": False})

    replaced = {"select": select, "coor_descent": descent, "soft_topk": exact, "attend": in_steps}
    with ExitStack() as patches:
        # By their names, because `reference.route`, for example, is a function.
        for module in (sys.modules[f"reference.{name}"] for name in REPLACED_IN):
            for name in replaced.keys() & vars(module).keys():
                patches.enter_context(mock.patch.object(module, name, replaced[name]))
        changed = {"coor_descent": descent, "soft_topk": exact, "segmented_coor_descent": segmented, "topk": topk}
        yield {name: changed.get(name) or getattr(reference, name) for name in OPERATIONS}
    assert next(given, None) is None, "ours selected more often than the definition"
