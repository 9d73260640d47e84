"""The answer that a case should give, and whether an implementation gives it: at first, and after it was timed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import isnan
from typing import Self

import torch
from torch import Tensor

from colt5_bench.case import FORWARD, Case, Problem, Truth, other_values
from colt5_bench.measuring import accuracy
from colt5_bench.measuring.call import Call
from colt5_bench.records.results import Divergence
from colt5_bench.suite import Implementation, Operation
from colt5_bench.tolerance import Tolerance


@dataclass(frozen=True)
class Oracle:
    """The inputs of a case, what they should give, and how far from it a correct computation is."""

    operation: Operation
    case: Case
    problem: Problem
    pristine: dict[str, Tensor]
    """A copy of the inputs."""

    truth: Truth
    tolerances: dict[str, Tolerance]

    @classmethod
    def consult(cls, operation: Operation, case: Case, direction: str, device: torch.device) -> Self:
        problem = operation.problem(case, device)
        truth = operation.truth(case, problem, direction)
        pristine = {name: tensor.clone() for name, tensor in problem.inputs.items()}

        def plain() -> dict[str, Tensor]:
            return Call(operation.plain(case), problem, direction).results()

        tolerances = accuracy.tolerances(plain, truth.tensors(), truth.at_kink)
        return cls(operation, case, problem, pristine, truth, tolerances)

    def judge(self, implementation: Implementation, results: Mapping[str, Tensor]) -> tuple[dict[str, Divergence], str]:
        """The distance of each result from the truth, and what is wrong with them; an empty text if nothing is."""
        divergences, wrong = {}, ""
        for tensor, result in results.items():
            expected, at_kink = self.truth.tensors()[tensor], self.truth.at_kink.get(tensor)
            allowed = implementation.bound(self.case, tensor, expected, self.tolerances[tensor])
            divergences[tensor] = accuracy.diverge(result, expected, at_kink, tolerance=allowed)
            named = tensor if tensor == "output" else f"gradient of {tensor}"
            if not wrong and result.dtype != allowed.dtype:
                wrong = f"{named} is of {_short(result.dtype)}, expected is {_short(allowed.dtype)}"
            if not wrong and not accuracy.passes(divergences[tensor]):
                elements = expected.numel() - divergences[tensor].kinks
                wrong = f"{named} is off by {_excess(divergences[tensor], elements)}"
        return divergences, wrong

    def restore(self) -> str:
        """Undo what was done to the inputs that all implementations share, and name the inputs that were spoilt."""
        spoilt = [name for name, tensor in self.problem.inputs.items() if not _same(tensor, self.pristine[name])]
        for name in spoilt:
            self.problem.inputs[name].copy_(self.pristine[name])
        return ", ".join(spoilt)

    def with_other_values(self) -> "Oracle":
        """The oracle of the forward pass for a problem of the same case and other values."""
        with other_values():
            return Oracle.consult(self.operation, self.case, FORWARD, self.problem.upstream.device)

    @contextmanager
    def given(self, other: "Oracle") -> Iterator[None]:
        """While this lasts, the inputs hold the values of another oracle's."""
        for name, tensor in self.problem.inputs.items():
            tensor.copy_(other.pristine[name])
        try:
            yield
        finally:
            for name, tensor in self.problem.inputs.items():
                tensor.copy_(self.pristine[name])


def _same(tensor: Tensor, other: Tensor) -> bool:
    """True if the bits are the same, of NaN as well."""
    first, second = (each.reshape(-1).view(torch.uint8) for each in (tensor, other))
    return torch.equal(first, second)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _excess(divergence: Divergence, elements: int) -> str:
    """The error and what is allowed in figures that differ, however near they are, and which elements are wrong."""
    worst, allowed = divergence.worst, divergence.allowed
    if worst is None or allowed is None:
        return f"{divergence.largest:.3g}"
    place = f"at {divergence.worst_at}, and {divergence.off:,} of {elements:,} elements by too much"
    if isnan(divergence.largest):
        return f"nan {place}"
    share = f", {100 * (worst / allowed - 1):.2g} % more than allowed" if worst < 2 * allowed else ""
    return f"{worst:.3g} where {allowed:.3g} is allowed{share}, {place}"
