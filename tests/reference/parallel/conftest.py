import pytest

from tests.reference.parallel.ranks import started


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Four ranks, of which a call takes the first so many."""
    with started(tmp_path_factory.mktemp("ranks") / "store", 4) as ranks:
        yield ranks
