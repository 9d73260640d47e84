"""Processes that stay for many tests: starting one takes as long as dozens of the calls that it is for."""

import multiprocessing
import os
import pickle
import traceback
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
# The server imports these once; ranks are its forks.
CONTEXT.set_forkserver_preload(["torch", "reference.parallel", "kernels", "tests.reference.parallel.sharded"])

SECONDS = 30.0
"""Timeout of an exchange. It is long: on a busy machine a rank may have to wait for its turn."""


class Ranks:
    """Ranks of a process group on gloo, which call functions with it."""

    def __init__(self, store: Path, size: int, seconds: float):
        pipes = [CONTEXT.Pipe() for _ in range(size)]
        self.pipes = [mine for mine, _ in pipes]
        options = {"daemon": True}
        self.processes = [
            CONTEXT.Process(target=_serve, args=(theirs, str(store), rank, size, seconds), **options)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()

    def __call__(self, size, function, *args):
        """The results of `function(group, *args)` in a group of the first so many ranks, by rank.

        Raises:
            AssertionError: a call has raised something, of which this is the text.
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
        for pipe in self.pipes[:size]:
            pipe.send_bytes(pickle.dumps((size, function, args)))

    def receive(self, rank):
        return pickle.loads(self.pipes[rank].recv_bytes())

    def end(self):
        for process in self.processes:
            process.kill()
            process.join()


@contextmanager
def started(store, size, seconds=SECONDS):
    ranks = Ranks(store, size, seconds)
    try:
        yield ranks
    finally:
        ranks.end()


def _serve(pipe, store, rank, size, seconds):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    together = {"rank": rank, "world_size": size, "timeout": timedelta(seconds=SECONDS)}
    dist.init_process_group("gloo", init_method=f"file://{store}", **together)
    groups = {n: dist.new_group(list(range(n)), timeout=timedelta(seconds=seconds)) for n in range(1, size + 1)}
    while True:
        n, function, args = pickle.loads(pipe.recv_bytes())
        try:
            outcome = False, function(groups[n], *args)
        except Exception:
            outcome = True, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(outcome))
