"""Operations on rows whose entries are sharded over the ranks of a process group.

Only scores are exchanged, 4 bytes per token. Every rank runs the operation of `reference`, or its kernel, on the whole
row, and keeps its own part. So all ranks get the same bits as one process, in values and in gradients.

A loss is the sum of the losses of all ranks. For DistributedDataParallel and FSDP2 it is the same except for the factor
of their mean. Backward is called on all ranks. It gives each rank the gradient of that sum with respect to its own
part.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.distributed import ProcessGroup

from reference import topk as whole_topk
from reference._shared.arguments import Solver, check_route, check_scores
from reference._shared.returns import RouteReturn, TopkReturn
from reference.layers.operations import Operations, UseTriton
from reference.parallel.shards import Mesh, Shards, all_gather, common, share
from reference.route import choose, gather_tokens


@dataclass(frozen=True)
class Rows:
    """Whole rows of scores, and of a mask if any rank has one."""

    shards: Shards
    scores: Tensor
    mask: Tensor | None

    @classmethod
    def of(cls, scores: Tensor, mask: Tensor | None, mesh: Mesh, name: str = "scores") -> "Rows":
        """The rows `... n` of this rank's scores, and a mask that broadcasts to them."""
        shards = Shards.of(scores, -1, mesh, mask, name)
        check_scores(scores, mask)
        return cls(shards, shards.gather(scores, name=name), shards.gather_mask(mask, scores))


def coor_descent(
    scores: Tensor,
    *,
    n_iters: int,
    k: float | Tensor,
    eps: float = 0.1,
    eps_init: float | None = None,
    eps_decay: float = 1.0,
    mask: Tensor | None = None,
    mesh: Mesh,
    use_triton: UseTriton = False,
) -> Tensor:
    """`reference.coor_descent` of sharded rows: each rank passes its entries, and gets their results.

    Args:
        scores: `... n`, any float dtype. n may differ between ranks, and is at least 1.
        k: of the whole row, the same on all ranks. If it is a tensor, each rank gets an equal share of its gradient.
        n_iters, eps, eps_init, eps_decay: as in `reference.coor_descent`.
        mask: bool, broadcasts to `... n`. None means True everywhere, if other ranks have a mask.
        mesh: the ranks that hold the rows, in order: a `DeviceMesh` of one dimension, or a `ProcessGroup`.
        use_triton: as in the layers.

    Returns:
        `... n`, in the dtype of the scores.

    Raises:
        ValueError: as in `reference.coor_descent`, or ranks differ in dtype or in the other dimensions.
        RuntimeError: another rank has ended or hangs.
    """
    rows, descend = Rows.of(scores, mask, mesh), Operations.of(use_triton).coor_descent
    schedule: dict[str, Any] = {"n_iters": n_iters, "eps": eps, "eps_init": eps_init, "eps_decay": eps_decay}
    return rows.shards.keep(descend(rows.scores, k=common(k, rows.shards.group), mask=rows.mask, **schedule))


def soft_topk(
    scores: Tensor,
    *,
    k: float | Tensor,
    eps: float,
    mask: Tensor | None = None,
    mesh: Mesh,
    use_triton: UseTriton = False,
) -> Tensor:
    """`reference.soft_topk` of sharded rows: each rank passes its entries, and gets their results.

    Args:
        eps: as in `reference.soft_topk`.
        scores, k, mask, mesh, use_triton: as in `coor_descent`.

    Returns:
        `... n`, in the dtype of the scores.

    Raises:
        ValueError: as in `reference.soft_topk`, or ranks differ in dtype or in the other dimensions.
        RuntimeError: another rank has ended or hangs.
    """
    rows, solve = Rows.of(scores, mask, mesh), Operations.of(use_triton).soft_topk
    return rows.shards.keep(solve(rows.scores, k=common(k, rows.shards.group), eps=eps, mask=rows.mask))


def select(
    scores: Tensor, *, num_selected: int, mask: Tensor | None = None, mesh: Mesh, use_triton: UseTriton = False
) -> Tensor:
    """`reference.select` of sharded rows: all ranks get all indices.

    Args:
        num_selected: number of entries to select from the whole row.
        scores, mask, mesh, use_triton: as in `coor_descent`.

    Returns:
        int64 `... num_selected`: indices into the whole row, the same on all ranks.

    Raises:
        ValueError: as in `reference.select`, or ranks differ in dtype or in the other dimensions.
        RuntimeError: another rank has ended or hangs.
    """
    rows, choice = Rows.of(scores.detach(), mask, mesh), Operations.of(use_triton).select
    indices: Tensor = choice(rows.scores, num_selected=num_selected, mask=rows.mask)
    return indices


