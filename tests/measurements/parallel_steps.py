"""Training steps of sharded layers in the loop of each rank, by the number of ranks.

`torchrun --nproc-per-node=2 -m tests.measurements.parallel_steps [KIND ...]`

The suite `context_parallel` measures each call by itself, and its first rank sends commands to the others. Here ranks
run one step after the other, as in training, and each has a loss of its own tokens. A step is a forward and a backward
pass, with sums of the parameters' gradients over ranks. Its time is that of the slowest rank. Without GPUs it runs on
gloo with few tokens, only to try it.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from suites import context_parallel
from suites.context_parallel import ParallelCase

STEPS, SAMPLES, WARM_UP = 10, 5, 3
ON_GPU = torch.cuda.is_available()


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


def seconds(step: Callable[[], None], group: ProcessGroup | None, device: torch.device) -> float:
    """Median time of a step in series of them, on the slowest rank."""
    for _ in range(WARM_UP):
        step()
    samples = []
    for _ in range(SAMPLES):
        if group is not None:
            dist.barrier(group)
        _wait()
        begun = time.perf_counter()
        for _ in range(STEPS):
            step()
        _wait()
        samples.append((time.perf_counter() - begun) / STEPS)
    taken = torch.tensor(median(samples), device=device)
    if group is not None:
        dist.all_reduce(taken, dist.ReduceOp.MAX, group=group)
    return taken.item()


def _wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


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
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if ON_GPU else torch.device("cpu")
    if ON_GPU:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if ON_GPU else "gloo")
    counts = [2**power for power in range(dist.get_world_size().bit_length())]
    groups = {ranks: None if ranks == 1 else dist.new_group([*range(ranks)]) for ranks in counts}
    alone: dict[tuple[str, str], float] = {}
    for many in zip(*(cases(kinds, ranks) for ranks in counts), strict=True):
        for case in many:
            dist.barrier()
            if dist.get_rank() >= case.ranks:
                continue
            taken = seconds(step_of(case, groups[case.ranks], device), groups[case.ranks], device)
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
