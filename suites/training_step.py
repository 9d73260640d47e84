"""A training step as the user calls it, of single layers and of eight blocks, under autocast to bfloat16.

The `eager` column is the time that a caller waits. `ours_graphed` and `ours_reduce_overhead` are PyTorch's two ways to
launch a whole step at once.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor, nn

import reference
from colt5_bench.case import FORWARD_BACKWARD
from colt5_bench.process.workspaces import clear_workspaces
from colt5_bench.pytest_plugin.replay import replay
from colt5_bench.suite import Implementation, Suite
from suites._descent import implementations, lenient
from suites._layers import (
    GUEST,
    OURS,
    REFERENCE,
    Layer,
    LayerCase,
    as_function,
    cost,
    plain,
    problem,
    truth,
    without_memory,
)
from suites.layers import LAYERS
from suites.peers import DENSE_FLASH

DEPTH = 8
"""Blocks of the model."""


class InTurn(nn.Module):
    """Several layers in sequence."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `b n d` to `b n d`."""
        for layer in self.layers:
            x = layer(x)
        return x


def eight_blocks(model: str) -> Layer:
    block = LAYERS["block"](model)

    def make(package: ModuleType, use_triton: bool) -> nn.Module:
        return InTurn([block.make(package, use_triton) for _ in range(DEPTH)])

    def dense(attend: Callable[..., Tensor]) -> nn.Module:
        assert block.dense is not None
        return InTurn([block.dense(attend) for _ in range(DEPTH)])

    # Scores are not moved apart: from the second block on, they depend on all earlier routing.
    return replace(block, make=make, dense=dense, settle=None)


KINDS: dict[str, Callable[[str], Layer]] = {**LAYERS, "eight_blocks": eight_blocks}

MEASURED = ("attention", "feed_forward", "block", "autoregressive", "eight_blocks")


@dataclass(frozen=True)
class StepCase(LayerCase):
    """A step of a layer or model."""

    kind: str
    """Name of one of KINDS."""

    model: str
    """Name of one of the models of suite layers."""

    dtype: str = "autocast"

    @property
    def layer(self) -> Layer:
        return replace(KINDS[self.kind](self.model), dtype=self.dtype, masks={})


def cases(preset: str, device: torch.device) -> list[StepCase]:
    if preset == "smoke":
        in_fp32 = [StepCase(kind, "tiny", "float32") for kind in ("attention", "feed_forward")]
        return [*(StepCase(kind, "tiny") for kind in MEASURED), *in_fp32]
    if device.type != "cuda":
        return [StepCase(kind, "document-2k") for kind in MEASURED if kind != "eight_blocks"]
    longer = [("attention", "document-16k"), ("attention", "document-8x4k"), ("autoregressive", "document-32k")]
    of_document = [(kind, "document") for kind in MEASURED if kind != "eight_blocks"]
    return [StepCase(*each) for each in (*of_document, *longer, ("eight_blocks", "document-16k"))]


def _needs_a_gpu(case: StepCase, device: torch.device) -> str | None:
    return None if device.type == "cuda" else "CUDA graphs need a GPU"


class _Relayed(torch.autograd.Function):
    """A call on separate tensors, which share the memory of the given ones and pass their gradients on."""

    @staticmethod
    def forward(ctx, call, own, *_):
        with torch.enable_grad():
            ctx.output = call(**own)
        ctx.own = [*own.values()]
        return ctx.output.detach()

    @staticmethod
    def backward(ctx, grad_output):
        return None, None, *torch.autograd.grad(ctx.output, ctx.own, grad_output)


def _captured(
    case: StepCase, capture: Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]
) -> Callable[..., Tensor]:
    """The layer as `capture` makes it. A graph contains addresses, so it is made once for all tensors in the same
    memory."""
    kept: dict[tuple[int, ...], tuple[Callable[..., Tensor], dict[str, Tensor]]] = {}

    def made() -> Callable[..., Tensor]:
        module = without_memory(lambda: case.layer.make(reference, True))
        # Captured in the first call, when parameters are in their places.
        captured: list[Callable[[Tensor], Tensor]] = []

        def call(x: Tensor) -> Tensor:
            if not captured:
                captured.append(capture(module, x))
            return captured[0](x)

        return as_function(module, call, autocast=case.layer.autocast)

    def function(**tensors: Tensor) -> Tensor:
        addresses = tuple(each.data_ptr() for each in tensors.values())
        if addresses not in kept:
            kept.clear()
            kept[addresses] = made(), {name: each.detach().requires_grad_() for name, each in tensors.items()}
        out: Tensor = _Relayed.apply(*kept[addresses], *tensors.values())
        return out

    return function


def _graphed(module: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    # Weights that autocast caches for a whole step would be those of the capture.
    torch.set_autocast_cache_enabled(False)
    clear_workspaces()
    try:
        torch.cuda.make_graphed_callables(module, (x,))
    finally:
        torch.set_autocast_cache_enabled(True)
    # From here on, its calls replay the graphs.
    return module


def _reduce_overhead(module: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    compiled = torch.compile(module, mode="reduce-overhead")

    def call(x: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        out: Tensor = compiled(x)
        return out

    return call


OURS_GRAPHED = Implementation[StepCase](
    "ours_graphed", lambda case: _captured(case, _graphed), _needs_a_gpu, bound=lenient
)
"""By `torch.cuda.make_graphed_callables`: a graph of the forward and one of the backward pass."""

OURS_REDUCE_OVERHEAD = Implementation[StepCase](
    "ours_reduce_overhead", lambda case: _captured(case, _reduce_overhead), _needs_a_gpu, bound=lenient
)
"""By `torch.compile(mode="reduce-overhead")`."""

SUITE = Suite(
    name="training_step",
    description="a training step called eagerly and by CUDA graphs, beside dense attention",
    cases=cases,
    directions=lambda case: (FORWARD_BACKWARD,),
    implementations=implementations(REFERENCE, OURS, OURS_GRAPHED, OURS_REDUCE_OVERHEAD, DENSE_FLASH),
    reference="reference",
    problem=problem,
    truth=truth,
    plain=plain,
    cost=cost,
    guest=GUEST,
    x_axis="kind",
)


def test_training_step(record, benchmark):
    replay(record, benchmark)
