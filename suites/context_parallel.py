"""Layers of sequences that are sharded over several processes: strong and weak scaling, memory, and bytes sent.

`torchrun --nproc-per-node=N bench.py --suite context_parallel` starts it. The first rank measures and writes; the
others do their part of each call. Times are those of the first rank, from its word to the others until its own part is
done. Its part of the output is compared with that of one process in fp64, and so is the gradient of its tokens, for a
loss of these. Backward passes have the gradients of parameters too, which are summed over ranks.

Cases of one rank have the layer as it is, and no process group. `tokens` are those of a sequence on one rank. Where
scaling is weak a sequence has so many for each rank, and as many times the routed ones.

Metrics, of the latest call, its backward pass included if it has one:

    rank_I_seconds             time of rank I for its latest pass, forward or backward
    rank_I_process_peak_bytes  most memory of rank I until then: of its allocator on a GPU, else of the process
    rank_I_bytes_sent          by rank I to others within the layer; sums of parameters' gradients are not counted
    rank_I_sm_clock_mhz        clock of its GPU
    bytes_sent                 by all ranks
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

import reference
from colt5_bench.case import Problem, Truth
from colt5_bench.pytest_plugin.replay import replay
from colt5_bench.suite import Implementation, Suite
from reference.parallel import shard_sequences
from suites import _layers, _ranks
from suites._descent import both_directions, implementations, lenient
from suites._layers import SCORE_STD, Layer, LayerCase, truth_of
from suites._ours import by_kernels
from suites._ranks import WORLD

HEAVY_SHARE = 16
"""One of so many tokens is routed."""


@dataclass(frozen=True)
class ParallelCase(LayerCase):
    """A layer, the number of ranks, and the tokens that one rank has alone."""

    kind: str
    scaling: str
    tokens: int
    ranks: int
    dim: int
    dtype: str = "float32"

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return self.tokens * (self.ranks if self.scaling == "weak" else 1)

    @property
    def layer(self) -> Layer:
        """The layer for the first rank's part of the sequence."""
        shape = (1, self.length // self.ranks, self.dim)
        inputs = {"x": shape, "context": shape} if self.kind == "cross_attention" else {"x": shape}
        output = (*shape[:2], 1) if self.kind == "router" else shape
        return Layer(lambda package, triton: MAKE[self.kind](package, self, triton), inputs, output, dtype=self.dtype)

    @property
    def routed(self) -> int:
        return self.length // HEAVY_SHARE


def _attention(package: ModuleType, case: ParallelCase, use_triton: bool) -> nn.Module:
    routed = {"num_heavy_tokens_q": case.routed, "num_heavy_tokens_kv": case.routed}
    return package.ConditionalRoutedAttention(case.dim, **routed, **_heads(case), use_triton=use_triton)


def _heads(case: ParallelCase) -> dict[str, int]:
    heads = max(case.dim // 64, 1)
    return {"light_heads": heads, "heavy_heads": heads}


def _feed_forward(package: ModuleType, case: ParallelCase, use_triton: bool) -> nn.Module:
    return package.ConditionalRoutedFeedForward(case.dim, num_heavy_tokens=case.routed, use_triton=use_triton)


def _cross_attention(package: ModuleType, case: ParallelCase, use_triton: bool) -> nn.Module:
    """Tokens and context are of one length."""
    routed = {"num_tokens_q": case.routed, "num_tokens_kv": case.routed, "heads": max(case.dim // 64, 1)}
    return package.ConditionalRoutedCrossAttention(case.dim, **routed, use_triton=use_triton)


def _autoregressive(package: ModuleType, case: ParallelCase, use_triton: bool) -> nn.Module:
    window = 128
    return package.ConditionalRoutedAutoregressiveAttention(
        case.dim,
        num_heavy_tokens_q=window // HEAVY_SHARE,
        num_heavy_tokens_kv=case.routed,
        light_window_size=window,
        **_heads(case),
        use_triton=use_triton,
    )


class Routed(nn.Module):
    """A router alone: of each token that it routes the weight times the mean, and 0 of all others.

    The result has a place for each token, and so a part for each rank, and is no larger than it has to be.
    """

    def __init__(self, router: nn.Module, num_tokens: int) -> None:
        super().__init__()
        self.router, self.num_tokens = router, num_tokens

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `b n d` to `b n 1`."""
        n, routed = x.shape[1], self.router(x, num_tokens=self.num_tokens)
        means = routed.scores * routed.routed_tokens.mean(dim=-1)
        # Past the end is no place.
        places = x.new_zeros(x.shape[0], n + 1).scatter(1, routed.indices.clamp(max=n), means)
        return places[:, :n].unsqueeze(-1)


def _router(package: ModuleType, case: ParallelCase, use_triton: bool) -> nn.Module:
    """Without its straight-through weights, so that the output shows what they are."""
    router = package.CoordinateDescentRouter(case.dim, straight_through=False, use_triton=use_triton)
    return Routed(router, case.routed)


MAKE = {
    "router": _router,
    "attention": _attention,
    "feed_forward": _feed_forward,
    "cross_attention": _cross_attention,
    "autoregressive": _autoregressive,
}


def cases(preset: str, device: torch.device) -> list[ParallelCase]:
    """From one rank to as many as there are, in powers of two."""
    if WORLD > 1:
        # The others wait for this before they can be told anything.
        _ranks.rank()
    counts = [2**power for power in range(WORLD.bit_length()) if 2**power <= WORLD]
    counts = counts if WORLD > 1 else [1, 2]
    if preset == "smoke":
        kinds = ("router", "attention", "autoregressive")
        return [ParallelCase(kind, "strong", 512, ranks, 32) for kind in kinds for ranks in counts]
    on_gpu = device.type == "cuda"
    tokens, dim = (2**20, 512) if on_gpu else (2**13, 64)
    lengths = [tokens, 4 * tokens] if preset == "full" else [tokens]
    return [
        ParallelCase(kind, scaling, length, ranks, dim)
        for kind in MAKE
        for scaling in ("strong", "weak")
        for length in lengths
        for ranks in counts
    ]


def module_of(case: ParallelCase, use_triton: bool, device: torch.device) -> nn.Module:
    """The layer, with the same parameters in each process, and of scores as narrow as those of other suites."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = case.layer.make(reference, use_triton)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("routing_token"):
                parameter.mul_(SCORE_STD / parameter.shape[-1] ** 0.5)
    return module.to(device)


def inputs_of(case: ParallelCase, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    """The tokens of one rank."""
    shapes = case.layer.inputs.items()
    return {name: torch.randn(shape, generator=generator).to(device) for name, shape in shapes}


def inputs_of_other(case: ParallelCase, rank: int, device: torch.device) -> dict[str, Tensor]:
    """The tokens of a rank that is not the first."""
    return inputs_of(case, torch.Generator().manual_seed(rank), device)


def part(
    case: ParallelCase, group: ProcessGroup | None, device: torch.device, use_triton: bool
) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """The call of a rank. Only the first has a loss."""
    module = module_of(case, use_triton, device)
    upstream = torch.zeros(case.layer.output, device=device)
    if group is None:
        return module, {}, upstream
    return shard_sequences(module, mesh=group), inputs_of_other(case, group.rank(), device), upstream


def sharded(use_triton: bool) -> Callable[[ParallelCase], Callable[..., Tensor]]:
    """The layer on all ranks of a case."""
    return lambda case: _ranks.together(part, case, case.ranks, use_triton)


def unavailable(case: ParallelCase, device: torch.device) -> str | None:
    if case.ranks <= WORLD:
        return None
    start = f"torchrun --nproc-per-node={case.ranks} bench.py --suite context_parallel"
    return f"needs {case.ranks} processes, of which {WORLD} are there; start them with: {start}"


def metrics(case: ParallelCase, problem: Problem) -> Mapping[str, float]:
    return {} if case.ranks == 1 else _ranks.figures(case.ranks)


def plain(case: ParallelCase) -> Callable[..., Tensor]:
    """The first rank's output, by one process that has all tokens."""

    def function(**own: Tensor) -> Tensor:
        x = own["x"]
        others = [inputs_of_other(case, rank, x.device) for rank in range(1, case.ranks)]
        whole = {
            name: torch.cat((each, *(other[name].to(x.dtype) for other in others)), 1) for name, each in own.items()
        }
        return module_of(case, False, x.device).to(x.dtype)(**whole)[:, : x.shape[1]]

    return function


def problem(case: ParallelCase, device: torch.device) -> Problem:
    """Normally distributed tokens of the first rank, and the gradient of its output."""
    generator, output = case.generator(), case.layer.output
    inputs = inputs_of(case, generator, device)
    upstream = torch.randn(output, generator=generator) / prod(output[:-1]) ** 0.5
    return Problem(inputs, upstream.to(device), tuple(inputs))


def truth(case: ParallelCase, problem: Problem, direction: str) -> Truth:
    return truth_of(plain(case), problem, direction)


COMMON: dict[str, Any] = {"unavailable": unavailable, "metrics": metrics, "bound": lenient}

SUITE = Suite(
    name="context_parallel",
    description="layers of sequences that are sharded over several processes",
    cases=cases,
    directions=both_directions,
    implementations=implementations(
        Implementation("reference", sharded(use_triton=False), **COMMON),
        by_kernels(sharded(use_triton=True), **COMMON),
    ),
    reference="reference",
    problem=problem,
    truth=truth,
    plain=plain,
    cost=_layers.cost,
    x_axis="ranks",
    serve=_ranks.serve,
)


def test_context_parallel(record, benchmark):
    replay(record, benchmark)
