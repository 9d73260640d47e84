"""Content of a file in suites/, and how the harness finds it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from colt5_bench.case import DIRECTIONS, Case, Cost, Problem, Truth
from colt5_bench.tolerance import Tolerance

C = TypeVar("C", bound=Case)
"""The suite's own kind of case."""


def _as_it_is(case: Case, tensor: str, expected: Tensor, tolerance: Tolerance) -> Tolerance:
    """The bound of an implementation that states none of its own."""
    return tolerance


def _no_metrics(case: Case, problem: Problem) -> Mapping[str, float]:
    return {}


@dataclass(frozen=True)
class Operation(Generic[C]):
    """A computation, and the truth that it is judged by."""

    problem: Callable[[C, torch.device], Problem]
    truth: Callable[[C, Problem, str], Truth]
    """The fp64 answer for a case, its problem and a direction."""

    plain: Callable[[C], Callable[..., Tensor]]
    """Plain PyTorch in the dtype of the inputs. Others may be off by how far it lies from the truth when its operands
    are moved by roundings."""


@dataclass(frozen=True)
class Implementation(Generic[C]):
    """One way to compute the operation of a suite."""

    name: str

    build: Callable[[C], Callable[..., Tensor]]
    """From a case to a function of `**problem.inputs` that returns the output."""

    unavailable: Callable[[C, torch.device], str | None] = lambda case, device: None
    """Why this implementation cannot run the case on the device, or None. The reason goes into the record."""

    directions: Sequence[str] = DIRECTIONS
    """The directions that this implementation has; it is skipped in the others."""

    partial: bool = False
    """True if it does less than the operation, as a lower bound. The cost of the operation is not its own then."""

    bound: Callable[[C, str, Tensor, Tolerance], Tolerance] = _as_it_is
    """Allowed error of a tensor. Arguments are the case, the name of the tensor (`output` or an input, for its
    gradient), its fp64 truth and the tolerance that plain PyTorch sets on the same inputs."""

    operation: Operation[C] | None = None
    """The operation that it computes, if that is not the suite's, in whose place it could stand. A dense layer does so
    beside a routed one. It is judged by this one's truth, and the cost of the suite's is not its own."""

    metrics: Callable[[C, Problem], Mapping[str, float]] = _no_metrics
    """Further figures of what it does with the problem of a case, by name."""

    launching: Callable[[], AbstractContextManager[None]] | None = None
    """A context in which its calls launch their Triton kernels with tensors on a CPU. These can then be compiled where
    there is no GPU. None if it has no kernels that could."""


@dataclass(frozen=True)
class Suite(Operation[C]):
    """An operation, and everything needed to measure it; each file in suites/ holds one as `SUITE`."""

    name: str
    description: str

    cases: Callable[[str, torch.device], Sequence[C]]
    """From a preset and a device to the cases that it runs there."""

    directions: Callable[[C], Sequence[str]]
    implementations: Mapping[str, Implementation[C]]

    reference: str
    """The implementation that speed-ups are given over."""

    cost: Callable[[C, str], Cost]

    x_axis: str = "n"
    """The case field that plots are drawn against."""

    lines: Sequence[str] = ()
    """Case fields each combination of which is a line in plots of metrics, and no panel."""

    timed: bool = True
    """False for a suite that measures divergence only."""
