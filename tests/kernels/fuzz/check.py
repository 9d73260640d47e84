"""The check of a case: values and gradients of ours against the definition in fp64.

Each element has the allowed error of correct computations, from `colt5_bench.measuring.accuracy`: plain PyTorch in the
dtype of the case, with operands moved by roundings. If a gradient is wrong where the definition does not decide it, as
at a kink of coordinate descent, a case is `undecided`: neither right nor wrong.
"""

import traceback
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
import triton
from torch import Tensor

from colt5_bench.measuring.accuracy import DRAWS, Spread
from colt5_bench.measuring.rounding import MovedOperands
from colt5_bench.tolerance import Tolerance
from suites._descent import FORWARD_BOUND, GRADIENT_BOUND
from tests.kernels.fuzz.cases import OPERATIONS, Case, Maker, build
from tests.kernels.fuzz.definition import Function, Tensors, Watched, by_kernels, definition, ours
from tests.kernels.fuzz.kinks import error_handed_on, rows_at_kink

INTERPRETED = triton.knobs.runtime.interpret

PROMISED = {
    ("coor_descent", "output"): FORWARD_BOUND,
    ("coor_descent", "gradient of scores"): GRADIENT_BOUND,
    ("route_prefixes", "weights"): FORWARD_BOUND,
    ("topk", "coor_descent_values"): FORWARD_BOUND,
}
"""Promised errors of our own kernels for numbers in fp32, independent of plain PyTorch. In a row whose iterations pass
many roundings on, for example if most entries are above the threshold, the promise is their sum."""


@dataclass
class Verdict:
    """Outcome of a case."""

    case: Case
    status: str
    """ok, undecided or failed."""

    messages: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.status}: {'; '.join(self.messages)}\n  FUZZ_CASE='{self.case}'"


@dataclass
class Fault:
    """A wrong tensor, and the place."""

    name: str
    message: str
    where: Tensor | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.message}"


def examine(case: Case, device: torch.device) -> Verdict:
    """Run a case in all ways and compare. An error that breaks the device is raised."""
    try:
        return _examine(case, device)
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        return Verdict(case, "undecided", [f"out of memory: {error}".splitlines()[0]])
    except Exception as error:
        if isinstance(error, torch.AcceleratorError) or "CUDA" in str(error):
            raise
        frames = [each for each in traceback.extract_tb(error.__traceback__) if "site-packages" not in each.filename]
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        return Verdict(case, "failed", [f"{message} ({frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno})"])


def _examine(case: Case, device: torch.device) -> Verdict:
    make, watched = build(case, device), Watched()
    function, parameters = ours(case, device, watched)
    tensors = {**make.tensors, **parameters}
    found, called, faults = _run_again(function, tensors, case, make, device)

    once = len(watched.selections) if INTERPRETED else len(watched.selections) // 2
    of_truth = Watched(watched.selections[:once])
    truth = execute(definition(case, device, of_truth, torch.float64), tensors, case, torch.float64)
    allowed, moved = _tolerances(case, device, of_truth, make.dtype, tensors, truth)

    spreads = _spreads(of_truth.ranked, [each.ranked for each in moved])
    if not case.data.get("given", {}).get("random_route"):
        faults += _check_selections(of_truth, spreads)
    if case.name == "topk":
        faults += _check_topk(make.tensors, found["indices"])
    for name, expected in truth.items():
        faults += _compare(name, found[name], expected, allowed.get(name))
        if called:
            faults += _compare(f"{name}, called", called[name], expected, allowed.get(name))

    causal = _differ_causally(watched, of_truth, moved)
    if causal and faults:
        return Verdict(case, causal, [f"a causal selection differs from the definition's, {causal}"])
    wrong = [fault for fault in faults if not _is_undecided(fault, of_truth, max(spreads, default=0.0))]
    status = "failed" if wrong else "undecided" if faults else "ok"
    return Verdict(case, status, [str(fault) for fault in wrong or faults])


# Execution ------------------------------------------------------------------------------------------------------------


def execute(function: Function, tensors: Tensors, case: Case, dtype: torch.dtype | None = None) -> Tensors:
    """Outputs and the gradients of all float tensors; in fp64 without autocast, if that is the dtype."""
    return next(_executions(function, tensors, case, dtype))


def _executions(
    function: Function, tensors: Tensors, case: Case, dtype: torch.dtype | None = None
) -> Iterator[Tensors]:
    """The same for several runs in sequence, all with the same leaves."""
    device = next(iter(tensors.values())).device.type
    leaves = {}
    for name, tensor in tensors.items():
        leaf = tensor.detach()
        if tensor.is_floating_point():
            leaf = (leaf if dtype is None else leaf.to(dtype)).requires_grad_(case.grad)
        leaves[name] = leaf
    while True:
        yield _run(function, leaves, case, device, dtype)