def topk(
    x: Tensor,
    k: int,
    coor_descent_k_ratio: float = 9 / 8,
    n_iters: int = 20,
    eps: float = 0.1,
    eps_init: float | None = None,
    eps_decay: float = 1.0,
    mask: Tensor | None = None,
    fused: bool = False,
    non_differentiable: bool = False,
    *,
    mesh: Mesh,
) -> TopkReturn:
    """`reference.topk` of sharded rows: all ranks get all selected entries, with indices into the whole row.

    If every rank computes a loss from the same values, the loss counts once per rank.

    Args:
        x: `... n`, any float dtype. n may differ between ranks, and is at least 1.
        k: number of entries to select from the whole row.
        coor_descent_k_ratio, n_iters, eps, eps_init, eps_decay, fused, non_differentiable: as in `reference.topk`.
        mask, mesh: as in `coor_descent`.

    Raises:
        ValueError: as in `reference.topk`, or ranks differ in dtype or in the other dimensions.
        RuntimeError: another rank has ended or hangs.
    """
    rows = Rows.of(x, mask, mesh, "x")
    schedule: dict[str, Any] = {"n_iters": n_iters, "eps": eps, "eps_init": eps_init, "eps_decay": eps_decay}
    options: dict[str, Any] = {"fused": fused, "non_differentiable": non_differentiable, "mask": rows.mask}
    whole = whole_topk(rows.scores, k, coor_descent_k_ratio, **schedule, **options)
    parts = zip(TopkReturn._fields, whole, strict=True)
    shared = {name: share(each, rows.shards.group, name) for name, each in parts if each is not None}
    return whole._replace(**shared)


def route(
    x: Tensor,
    routing_tokens: Tensor,
    *,
    num_selected: int,
    k: float,
    n_iters: int,
    eps: float = 0.1,
    eps_init: float | None = None,
    eps_decay: float = 1.0,
    solver: Solver = "coor_descent",
    cosine_sim_scale: float | None = None,
    block_size: int | None = None,
    straight_through: bool = False,
    mask: Tensor | None = None,
    mesh: Mesh,
    use_triton: UseTriton = False,
) -> RouteReturn:
    """`reference.route` of a sharded sequence: each rank gets the selected tokens among its own.

    Args:
        x: this rank's tokens `b n d`, any float dtype. n may differ between ranks, and is at least 1.
        routing_tokens: `b r d`, or `1 r d` for the whole batch; the same on all ranks.
        num_selected: number of tokens of the whole sequence that each route selects, from each block if there are
            blocks.
        block_size: number of tokens of the whole sequence per block, if tokens are selected from each block.
        k, n_iters, eps, eps_init, eps_decay, solver, cosine_sim_scale, straight_through: as in `reference.route`.
        mask: bool `b n`, False for masked tokens. None means True everywhere, if other ranks have a mask.
        mesh, use_triton: as in `coor_descent`.

    Returns:
        As `reference.route`, with lists `b r s` as long as the longest of any rank. Indices are those of the rank's own
        tokens. A shorter list is padded with index n and weight 0.

    Raises:
        ValueError: as in `reference.route`, or ranks differ in dtype or in the other dimensions.
        RuntimeError: another rank has ended or hangs.
    """
    shards, operations = Shards.of(x, 1, mesh, mask), Operations.of(use_triton)
    checked = (num_selected, k, (n_iters, eps, eps_init, eps_decay), solver, block_size, mask)
    check_route(x, routing_tokens, *checked, length=shards.total)
    given: list[tuple[Tensor, Tensor]] = []
    x = _Joined.apply(x, given)
    scores = operations.routing_scores(x, routing_tokens, cosine_sim_scale=cosine_sim_scale)
    per_route = None if mask is None else rearrange(mask, "b n -> b 1 n")
    rows = Rows(shards, shards.gather(scores), shards.gather_mask(per_route, scores[:, :1]))
    relax: Callable[..., Tensor] = partial(operations.soft_topk, k=k, eps=eps)
    if solver == "coor_descent":
        schedule: dict[str, Any] = {"n_iters": n_iters, "eps": eps, "eps_init": eps_init, "eps_decay": eps_decay}
        relax = partial(operations.coor_descent, k=k, **schedule)
    options: dict[str, Any] = {"block_size": block_size, "straight_through": straight_through}
    indices, weights = choose(rows.scores, rows.mask, num_selected, relax, operations.select, **options)
    owned = _Owned.among(indices, shards)
    return RouteReturn(owned.places, _Own.apply(weights, owned), _Gathered.apply(x, owned.places, given))


