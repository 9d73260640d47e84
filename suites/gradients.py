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

SHAPES = [(32, 2048), (4, 32768), (1, 1048576)]
"""Rows and their length."""


def cases(preset: str, device: torch.device) -> list[DescentCase]:
    spreads, iterations, shapes = [1.0, 5.0, 20.0], [5, 20, 50, 100, 200], SHAPES
    dtypes = ["float32", "bfloat16", "float16"]
    if preset == "smoke":
        spreads, iterations, shapes, dtypes = [1.0, 20.0], [5], [(31, 2047)], ["float32", "bfloat16"]
    elif preset == "default" and device.type != "cuda":
        iterations, shapes = [5, 20], SHAPES[:2]
    return [
        DescentCase.at(*shape, n_iters, temperature, std=std, ties=ties, dtype=dtype)
        for shape, dtype, ties, std, temperature, n_iters in product(
            shapes, dtypes, (False, True), spreads, (CONSTANT, COLD, DECAYING), iterations
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
