"""Content of a file in suites/, and how the harness finds it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from colt5_bench.case import DIRECTIONS, TRAINING, Case, Cost, Problem, Truth
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

    refused: str = ""
    """Reason for which nothing of it is measured; empty for most."""

    changed_settings: tuple[str, ...] = ()
    """Settings that the import of its module had changed. They were put back."""

    launching: Callable[[], AbstractContextManager[None]] | None = None
    """A context in which its calls launch their Triton kernels with tensors on a CPU. These can then be compiled where
    there is no GPU. None if it has no kernels that could."""


@dataclass(frozen=True, kw_only=True)
class Grid(Generic[C]):
    """Cases and implementations. Each pair of these gives a record; each file in suites/ holds a grid as `SUITE`."""

    name: str
    description: str

    cases: Callable[[str, torch.device], Sequence[C]]
    """From a preset and a device to the cases that it runs there."""

    directions: Callable[[C], Sequence[str]]
    implementations: Mapping[str, Any]

    reference: str
    """The implementation that others are compared with."""

    x_axis: str = "n"
    """The case field that plots are drawn against."""

    lines: Sequence[str] = ()
    """Case fields each combination of which is a line in plots of metrics, and no panel."""

    crossover: bool = False
    """True if the page says from which value of `x_axis` on each implementation is faster than the reference."""

    timed: bool = True
    """False for a suite without time columns: it measures divergence, or trains."""

    serve: Callable[[], None] | None = None
    """Does the part of each process but the first that `torchrun` has started, until the first has measured. None if
    the suite is for one process."""


@dataclass(frozen=True, kw_only=True)
class Suite(Operation[C], Grid[C]):
    """An operation, and everything needed to measure it."""

    implementations: Mapping[str, Implementation[C]]
    cost: Callable[[C, str], Cost]

    guest: Callable[[Callable[..., Any]], Implementation[C]] | None = None
    """From a function or class by the user to an implementation of it. None if the suite takes none but its own.

    A function takes the arguments of the operation, a class those of the layer."""


@dataclass(frozen=True)
class Trainee(Generic[C]):
    """One kind of model that a suite trains."""

    name: str

    build: Callable[[C], nn.Module]
    """The model of a case, on the CPU. Random numbers have been seeded."""

    unavailable: Callable[[C, torch.device], str | None] = lambda case, device: None
    """Why it cannot be trained on the case and device, or None. The reason goes into the record."""

    directions: Sequence[str] = (TRAINING,)


@dataclass
class Course:
    """A training run as the harness drives it: a model, its data, and what is asked of it."""

    model: nn.Module
    """On the device, in training mode."""

    optimizer: torch.optim.Optimizer

    prepare: Callable[[int], None]
    """Called before each step with its number from 0, and before each evaluation with the number of steps done. It
    seeds all random numbers and sets the learning rate, so that a step depends on nothing but weights and number."""

    loss: Callable[[int], Tensor]
    """The loss of a step's batch, with a graph."""

    evaluate: Callable[[], Mapping[str, float]]
    """Figures of the model as it is, by name. Each is a point of a curve. No gradient may stay."""

    finish: Callable[[], Mapping[str, float | Sequence[float]]]
    """Final figures by name, for the metrics of the record; a sequence goes into its curves."""

    steps: int
    evaluations: int
    """Number of evaluations, at equal distances; the last is after the last step."""

    tokens_per_step: int

    max_grad_norm: float = 1.0

    memory: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that evaluations keep for later ones. They go into checkpoints."""


@dataclass(frozen=True, kw_only=True)
class TrainingSuite(Grid[C]):
    """Models that are trained; cases that differ in `seed` alone are repeats of one another."""

    directions: Callable[[C], Sequence[str]] = lambda case: (TRAINING,)
    implementations: Mapping[str, Trainee[C]]

    data: Callable[[Path | None], str]
    """A hash of the data that it reads, from the path that the user gave by `--corpus`, if any.

    Raises:
        ValueError: there is no data at the path.
    """

    course: Callable[[C, Trainee[C], torch.device, Path | None], Course]
    """The run of a case and trainee on a device. The path is that of `data`."""

    timed: bool = False
