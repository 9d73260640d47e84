"""The choice between operations of `reference` and of `kernels`, made once for a tree of layers."""

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from reference._kernels import Operation, kernel
from reference.biased_gelu import biased_gelu
from reference.combine import combine
from reference.coor_descent import coor_descent
from reference.gathered_attention import gather_and_attend
from reference.normalize import normalize
from reference.normalize_and_route import normalize_and_route
from reference.route import route
from reference.routed_attention import attend_to_routed
from reference.routing_scores import routing_scores
from reference.select import select
from reference.soft_topk import soft_topk
from reference.windowed_attention import attend_to_all, windowed_attention

KERNEL_OF = {
    "attend_to_all": "windowed_attention",
    "flash_gathered_attention": "gathered_attention",
    "flash_routed_attention": "routed_attention",
}
"""Names of kernels that differ from those of the operations: one kernel may replace several plain functions."""


@dataclass(frozen=True)
class Operations:
    """The operations that layers call, each with the signature of its definition in `reference`.

    A layer makes them from its `use_triton` and passes them on to its inner layers. To observe or replace an operation,
    make an object with `dataclasses.replace` and pass it.
    """

    use_triton: bool | None
    """True if these are kernels. None means kernels only for CUDA tensors."""

    attend_to_all: Operation
    biased_gelu: Operation
    combine: Operation
    coor_descent: Operation
    flash_gathered_attention: Operation
    flash_routed_attention: Operation
    """These two are PyTorch's scaled_dot_product_attention if there is no kernel."""

    gathered_attention: Operation
    normalize: Operation
    normalize_and_route: Operation
    route: Operation
    route_prefixes: Operation | None
    """None without kernels: layers then select from rows with a mask."""

    routed_attention: Operation
    routing_scores: Operation
    segmented_coor_descent: Operation | None
    """None without kernels."""

    select: Operation
    soft_topk: Operation
    windowed_attention: Operation

    replay: Operation | None = None
    """Plays calls of layers with kernels from tapes, unless `kernels.played` has switched it off."""

    shards_of: Operation | None = None
    """Returns the shards of the sequence that `b n d` is a part of; None if sequences are whole."""

    @classmethod
    def of(cls, use_triton: "UseTriton") -> "Operations":
        """Kernels if `use_triton` is True, and plain PyTorch if it is False. None means kernels only for CUDA tensors,
        and `Operations` are returned as they are."""
        if isinstance(use_triton, Operations):
            return use_triton
        plain = _plain()
        if use_triton is False or (use_triton is None and not torch.cuda.is_available()):
            return cls(use_triton, **plain)
        fused = {name: kernel(KERNEL_OF.get(name, name)) for name in plain}
        if use_triton is None:
            fused |= {name: ByDevice(fused[name], each) for name, each in plain.items() if each is not None}
        return cls(use_triton, **fused, replay=kernel("replay"))

    @property
    def are_own(self) -> bool:
        """True if no operation was replaced by another function, which may have to see each call."""
        return self == replace(Operations.of(self.use_triton), replay=self.replay)

    def are_fused_for(self, x: Tensor) -> bool:
        """True if the operations use kernels for a tensor."""
        return x.is_cuda if self.use_triton is None else self.use_triton

    def length(self, x: Tensor) -> int:
        """Length of the sequence that x `b n d` is, or is a part of."""
        return x.shape[1] if self.shards_of is None else self.shards_of(x).total

    def start(self, x: Tensor) -> int:
        """Place of the first token of x `b n d` in its sequence."""
        return 0 if self.shards_of is None else self.shards_of(x).start

    def with_window_before(self, x: Tensor, window_size: int) -> Tensor:
        """Tokens `b n d`, preceded by the tokens of the window before that another rank holds."""
        return x if self.shards_of is None else self.shards_of(x).with_window_before(x, window_size)

    def whole_rows(self, scores: Tensor, x: Tensor) -> Tensor:
        """Scores `b r n` of the whole sequence of x, from those of x `b n d`."""
        return scores if self.shards_of is None else self.shards_of(x).gather_for_each(scores, -1, "scores")

    def path(self, name: str) -> str:
        """The implementation of an operation, as text."""
        if self.use_triton:
            return f"kernels.{name}"
        if isinstance(getattr(self, name), ByDevice):
            return f"kernels.{name} for CUDA tensors, else reference.{name}"
        return f"reference.{name} ({'there is no GPU' if self.use_triton is None else 'use_triton=False'})"


UseTriton: TypeAlias = bool | Operations | None
"""The argument `use_triton` of a layer; a layer passes its `Operations` to its inner layers."""


@dataclass(frozen=True)
class ByDevice:
    """An operation that depends on the device of its first tensor."""

    on_gpu: Operation
    elsewhere: Operation

    def __call__(self, x: Tensor, /, *tensors: Tensor, **options: object) -> Any:
        return (self.on_gpu if x.is_cuda else self.elsewhere)(x, *tensors, **options)


def _flash_gathered_attention(*tensors: Tensor, **options: Any) -> Tensor:
    return gather_and_attend(*tensors, **options, use_flash=True)


def _flash_routed_attention(*tensors: Tensor, **options: Any) -> Tensor:
    return attend_to_routed(*tensors, **options, use_flash=True)


def _plain() -> dict[str, Any]:
    """The definitions by the names of the fields of `Operations`."""
    return {
        "attend_to_all": attend_to_all,
        "biased_gelu": biased_gelu,
        "combine": combine,
        "coor_descent": coor_descent,
        "flash_gathered_attention": _flash_gathered_attention,
        "flash_routed_attention": _flash_routed_attention,
        "gathered_attention": gather_and_attend,
        "normalize": normalize,
        "normalize_and_route": normalize_and_route,
        "route": route,
        "route_prefixes": None,
        "routed_attention": attend_to_routed,
        "routing_scores": routing_scores,
        "segmented_coor_descent": None,
        "select": select,
        "soft_topk": soft_topk,
        "windowed_attention": windowed_attention,
    }