def _run(function: Function, leaves: Tensors, case: Case, device: str, dtype: torch.dtype | None) -> Tensors:
    lowered = case.autocast is not None and dtype is None
    autocast = torch.autocast(device, getattr(torch, case.autocast)) if lowered else nullcontext()
    # For random selections.
    torch.manual_seed(case.seed)
    with torch.set_grad_enabled(case.grad), autocast:
        outputs = function(leaves)
    results = {name: out.detach() for name, out in outputs.items()}
    differentiable = {name: out for name, out in outputs.items() if out.requires_grad}
    if differentiable:
        sources = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        upstream = [_upstream(case, name, out) for name, out in differentiable.items()]
        outs, inputs = list(differentiable.values()), list(sources.values())
        gradients = torch.autograd.grad(outs, inputs, upstream, materialize_grads=True)
        results |= {f"gradient of {name}": each for name, each in zip(sources, gradients, strict=True)}
    return results


def _upstream(case: Case, name: str, out: Tensor) -> Tensor:
    """The same numbers for an output in any dtype and layout."""
    generator = torch.Generator("cpu").manual_seed(case.seed + len(name))
    expanded = case.layout == "expanded" and out.dim() > 0
    shape = (*out.shape[:-1], 1) if expanded else out.shape
    upstream = (64 * torch.randn(shape, generator=generator)).round().clamp(-192, 192) / 64
    upstream = upstream.to(out.device, out.dtype).expand(out.shape)
    return upstream.mT.contiguous().mT if case.layout == "transposed" and out.dim() > 1 else upstream


def _run_again(
    function: Function, tensors: Tensors, case: Case, make: Maker, device: torch.device
) -> tuple[Tensors, Tensors, list[Any]]:
    """Results, those of the calls of a layer without observers, and faults. Faults are that a second run gives other
    bits, or writes to its inputs."""
    before = {name: memory.clone() for name, memory in make.memory.items()}
    found, called = execute(function, tensors, case), {}
    faults = []
    # The interpreter always has the same order.
    if not INTERPRETED:
        faults += _differences(found, execute(function, tensors, case), "has other bits in a second run")
    if case.name not in OPERATIONS:
        called, calls = _calls_of_layer(tensors, case, device)
        outputs = {name: found[name] for name in found if not name.startswith("gradient")}
        faults += _differences(outputs, called, "has other bits where nobody watches the layer")
        for number, results in enumerate(calls, start=2):
            faults += _differences(called, results, f"has other bits in call {number} of a layer than in the first")
    written = [Fault(name, "was written to") for name, memory in before.items() if not _same(memory, make.memory[name])]
    return found, called, faults + written


def _calls_of_layer(tensors: Tensors, case: Case, device: torch.device) -> tuple[Tensors, list[Tensors]]:
    """The first call of a layer, the recorded one, and two more, which are played if Triton runs."""
    first, *later = islice(_executions(by_kernels(case, device), tensors, case), 4)
    return first, later


def _differences(expected: Tensors, results: Tensors, message: str) -> list[Fault]:
    return [Fault(name, message) for name in expected if not _same(expected[name], results[name])]


def _same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, including NaN."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.contiguous().view(bits), other.contiguous().view(bits))


# Allowed errors -------------------------------------------------------------------------------------------------------


class _AllMoved(MovedOperands):
    """A case of fp64 has no more exact truth than fp64."""

    def _move(self, x: Any) -> Any:
        floats = isinstance(x, Tensor) and x.is_floating_point()
        return x * self._factors_for(x) if floats else x


def _tolerances(
    case: Case, device: torch.device, of_truth: Watched, dtype: torch.dtype, tensors: Tensors, truth: Tensors
) -> tuple[dict[str, tuple[Tolerance, torch.dtype]], list[Watched]]:
    """The allowed error of each float tensor, and its expected dtype. Also the scores by which the underlying
    computations have selected."""
    spreads = {name: Spread(expected) for name, expected in truth.items() if expected.is_floating_point()}
    moving = _AllMoved if dtype == torch.float64 else MovedOperands
    seen, dtypes = [], {}
    for context in (nullcontext(), *map(moving, range(DRAWS))):
        seen.append(Watched(of_truth.selections))
        with context:
            results = execute(definition(case, device, seen[-1]), tensors, case)
        for name, spread in spreads.items():
            spread.add(results[name])
            dtypes[name] = results[name].dtype
    allowed = {}
    for name, spread in spreads.items():
        tolerance = spread.tolerance()
        if (case.name, name) in PROMISED and dtype != torch.float64:
            largest = truth[name].abs().max().item() if truth[name].numel() else 0.0
            rounding = torch.finfo(dtypes[name]).eps * largest
            tolerance = replace(tolerance, most=_promised(PROMISED[case.name, name], of_truth, truth[name]) + rounding)
        allowed[name] = tolerance, dtypes[name]
    return allowed, seen


def _promised(promise: float, of_truth: Watched, truth: Tensor) -> Tensor:
    """The largest error of a row `... 1`, or of all rows if they are not those of one descent."""
    rows = [error_handed_on(*each) for each in of_truth.relaxed]
    if len(rows) == 1 and rows[0].shape == (*truth.shape[:-1], 1):
        return rows[0].clamp(min=promise)
    return truth.new_tensor(max([promise, *(each.max().item() for each in rows if each.numel())]))


