"""For CPU tensors, no operation is slower than its definition, for any sizes, iterations and direction."""

from functools import partial
from itertools import product

import pytest
import torch
import triton

import kernels
import reference
from colt5_bench.measuring.timing import time_interleaved
from colt5_bench.records.samples import beside, intervals

pytestmark = [
    pytest.mark.alone,
    pytest.mark.slow,
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter is not timed"),
]

SLOWER = 1.1
"""Limit of the ratio of ours to the definition: an interval completely above it is a failure."""

SHORT, LONG = {"min_samples": 5, "max_seconds": 0.03}, {"max_seconds": 0.25}
"""Measurements. A short one counts only if its whole interval is below the limit."""

REPETITIONS = 3
"""Number of long measurements that all have to fail.

Other work on the machine may spoil one of them, and so may the place of its inputs in memory.
"""

CONSTANT, DECAYING = {"eps": 0.1}, {"eps": 0.03, "eps_init": 4.0, "eps_decay": 0.7}
TWENTY = {"n_iters": 20, **DECAYING}


def descents():
    for (rows, n), n_iters, schedule in product(
        [(512, 512), (64, 4096), (1, 131072)], (2, 5, 20), (CONSTANT, DECAYING)
    ):
        yield "coor_descent", (rows, n), {"k": n / 16, "n_iters": n_iters, **schedule}
    # A sort takes longest beside a pass in a long row.
    yield "coor_descent", (1, 1048576), {"k": 65536.0, "n_iters": 20, **CONSTANT}


def prefixes():
    for n, window_size in product((1024, 4096), (128,)):
        yield "route_prefixes", (1, 2, n), {"window_size": window_size, "num_selected": 256, "k": 288.0, **TWENTY}


def windows():
    for n, window_size, causal in product((512, 2048), (32, 4096), (False, True)):
        yield "windowed_attention", (1, n, 3 * 64), {"heads": 1, "window_size": window_size, "causal": causal}


def described(value):
    return value if isinstance(value, str) else None


@pytest.fixture(params=[1, None], ids=["one thread", "all threads"], autouse=True)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param or before)
    yield
    torch.set_num_threads(before)


def interval_of_ratio(calls, length):
    timings = time_interleaved(calls, device=torch.device("cpu"), columns=("wall",), target=0.03, **length)
    samples = {name: columns["wall"].samples for name, columns in timings.items()}
    ((low, high),) = intervals([beside(samples["ours"], samples["definition"])])
    return low, high


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize(("name", "shape", "options"), [*descents(), *prefixes(), *windows()], ids=described)
def test_ours_takes_no_longer_than_the_definition(name, shape, options, direction):
    inputs = []

    def call(module, x):
        operation = partial(getattr(module, name), **options)

        def run():
            result = operation(x)
            result = result if isinstance(result, torch.Tensor) else result.weights
            if x.requires_grad:
                torch.autograd.grad(result.sum(), x)

        return run

    def measured(length):
        # Earlier inputs stay, so that these are elsewhere in memory.
        inputs.append(torch.randn(shape, requires_grad=direction != "forward"))
        return interval_of_ratio({"definition": call(reference, inputs[-1]), "ours": call(kernels, inputs[-1])}, length)

    _, high = measured(SHORT)
    if high < SLOWER:
        return
    seen = []
    while len(seen) < REPETITIONS and (not seen or seen[-1][0] > SLOWER):
        seen.append(measured(LONG))
    assert seen[-1][0] <= SLOWER, f"ours over the definition, each time as an interval: {seen}"
