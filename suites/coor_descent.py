"""Coordinate descent by rows, length, iterations and temperature."""

from functools import partial
from itertools import product

import torch

import kernels
from colt5_bench.pytest_plugin.replay import replay
from colt5_bench.suite import Implementation, Suite
from suites._descent import (
    CONSTANT,
    DECAYING,
    OURS,
    REFERENCE,
    DescentCase,
    both_directions,
    compiled,
    cost,
    descending,
    implementations,
    in_segments,
    lenient,
    plain,
    problem,
    segments_of,
    truth,
)
from suites._ours import by_kernels, guest
from suites.peers import COLT5_PLAIN, COLT5_TRITON, COLT5_TRITON_SEGMENTED

MILESTONES = [
    DescentCase.at(8192, 512, 20, DECAYING),
    DescentCase.at(1024, 4096, 50, CONSTANT),
    DescentCase.at(64, 32768, 50, CONSTANT),
    DescentCase.at(8, 131072, 50, CONSTANT),
    DescentCase.at(1, 1048576, 20, DECAYING),
    DescentCase.at(4, 4194304, 20, DECAYING),
]
"""The shapes for which the project has targets of times on an H200."""

BY_ITERATIONS = [DescentCase.at(1024, 4096, n_iters, CONSTANT) for n_iters in (5, 20, 100)]

RAGGED = DescentCase.at(1023, 4095, 20, CONSTANT)
"""Odd sizes: rows are not aligned, and no tile fits."""

ON_CPU = [
    DescentCase.at(512, 512, 20, DECAYING),
    DescentCase.at(64, 4096, 5, CONSTANT),
    DescentCase.at(64, 4096, 50, CONSTANT),
    DescentCase.at(1, 131072, 20, DECAYING),
]


def cases(preset: str, device: torch.device) -> list[DescentCase]:
    if preset == "smoke":
        aligned = [DescentCase.at(16, 256, 10, CONSTANT), DescentCase.at(2, 4096, 10, DECAYING)]
        return [*aligned, DescentCase.at(15, 255, 10, CONSTANT)]
    if preset == "default":
        return [*MILESTONES, *BY_ITERATIONS, RAGGED] if device.type == "cuda" else ON_CPU
    shapes = [(8192, 512), (1024, 4096), (64, 32768), (8, 131072), (1, 1048576), (4, 4194304)]
    if device.type != "cuda":
        shapes = shapes[:-1]
    grid = product(shapes, (5, 20, 50, 100), (CONSTANT, DECAYING))
    return [*(DescentCase.at(*shape, n_iters, temperature) for shape, n_iters, temperature in grid), RAGGED]


def compiling_takes_too_long(case: DescentCase, device: torch.device) -> str | None:
    most = 20 if device.type == "cuda" else 5
    return None if case.n_iters <= most else f"compiling more than {most} unrolled iterations takes too long"


SUITE = Suite(
    name="coor_descent",
    description="speed, memory and divergence of coordinate descent by rows, length, iterations and temperature",
    cases=cases,
    directions=both_directions,
    implementations=implementations(
        REFERENCE,
        Implementation("compile", compiled, compiling_takes_too_long, bound=lenient),
        by_kernels(
            lambda case: partial(
                kernels.segmented_coor_descent, **case.arguments, checkpoint_segments=segments_of(case)
            ),
            name="segmented",
            unavailable=in_segments,
            bound=lenient,
        ),
        OURS,
        COLT5_PLAIN,
        COLT5_TRITON,
        COLT5_TRITON_SEGMENTED,
    ),
    reference="reference",
    problem=problem,
    truth=truth,
    plain=plain,
    cost=cost,
    guest=guest(descending, bound=lenient),
)


def test_coor_descent(record, benchmark):
    replay(record, benchmark)
