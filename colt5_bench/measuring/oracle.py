"""The right results of a case, and the judgement of an implementation before and after it is timed."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isnan
from typing import Self

import torch
from torch import Tensor

from colt5_bench.case import Case, Truth, other_values
from colt5_bench.measuring import accuracy
from colt5_bench.measuring.call import Call
from colt5_bench.measuring.inputs import Inputs, shares_memory
from colt5_bench.records.results import Divergence
from colt5_bench.suite import Implementation, Operation
from colt5_bench.tolerance import Tolerance


@dataclass(frozen=True)
class Oracle:
    """The inputs of a case, the right results, and the allowed errors."""

    operation: Operation
    case: Case
    direction: str
    inputs: Inputs
    truth: Truth
    """Right results for the values of the inputs when this object was made."""

    tolerances: dict[str, Tolerance]
    is_view: bool
    """True if plain PyTorch returns a view of an input."""

    @classmethod
    def consult(
        cls, operation: Operation, case: Case, direction: str, device: torch.device, secret: str | None
    ) -> Self:
        """Compute the right results. The values of timed calls are drawn with a secret; None if there are
        no such calls."""
        problem, others = operation.problem(case, device), None
        if secret is not None:
            with other_values(secret):
                others = operation.problem(case, device)
        inputs = Inputs(problem, others)
        truth = operation.truth(case, problem, direction)
        plain, is_view = Call(operation.plain(case), problem, direction), []

        def results() -> dict[str, Tensor]:
            found = plain.results()
            is_view.append(shares_memory([found["output"]], [*problem.inputs.values()]))
            return found

        tolerances = accuracy.tolerances(results, truth.tensors(), truth.at_kink)
        return cls(operation, case, direction, inputs, truth, tolerances, any(is_view))

    def for_factor(self, factor: float) -> Self:
        """The oracle of other values of the inputs, with its own truth. Allowed errors are about the same
        as for the first values."""
        self.inputs.renew(factor)
        return replace(self, truth=self.operation.truth(self.case, self.inputs.problem, self.direction))

    def with_own_tolerances(self, factor: float) -> Self:
        """The same oracle with new tolerances, because values with this factor may allow larger errors."""
        self.inputs.renew(factor)
        plain = Call(self.operation.plain(self.case), self.inputs.problem, self.direction)
        return replace(self, tolerances=accuracy.tolerances(plain.results, self.truth.tensors(), self.truth.at_kink))

    def judge(self, implementation: Implementation, results: Mapping[str, Tensor]) -> tuple[dict[str, Divergence], str]:
        """The error of each result, and the first fault with the names of other wrong results.

        The text is empty if there is no fault.
        """
        divergences, wrong = {}, {}
        for tensor, result in results.items():
            expected, at_kink = self.truth.tensors()[tensor], self.truth.at_kink.get(tensor)
            allowed = implementation.bound(self.case, tensor, expected, self.tolerances[tensor])
            divergences[tensor] = accuracy.diverge(result, expected, at_kink, tolerance=allowed)
            named = tensor if tensor == "output" else f"gradient of {tensor}"
            if result.dtype != allowed.dtype:
                wrong[named] = f"{named} must have dtype {_short(allowed.dtype)}, got {_short(result.dtype)}"
            elif not accuracy.passes(divergences[tensor]):
                elements = expected.numel() - divergences[tensor].kinks
                wrong[named] = f"{named} is off by {_excess(divergences[tensor], elements)}"
        first, *others = wrong or [""]
        return divergences, wrong.get(first, "") + (f"; also wrong: {', '.join(others)}" if others else "")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _excess(divergence: Divergence, elements: int) -> str:
    """The largest error, the number of wrong elements, and the one that exceeds its allowed error most.

    Its error and the allowed error differ in print, even if they are close.
    """
    worst, allowed = divergence.worst, divergence.allowed
    if worst is None or allowed is None:
        return f"{divergence.largest:.3g}"
    wrong = f"{divergence.off:,} of {elements:,} elements are wrong"
    if isnan(divergence.largest):
        return f"nan at {divergence.worst_at}, and {wrong}"
    share = f", {100 * (worst / allowed - 1):.2g} % more than allowed" if worst < 2 * allowed else ""
    most = f"most at {divergence.worst_at}, by {worst:.3g} where {allowed:.3g} is allowed{share}"
    return f"up to {divergence.largest:.3g}: {wrong}, {most}"
