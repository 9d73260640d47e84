"""Training steps of sharded layers in the loop of each rank, by the number of ranks.

`torchrun --nproc-per-node=2 -m tests.measurements.parallel_steps [KIND ...]`

The suite `context_parallel` measures each call by itself, and its first rank sends commands to the others. Here ranks
run one step after the other, as in training, and each has a loss of its own tokens. A step is a forward and a backward
pass, with sums of the parameters' gradients over ranks. Its time is that of the slowest rank. Without GPUs it runs on
gloo with few tokens, only to try it.
"""

import sys
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from suites import context_parallel
from suites.context_parallel import ParallelCase
from tests.measurements.ranks import ON_GPU, joined, seconds

STEPS, SAMPLES = 10, 5


def step_of(case: ParallelCase, group: ProcessGroup | None, device: torch.device) -> Callable[[], None]:
    """A step of this rank's part of a layer."""
    module = context_parallel.part(case, group, device, use_triton=True).module
    rank = 0 if group is None else group.rank()
    tokens = context_parallel.held(case, range(rank, rank + 1), device, torch.float32)
    leaves = {name: each.detach().requires_grad_() for name, each in tokens.items()}
    sources = [*leaves.values(), *module.parameters()]
    upstream = torch.ones((), device=device)

    def step() -> None:
        output = module(**leaves)
        grads = torch.autograd.grad(output, sources, upstream.expand(output.shape))
        if group is not None:
            dist.all_reduce(torch.cat([each.flatten() for each in grads[len(leaves) :]]), group=group)

    return step


def slowest(taken: float, group: ProcessGroup, device: torch.device) -> float:
    """The longest time of any rank."""
    seconds_of_ranks = torch.tensor(taken, device=device)
    dist.all_reduce(seconds_of_ranks, dist.ReduceOp.MAX, group=group)
    return seconds_of_ranks.item()


def cases(kinds: list[str], ranks: int) -> Iterator[ParallelCase]:
    """The long sequences of the suite, or short ones without GPUs."""
    for kind, scaling, tokens in context_parallel.LONG:
        if not kinds or kind in kinds:
            size = (tokens, ranks, 512, context_parallel.SHARE_OF_LONG) if ON_GPU else (2**12, ranks, 64)
            yield ParallelCase(kind, scaling, *size)


def main() -> None:
    kinds = sys.argv[1:]
    if unknown := set(kinds) - set(context_parallel.MAKE):
        sys.exit(f"KIND must be one of {', '.join(context_parallel.MAKE)}, got {', '.join(sorted(unknown))}")
    device = joined("cpu:gloo,cuda:nccl")
    counts = [2**power for power in range(dist.get_world_size().bit_length())]
    groups = {ranks: dist.new_group([*range(ranks)]) for ranks in counts}
    alone: dict[tuple[str, str], float] = {}
    for many in zip(*(cases(kinds, ranks) for ranks in counts), strict=True):
        for case in many:
            dist.barrier()
            if dist.get_rank() >= case.ranks:
                continue
            group = groups[case.ranks]
            step = step_of(case, None if case.ranks == 1 else group, device)
            taken = slowest(seconds(step, in_a_row=STEPS, samples=SAMPLES, group=group), group, device)
            del step
            if ON_GPU:
                torch.cuda.empty_cache()
            if dist.get_rank() == 0:
                one = alone.setdefault((case.kind, case.scaling), taken)
                efficiency = one / taken / (case.ranks if case.scaling == "strong" else 1)
                text = f"{case.kind}, {case.scaling} scaling, {case.tokens:,} tokens, ranks: {case.ranks}"
                print(f"{text}, {1e3 * taken:.2f} ms, efficiency {efficiency:.0%}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
