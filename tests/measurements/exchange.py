"""Two ways of coordinate descent on a sharded row: gather all scores, or exchange one number per iteration.

`torchrun --nproc-per-node=2 -m tests.measurements.exchange` measures the times of the parts of each way, and adds them:

    gathered  scores and their gradients are gathered, and each rank descends on the whole row
    one number  each rank descends on its part; in each iteration, forward and backward, numbers of all are added up

The latter is a lower bound: a kernel would have to end, or to wait, for each exchange. Numbers are added up by NCCL, or
by a one-shot all-reduce through symmetric memory. Without GPUs it runs on gloo, only to try it.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric

import kernels
from tests.measurements.ranks import ON_GPU, joined, seconds

ITERATIONS = 20
SHARE = 1024
"""Entries per selected entry."""

LENGTHS = [2**power for power in (range(18, 27, 2) if ON_GPU else (12, 14))]


def exchanges_of_a_number(device: torch.device) -> dict[str, Callable[[], object]]:
    """Ways to add up one number of each rank."""
    number = torch.zeros(1, dtype=torch.float64, device=device)
    ways: dict[str, Callable[[], object]] = {"all-reduce": lambda: dist.all_reduce(number)}
    if ON_GPU:
        # It does not support fp64, and needs at least 16 bytes.
        shared = symmetric.empty(4, dtype=torch.float32, device=device)
        symmetric.rendezvous(shared, dist.group.WORLD)
        name = dist.group.WORLD.group_name
        ways["one-shot"] = lambda: torch.ops.symm_mem.one_shot_all_reduce(shared, "sum", name)
    return ways


def descent(n: int, k: int, device: torch.device) -> Callable[[], object]:
    """Coordinate descent on a row, forward and backward."""
    scores, upstream = torch.randn(1, n, device=device, requires_grad=True), torch.randn(1, n, device=device)

    def step() -> object:
        return torch.autograd.grad(kernels.coor_descent(scores, n_iters=ITERATIONS, k=k), scores, upstream)

    return step


def main() -> None:
    device = joined("nccl")
    ranks, rank = dist.get_world_size(), dist.get_rank()
    of_a_number = {name: seconds(way, in_a_row=ITERATIONS) for name, way in exchanges_of_a_number(device).items()}
    lines = [f"{name} of a number: {1e6 * each:.1f} us" for name, each in of_a_number.items()]
    for n in LENGTHS:
        k, own = n // SHARE, torch.randn(n // ranks, device=device)
        every = [torch.empty_like(own) for _ in range(ranks)]
        gather = seconds(lambda every=every, own=own: dist.all_gather(every, own))
        whole, part = (seconds(descent(length, k, device)) for length in (n, n // ranks))
        totals = {"gathered": 2 * gather + whole}
        totals |= {f"one number, {name}": 2 * ITERATIONS * each + part for name, each in of_a_number.items()}
        lines.append(f"{n} entries: " + ", ".join(f"{name} {1e6 * total:.0f} us" for name, total in totals.items()))
    if rank == 0:
        print("\n".join(lines))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
