"""Layers of sequences whose tokens are sharded over the ranks of a process group.

They are the layers of `reference` with other operations. A rank routes its own tokens by the scores of all, and runs
its own queries: queries and their results are not exchanged. Routed keys and values go to all ranks. Tokens near the
ends of a shard, as projected for the light attention, go to the neighbours.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from reference._shared.ranks import Ranks
from reference._shared.returns import NormalizedRouteReturn
from reference.layers.image import ConditionalRoutedImageAttention
from reference.layers.operations import Operations
from reference.layers.router import CoordinateDescentRouter
from reference.parallel.operations import route
from reference.parallel.shards import Mesh, Shards, all_gather, group_of

Module = TypeVar("Module", bound=nn.Module)


def shard_sequences(model: Module, *, mesh: Mesh) -> Module:
    """Let the layers of a model take sequences `b n d` whose tokens are sharded over a mesh.

    Each rank then passes its own tokens, in the order of ranks, with their mask and residual, and gets their results.
    Lengths may differ between ranks. Numbers of tokens to route, blocks and positions refer to the whole sequence.
    Parameters and checkpoints do not change and are the same on all ranks; `DistributedDataParallel` or `fully_shard`
    reduces the gradients.

    Like `fully_shard`, this changes an existing model and takes an argument `mesh`.

    Args:
        model: a layer of `reference` or `kernels`, or any model that contains such layers; changed in place.
        mesh: the ranks that hold a sequence, in its order: a `DeviceMesh` of one dimension, as `mesh["cp"]`, or a
            `ProcessGroup`.

    Returns:
        The model.

    Raises:
        ValueError: the mesh has several dimensions, or layers have one already.
        NotImplementedError: a layer or an option has no parallel form yet.
    """
    group = group_of(mesh)
    for name, module in model.named_modules():
        operations = getattr(module, "operations", None)
        if isinstance(operations, Operations):
            _check(name, module, operations)
    for module in model.modules():
        operations = getattr(module, "operations", None)
        if isinstance(operations, Operations):
            module.operations = _sharded(operations, group)  # type: ignore[assignment]
    return model


def _check(name: str, module: nn.Module, operations: Operations) -> None:
    """Check that a module may be sharded."""
    if operations.shards_of is not None:
        raise ValueError(f"model must have no layer that is sharded already, got {name or type(module).__name__}")
    if isinstance(module, ConditionalRoutedImageAttention):
        raise NotImplementedError(f"model must have only layers of sequences, got one of feature maps, {name!r}")
    if isinstance(module, CoordinateDescentRouter) and module.checkpoint_segments is not None:
        segments = module.checkpoint_segments
        raise NotImplementedError(f"triton_checkpoint_segments of router {name!r} must be None, got {segments}")


def _sharded(operations: Operations, group: ProcessGroup) -> Operations:
    """The operations for this rank's part of a sequence."""
    route_prefixes = operations.route_prefixes
    if route_prefixes is not None:
        gather = partial(all_gather, group=group, name="descents on prefixes")
        route_prefixes = partial(route_prefixes, ranks=Ranks(group.rank(), group.size(), gather))
    return replace(
        operations,
        flash_gathered_attention=partial(_gathered_attention, operations.flash_gathered_attention, group),
        flash_routed_attention=partial(_routed_attention, operations.flash_routed_attention, group),
        gathered_attention=partial(_gathered_attention, operations.gathered_attention, group),
        normalize_and_route=partial(_normalize_and_route, operations, group),
        replay=None,
        route=partial(route, mesh=group, use_triton=operations),
        route_prefixes=route_prefixes,
        routed_attention=partial(_routed_attention, operations.routed_attention, group),
        shards_of=partial(Shards.of, dim=1, mesh=group),
        windowed_attention=partial(_windowed_attention, operations.windowed_attention, group),
    )


def _normalize_and_route(
    operations: Operations,
    group: ProcessGroup,
    x: Tensor,
    routing_tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    **options: Any,
) -> NormalizedRouteReturn:
    """`normalize_and_route` of this rank's tokens: `normalize`, and `route` by the scores of all."""
    norm = {name: options.pop(each) for name, each in (("center", "center"), ("eps", "norm_eps")) if each in options}
    normalized = operations.normalize(x, weight, bias, dtype=options.pop("dtype", None), **norm)
    routed = route(x, routing_tokens, **options, mesh=group, use_triton=operations)
    return NormalizedRouteReturn(*routed, normalized, x)


def _routed_attention(
    attend: Callable[..., Tensor],
    group: ProcessGroup,
    query: Tensor,
    key_value: Tensor,
    weights: Tensor,
    null_kv: Tensor,
    *,
    mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """`routed_attention` of this rank's queries to the keys and values of all ranks."""
    shards = Shards.of(key_value, 2, group, mask, "key_value")
    mask = shards.gather_mask(mask, weights)
    key_value = shards.gather_for_each(key_value, 2, "key_value")
    return attend(query, key_value, shards.gather_for_each(weights, 2, "weights"), null_kv, mask=mask, **options)


def _gathered_attention(
    attend: Callable[..., Tensor],
    group: ProcessGroup,
    query: Tensor,
    key_value: Tensor,
    indices: Tensor,
    weights: Tensor,
    null_kv: Tensor,
    *,
    mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """`gathered_attention` of this rank's windows to lists of tokens of the whole sequence, which are fetched."""
    shards = Shards.of(key_value, 2, group, name="key_value")
    listed = indices if mask is None else indices[mask]
    fetched = listed.unique()
    key_value = shards.fetch_rows(key_value, fetched, "key_value")
    # Masked entries may have any value.
    indices = torch.searchsorted(fetched, indices)
    return attend(query, key_value, indices, weights, null_kv, mask=mask, **options)


def _windowed_attention(
    attend: Callable[..., Tensor],
    group: ProcessGroup,
    qkv: Tensor,
    *,
    heads: int,
    window_size: int,
    causal: bool = False,
    mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """`windowed_attention` of this rank's tokens to the tokens of all ranks within their reach.

    Positions count from the first token in reach, because rotary embedding and position bias depend only on distances.
    """
    shards = Shards.of(qkv, 1, group, mask, "qkv")
    reaches = [_reach(each, shards.total, window_size, causal) for each in shards.stretches]
    before = shards.start - reaches[shards.rank][0]
    if shards.some_are_masked:
        there = qkv.new_ones(qkv.shape[:2]) if mask is None else mask.to(qkv.dtype)
        mask = shards.fetch(there, reaches, "mask").bool()
    qkv = shards.fetch(qkv, reaches, "qkv")
    out = attend(qkv, heads=heads, window_size=window_size, causal=causal, mask=mask, **options)
    return out.narrow(1, before, shards.length)


def _reach(own: tuple[int, int], total: int, window_size: int, causal: bool) -> tuple[int, int]:
    """Tokens that those of a rank attend to. If causal, they begin with a window, like the windows of the whole
    sequence."""
    first, end = own
    if causal:
        return max((first // window_size - 1) * window_size, 0), end
    return max(first - window_size, 0), min(end + window_size, total)
