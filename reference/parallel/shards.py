"""Dimensions that are sharded over the ranks of a process group, and how their entries travel.

Two primitives move bytes: `all_gather` and `all_to_all_single`. Sums are taken where they are needed, in the order of
ranks. Values are of two kinds, and each autograd function leads from one to the other.

- Local values: each rank has its own, and the gradient of the ranks' losses, all added up, with respect to these.
- Common values: all ranks compute the same from the same, and each of them has the whole gradient.
"""

from collections.abc import Iterator
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
    require(mesh.ndim == 1, "mesh", mesh, "of one dimension: that which sequences are sharded over, as mesh['cp']")
    return mesh.get_group()


@dataclass(frozen=True)
class Shards:
    """A dimension of which each rank of a group holds a stretch, in the order of ranks. Lengths may differ."""

    group: ProcessGroup
    lengths: tuple[int, ...]
    """Number of entries of each rank."""

    some_are_masked: bool
    """True if any rank has a mask."""

    @classmethod
    def of(cls, x: Tensor, dim: int, mesh: Mesh, mask: Tensor | None = None, name: str = "x") -> "Shards":
        """The shards of a dimension of x, of which each rank calls this with its own.

        Raises:
            ValueError: a rank has no entries, or ranks differ in more than the lengths of this dimension.
        """
        group = group_of(mesh)
        require(-x.ndim <= dim < x.ndim, name, x.shape, "of a shape with the dimension {} that is sharded", dim)
        others = [size for each, size in enumerate(x.shape) if each != dim % x.ndim]
        kind = crc32(repr((x.dtype, others)).encode())
        header = torch.tensor([x.shape[dim], mask is not None, kind], device=x.device)
        lengths, masked, kinds = torch.stack(_all_gather(header, group, name)).T.tolist()
        allowed = "of the dtype, and of the shape but for dimension {}, of all ranks of the group"
        require(len(set(kinds)) == 1, name, (x.dtype, tuple(x.shape)), allowed, dim)
        require(min(lengths) >= 1, name, f"lengths {lengths}", "of at least one entry on each rank")
        return cls(group, tuple(lengths), any(masked))

    @property
    def rank(self) -> int:
        """This process in the group."""
        return self.group.rank()

    @property
    def length(self) -> int:
        """Number of entries that this rank holds."""
        return self.lengths[self.rank]

    @property
    def start(self) -> int:
        """Place of this rank's first entry in the whole."""
        return sum(self.lengths[: self.rank])

    @property
    def total(self) -> int:
        """Number of entries of the whole."""
        return sum(self.lengths)

    def owners(self, indices: Tensor) -> Tensor:
        """The ranks that hold these places of the whole; past its end, the size of the group."""
        ends = torch.tensor([*accumulate(self.lengths)], device=indices.device)
        return torch.bucketize(indices, ends, right=True)

    def gather(self, x: Tensor, dim: int = -1, name: str = "scores") -> Tensor:
        """All entries of local x, as a common value."""
        return _Gather.apply(x, self, dim, name)

    def keep(self, whole: Tensor, dim: int = -1, name: str = "scores") -> Tensor:
        """This rank's entries of a common value, as a local one."""
        return _Keep.apply(whole, self, dim, name)

    def gather_mask(self, mask: Tensor | None, shape: torch.Size) -> Tensor | None:
        """All of a mask that broadcasts to the shape of this rank's scores. None where no rank has one."""
        if not self.some_are_masked:
            return None
        there = torch.ones((), dtype=torch.bool) if mask is None else mask
        return _gathered(there.expand(shape), self, -1, "mask")


def share(x: Tensor, group: ProcessGroup, name: str) -> Tensor:
    """A common value as a local one of each rank, for any use."""
    return _Share.apply(x, group, name)


def common(k: float | Tensor, group: ProcessGroup) -> float | Tensor:
    """A number, or local numbers that are the same on all ranks, as a common value. Ranks share its gradient evenly."""
    if not isinstance(k, Tensor) or not k.requires_grad:
        return k
    return k.detach() + (k - k.detach()) / group.size()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards, dim: int, name: str) -> Tensor:
        ctx.rest = shards, dim, name
        return _gathered(x, shards, dim, name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Keep.apply(grad, *ctx.rest), None, None, None


class _Keep(torch.autograd.Function):
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
        return _summed(_all_gather(x, group, name))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Share.apply(grad, *ctx.rest), None, None


def _summed(parts: list[Tensor]) -> Tensor:
    """The sum of tensors of one shape, in their order, in fp32 at least."""
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    return torch.stack(parts).sum(dim=0, dtype=wide).to(parts[0].dtype)


def _gathered(x: Tensor, shards: Shards, dim: int, name: str) -> Tensor:
    """All entries of a dimension. Shards travel filled up to the longest: not every backend takes uneven ones."""
    shape = list(x.shape)
    shape[dim] = max(shards.lengths)
    filled_up = x.new_zeros(shape)
    filled_up.narrow(dim, 0, x.shape[dim]).copy_(x)
    parts = _all_gather(filled_up, shards.group, name)
    return torch.cat([part.narrow(dim, 0, n) for part, n in zip(parts, shards.lengths, strict=True)], dim=dim)


def _all_gather(x: Tensor, group: ProcessGroup, name: str) -> list[Tensor]:
    """x of each rank, all of one shape."""
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(group.size())]
    with _travelling(name, group):
        dist.all_gather(parts, x, group=group)
    return parts


@contextmanager
def _travelling(name: str, group: ProcessGroup) -> Iterator[None]:
    """Say which exchange has failed, and why it may have."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {group.rank()} of {group.size()} got no answer where all exchange {name}: another rank has ended, "
            "or has not come here within the timeout of the process group"
        ) from error
