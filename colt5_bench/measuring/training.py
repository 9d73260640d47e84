"""A training run: steps, evaluations and checkpoints. A loss that is not finite ends the run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import torch

from colt5_bench.case import Case
from colt5_bench.files import atomic_write
from colt5_bench.measuring.conditions import Conditions, Tell
from colt5_bench.measuring.memory import requested_bytes
from colt5_bench.records.results import Record
from colt5_bench.suite import Course, Trainee, TrainingSuite


@dataclass
class Progress:
    """State of a run at an evaluation, without model and optimizer."""

    steps: int = 0
    seconds: float = 0.0
    """Host time of training steps, including the work of the device, without evaluations."""

    curves: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **figures: float) -> None:
        for name, value in figures.items():
            self.curves.setdefault(name, []).append(float(value))


def train(
    course: Course, checkpoint: Path | None, device: torch.device, tell: Callable[[str], None] = lambda text: None
) -> Progress:
    """Train to the end of a course, from its checkpoint if there is one.

    Curves are `step`, `tokens`, `seconds`, `training_loss` (mean since the last evaluation) and what the course
    evaluates.

    Args:
        checkpoint: file that is written at each evaluation, and read if it exists; None for no checkpoints.
        tell: called with a line at each evaluation.

    Raises:
        FloatingPointError: a loss is not finite; the message names the step.
    """
    progress = _resume(course, checkpoint, device)
    marks = [course.steps * (index + 1) // course.evaluations for index in range(course.evaluations)]
    for mark in marks:
        if mark <= progress.steps:
            continue
        losses = _steps(course, progress, mark, device)
        _evaluate(course, progress, {"training_loss": losses.mean().item()})
        if checkpoint is not None:
            _save(course, progress, checkpoint)
        last = (f"{name} {values[-1]:.4g}" for name, values in progress.curves.items())
        tell(", ".join(last))
    return progress


def record_training(
    suite: TrainingSuite, case: Case, trainee: Trainee, record: Record, conditions: Conditions, tell: Tell
) -> None:
    """Train a model and put curves and final figures into its record."""
    device, name = conditions.device, record.implementation
    record.data = suite.data(conditions.corpus)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    course = suite.course(case, trainee, device, conditions.corpus)
    checkpoint = None if conditions.checkpoints is None else conditions.checkpoints / f"{record.digest}.pt"
    progress = train(course, checkpoint, device, lambda text: tell(f"{name}: {text}"))
    final = course.finish()
    by_place = {each: list(figure) for each, figure in final.items() if isinstance(figure, Sequence)}
    record.curves = progress.curves | by_place
    record.metrics = {
        **{each: figure for each, figure in final.items() if not isinstance(figure, Sequence)},
        "seconds_per_step": progress.seconds / progress.steps,
        "parameters": sum(each.numel() for each in course.model.parameters()),
        **{each: curve[-1] for each, curve in progress.curves.items()},
    }
    if device.type == "cuda":
        record.peak_bytes = requested_bytes(device, "peak")
    record.status, record.reason = "ok", ""


def _steps(course: Course, progress: Progress, end: int, device: torch.device) -> torch.Tensor:
    """Train up to a step, and return the losses. They are read together, as a read per step would stall the device."""
    losses = []
    start = _now(device)
    for step in range(progress.steps, end):
        course.prepare(step)
        loss = course.loss(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(course.model.parameters(), course.max_grad_norm)
        course.optimizer.step()
        course.optimizer.zero_grad()
        losses.append(loss.detach())
    all_losses = torch.stack(losses).double().cpu()
    progress.seconds += _now(device) - start
    for step, value in enumerate(all_losses.tolist(), start=progress.steps):
        if not torch.isfinite(torch.tensor(value)):
            raise FloatingPointError(f"the loss is {value} at step {step}")
    progress.steps = end
    return all_losses


def _evaluate(course: Course, progress: Progress, figures: dict[str, float]) -> None:
    course.prepare(progress.steps)
    course.model.eval()
    found = course.evaluate()
    course.model.train()
    tokens = progress.steps * course.tokens_per_step
    progress.add(step=progress.steps, tokens=tokens, seconds=progress.seconds, **figures, **found)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def _save(course: Course, progress: Progress, path: Path) -> None:
    state = {"model": course.model.state_dict(), "optimizer": course.optimizer.state_dict(), "progress": vars(progress)}
    state["memory"] = course.memory
    with atomic_write(path) as unfinished:
        torch.save(state, unfinished)


def _resume(course: Course, path: Path | None, device: torch.device) -> Progress:
    if path is None or not path.exists():
        return Progress()
    state = torch.load(path, map_location=device, weights_only=True)
    course.model.load_state_dict(state["model"])
    course.optimizer.load_state_dict(state["optimizer"])
    course.memory.update(state["memory"])
    return Progress(**state["progress"])
