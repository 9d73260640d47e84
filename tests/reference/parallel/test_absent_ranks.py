"""A rank that ends, or does not come, ends the others with a message."""

import time

import pytest
import torch

from tests.reference.parallel import sharded
from tests.reference.parallel.ranks import started

TIMEOUT = 3.0


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("leave", [sharded.die, sharded.hang])
def test_the_others_end(tmp_path, leave, when):
    with started(tmp_path / "store", 3, TIMEOUT) as ranks:
        # Ranks that have started are no part of the time.
        ranks(3, sharded.shard, torch.nn.Identity(), 1)
        start = time.monotonic()
        ranks.send(3, sharded.with_an_absent_rank, leave, when, torch.randn(2, 9))
        outcomes = [ranks.receive(rank) for rank in range(2)]
        # A rank that is killed is missed at once, another one when its time is over.
        assert time.monotonic() - start < (1 if leave is sharded.die else 2) * TIMEOUT
    for rank, (failed, text) in enumerate(outcomes):
        assert failed
        exchanged = "scores" if when == "forward" else "the gradient of scores"
        assert f"RuntimeError: rank {rank} of 3 got no answer where all exchange {exchanged}: another rank" in text
