"""Dimensions that are sharded over the ranks of a process group, and exchanges of their entries.

Two primitives move bytes: `all_gather` and `all_to_all_single`. Each rank adds up the terms of its sums itself, in the
order of ranks. Values are of two kinds, and each autograd function converts one kind to the other.

- Local values: each rank has its own, and its gradient of the sum of all ranks' losses.
- Common values: all ranks compute the same value from the same inputs, and each rank has the whole gradient.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeAlias
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from reference._shared.arguments import require

Mesh: TypeAlias = DeviceMesh | ProcessGroup
"""A mesh of one dimension, or a process group: the ranks that hold a sequence, in its order."""


def group_of(mesh: Mesh) -> ProcessGroup:
    """The process group of a mesh of one dimension."""
    if not isinstance(mesh, DeviceMesh):
        require(isinstance(mesh, ProcessGroup), "mesh", mesh, "a DeviceMesh or a ProcessGroup that this process is in")
        return mesh
    require(mesh.ndim == 1, "mesh", mesh, "of one dimension, the one that shards sequences, such as mesh['cp']")
    return mesh.get_group()


Stretch: TypeAlias = tuple[int, int]
"""Places of a dimension: the first one, and the one after the last."""


@dataclass(frozen=True)
class Shards:
    """A dimension divided among the ranks of a group, one stretch per rank in the order of ranks. Lengths may
    differ."""

    group: ProcessGroup
    lengths: tuple[int, ...]
    """Number of entries of each rank."""

    some_are_masked: bool
    """True if any rank has a mask."""

    @classmethod
    def of(cls, x: Tensor, dim: int, mesh: Mesh, mask: Tensor | None = None, name: str = "x") -> "Shards":
        """The shards of a dimension of x. All ranks call this, each with its own x.

        Raises:
            ValueError: a rank has no entries, or ranks differ in more than the lengths of this dimension.
        """
        group = group_of(mesh)
        require(-x.ndim <= dim < x.ndim, name, x.shape, "of a shape with the sharded dimension {}", dim)
        others = [size for axis, size in enumerate(x.shape) if axis != dim % x.ndim]
        # Not Python's `hash`, which differs between processes for texts.
        fingerprint = crc32(repr((x.dtype, others)).encode())
        header = torch.tensor([x.shape[dim], mask is not None, fingerprint], device=_device_of_headers(group, x.device))
        lengths, masked, fingerprints = torch.stack(all_gather(header, group, name)).T.tolist()
        allowed = "of the same dtype and, except for dimension {}, of the same shape on all ranks of the group"
        require(len(set(fingerprints)) == 1, name, (x.dtype, tuple(x.shape)), allowed, dim)
        require(min(lengths) >= 1, name, f"lengths {lengths}", "of at least one entry on each rank")
        return cls(group, tuple(lengths), any(masked))

    @property
    def rank(self) -> int:
        """Rank of this process in the group."""
        return self.group.rank()

    @property
    def length(self) -> int:
        """Number of entries of this rank."""
        return self.lengths[self.rank]

    @property
    def start(self) -> int:
        """Place of this rank's first entry in the whole."""
        return self.stretches[self.rank][0]

    @property
    def ranks(self) -> range:
        """All ranks of the group."""
        return range(len(self.lengths))

    @property
    def stretches(self) -> list[Stretch]:
        """The entries of each rank."""
        ends = [*accumulate(self.lengths)]
        return [*zip([0, *ends], ends, strict=False)]

    @property
    def total(self) -> int:
        """Number of entries of the whole."""
        return sum(self.lengths)

    def owners(self, indices: Tensor) -> Tensor:
        """The ranks of these places of the whole; past its end, the size of the group."""
        # The host need not wait until it is copied.
        ends = torch.tensor([*accumulate(self.lengths)], device="cpu").to(indices.device, non_blocking=True)
        return torch.bucketize(indices, ends, right=True)

    def gather(self, x: Tensor, dim: int = -1, name: str = "scores") -> Tensor:
        """All entries of local x, as a common value."""
        return _Gather.apply(x, self, dim, name)

    def keep(self, whole: Tensor, dim: int = -1, name: str = "scores") -> Tensor:
        """This rank's entries of a common value, as a local one."""
        return _Keep.apply(whole, self, dim, name)

    def gather_for_each(self, x: Tensor, dim: int, name: str) -> Tensor:
        """All entries of local x, as a local value of each rank."""
        return _GatherForEach.apply(x, self, dim, name)

    def fetch(self, x: Tensor, stretches: Sequence[Stretch], name: str) -> Tensor:
        """Entries in the stretch of the whole that each rank needs, of local x `b n ...`, as a local value.

        Args:
            stretches: one for each rank, which includes the rank's own entries.
        """
        return _Fetch.apply(x, self, stretches, name)

    def with_window_before(self, x: Tensor, window_size: int) -> Tensor:
        """Local x `b n ...`, preceded by the entries of the window before if another rank holds them.

        Raises:
            NotImplementedError: a shard begins within a window.
        """
        if any(first % window_size for first, _ in self.stretches):
            raise NotImplementedError(
                f"heavy_window_size must divide the lengths of all shards but the last, got {window_size}, and lengths "
                f"{list(self.lengths)}"
            )
        return self.fetch(x, [(max(first - window_size, 0), end) for first, end in self.stretches], "x")

    def fetch_rows(self, x: Tensor, indices: Tensor, name: str) -> Tensor:
        """Entries `b r m ...` of the whole of local x `b r n ...`, as a local value.

        Args:
            indices: `m`, the places that this rank requests, in ascending order.
        """
        owners = self.owners(indices)
        counts = torch.stack([(owners == rank).sum() for rank in self.ranks])
        one = torch.Size((1,))
        asked = _all_to_all([*counts.split(1)], [one] * len(self.ranks), self.group, f"counts of {name}")
        received, sent = (each.tolist() for each in (counts, torch.cat(asked)))
        shapes = [torch.Size((count,)) for count in sent]
        places = _all_to_all([*indices.split(received)], shapes, self.group, f"indices of {name}")
        return _FetchRows.apply(x, [each - self.start for each in places], received, self.group, name)

    def gather_mask(self, mask: Tensor | None, scores: Tensor) -> Tensor | None:
        """The whole of a mask that broadcasts to this rank's scores. None if no rank has a mask."""
        if not self.some_are_masked:
            return None
        there = scores.new_ones((), dtype=torch.bool) if mask is None else mask
        return _gathered(there.expand(scores.shape), self, -1, "mask")


