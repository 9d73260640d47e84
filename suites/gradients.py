"""Distance of gradients from fp64, by spread, temperature, iterations, length, dtype and ties."""

from itertools import product

import torch

from colt5_bench.case import FORWARD_BACKWARD
from colt5_bench.pytest_plugin.replay import check
from colt5_bench.suite import Suite
from suites._descent import (
    COLD,
    CONSTANT,
    DECAYING,
    OURS,
    REFERENCE,
    DescentCase,
    cost,
    descending,
    implementations,
    lenient,
    plain,
    problem,
    truth,
)
from suites._ours import guest

ROWS = {2048: 32, 32768: 4, 1048576: 1}
"""Rows by length."""


def cases(preset: str, device: torch.device) -> list[DescentCase]:
    spreads, iterations, lengths = [1.0, 5.0, 20.0], [5, 20, 50, 100, 200], list(ROWS)
    dtypes = ["float32", "bfloat16", "float16"]
    if preset == "smoke":
        spreads, iterations, lengths, dtypes = [1.0, 20.0], [5], [2048], ["float32", "bfloat16"]
    elif preset == "default" and device.type != "cuda":
        iterations, lengths = [5, 20], [2048, 32768]
    return [
        DescentCase.at(ROWS[n], n, n_iters, temperature, std=std, ties=ties, dtype=dtype)
        for n, dtype, ties, std, temperature, n_iters in product(
            lengths, dtypes, (False, True), spreads, (CONSTANT, COLD, DECAYING), iterations
        )
    ]


SUITE = Suite(
    name="gradients",
    description="divergence of outputs and gradients from fp64, with elements at a kink counted separately",
    cases=cases,
    directions=lambda case: (FORWARD_BACKWARD,),
    implementations=implementations(REFERENCE, OURS),
    reference="reference",
    problem=problem,
    truth=truth,
    plain=plain,
    cost=cost,
    guest=guest(descending, bound=lenient),
    x_axis="n_iters",
    timed=False,
)


def test_gradients(record):
    check(record)
