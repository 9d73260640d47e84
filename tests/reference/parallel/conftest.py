import pytest
import torch

from tests.reference.parallel.ranks import started

ON_GPUS = pytest.param("cpu:gloo,cuda:nccl", marks=pytest.mark.gpu, id="nccl")


@pytest.fixture(scope="session", params=["gloo", ON_GPUS])
def started_ranks(request, tmp_path_factory):
    """Four ranks, or one on each GPU; a call uses the first ones."""
    size = torch.cuda.device_count() if "nccl" in request.param else 4
    with started(tmp_path_factory.mktemp("ranks") / "store", size, backend=request.param) as ranks:
        yield ranks


@pytest.fixture
def ranks(started_ranks):
    """Ranks that have started. The test makes its tensors on the device of the first."""
    with started_ranks.device:
        yield started_ranks