def share(x: Tensor, group: ProcessGroup, name: str) -> Tensor:
    """A common value as a local one of each rank, for any use."""
    return _Share.apply(x, group, name)


def common(k: float | Tensor, group: ProcessGroup) -> float | Tensor:
    """A number, or local numbers that are the same on all ranks, as a common value. Ranks share its gradient evenly."""
    if not isinstance(k, Tensor) or not k.requires_grad:
        return k
    return k.detach() + (k - k.detach()) / group.size()


class _Gather(torch.autograd.Function):
    """All entries, for the same use on all ranks: each rank has the whole gradient, and keeps its part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards, dim: int, name: str) -> Tensor:
        ctx.rest = shards, dim, name
        return _gathered(x, shards, dim, name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Keep.apply(grad, *ctx.rest), None, None, None


class _Keep(torch.autograd.Function):
    """A rank's entries of a common value. The gradient of the whole is gathered from all ranks."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, shards: Shards, dim: int, name: str) -> Tensor:
        ctx.rest = shards, dim, name
        # A view would keep the whole row in memory.
        return whole.narrow(dim, shards.start, shards.length).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shards, dim, name = ctx.rest
        return _Gather.apply(grad, shards, dim, f"the gradient of {name}"), None, None, None


class _Share(torch.autograd.Function):
    """A common value, for a use that differs between ranks: its gradient is a sum over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, name: str) -> Tensor:
        ctx.rest = group, name
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        group, name = ctx.rest
        return _Sum.apply(grad, group, f"the gradient of {name}"), None, None


class _Sum(torch.autograd.Function):
    """The sum of local values, as a common value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, name: str) -> Tensor:
        ctx.rest = group, name
        return _summed(all_gather(x, group, name))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Share.apply(grad, *ctx.rest), None, None


class _GatherForEach(torch.autograd.Function):
    """All entries, for a use that differs between ranks: their gradient is a sum over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards, dim: int, name: str) -> Tensor:
        ctx.rest = shards, dim, name
        return _gathered(x, shards, dim, name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shards, dim, name = ctx.rest
        return _SumAtOwner.apply(grad, shards, dim, f"the gradient of {name}"), None, None, None


class _SumAtOwner(torch.autograd.Function):
    """The sum of local values of all ranks for all entries; each rank gets its own entries."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards, dim: int, name: str) -> Tensor:
        ctx.rest = shards, dim, name
        parts = [*x.split(shards.lengths, dim=dim)]
        own = parts[shards.rank].shape
        return _summed(_all_to_all(parts, [own] * len(parts), shards.group, name))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _GatherForEach.apply(grad, *ctx.rest), None, None, None


class _Fetch(torch.autograd.Function):
    """The entries that each rank needs, from the ranks that hold them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards, stretches: Sequence[Stretch], name: str) -> Tensor:
        ctx.rest = shards, stretches, name
        sent, received = _overlaps(shards, stretches)
        parts = [x[:, first - shards.start : end - shards.start] for first, end in sent]
        shapes = [torch.Size((x.shape[0], end - first, *x.shape[2:])) for first, end in received]
        parts = _all_to_all(parts, shapes, shards.group, name)
        parts[shards.rank] = x
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shards, stretches, name = ctx.rest
        return _SumFetched.apply(grad, shards, stretches, f"the gradient of {name}"), None, None, None


class _SumFetched(torch.autograd.Function):
    """Fetched entries are returned to their ranks, and added up there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards, stretches: Sequence[Stretch], name: str) -> Tensor:
        ctx.rest = shards, stretches, name
        sent, received = _overlaps(shards, stretches)
        sizes = [end - first for first, end in received]
        sizes[shards.rank] = shards.length
        parts = [*x.split(sizes, dim=1)]
        total = parts[shards.rank].to(torch.promote_types(x.dtype, torch.float32), copy=True)
        parts[shards.rank] = x[:, :0]
        shapes = [torch.Size((x.shape[0], end - first, *x.shape[2:])) for first, end in sent]
        for (first, end), part in zip(sent, _all_to_all(parts, shapes, shards.group, name), strict=True):
            total[:, first - shards.start : end - shards.start] += part
        return total.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Fetch.apply(grad, *ctx.rest), None, None, None


