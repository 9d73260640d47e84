"""Processes that stay for many tests, because starting one takes as long as dozens of calls."""

import io
import multiprocessing
import os
import traceback
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
# The server imports these once; ranks are its forks.
CONTEXT.set_forkserver_preload(["torch", "reference.parallel", "kernels", "tests.reference.parallel.sharded"])

SECONDS = 30.0
"""Timeout of an exchange. It is long: on a busy machine a rank may have to wait for its turn."""

LONGEST = 4 * SECONDS
"""Limit of a call. Nothing else ends a rank that waits for a GPU."""


class Ranks:
    """Ranks of a process group, which call functions with it: on CPUs with gloo, on one GPU each with NCCL.

    Tensors of a call are sent to the device of a rank, and those of its results to the device of the first.
    """

    def __init__(self, store: Path, size: int, seconds: float, backend: str):
        self.device = torch.device("cuda", 0) if "nccl" in backend else torch.device("cpu")
        pipes = [CONTEXT.Pipe() for _ in range(size)]
        self.pipes = [mine for mine, _ in pipes]
        options = {"daemon": True}
        self.processes = [
            CONTEXT.Process(target=_serve, args=(theirs, str(store), rank, size, seconds, backend), **options)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()

    def __call__(self, size, function, *args):
        """The results of `function(group, *args)` in a group of the first ranks, by rank.

        Raises:
            AssertionError: a call has raised an error, which the text shows.
        """
        outcomes = self.outcomes(size, function, *args)
        failures = [text for failed, text in outcomes if failed]
        assert not failures, failures[0]
        return [result for _, result in outcomes]

    def outcomes(self, size, function, *args):
        """For each rank whether the call has raised, and its result or traceback."""
        self.send(size, function, *args)
        return [self.receive(rank) for rank in range(size)]

    def send(self, size, function, *args):
        if size > len(self.pipes):
            pytest.skip(f"needs {size} GPUs, of which {len(self.pipes)} are there")
        for pipe in self.pipes[:size]:
            pipe.send_bytes(_packed((size, function, args)))

    def receive(self, rank):
        assert self.pipes[rank].poll(LONGEST), f"rank {rank} does not answer"
        return _unpacked(self.pipes[rank].recv_bytes(), self.device)

    def end(self):
        for process in self.processes:
            process.kill()
            process.join()


@contextmanager
def started(store, size, seconds=SECONDS, backend="gloo"):
    ranks = Ranks(store, size, seconds, backend)
    try:
        yield ranks
    finally:
        ranks.end()


def _packed(something):
    """Bytes of an object with tensors in it, at any depth."""
    file = io.BytesIO()
    torch.save(something, file)
    return file.getvalue()


def _unpacked(packed, device):
    return torch.load(io.BytesIO(packed), device, weights_only=False)


def _serve(pipe, store, rank, size, seconds, backend):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if "nccl" in backend:
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        torch.set_default_device(device)
    together = {"rank": rank, "world_size": size, "timeout": timedelta(seconds=SECONDS)}
    dist.init_process_group(backend, init_method=f"file://{store}", **together)
    groups = {n: dist.new_group(list(range(n)), timeout=timedelta(seconds=seconds)) for n in range(1, size + 1)}
    while True:
        n, function, args = _unpacked(pipe.recv_bytes(), device)
        try:
            outcome = False, function(groups[n], *args)
        except Exception:
            outcome = True, traceback.format_exc()
        pipe.send_bytes(_packed(outcome))
