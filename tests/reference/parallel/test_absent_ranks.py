"""A rank that ends, or does not start a call, ends the others with a message."""

import time

import pytest
import torch

from tests.reference.parallel import sharded
from tests.reference.parallel.ranks import LONGEST, started

TIMEOUT = 3.0


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("leave", [sharded.die, sharded.hang])
def test_the_others_end(tmp_path, leave, when):
    with started(tmp_path / "store", 3, TIMEOUT) as ranks:
        # The start of ranks is not part of the time.
        ranks(3, sharded.shard, torch.nn.Identity(), 1)
        start = time.monotonic()
        ranks.send(3, sharded.with_an_absent_rank, leave, when, torch.randn(2, 9))
        outcomes = [ranks.receive(rank) for rank in range(2)]
        # A killed rank is noticed at once, another one after the timeout.
        assert time.monotonic() - start < (1 if leave is sharded.die else 2) * TIMEOUT
    for rank, (failed, text) in enumerate(outcomes):
        assert failed
        exchanged = "scores" if when == "forward" else "the gradient of scores"
        assert f"RuntimeError: rank {rank} of 3 got no answer in the exchange of {exchanged}: another rank" in text


@pytest.mark.gpu
@pytest.mark.parametrize("leave", [sharded.die, sharded.hang])
def test_nccl_ends_a_process_that_waits(tmp_path, leave):
    """Its watchdog ends it after the timeout: the host has gone on, and nothing else could."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    with started(tmp_path / "store", 2, TIMEOUT, "nccl") as ranks:
        ranks(2, sharded.of_shapes, [(4,), (5,)], 2 * [torch.float32])
        ranks.send(2, sharded.with_an_absent_rank, leave, "forward", torch.randn(2, 9))
        ranks.processes[0].join(LONGEST)
        assert ranks.processes[0].exitcode not in (None, 0)