class _FetchRows(torch.autograd.Function):
    """Rows at the places that other ranks request, sent to them; and the rows that this rank has requested."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, places: list[Tensor], received: list[int], group: ProcessGroup, name: str
    ) -> Tensor:
        ctx.rest, ctx.n = (places, received, group, name), x.shape[2]
        shapes = [torch.Size((*x.shape[:2], count, *x.shape[3:])) for count in received]
        return torch.cat(_all_to_all([x[:, :, each] for each in places], shapes, group, name), dim=2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *rest, name = ctx.rest
        grad_x = _SumFetchedRows.apply(grad, ctx.n, *rest, f"the gradient of {name}")
        return grad_x, None, None, None, None


class _SumFetchedRows(torch.autograd.Function):
    """Fetched rows are returned to their ranks, and added up there."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, n: int, places: list[Tensor], received: list[int], group: ProcessGroup, name: str
    ) -> Tensor:
        ctx.rest = places, received, group, name
        shape = [*x.shape]
        shape[2] = n
        total = x.new_zeros(shape, dtype=torch.promote_types(x.dtype, torch.float32))
        shapes = [torch.Size((*x.shape[:2], len(each), *x.shape[3:])) for each in places]
        for each, part in zip(places, _all_to_all([*x.split(received, dim=2)], shapes, group, name), strict=True):
            # All rows from one rank are different, so their order does not matter.
            total[:, :, each] += part
        return total.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _FetchRows.apply(grad, *ctx.rest), None, None, None, None, None


def _device_of_headers(group: ProcessGroup, device: torch.device) -> torch.device:
    """The CPU if a group can exchange its tensors. Then the host waits for other hosts, but not for a GPU."""
    return torch.device("cpu") if "cpu:" in dist.get_backend_config(group) else device


def _overlaps(shards: Shards, stretches: Sequence[Stretch]) -> tuple[list[Stretch], list[Stretch]]:
    """Places that this rank sends to each rank, and those that it receives from each. Its own entries stay."""
    me, held = shards.rank, shards.stretches
    sent = [_overlap(held[me], stretches[rank], rank == me) for rank in shards.ranks]
    return sent, [_overlap(held[rank], stretches[me], rank == me) for rank in shards.ranks]


def _overlap(held: Stretch, wanted: Stretch, is_own: bool) -> Stretch:
    first, end = max(held[0], wanted[0]), min(held[1], wanted[1])
    return (held[0], held[0]) if is_own or first >= end else (first, end)


def _summed(parts: list[Tensor]) -> Tensor:
    """The sum of tensors of one shape, in order, in fp32 at least."""
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    return torch.stack(parts).sum(dim=0, dtype=wide).to(parts[0].dtype)


def _gathered(x: Tensor, shards: Shards, dim: int, name: str) -> Tensor:
    """All entries of a dimension. Shards are padded to the longest one, because not every backend supports different
    sizes."""
    longest = max(shards.lengths)
    if min(shards.lengths) < longest:
        shape = list(x.shape)
        shape[dim] = longest
        padded = x.new_zeros(shape)
        padded.narrow(dim, 0, x.shape[dim]).copy_(x)
        x = padded
    parts = all_gather(x, shards.group, name)
    return torch.cat([part.narrow(dim, 0, n) for part, n in zip(parts, shards.lengths, strict=True)], dim=dim)


def all_gather(x: Tensor, group: ProcessGroup, name: str) -> list[Tensor]:
    """x of each rank; all have one shape."""
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(group.size())]
    with _naming_exchange(name, group):
        dist.all_gather(parts, x, group=group)
    return parts


def _all_to_all(parts: list[Tensor], shapes: list[torch.Size], group: ProcessGroup, name: str) -> list[Tensor]:
    """Send each rank its part. Returns the tensors, of these shapes, that the ranks send to this one."""
    sent = torch.cat([part.flatten() for part in parts])
    sizes = [shape.numel() for shape in shapes]
    received = sent.new_empty(sum(sizes))
    with _naming_exchange(name, group):
        dist.all_to_all_single(received, sent, sizes, [part.numel() for part in parts], group=group)
    return [part.view(shape) for part, shape in zip(received.split(sizes), shapes, strict=True)]


@contextmanager
def _naming_exchange(name: str, group: ProcessGroup) -> Iterator[None]:
    """Name the failed exchange in the error, and possible reasons."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {group.rank()} of {group.size()} got no answer in the exchange of {name}: another rank has ended, "
            "or did not begin this exchange within the timeout of the process group"
        ) from error
