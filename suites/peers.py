"""Other people's implementations, each of them optional."""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from colt5_bench.case import Case
from colt5_bench.suite import Implementation
from suites._descent import DescentCase, in_segments, lenient, segments_of


def missing(case: Case, device: torch.device) -> str | None:
    return None if find_spec("colt5_attention") else "colt5-attention is not installed (pip install '.[peers]')"


def in_triton_missing(case: DescentCase, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "its Triton kernel runs on a GPU only"
    return missing(case, device) or in_segments(case, device)


def _plain(case: DescentCase) -> Callable[..., Tensor]:
    from colt5_attention.coor_descent import coor_descent

    return lambda scores: coor_descent(scores, **case.arguments)


def in_triton(case: DescentCase, segments: int) -> Callable[..., Tensor]:
    from colt5_attention.triton_coor_descent import triton_coor_descent

    return lambda scores: triton_coor_descent(scores, **case.arguments, checkpoint_segments=segments)


def colt5_topk() -> Callable[..., tuple[Tensor, ...]]:
    from colt5_attention.topk import topk

    return topk


COLT5_PLAIN = Implementation("colt5_plain", _plain, missing, bound=lenient)

COLT5_TRITON = Implementation[DescentCase](
    "colt5_triton", lambda case: in_triton(case, 1), in_triton_missing, bound=lenient
)

COLT5_TRITON_SEGMENTED = Implementation[DescentCase](
    "colt5_triton_segmented", lambda case: in_triton(case, segments_of(case)), in_triton_missing, bound=lenient
)
"""With segments of five iterations, which takes more memory and less time."""