@dataclass(frozen=True)
class _Owned:
    """A rank's own entries of lists `... s` of places in the whole sequence. All ranks have the same lists.

    The rank's lists are in the same order, and have `... m` entries: as many as the longest of any rank has.
    """

    places: Tensor
    """Places among the rank's own; after the last entry, their number."""

    slots: Tensor
    """Place of each entry in the whole list."""

    there: Tensor
    """False after the last entry."""

    sources: Tensor
    """`... s`: place of each entry of the whole list in the lists of all ranks, `... m ranks` as one dimension."""

    group: ProcessGroup

    @classmethod
    def among(cls, indices: Tensor, shards: Shards) -> "_Owned":
        owners, size = shards.owners(indices), len(shards.lengths)
        # By rank, in the order of the list. This takes no tensor of the size of lists times ranks.
        ordered, order = owners.sort(dim=-1, stable=True)
        ranks = torch.arange(size + 1, device=indices.device).repeat(*owners.shape[:-1], 1)
        firsts = torch.searchsorted(ordered, ranks)
        counts = firsts.diff(dim=-1)
        longest = counts.amax() if counts.numel() else 0
        at = torch.arange(indices.shape[-1], device=indices.device)
        sources = (at - firsts.gather(-1, ordered)) * size + ordered
        # Entries past the end of the whole have no owner. They get the gradient of another entry, which the mask of
        # the blocks that they fill up removes.
        sources = torch.empty_like(order).scatter_(-1, order, sources.masked_fill(ordered == size, 0))

        slots = order.gather(-1, (firsts[..., shards.rank, None] + at).clamp(max=len(at) - 1))
        there = at < counts[..., shards.rank, None]
        places = (indices.gather(-1, slots) - shards.start).masked_fill(~there, shards.length)
        # Here the host waits for the GPU. All that does not depend on the length is queued before.
        m = int(longest)
        places, slots, there = (each[..., :m].contiguous() for each in (places, slots, there))
        return cls(places, slots, there, sources, shards.group)


class _Own(torch.autograd.Function):
    """A rank's entries of lists that all ranks have; 0 after the last one."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, owned: _Owned) -> Tensor:
        ctx.owned = owned
        return torch.where(owned.there, whole.gather(-1, owned.slots), 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _OfOwners.apply(grad, ctx.owned), None


class _OfOwners(torch.autograd.Function):
    """Lists for all ranks, with each entry from its owner."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, owned: _Owned) -> Tensor:
        ctx.owned = owned
        parts = torch.stack(all_gather(own, owned.group, "the gradient of weights"), dim=-1)
        return parts.flatten(-2).gather(-1, owned.sources)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Own.apply(grad, ctx.owned), None


class _Gathered(torch.autograd.Function):
    """Gather tokens from joined ones, and pass the gradient to the joined ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: Tensor, given: list[tuple[Tensor, Tensor]]) -> Tensor:
        ctx.shape, ctx.given = x.shape, given
        ctx.save_for_backward(indices)
        return gather_tokens(x, indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            # This result is differentiated.
            return _add_tokens(grad.new_zeros(ctx.shape), indices, grad), None, None
        ctx.given.append((indices, grad))
        return None, None, None


class _Joined(torch.autograd.Function):
    """Tokens that are scored and gathered. The gradients of gathered tokens are added at their places.

    Filling and adding a tensor of the size of all tokens would take as long as the rest of a router.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, given: list[tuple[Tensor, Tensor]]) -> Tensor:
        ctx.given = given
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.contiguous()
        for indices, of_gathered in ctx.given:
            _add_tokens(grad, indices, of_gathered, in_place=True)
        ctx.given.clear()
        return grad, None


def _add_tokens(total: Tensor, indices: Tensor, x: Tensor, *, in_place: bool = False) -> Tensor:
    """Tokens `b n d`, with x `b ... k d` added at indices `b ... k`; an index past the end is the last token."""
    batch = torch.arange(total.shape[0], device=total.device).view(-1, *(1,) * (indices.dim() - 1))
    add = total.index_put_ if in_place else total.index_put
    return add((batch, indices.clamp(max=total.shape[1] - 1)), x, accumulate=True)
