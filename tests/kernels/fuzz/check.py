"""The check of a case: values and gradients of ours against the definition in fp64.

What is selected may differ where scores differ by less than a rounding. So what ours selects is checked by the fp64
scores, and then the definition is asked what follows from that selection. Where a gradient is off and the definition
has no decided one, as at a kink of coordinate descent, the case is `undecided`.
"""

import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from math import ceil
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor, nn
from torch.func import functional_call

import kernels
import reference
from reference._arguments import epsilon_schedule
from tests.kernels.fuzz.budget import Moved, allowed, moved
from tests.kernels.fuzz.cases import OPERATIONS, Case, build

DRAWS = 3
"""Of what plain PyTorch gives when it is moved by roundings."""

UNIT = torch.finfo(torch.float32).eps / 2

WIDE = {"coor_descent", "segmented_coor_descent", "soft_topk", "topk"}
"""Operations that compute in fp32 what they are given in half precision."""

INTERPRETED = triton.knobs.runtime.interpret

Tensors = dict[str, Tensor]


@dataclass
class Verdict:
    """What came of a case."""

    case: Case
    status: str
    """ok, undecided or failed."""

    messages: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.status}: {'; '.join(self.messages)}\n  FUZZ_CASE='{self.case}'"


@dataclass
class Watched:
    """What an execution selected and relaxed, in the order of the calls."""

    selections: list[Tensor] = field(default_factory=list)
    causal: list[Tensor] = field(default_factory=list)
    chosen_by: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    """Scores and mask of each selection."""

    relaxed: list[tuple[str, Tensor, dict[str, Any]]] = field(default_factory=list)
    """Scores and arguments of each relaxation."""


