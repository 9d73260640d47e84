"""A GPU selects no slower than torch.topk, for any number and length of rows and any number selected."""

from itertools import product

import pytest
import torch

import kernels
from colt5_bench.measuring.timing import time_interleaved
from colt5_bench.records.samples import beside, intervals

pytestmark = [pytest.mark.gpu, pytest.mark.alone]

MOST_ENTRIES = 2**28
"""Entries of all rows, 1 GiB."""

GRID = [
    (n_rows, n, k)
    for n_rows, n, k in product(
        (1, 16, 66, 133, 256, 4096), (1024, 8192, 32768, 262144, 2**20), (1, 64, 256, 1024, 2048, 4096)
    )
    if k <= n and n_rows * n <= MOST_ENTRIES
]

AT_MOST = {(1, 8192, 1024): 15e-6, (1, 262144, 1024): 20e-6, (256, 262144, 2048): 250e-6}
"""Seconds on an H200, with a cold L2 cache."""


def time_both(n_rows, n, k):
    """Samples of `select` and torch.topk in seconds."""
    scores = torch.randn(n_rows, n, device="cuda")
    calls = {"select": lambda: kernels.select(scores, num_selected=k), "topk": lambda: scores.topk(k, dim=-1)}
    timings = time_interleaved(calls, device=scores.device, columns=("cold",), target=0.03, max_seconds=0.1)
    samples = {name: columns["cold"].samples for name, columns in timings.items()}
    print(f"{n_rows} x {n}, k {k}:", {name: f"{1e6 * sorted(s)[len(s) // 2]:.1f} us" for name, s in samples.items()})
    return samples


@pytest.mark.parametrize(("n_rows", "n", "k"), GRID)
def test_no_slower_than_topk(n_rows, n, k):
    samples = time_both(n_rows, n, k)
    ((low, _),) = intervals([beside(samples["select"], samples["topk"])])
    assert low <= 1.0


@pytest.mark.parametrize("shape", AT_MOST, ids=str)
def test_time_on_an_h200(shape):
    if "H200" not in torch.cuda.get_device_name():
        pytest.skip("a limit of another GPU")
    samples = time_both(*shape)["select"]
    assert sorted(samples)[len(samples) // 2] <= AT_MOST[shape]
