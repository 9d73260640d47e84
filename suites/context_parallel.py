"""Layers of sequences that are sharded over several processes: strong and weak scaling, memory, and bytes sent.

`torchrun --nproc-per-node=N bench.py --suite context_parallel` starts it. The first rank measures and writes records;
the others compute their part of each call. Times are those of the first rank, from its command to the others until its
own part is done. Its part of the output, and the gradient of its tokens for a loss of these, are compared with one
process in fp64. Backward passes also compute the gradients of parameters, which are summed over ranks.

For the long sequences on GPUs, the fp64 truth would need more memory than a GPU has, or minutes. They are compared with
one process that runs the same kernels in the same dtype. The problem of such a case has every `every`-th token of the
first rank: these get new values in each call, and are compared. All other tokens keep their values.

Cases of one rank have the layer without changes, and no process group. `tokens` are those of a sequence on one rank.
With weak scaling, a sequence has this many for each rank, and routed tokens grow by the same factor.

Next to self-attention is dense attention by PyTorch's context parallelism, in bf16, at lengths that are feasible for
it.

Metrics of the latest call, with its backward pass if it has one:

    rank_I_seconds             time of rank I for its passes: of its stream on a GPU, else of the host
    rank_I_process_peak_bytes  peak memory of rank I: of its allocator on a GPU, in this case; else of the process
    rank_I_bytes_sent          by rank I to others within the layer, without sums of parameters' gradients
    rank_I_sm_clock_mhz        clock of its GPU
    bytes_sent                 by all ranks
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from types import ModuleType
from typing import Any
from unittest.mock import patch
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

import reference
from colt5_bench.case import FORWARD_BACKWARD, Problem, Truth
from colt5_bench.measuring.call import Call
from colt5_bench.pytest_plugin.replay import replay
from colt5_bench.suite import Implementation, Operation, Suite
from colt5_bench.tolerance import Tolerance
from reference._shared.sizes import ceil_div
from reference.parallel import shard_sequences
from suites import _layers, _ranks
from suites._dense import Attend, DenseAttention, attend_plainly, attend_with_flash
from suites._descent import both_directions, implementations, lenient
from suites._layers import SCORE_STD, Layer, LayerCase, truth_of
from suites._ours import by_kernels
from suites._ranks import WORLD, MakePart, Part
from suites.peers import MOST_DENSE_PAIRS

HEAVY_SHARE = 16
"""Tokens per routed token; sequences of millions of tokens have fewer routed ones."""

QUERY_SHARE = 64
"""Memory tokens of cross attention for each of its queries."""

LONG = (
    ("router", "strong", 2**24),
    ("router", "weak", 2**22),
    ("cross_attention", "strong", 2**24),
    ("autoregressive", "strong", 2**20),
    ("attention", "weak", 2**20),
    ("attention", "strong", 2**17),
    ("feed_forward", "weak", 2**20),
)
"""Kind, scaling and tokens of the sequences on GPUs."""

SHARE_OF_LONG, EVERY = 1024, 1021
"""Tokens per routed token, and per token of the problem, for these sequences. The latter is a prime, so that its places
differ between blocks and windows."""

SAME = 1e-5
"""Allowed error of an output relative to the same kernels in one process, as a share of the largest value."""


@dataclass(frozen=True)
class ParallelCase(LayerCase):
    """A layer, the number of ranks, and the number of tokens on a single rank."""

    kind: str
    scaling: str
    tokens: int
    """Tokens of the sequence, or of a rank if scaling is weak; memory tokens of cross attention."""

    ranks: int
    dim: int
    heavy_share: int = HEAVY_SHARE
    """Tokens per routed token."""

    every: int = 1
    """Tokens of the first rank per token of the problem. If the problem has all of them, the truth is fp64."""

    dtype: str = "float32"

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return self.tokens * (self.ranks if self.scaling == "weak" else 1)

    @property
    def layer(self) -> Layer:
        """The layer for the first rank's part of the sequence."""
        shape = (1, self.length // self.ranks, self.dim)
        inputs, output = {"x": shape}, shape
        if self.kind == "cross_attention":
            output = (1, shape[1] // QUERY_SHARE, self.dim)
            inputs = {"x": output, "context": shape}
        elif self.kind == "router":
            output = (*shape[:2], 1)
        return Layer(lambda package, triton: MAKE[self.kind](package, self, triton), inputs, output, dtype=self.dtype)

    @property
    def routed(self) -> int:
        return self.length // self.heavy_share

    @property
    def is_long(self) -> bool:
        """True if the truth comes from one process with kernels."""
        return self.every > 1

    def places(self, n: int) -> slice:
        """Tokens of the problem among n of the first rank."""
        return slice(0, n, self.every)


def _attention(package: ModuleType, case: ParallelCase, use_triton: bool) -> nn.Module:
    routed = {"num_heavy_tokens_q": case.routed, "num_heavy_tokens_kv": case.routed}
    return package.ConditionalRoutedAttention(case.dim, **routed, **_heads(case), use_triton=use_triton)


def _heads(case: ParallelCase) -> dict[str, int]:
    heads = max(case.dim // 64, 1)
    return {"light_heads": heads, "heavy_heads": heads}


def _feed_forward(package: ModuleType, case: ParallelCase, use_triton: bool) -> nn.Module:
    return package.ConditionalRoutedFeedForward(case.dim, num_heavy_tokens=case.routed, use_triton=use_triton)


def _cross_attention(package: ModuleType, case: ParallelCase, use_triton: bool) -> nn.Module:
    routed = {"num_tokens_q": case.length // QUERY_SHARE // HEAVY_SHARE, "num_tokens_kv": case.routed}
    heads = max(case.dim // 64, 1)
    return package.ConditionalRoutedCrossAttention(case.dim, **routed, heads=heads, use_triton=use_triton)


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
    """A router alone: the weight times the mean for each routed token, and 0 for all others.

    The result has a place for each token, so that it has a part for each rank, and is as small as possible.
    """

    def __init__(self, router: nn.Module, num_tokens: int) -> None:
        super().__init__()
        self.router, self.num_tokens = router, num_tokens

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `b n d` to `b n 1`."""
        n, routed = x.shape[1], self.router(x, num_tokens=self.num_tokens)
        means = routed.scores * routed.routed_tokens.mean(dim=-1)
        # An index past the end has the weight 0.
        places = x.new_zeros(x.shape[0], n).scatter_add_(1, routed.indices.clamp(max=n - 1), means)
        return places.unsqueeze(-1)


def _router(package: ModuleType, case: ParallelCase, use_triton: bool) -> nn.Module:
    """The router without straight-through weights, so that the output shows the weights."""
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
    """From one rank to all ranks, in powers of two."""
    if WORLD > 1:
        # The other ranks wait for this before they accept commands.
        _ranks.rank()
    counts = [2**power for power in range(WORLD.bit_length()) if 2**power <= WORLD]
    counts = counts if WORLD > 1 else [1, 2]
    if preset == "smoke":
        kinds = ("router", "attention", "autoregressive")
        small = [ParallelCase(kind, "strong", 512, ranks, 32) for kind in kinds for ranks in counts]
        return [*small, *(ParallelCase("cross_attention", "weak", 4096, ranks, 32, every=7) for ranks in counts)]
    every_kind = list(product(MAKE, ("strong", "weak")))
    if device.type == "cuda":
        longer = [(*kind, 2**22) for kind in every_kind] if preset == "full" else []
        sizes = dict.fromkeys((*LONG, *longer))
        return [
            ParallelCase(kind, scaling, tokens, ranks, 512, SHARE_OF_LONG, EVERY)
            for (kind, scaling, tokens), ranks in product(sizes, counts)
        ]
    lengths = [2**13, 2**15] if preset == "full" else [2**13]
    return [ParallelCase(*kind, length, ranks, 64) for kind, length, ranks in product(every_kind, lengths, counts)]


def directions(case: ParallelCase) -> Sequence[str]:
    """Only training for long sequences."""
    return (FORWARD_BACKWARD,) if case.is_long else both_directions(case)


def module_of(case: ParallelCase, use_triton: bool, device: torch.device) -> nn.Module:
    """The layer, with the same parameters in each process, and with scores as in other suites."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = case.layer.make(reference, use_triton)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("routing_token"):
                parameter.mul_(SCORE_STD / parameter.shape[-1] ** 0.5)
    return module.to(device)


class Tokens(dict[str, Tensor]):
    """Tokens of some ranks, by the names of inputs."""


_held: WeakValueDictionary[Any, Tokens] = WeakValueDictionary()


def held(case: ParallelCase, ranks: range, device: torch.device, dtype: torch.dtype) -> Tokens:
    """Normally distributed tokens of some ranks, in their order. The same tensors are returned while they are in
    use."""
    key = case, ranks, device, dtype
    tokens = _held.get(key)
    if tokens is None:
        tokens = _held[key] = _made(case, ranks, device, dtype)
    return tokens


def _made(case: ParallelCase, ranks: range, device: torch.device, dtype: torch.dtype) -> Tokens:
    shapes = case.layer.inputs
    tokens = {name: torch.empty(1, n * len(ranks), dim, device=device) for name, (_, n, dim) in shapes.items()}
    for number, rank in enumerate(ranks):
        generator = torch.Generator(device).manual_seed(rank)
        for name, (_, n, _) in shapes.items():
            tokens[name].narrow(1, number * n, n).normal_(generator=generator)
    return Tokens({name: each.to(dtype) for name, each in tokens.items()})


class _Placed(torch.autograd.Function):
    """Tokens, some of which are replaced by given ones."""

    @staticmethod
    def forward(ctx: Any, some: Tensor, tokens: Tensor, places: slice) -> Tensor:
        ctx.places = places
        placed = tokens.detach()
        placed[:, places] = some
        return placed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad[:, ctx.places].clone(), None, None


def placed(case: ParallelCase, some: Mapping[str, Tensor], tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tokens of the first rank, and of the ranks after it if included, with the problem's tokens in their places."""
    return {
        name: _Placed.apply(some[name], tokens[name], case.places(n)) for name, (_, n, _) in case.layer.inputs.items()
    }


def part(case: ParallelCase, group: ProcessGroup | None, device: torch.device, *, use_triton: bool) -> Part:
    """A routed layer on a rank."""
    module = module_of(case, use_triton, device)
    return of_rank(case, module if group is None else shard_sequences(module, mesh=group), group)


def of_rank(case: ParallelCase, module: nn.Module, group: ProcessGroup | None, **more: Any) -> Part:
    """A layer, and the tokens of a rank. Only the first rank has a loss, and gets its tokens with each call."""
    rank = 0 if group is None else group.rank()
    if rank == 0:
        return Part(module, **more)
    first = next(module.parameters())
    tokens = held(case, range(rank, rank + 1), first.device, first.dtype)
    return Part(module, tokens, first.new_zeros(case.layer.output), **more)


def sharded(make: MakePart) -> Callable[[ParallelCase], Callable[..., Tensor]]:
    """A layer on all ranks of a case."""

    def build(case: ParallelCase) -> Callable[..., Tensor]:
        step = _ranks.together(make, case, case.ranks)
        if not case.is_long:
            return step
        tokens = cache(partial(held, case, range(1)))
        places = case.places(case.layer.output[1])
        return lambda **some: step(**placed(case, some, tokens(some["x"].device, some["x"].dtype)))[:, places]

    return build


def unavailable(case: ParallelCase, device: torch.device) -> str | None:
    if case.ranks <= WORLD:
        return None
    start = f"torchrun --nproc-per-node={case.ranks} bench.py --suite context_parallel"
    return f"needs {case.ranks} processes, got {WORLD}; start them with: {start}"


def metrics(case: ParallelCase, problem: Problem) -> Mapping[str, float]:
    return {} if case.ranks == 1 else _ranks.figures(case.ranks)


def metrics_of_dense(case: ParallelCase, problem: Problem) -> Mapping[str, float]:
    """All metrics but bytes, which PyTorch's context parallelism sends by other functions."""
    return {name: each for name, each in metrics(case, problem).items() if "bytes_sent" not in name}


def too_long(case: ParallelCase, device: torch.device) -> str | None:
    if case.is_long:
        return "computes all tokens at once: plain PyTorch takes minutes for millions, or more memory than a GPU has"
    return unavailable(case, device)


def operation(judge: Callable[[ParallelCase, torch.device], nn.Module], dtype: torch.dtype) -> Operation[ParallelCase]:
    """The first rank's output, from a layer in one process that has all tokens."""

    def plain(case: ParallelCase) -> Callable[..., Tensor]:
        # Only for the first call, in which no operands are moved.
        tokens = cache(partial(held, case, range(case.ranks)))

        def function(**some: Tensor) -> Tensor:
            x = some["x"]
            whole = placed(case, some, tokens(x.device, x.dtype))
            return judge(case, x.device).to(x.dtype)(**whole)[:, case.places(case.layer.output[1])]

        return function

    def truth(case: ParallelCase, problem: Problem, direction: str) -> Truth:
        if not case.is_long:
            return truth_of(plain(case), problem, direction)
        output, *gradients = (each.double() for each in Call(plain(case), problem, direction)())
        return Truth(output.detach(), dict(zip(problem.differentiable, gradients, strict=False)))

    return Operation(partial(problem, dtype=dtype), truth, plain)


def problem(case: ParallelCase, device: torch.device, *, dtype: torch.dtype) -> Problem:
    """Normally distributed tokens of the first rank, and the gradient of its output."""
    generator = case.generator(device)

    def drawn(shape: Sequence[int]) -> Tensor:
        drawn = torch.randn(1, ceil_div(shape[1], case.every), shape[2], generator=generator, device=device)
        return drawn.to(dtype)

    inputs = {name: drawn(shape) for name, shape in case.layer.inputs.items()}
    upstream = drawn(case.layer.output)
    return Problem(inputs, upstream / upstream.shape[1] ** 0.5, tuple(inputs))


def bound(case: ParallelCase, tensor: str, expected: Tensor, tolerance: Tolerance) -> Tolerance:
    if case.is_long and tensor == "output":
        return tolerance.at_least(SAME * expected.abs().max().item())
    return lenient(case, tensor, expected, tolerance)


def dense(case: ParallelCase, attend: Attend, device: torch.device) -> nn.Module:
    """Dense attention of the width of the heavy branch, with the same parameters in each process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DenseAttention(attend, case.dim, max(case.dim // 64, 1)).to(device, torch.bfloat16)


def dense_part(case: ParallelCase, group: ProcessGroup | None, device: torch.device) -> Part:
    """Dense attention on a rank, by PyTorch's context parallelism if there are several."""
    module = dense(case, attend_with_flash, device)
    if group is None:
        return of_rank(case, module, group)
    return of_rank(case, module, group, around=partial(_in_a_ring, DeviceMesh.from_group(group, device.type)))


@contextmanager
def _in_a_ring(mesh: DeviceMesh) -> Iterator[None]:
    """PyTorch's attention covers all ranks of a mesh within this context."""
    # The import takes longer than many cases.
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import _cp_options

    # The context needs a tensor to shard. Load balancing is for causal attention only, and is refused here.
    nothing = torch.empty(mesh.size(), device=mesh.device_type)
    sharding: dict[str, Any] = {"buffers": [nothing], "buffer_seq_dims": [0], "no_restore_buffers": {nothing}}
    with patch.object(_cp_options, "enable_load_balance", False), context_parallel(mesh, **sharding):
        yield


def dense_missing(case: ParallelCase, device: torch.device) -> str | None:
    if case.kind != "attention":
        return "this kind of layer has no dense counterpart"
    if device.type != "cuda":
        return "PyTorch's context parallelism has attention only for GPUs"
    most = MOST_DENSE_PAIRS["cuda"]
    if case.length**2 > most:
        return f"dense attention of more than {most} pairs takes too long"
    return unavailable(case, device)


ROUTED = operation(lambda case, device: module_of(case, case.is_long, device), torch.float32)
"""Millions of tokens, with kernels."""

DENSE = operation(
    lambda case, device: dense(case, attend_with_flash if case.is_long else attend_plainly, device), torch.bfloat16
)

SUITE = Suite(
    name="context_parallel",
    description="layers of sequences that are sharded over several processes",
    cases=cases,
    directions=directions,
    implementations=implementations(
        Implementation("reference", sharded(partial(part, use_triton=False)), too_long, metrics=metrics, bound=bound),
        by_kernels(sharded(partial(part, use_triton=True)), unavailable=unavailable, metrics=metrics, bound=bound),
        Implementation(
            "dense_parallel",
            sharded(dense_part),
            dense_missing,
            metrics=metrics_of_dense,
            bound=bound,
            operation=DENSE,
        ),
    ),
    reference="reference",
    problem=ROUTED.problem,
    truth=ROUTED.truth,
    plain=ROUTED.plain,
    cost=_layers.cost,
    x_axis="ranks",
    serve=_ranks.serve,
)


def test_context_parallel(record, benchmark):
    replay(record, benchmark)