def examine(case: Case, device: torch.device) -> Verdict:
    """Run a case in all ways and compare."""
    try:
        return _examine(case, device)
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        return Verdict(case, "undecided", [f"out of memory: {str(error).splitlines()[0]}"])
    except Exception as error:
        if "CUDA error" in str(error) or "CUDA driver" in str(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        where = next((f for f in reversed(frames) if "site-packages" not in f.filename), frames[-1])
        message = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return Verdict(case, "failed", [f"{message} ({where.filename.rsplit('/', 2)[-1]}:{where.lineno})"])


def _examine(case: Case, device: torch.device) -> Verdict:
    make = build(case, device)
    bases = {name: base.clone() for name, base in make.bases.items()}
    watched = Watched()
    ours, parameters = _ours(case, device, watched)
    tensors = {**make.tensors, **parameters}
    first = execute(ours, tensors, case, seeded=True)
    # The interpreter has no other order of things.
    again = first if INTERPRETED else execute(ours, tensors, case, seeded=True)
    faults = [f"{name}: not the same bits in a second run" for name in first if not _same(first[name], again[name])]
    faults += [f"{name}: was written to" for name, base in bases.items() if not _same(base, make.bases[name])]
    del again, bases

    given = watched.selections if INTERPRETED else watched.selections[: len(watched.selections) // 2]
    truth_watched = Watched(given, watched.causal)
    truth = execute(_plain(case, device, truth_watched, parameters, torch.float64), tensors, case, torch.float64)
    draws, scores = [], []
    for seed in range(DRAWS):
        drawn = Watched(given)
        torch.manual_seed(case.seed + seed)
        plain = _plain(case, device, drawn, parameters, make.dtype)
        inputs = tensors if case.name == "route_prefixes" else {name: moved(x) for name, x in tensors.items()}
        with Moved():
            draws.append(execute(plain, inputs, case))
        scores.append(drawn.chosen_by)

    spreads = [
        max((each[call][0].double() - wide).abs().amax().item() if wide.numel() else 0.0 for each in scores)
        for call, (wide, _) in enumerate(truth_watched.chosen_by)
    ]
    faults += _check_selections(truth_watched, given, spreads)
    faults += _check_exact(case, make.tensors, first)
    undecided = _differ_causally(case, watched, truth_watched)
    for name, expected in truth.items():
        faults += _compare(name, first[name], expected, [draw[name] for draw in draws], undecided)
    decided = [fault for fault in faults if not _at_kink(fault, case, truth_watched, max(spreads, default=0.0))]
    messages = [str(fault) for fault in decided or faults]
    if undecided and faults:
        return Verdict(case, "undecided", [*undecided, *messages])
    return Verdict(case, "failed" if decided else "undecided" if faults else "ok", messages)


# Execution ------------------------------------------------------------------------------------------------------------


def execute(
    function: Callable[[Tensors], Tensors],
    tensors: Tensors,
    case: Case,
    dtype: torch.dtype | None = None,
    seeded: bool = False,
) -> Tensors:
    """Outputs and the gradients of all float tensors."""
    device = next(iter(tensors.values())).device.type
    leaves = {}
    for name, tensor in tensors.items():
        leaf = tensor.detach()
        if tensor.is_floating_point():
            leaf = (leaf if dtype is None else leaf.to(dtype)).requires_grad_(case.grad)
        leaves[name] = leaf
    autocast = getattr(torch, case.autocast) if case.autocast and dtype is None else None
    if seeded:
        torch.manual_seed(case.seed)
    context = nullcontext() if autocast is None else torch.autocast(device, autocast)
    with torch.set_grad_enabled(case.grad), context:
        outputs = function(leaves)
    results = {name: out.detach() for name, out in outputs.items()}
    differentiable = {name: out for name, out in outputs.items() if out.requires_grad}
    if differentiable:
        sources = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        upstream = [_upstream(case, name, out) for name, out in differentiable.items()]
        gradients = torch.autograd.grad(
            list(differentiable.values()), list(sources.values()), upstream, materialize_grads=True
        )
        results |= {f"gradient of {name}": each for name, each in zip(sources, gradients, strict=True)}
    return results


def _upstream(case: Case, name: str, out: Tensor) -> Tensor:
    """The same numbers for an output, whatever its dtype."""
    generator = torch.Generator().manual_seed(case.seed + len(name))
    shape = out.shape if case.layout != "expanded" else (*out.shape[:-1], 1) if out.dim() else ()
    # What fp32, bf16 and fp16 have without a rounding.
    values = (64 * torch.randn(shape, generator=generator)).round() / 64
    upstream = values.clamp(-3, 3).to(out.device, out.dtype)
    return upstream.expand(out.shape) if case.layout != "transposed" or out.dim() < 2 else upstream.mT.contiguous().mT


def _named(result: Any) -> Tensors:
    if isinstance(result, Tensor):
        return {"output": result}
    return {name: value for name, value in result._asdict().items() if value is not None}


# Ours -----------------------------------------------------------------------------------------------------------------


def _ours(case: Case, device: torch.device, watched: Watched) -> tuple[Callable[[Tensors], Tensors], Tensors]:
    """As a function of tensors, and the parameters that are among these."""
    if case.name not in OPERATIONS:
        module = layer(case, device, use_triton=True)
        _watch(module, watched)
        parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
        return lambda tensors: _call(module, case, tensors), parameters

    def function(tensors: Tensors) -> Tensors:
        result = _named(getattr(kernels, case.name)(**tensors, **case.arguments()))
        if case.name == "route":
            watched.selections.append(_within_blocks(result["indices"], case.options, tensors["x"].shape[1]))
        if case.name == "topk":
            watched.selections.append(result["indices"])
        return result

    return function, {}


def layer(case: Case, device: torch.device, *, use_triton: bool) -> nn.Module:
    """The layer of a case, with parameters in its dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        options = case.arguments()
        options["router_use_triton" if case.name.endswith("ViT") else "use_triton"] = use_triton
        module = getattr(reference, case.name)(**options)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("routing_token"):
                parameter.mul_(case.data["std"] / parameter.shape[-1] ** 0.5)
    return module.to(device, getattr(torch, case.dtype))


def _call(module: nn.Module, case: Case, tensors: Tensors) -> Tensors:
    """A layer called with parameters and inputs by their names, and the numbers of the case."""
    names = {name for name, _ in module.named_parameters()}
    parameters = {name: tensors[name] for name in names}
    inputs = {name: tensor for name, tensor in tensors.items() if name not in names}
    accepted = inspect.signature(module.forward).parameters
    numbers = {name: value for name, value in case.data["given"].items() if name not in inputs and name in accepted}
    numbers = {name: value for name, value in numbers.items() if "mask" not in name and (value or "random" in name)}
    return _named(functional_call(module, parameters, kwargs={**inputs, **numbers}))


def _watch(module: nn.Module, watched: Watched) -> None:
    """Keep what the routers of a layer with kernels select."""

    def after(owner: nn.Module, name: str, keep: Callable[[Any, tuple, dict[str, Any]], None]) -> None:
        function = getattr(owner, name)

        def watching(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            keep(result, args, kwargs)
            return result

        setattr(owner, name, watching)

    selections = watched.selections
    for part in module.modules():
        if isinstance(part, reference.CoordinateDescentRouter):
            after(part, "_choose", lambda result, args, kwargs: selections.append(result))
            after(
                part,
                "_route",
                lambda result, args, kwargs: selections.append(
                    _within_blocks(result.indices, kwargs, args[0].shape[1])
                ),
            )
        if getattr(part, "_route_prefixes", None) is not None:
            after(part, "_route_prefixes", lambda result, args, kwargs: selections.append(result.indices))
        if hasattr(part, "_select_causally"):
            after(part, "_select_causally", lambda result, args, kwargs: watched.causal.append(result.indices))


def _within_blocks(indices: Tensor, options: dict[str, Any], n: int) -> Tensor:
    """Indices `b r (m s)` of the whole as what is selected from blocks: `b r m s`."""
    size = options["block_size"]
    if size is None:
        return indices
    blocks = ceil(n / size)
    starts = torch.arange(blocks, device=indices.device)[:, None] * size
    return indices.unflatten(-1, (blocks, -1)) - starts


# The definition -------------------------------------------------------------------------------------------------------


def _plain(
    case: Case, device: torch.device, watched: Watched, parameters: Tensors, dtype: torch.dtype
) -> Callable[[Tensors], Tensors]:
    """The definition, given what was selected."""

    def function(tensors: Tensors) -> Tensors:
        with _replaying(watched) as definition:
            if case.name not in OPERATIONS:
                module = layer(case, device, use_triton=False).to(dtype)
                _replay_causal(module, watched)
                return _call(module, case, tensors)
            widened = {name: _widened(x) if case.name in WIDE else x for name, x in tensors.items()}
            results = _named(definition[case.name](**widened, **case.arguments()))
            if case.name in WIDE:
                results = {name: x.to(dtype) if x.is_floating_point() else x for name, x in results.items()}
            return results

    return function


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() and x.dtype.itemsize == 2 else x


@contextmanager
def _replaying(watched: Watched) -> Iterator[dict[str, Callable[..., Any]]]:
    """The operations of the reference, in which all that select take one selection after the other."""
    given = iter(watched.selections)

    def select(scores: Tensor, *, num_selected: int, mask: Tensor | None = None) -> Tensor:
        watched.chosen_by.append((scores.detach(), mask))
        indices = next(given)
        assert indices.shape == (*scores.shape[:-1], num_selected), (indices.shape, scores.shape, num_selected)
        return indices

    def relaxing(name: str) -> Callable[..., Tensor]:
        def relax(scores: Tensor, **options: Any) -> Tensor:
            watched.relaxed.append((name, scores.detach(), options))
            return getattr(reference, name)(scores, **options)

        return relax

    descent = relaxing("coor_descent")

    def topk(x: Tensor, k: int, **options: Any) -> Any:
        mask, ratio, quick = (
            options.pop(name, None) for name in ("mask", "coor_descent_k_ratio", "non_differentiable")
        )
        del options["fused"]
        indices = next(given)
        there = torch.ones_like(indices, dtype=torch.bool) if mask is None else mask.expand(x.shape).gather(-1, indices)
        values = x.gather(-1, indices).masked_fill(~there, 0.0)
        if quick:
            return reference.TopkReturn(values, indices, None, None)
        soft = descent(x, k=min(k * ratio, x.shape[-1]), mask=mask, **options).gather(-1, indices)
        gates = (soft + (1.0 - soft).detach()).masked_fill(~there, 0.0)
        return reference.TopkReturn(values * gates, indices, soft, gates)

    def segmented(scores: Tensor, checkpoint_segments: int, **options: Any) -> Tensor:
        return descent(scores, **options)

    modules = [sys.modules[f"reference.{name}"] for name in ("route", "router", "route_prefixes")]
    with _patched(modules, {"select": select, "coor_descent": descent, "soft_topk": relaxing("soft_topk")}):
        yield {
            **{name: getattr(reference, name, None) for name in OPERATIONS},
            "coor_descent": descent,
            "segmented_coor_descent": segmented,
            "soft_topk": relaxing("soft_topk"),
            "topk": topk,
        }


@contextmanager
def _patched(modules: list[ModuleType], functions: dict[str, Callable]) -> Iterator[None]:
    patches = [
        mock.patch.object(module, name, function)
        for module in modules
        for name, function in functions.items()
        if hasattr(module, name)
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def _replay_causal(module: nn.Module, watched: Watched) -> None:
    pass


# Comparison -----------------------------------------------------------------------------------------------------------


@dataclass
class Fault:
    """A tensor that is off, and where."""

    name: str
    message: str
    where: Tensor | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.message}"


def _same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, NaN included."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.contiguous().view(integer), other.contiguous().view(integer))


def _compare(name: str, actual: Tensor, truth: Tensor, draws: list[Tensor], undecided: list[str]) -> list[Any]:
    plain = draws[0]
    if actual.dtype != plain.dtype or actual.shape != truth.shape or actual.device != plain.device:
        what = [(tuple(x.shape), x.dtype, x.device.type) for x in (actual, plain)]
        return [f"{name}: shape, dtype and device are {what[0]}, of the definition {what[1]}"]
    if not actual.is_floating_point():
        return [] if torch.equal(actual, truth) else [Fault(name, "differs from the definition")]
    wide = actual.double()
    bound = allowed(truth, draws, actual.dtype)
    difference = (wide - truth).abs()
    agree = (difference <= bound) | (wide == truth) | (wide.isnan() & truth.isnan())
    # Beyond the largest number of its dtype.
    agree |= (truth.abs() > torch.finfo(actual.dtype).max) & ~wide.isfinite()
    if agree.all():
        return []
    off = ~agree
    first = tuple(off.nonzero()[0].tolist())
    worst = (difference / bound).masked_fill(agree, 0).nan_to_num(torch.inf).argmax()
    place = tuple(int(i) for i in torch.unravel_index(worst, off.shape)) if off.dim() else ()
    shown = f"{wide[place].item():.9g} at {list(place)}, is {truth[place].item():.9g} +- {bound[place].item():.2g}"
    return [
        Fault(name, f"{int(off.sum())} of {off.numel()} are off, the first at {list(first)}, the worst {shown}", off)
    ]


def _check_selections(truth: Watched, given: list[Tensor], spreads: list[float]) -> list[str]:
    """What was selected has the largest scores, in their order, within what roundings move these by."""
    faults = []
    for (scores, mask), indices, spread in zip(truth.chosen_by, given, spreads, strict=False):
        if not scores.numel():
            continue
        slack = 4 * spread + 8 * UNIT * scores.abs().max().item() * (scores.dtype != torch.float64)
        valid = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand(scores.shape)
        if indices.min() < 0 or indices.max() >= scores.shape[-1]:
            faults.append("selection: an index is out of range")
            continue
        taken = torch.zeros_like(valid).scatter(-1, indices, True)
        if (taken.sum(-1) != indices.shape[-1]).any():
            faults.append("selection: an index is selected twice")
        if _is_random(scores):
            continue
        ranked = scores.masked_fill(~valid, -torch.inf)
        selected = ranked.gather(-1, indices)
        if (selected[..., :-1] < selected[..., 1:] - slack).any():
            faults.append("selection: is not in the order of its scores")
        least, most = selected[..., -1], ranked.masked_fill(taken, -torch.inf).amax(-1)
        if (least < most - slack).any():
            faults.append(f"selection: leaves out a score larger by {(most - least).max().item():.3g} than {slack:.2g}")
    return faults


def _is_random(scores: Tensor) -> bool:
    """Random numbers in place of scores, which fp64 has others of."""
    return bool(((scores >= 0) & (scores < 1)).all()) and scores.numel() > 1


def _check_exact(case: Case, tensors: Tensors, results: Tensors) -> list[str]:
    """Selections from numbers that are given are right to the last one."""
    if case.name == "topk":
        x, mask = tensors["x"], tensors.get("mask")
        ranked = x if mask is None else x.masked_fill(~mask, -torch.inf)
        indices = results["indices"]
        best = ranked.topk(indices.shape[-1], dim=-1).values
        distinct = indices.sort(-1).values.diff(dim=-1).ne(0).all()
        if not distinct or not torch.equal(ranked.gather(-1, indices), best):
            return ["indices: are not those of the largest"]
    return []


def _differ_causally(case: Case, ours: Watched, truth: Watched) -> list[str]:
    return []


# Kinks ----------------------------------------------------------------------------------------------------------------


def _at_kink(fault: Any, case: Case, truth: Watched, spread: float) -> bool:
    """Whether a fault is one of a gradient that the definition has not decided."""
    if not isinstance(fault, Fault) or fault.where is None or not fault.name.startswith("gradient"):
        return False
    undecided = [_undecided_rows(*relaxed, spread) for relaxed in truth.relaxed]
    if not any(rows.any() for rows in undecided):
        return False
    if len(undecided) == 1 and fault.where.shape[:-1] == undecided[0].shape:
        return not bool((fault.where.any(-1) & ~undecided[0]).any())
    return True


def _undecided_rows(name: str, scores: Tensor, options: dict[str, Any], spread: float) -> Tensor:
    """Rows `...` of fp64 scores `... n` with an entry that the rounding of the input puts on either side of a kink."""
    mask = options.get("mask")
    valid = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand(scores.shape)
    s = scores.masked_fill(~valid, 0.0)
    k = torch.as_tensor(options["k"], dtype=torch.float64, device=scores.device).unsqueeze(-1)
    tolerance = 4 * UNIT * s.abs() + 4 * spread + 1e-13
    if name == "soft_topk":
        y = reference.soft_topk(scores, k=k.squeeze(-1), eps=options["eps"], mask=mask)
        below = s.masked_fill(~valid | (y == 1), -torch.inf).amax(-1, keepdim=True)
        largest = y.masked_fill(y == 1, 0).amax(-1, keepdim=True)
        distance = (s - below) + options["eps"] * largest.log()
        near = distance.abs() <= tolerance + 1e-6 * options["eps"]
        return (near & valid & below.isfinite()).any(-1)
    schedule = epsilon_schedule(
        options["n_iters"], options["eps"], options.get("eps_init"), options.get("eps_decay", 1.0)
    )
    *temperatures, _ = schedule
    count = valid.sum(-1, keepdim=True).double()
    a = temperatures[0] * (k.log() - count.log())
    undecided = torch.zeros_like(valid)
    for t, temperature in enumerate(temperatures):
        if t > 0:
            exponent = (torch.minimum(s, -a) / temperature).masked_fill(~valid, -torch.inf)
            a = temperature * (k.log() - exponent.logsumexp(dim=-1, keepdim=True))
        undecided |= ((s + a).abs() <= tolerance) & valid
    return undecided.any(-1)
