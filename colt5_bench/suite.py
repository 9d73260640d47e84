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
"""The type of case of a suite."""


def _as_it_is(case: Case, tensor: str, expected: Tensor, tolerance: Tolerance) -> Tolerance:
    """The bound of an implementation without its own bound."""
    return tolerance


def _no_metrics(case: Case, problem: Problem) -> Mapping[str, float]:
    return {}


@dataclass(frozen=True)
class Operation(Generic[C]):
    """A computation, and the truth for its results."""

    problem: Callable[[C, torch.device], Problem]
    truth: Callable[[C, Problem, str], Truth]
    """The fp64 answer for a case, its problem and a direction."""

    plain: Callable[[C], Callable[..., Tensor]]
    """Plain PyTorch in the dtype of the inputs. Its errors, with operands moved by roundings, set the allowed errors of
    implementations."""


@dataclass(frozen=True)
class Implementation(Generic[C]):
    """One way to compute the operation of a suite."""

    name: str

    build: Callable[[C], Callable[..., Tensor]]
    """From a case to a function of `**problem.inputs` that returns the output."""

    unavailable: Callable[[C, torch.device], str | None] = lambda case, device: None
    """The reason why this implementation cannot run the case on the device, or None. It goes into the record."""

    directions: Sequence[str] = DIRECTIONS
    """The directions that this implementation has; it is skipped in the others."""

    partial: bool = False
    """True if it does only a part of the operation, as a lower bound. The cost does not apply."""

    bound: Callable[[C, str, Tensor, Tolerance], Tolerance] = _as_it_is
    """Allowed error of a tensor. Arguments are the case, the name of the tensor (`output` or an input, for its
    gradient), its fp64 truth and the tolerance that plain PyTorch sets on the same inputs."""

    operation: Operation[C] | None = None
    """The operation that it computes instead of the one of the suite: a dense layer, for example. It is
    judged by the truth of this operation, and the cost of the suite does not apply."""

    metrics: Callable[[C, Problem], Mapping[str, float]] = _no_metrics
    """Other figures for the problem of a case, by name."""

    refused: str = ""
    """Reason why it is not measured; empty for most."""

    changed_settings: tuple[str, ...] = ()
    """Settings that the import of its module changed. They were restored."""

    launching: Callable[[], AbstractContextManager[None]] | None = None
    """A context in which its calls launch their Triton kernels with tensors on a CPU. The kernels can then be compiled
    without a GPU. None if it has no such kernels."""


@dataclass(frozen=True, kw_only=True)
class Grid(Generic[C]):
    """Cases and implementations. Each pair of these gives a record; each file in suites/ holds a grid as `SUITE`."""

    name: str
    description: str

    cases: Callable[[str, torch.device], Sequence[C]]
    """Function from a preset and a device to the cases."""

    directions: Callable[[C], Sequence[str]]
    implementations: Mapping[str, Any]

    reference: str
    """The implementation that others are compared with."""

    x_axis: str = "n"
    """The case field that plots are drawn against."""

    lines: Sequence[str] = ()
    """Case fields whose combinations are lines in plots of metrics, not panels."""

    crossover: bool = False
    """True if the page shows from which value of `x_axis` on each implementation is faster than the reference."""

    timed: bool = True
    """False for a suite without time columns, which measures divergence or trains."""

    serve: Callable[[], None] | None = None
    """The work of all processes of `torchrun` except the first, until the first one has measured. None if
    the suite is for one process."""


@dataclass(frozen=True, kw_only=True)
class Suite(Operation[C], Grid[C]):
    """An operation, and everything needed to measure it."""

    implementations: Mapping[str, Implementation[C]]
    cost: Callable[[C, str], Cost]

    guest: Callable[[Callable[..., Any]], Implementation[C]] | None = None
    """Makes an implementation of a function or class of the user. None if the suite takes no guests.

    A function takes the arguments of the operation, a class those of the layer."""


@dataclass(frozen=True)
class Trainee(Generic[C]):
    """One kind of model that a suite trains."""

    name: str

    build: Callable[[C], nn.Module]
    """The model of a case, on the CPU. Random numbers have been seeded."""

    unavailable: Callable[[C, torch.device], str | None] = lambda case, device: None
    """The reason why it cannot be trained on the case and device, or None. It goes into the record."""

    directions: Sequence[str] = (TRAINING,)


@dataclass
class Course:
    """A training run, as used by the harness: a model, its data, its evaluations and figures."""

    model: nn.Module
    """On the device, in training mode."""

    optimizer: torch.optim.Optimizer

    prepare: Callable[[int], None]
    """Called before each step with its number from 0, and before each evaluation with the number of steps done. It
    seeds all random numbers and sets the learning rate, so that a step depends on nothing but weights and number."""

    loss: Callable[[int], Tensor]
    """The loss of a step's batch, with a graph."""

    evaluate: Callable[[], Mapping[str, float]]
    """Present figures of the model, by name. Each is a point of a curve. No gradient may stay."""

    finish: Callable[[], Mapping[str, float | Sequence[float]]]
    """Final figures by name, for the metrics of the record; a sequence goes into its curves."""

    steps: int
    evaluations: int
    """Number of evaluations, at equal distances. The last one is after the last step."""

    tokens_per_step: int

    max_grad_norm: float = 1.0

    memory: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that evaluations keep for later ones. They go into checkpoints."""


@dataclass(frozen=True, kw_only=True)
class TrainingSuite(Grid[C]):
    """Models that are trained. Cases that differ only in `seed` are repeats."""

    directions: Callable[[C], Sequence[str]] = lambda case: (TRAINING,)
    implementations: Mapping[str, Trainee[C]]

    data: Callable[[Path | None], str]
    """A hash of the data, which is read from the path in `--corpus` if there is one.

    Raises:
        ValueError: there is no data at the path.
    """

    course: Callable[[C, Trainee[C], torch.device, Path | None], Course]
    """The run of a case and trainee on a device. The path is that of `data`."""

    timed: bool = False
