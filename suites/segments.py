"""The published algorithm by its number of segments, compared with the one that needs none."""

from dataclasses import dataclass
from functools import partial
from itertools import product

import torch

import kernels
from colt5_bench.pytest_plugin.replay import replay
from colt5_bench.suite import Implementation, Suite
from suites._descent import (
    CONSTANT,
    OURS,
    DescentCase,
    both_directions,
    cost,
    implementations,
    in_segments,
    lenient,
    plain,
    problem,
    truth,
)
from suites._ours import by_kernels
from suites.peers import COLT5_TRITON, in_triton


@dataclass(frozen=True)
class SegmentCase(DescentCase):
    """Coordinate descent that keeps its intermediates at the start of each segment of iterations."""

    segments: int


def cases(preset: str, device: torch.device) -> list[SegmentCase]:
    if preset == "smoke":
        return [SegmentCase.at(4, 255, 10, CONSTANT, segments=segments) for segments in (1, 5)]
    shapes = [(1024, 4096)] if device.type == "cuda" else [(32, 2048)]
    segments = [1, 2, 5, 10, 20, 50]
    if preset == "full":
        shapes = (
            [(8192, 512), (1024, 4096), (64, 32768), (8, 131072)] if device.type == "cuda" else [*shapes, (4, 32768)]
        )
        segments = [1, 2, 4, 5, 10, 20, 25, 50, 100]
    return [
        SegmentCase.at(*shape, n_iters, CONSTANT, segments=count)
        for shape, n_iters, count in product(shapes, (20, 50, 100), segments)
        if count <= n_iters
    ]


SUITE = Suite(
    name="segments",
    description="time and memory of the published algorithm by number of segments, beside the kernel without segments",
    cases=cases,
    directions=both_directions,
    implementations=implementations(
        by_kernels(
            lambda case: partial(kernels.segmented_coor_descent, **case.arguments, checkpoint_segments=case.segments),
            name="segmented",
            unavailable=in_segments,
            bound=lenient,
        ),
        Implementation[SegmentCase](
            "colt5_triton", lambda case: in_triton(case, case.segments), COLT5_TRITON.unavailable, bound=lenient
        ),
        OURS,
    ),
    reference="segmented",
    problem=problem,
    truth=truth,
    plain=plain,
    cost=cost,
    x_axis="segments",
)


def test_segments(record, benchmark):
    replay(record, benchmark)