def _spreads(of_truth: Sequence[tuple], of_moved: Sequence[Sequence[tuple]]) -> list[float]:
    """Rounding errors of the scores of each selection."""
    return [
        max((_distance(each[call][0], scores) for each in of_moved), default=0.0)
        for call, (scores, *_) in enumerate(of_truth)
    ]


def _distance(one: Tensor, other: Tensor) -> float:
    return (one.double() - other).abs().max().item() if one.numel() else 0.0


# Comparison -----------------------------------------------------------------------------------------------------------


def _compare(name: str, found: Tensor, truth: Tensor, allowed: tuple[Tolerance, torch.dtype] | None) -> list[Fault]:
    if found.shape != truth.shape or found.device != truth.device:
        what = [f"of shape {tuple(x.shape)} on {x.device}" for x in (found, truth)]
        return [Fault(name, f"is {what[0]}, by the definition {what[1]}")]
    if allowed is None:
        equal = found.dtype == truth.dtype and torch.equal(found, truth)
        return [] if equal else [Fault(name, "is not that of the definition")]
    tolerance, dtype = allowed
    if found.dtype != dtype:
        return [Fault(name, f"is of {found.dtype}, by the definition of {dtype}")]
    wide, most = found.double(), tolerance.of(truth)
    away = (wide - truth).abs()
    off = ~((away <= most) | (wide == truth) | (wide.isnan() & truth.isnan()))
    # Beyond the range of its dtype.
    off &= (truth.abs() <= torch.finfo(dtype).max) | wide.isfinite()
    if not off.any():
        return []
    worst = (away / most).masked_fill(~off, -1.0).nan_to_num(torch.inf).argmax()
    place = tuple(each.item() for each in torch.unravel_index(worst, off.shape))
    numbers = f"{wide[place].item():.9g}, right is {truth[place].item():.9g} +- {most[place].item():.2g}"
    return [Fault(name, f"{int(off.sum())} of {off.numel()} are off, the worst at {list(place)}: {numbers}", off)]


def _check_selections(of_truth: Watched, spreads: list[float]) -> list[Fault]:
    """Selected entries have the largest scores, in order, up to rounding errors of the scores."""
    messages = []
    for (scores, mask, indices), spread in zip(of_truth.ranked, spreads, strict=True):
        if not scores.numel():
            continue
        if indices.min() < 0 or indices.max() >= scores.shape[-1]:
            messages.append("an index is out of range")
            continue
        taken = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, indices, True)
        if (taken.sum(-1) != indices.shape[-1]).any():
            messages.append("an index is selected twice")
        slack = 8 * spread
        ranked = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        selected = ranked.gather(-1, indices)
        if (selected[..., :-1] < selected[..., 1:] - slack).any():
            messages.append("it is not in the order of its scores")
        missed = ranked.masked_fill(taken, -torch.inf).amax(-1) - selected[..., -1]
        if (missed > slack).any():
            messages.append(
                f"it leaves out what is larger by {missed.nan_to_num().max().item():.3g} than +- {slack:.2g}"
            )
    return [Fault("selection", message) for message in messages]


def _check_topk(tensors: Tensors, indices: Tensor) -> list[Fault]:
    """A selection from given numbers is exactly right."""
    x, mask = tensors["x"], tensors.get("mask")
    ranked = x if mask is None else x.masked_fill(~mask, -torch.inf)
    distinct = (indices.sort(-1).values.diff(dim=-1) > 0).all()
    best = ranked.topk(indices.shape[-1], dim=-1).values
    right = distinct and torch.equal(ranked.gather(-1, indices), best)
    return [] if right else [Fault("indices", "are not those of the largest")]


# Undecided cases ------------------------------------------------------------------------------------------------------


def _is_undecided(fault: Fault, of_truth: Watched, spread: float) -> bool:
    """True if a fault is in a gradient, in rows at a kink if it has rows."""
    if fault.where is None or not fault.name.startswith("gradient"):
        return False
    kinks = [rows_at_kink(*relaxed, spread) for relaxed in of_truth.relaxed]
    if len(kinks) == 1 and fault.where.shape[:-1] == kinks[0].shape:
        return not (fault.where.any(-1) & ~kinks[0]).any()
    return any(rows.any() for rows in kinks)


def _differ_causally(watched: Watched, of_truth: Watched, moved: Sequence[Watched]) -> str | None:
    """For causal selections that differ from the definition: whether they are wrong, or scores are too close to
    decide."""
    for (found, *_), (expected, before, scores), *others in zip(
        watched.causal, of_truth.causal, *(each.causal for each in moved), strict=False
    ):
        if torch.equal(found, expected):
            continue
        spread = max(max(_distance(other[1], before), _distance(other[2], scores)) for other in others)
        windows = (found != expected).any(-1)
        ranked = before.sort(-1, descending=True).values
        least = ranked[..., found.shape[-1] - 1 : found.shape[-1]]
        near = ((scores - least).abs() <= 8 * spread).any(-1)
        return "undecided" if (near | ~windows).all() else "failed"
    return None
