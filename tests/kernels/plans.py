"""All plans that the launchers of an operation may choose, and calls that follow each of them."""

import inspect
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kernels
from kernels._common import plans
from kernels._common.attention import is_ragged
from kernels._common.plans import Plan
from kernels.combine import triton as combine_kernels
from kernels.coor_descent import backward as descent_backward
from kernels.coor_descent import forward as descent_forward
from kernels.gathered_attention import backward as gathered_backward
from kernels.gathered_attention import forward as gathered_forward
from kernels.gathered_attention import inverse
from kernels.route import triton as gather_kernel
from kernels.route_prefixes import backward as prefix_backward
from kernels.route_prefixes import forward as prefix_forward
from kernels.routed_attention import triton as routed_attention_kernels
from kernels.routing_scores import triton as score_kernels
from kernels.segmented_coor_descent import triton as segmented_kernels
from kernels.select import order as order_kernels
from kernels.select import triton as select_kernels
from kernels.soft_topk import triton as soft_topk_kernels
from kernels.topk import triton as topk_kernels
from kernels.windowed_attention import backward as windowed_backward
from kernels.windowed_attention import bias_gradient, positions
from kernels.windowed_attention import forward as windowed_forward

DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
"""Dtypes by the bytes of an entry."""

BOOL = (False, True)

MOST_ENTRIES = 2**24
"""Most entries of a tensor that tests allocate."""


def around(*borders: int, most: int = 2**22) -> tuple[int, ...]:
    """Sizes up to some number: powers of two, the borders of a launcher, and the neighbours of all these."""
    middles = {2**power for power in range(most.bit_length())} | set(borders)
    near = {middle + step for middle in middles for step in (-1, 0, 1)}
    return tuple(sorted(size for size in near if 0 < size <= most))


COUNTS = {
    "aligned": BOOL,
    "available": (132, 1, 58, 72, 108),
    "batch": (1, 2, 4, 33, 132, 4000, 65535, 65537, 2**31, 2**33),
    "chunks": (1, 2, 64),
    "d": around(96, 384, 768, 5120, most=8192),
    "dim": around(48, 80, 96, 112, most=128),
    "head_dim": around(48, 80, 96, 112, most=128),
    "heads": (1, 2, 3, 8, 16),
    "itemsize": (2, 4),
    "n": around(descent_forward.RESIDENT, 12000, 108 * descent_forward.RESIDENT, 132 * descent_forward.RESIDENT),
    "n_entries": (1, 2, 1023, 1024, 1025, 2**20, 2**31, 2**33),
    "n_iters": (1, 2, 3, 20, 64, 65, 500),
    "n_queries": around(most=4096),
    "n_routed": around(),
    "n_rows": (1, 2, 3, 4, 5, 8, 32, 33, 64, 132, 300, 1000, 4096, 8192, 65535, 65536, 65537, 2**31, 2**33),
    "n_tokens": around(),
    "n_windows": around(most=2048),
    "pairs": BOOL,
    "routes": tuple(range(1, score_kernels.MOST_ROUTES + 1)),
    "selected": around(select_kernels.LISTED, select_kernels.MOST_RANKED, most=2**17),
    "simple": BOOL,
    "sweeps": BOOL,
    "tiles": around(most=2**12),
    "total": (1, 2, 1023, 1024, 1025, 2**20, 2**31, 2**33),
    "unmasked": BOOL,
    "window_size": around(prefix_forward.LONGEST_END, most=8192),
}
"""Tested sizes by name. A launcher with other names has to add its sizes here."""


NOT_A_COUNT = {
    "aligned",
    "available",
    "itemsize",
    "n_iters",
    "pairs",
    "positions",
    "simple",
    "sweeps",
    "unmasked",
}
"""Names among these that do not make a tensor larger."""


def sizes_of(planner: Callable[..., Plan], **limits: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """All combinations of the possible sizes of a planner, or ten thousand of them if there are more. No more entries
    are selected than exist."""
    names = tuple(inspect.signature(planner).parameters)
    values = [limits.get(name, COUNTS[name]) for name in names]
    if math.prod(map(len, values)) <= 50_000:
        chosen = itertools.product(*values)
    else:
        rng = random.Random(planner.__qualname__)
        chosen = (tuple(map(rng.choice, values)) for _ in range(50_000))
    named = (dict(zip(names, sizes, strict=True)) for sizes in chosen)
    named = (sizes for sizes in named if sizes.get("selected", 0) <= sizes.get("n", math.inf))
    return (sizes for sizes in named if not sizes.get("aligned") or _length_of_rows(sizes) % 16 == 0)


def _length_of_rows(sizes: Mapping[str, Any]) -> int:
    return sizes["n"] if "n" in sizes else (sizes["n_windows"] + 1) * sizes["window_size"]


class Case(NamedTuple):
    """A call that follows a plan."""

    planner: Callable[..., Plan]
    sizes: dict[str, Any]
    variant: dict[str, Any]


class Operation(NamedTuple):
    """Recipe for calls of an operation that follow a plan."""

    planners: tuple[Callable[..., Plan], ...]

    call: Callable[..., None]
    """Function of the sizes of a planner and a variant: forward and backward pass."""

    variants: tuple[dict[str, Any], ...]
    """Other options that make another kernel."""

    limits: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    """Sizes that differ from the common ones."""

    key: Callable[[Plan], object] = lambda plan: tuple(sorted(plan.settings.items()))
    """The key of a plan: plans with the same key are launched in the same way."""


def _variants(**choices: tuple[Any, ...]) -> tuple[dict[str, Any], ...]:
    """All combinations, in an order in which neighbours differ in most options."""
    combined = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    random.Random(0).shuffle(combined)
    return tuple(combined)


def _call_and_differentiate(kept: bool, call: Callable[[], Tensor]) -> None:
    """Forward and backward pass; unless `kept`, also a forward pass that keeps nothing for it."""
    if not kept:
        with torch.no_grad():
            call()
    output = call()
    output.backward(torch.zeros_like(output))


def _rows(
    n_rows: int,
    n: int,
    dtype: torch.dtype,
    masked: bool,
    per_row: bool = False,
    differentiable: bool = True,
    aligned: bool = True,
):
    """Scores, mask and k. Rows are aligned if their length allows it."""
    wide = torch.zeros(n_rows, n + (not aligned), dtype=dtype)
    scores = wide[:, :n].requires_grad_(differentiable)
    mask = torch.ones(n_rows, n, dtype=torch.bool) if masked else None
    return scores, mask, torch.ones(n_rows, requires_grad=differentiable) if per_row else 1.0


def coor_descent(n_rows, n, simple=True, aligned=True, per_row=False, kept=True, masked=True, half=True, **_):
    dtype = torch.bfloat16 if half and not simple else torch.float32
    masked = not simple and (masked or not half)
    scores, mask, k = _rows(n_rows, n, dtype, masked, per_row, aligned=aligned)
    schedule = {"n_iters": 4, "eps": 0.1, "eps_init": 1.0, "eps_decay": 0.5}
    _call_and_differentiate(kept, lambda: kernels.coor_descent(scores, k=k, mask=mask, **schedule))


def topk(n_rows, n, selected, masked=False, save=True, itemsize=4, **_):
    """No backward pass, because it is that of coordinate descent."""
    x, mask, _ = _rows(n_rows, n, DTYPES[itemsize], masked, differentiable=save)
    kernels.topk(x, min(selected, n), n_iters=4, mask=mask, fused=True)


def soft_topk(n_rows, n, unmasked=True, aligned=True, per_row=False, itemsize=4, **_):
    scores, mask, k = _rows(n_rows, n, DTYPES[itemsize], not unmasked, per_row, aligned=aligned)
    _call_and_differentiate(True, lambda: kernels.soft_topk(scores, k=k, eps=0.1, mask=mask))


def select(n_rows, n=1, selected=1, available=None, masked=False, itemsize=4, **_):
    """Plans that do not depend on a GPU are for longer lists."""
    selected = max(selected, 1 if available else select_kernels.LISTED + 1)
    scores, mask, _ = _rows(n_rows, max(n, selected), DTYPES[itemsize], masked, differentiable=False)
    kernels.select(scores, num_selected=selected, mask=mask)


def segmented_coor_descent(n_rows, n, itemsize, masked, per_row, kept, **_):
    scores, mask, k = _rows(n_rows, n, DTYPES[itemsize], masked, per_row)
    options = {"n_iters": 4, "checkpoint_segments": 2}
    _call_and_differentiate(kept, lambda: kernels.segmented_coor_descent(scores, k=k, mask=mask, **options))


def routing_scores(batch, n, d, routes, itemsize, cosine=False, needs_x=True, **_):
    x = torch.zeros(batch, n, d, dtype=DTYPES[itemsize], requires_grad=needs_x)
    routing_tokens = torch.zeros(1, routes, d, requires_grad=True)
    scale = 8.0 if cosine else None
    _call_and_differentiate(True, lambda: kernels.routing_scores(x, routing_tokens, cosine_sim_scale=scale))


def gathered_gradients(batch, selected, d, routes, cosine, itemsize, **_):
    x = torch.zeros(batch, selected, d, dtype=DTYPES[itemsize])
    scores = torch.zeros(batch, routes, selected)
    inverse_norms = torch.zeros(batch, selected) if cosine else None
    indices, slots = (torch.zeros(batch, routes, selected, dtype=dtype) for dtype in (torch.int64, torch.int32))
    gathered = indices, slots, x.new_zeros(batch, routes, selected, d)
    inputs = (x, torch.zeros(1, routes, d), scores, inverse_norms, scores, gathered)
    score_kernels.launch_gradients(*inputs, torch.zeros_like(x))


def gather(n_rows, selected, d, itemsize, straight=False, masked=False, kept=True, **_):
    """From several sequences of one block each."""
    x = torch.zeros(n_rows, selected, d, dtype=DTYPES[itemsize])
    indices, weights = torch.zeros(n_rows, selected, dtype=torch.int64), torch.zeros(n_rows, selected)
    mask = torch.zeros(n_rows, selected, dtype=torch.bool) if masked else None
    slots = torch.zeros(n_rows, 1, selected, dtype=torch.int32) if kept else None
    outputs = (weights[:, None], x[:, None].clone(), indices[:, None], slots)
    gather_kernel.launch_gather(x, indices, weights, mask, 1, straight, *outputs)


def spread(n_rows, n, selected=1, **_):
    weights, scores = torch.zeros(n_rows, 1, selected), torch.zeros(n_rows, 1, n)
    gather_kernel.launch_spread(weights, scores.to(torch.int32), scores)


def normalize(n_rows, d, center, biased, itemsize, **_):
    x = torch.zeros(n_rows, d, dtype=DTYPES[itemsize], requires_grad=True)
    bias = torch.zeros(d, requires_grad=True) if biased else None
    weight = torch.ones(d, requires_grad=True)
    _call_and_differentiate(True, lambda: kernels.normalize(x, weight, bias, center=center))


def biased_gelu(n_rows, d, itemsize, **_):
    x = torch.zeros(n_rows, d, dtype=DTYPES[itemsize], requires_grad=True)
    bias = torch.zeros(d, requires_grad=True)
    _call_and_differentiate(True, lambda: kernels.biased_gelu(x, bias))


def normalize_and_route(n_rows, d, center, biased, itemsize, routes=1, **_):
    """Sequences of one token."""
    x = torch.zeros(n_rows, 1, d, dtype=DTYPES[itemsize], requires_grad=True)
    bias = torch.zeros(d, requires_grad=True) if biased else None
    weight, routing_tokens = torch.ones(d, requires_grad=True), torch.zeros(1, routes, d, requires_grad=True)
    options = {"num_selected": 1, "k": 1.0, "n_iters": 1, "center": center}
    result = kernels.normalize_and_route(x, routing_tokens, weight, bias, **options)
    torch.autograd.backward(result[1:], [torch.zeros_like(each) for each in result[1:]])


def combine(
    d=8, n_rows=1, batch=None, n=1, nulled=True, lit=True, residual=True, biased=False, started=False, itemsize=4, **_
):
    """Sequences with one routed token."""
    batch = batch or n_rows
    dtype = DTYPES[itemsize]
    branches = {
        "null": torch.zeros(d, requires_grad=True) if nulled else None,
        "light": torch.zeros(batch, n, d, dtype=dtype, requires_grad=True) if lit else None,
        "residual": torch.zeros(batch, n, d, requires_grad=True) if residual else None,
        **{name: torch.zeros(d, requires_grad=True) if biased else None for name in ("bias", "routed_bias")},
        "start": int(started),
    }
    routed = torch.zeros(batch, 1, d, dtype=dtype, requires_grad=True)
    scores, indices = torch.zeros(batch, 1), torch.zeros(batch, 1, dtype=torch.int64)
    _call_and_differentiate(True, lambda: kernels.combine(routed, scores, indices, length=n, **branches))


def route_prefixes(
    n_rows, n_windows=2, window_size=3, n_iters=4, n=None, aligned=True, itemsize=4, kept=True, straight=False, **_
):
    n = (n_windows + 1) * window_size if n is None else max(n, 2)
    wide = torch.zeros(n_rows, 1, n + (not aligned), dtype=DTYPES[itemsize])
    scores = wide[..., :n].requires_grad_()
    sizes = {"window_size": min(window_size, n - 1), "num_selected": 2}
    options = {**sizes, "n_iters": n_iters, "straight_through": straight}
    _call_and_differentiate(kept, lambda: kernels.route_prefixes(scores, k=1.0, **options).weights)


def gathered_attention(
    batch, heads, dim, itemsize, n_windows=2, n_queries=16, n_tokens=3, pairs=None, weighed=False, **_
):
    dtype = DTYPES[itemsize]
    arguments = (
        torch.zeros(batch, n_windows, heads, n_queries, dim, dtype=dtype, requires_grad=True),
        torch.zeros(batch, 1, n_tokens, 2 * heads * dim, dtype=dtype, requires_grad=True),
        torch.zeros(batch, n_windows, 1, 1, dtype=torch.int64),
        torch.zeros(batch, n_windows, 1, 1, requires_grad=True),
        torch.zeros(2, heads, dim, requires_grad=True),
    )
    weighed = weighed if pairs is None else not pairs
    _call_and_differentiate(True, lambda: kernels.gathered_attention(*arguments, multiply_keys_by_score=weighed))


def listed(n_entries, masked=False, **_):
    """One list, of the same token several times."""
    indices = torch.zeros(1, 1, 1, n_entries, dtype=torch.int64)
    mask = torch.ones(indices.shape, dtype=torch.bool) if masked else None
    query, key_value, null_kv = torch.zeros(1, 1, 1, 16, 16), torch.zeros(1, 1, 1, 32), torch.zeros(2, 1, 16)
    kernels.gathered_attention(query, key_value, indices, torch.zeros(indices.shape), null_kv, mask=mask)


def invert(n_entries, total=None, **_):
    """One list, of any of `total` tokens."""
    lists = torch.zeros(1, 1, 1, n_entries, dtype=torch.int32)
    inverse.invert(lists, torch.zeros(lists.shape), n_entries if total is None else total)


def routed_attention(batch, n, heads, head_dim, itemsize, masked=False, weighed=False, kept=True, **_):
    dtype = DTYPES[itemsize]
    arguments = (
        torch.zeros(batch, n, heads * head_dim, dtype=dtype, requires_grad=True),
        torch.zeros(batch, 1, n, 2 * heads * head_dim, dtype=dtype, requires_grad=True),
        torch.zeros(batch, 1, n, requires_grad=True),
        torch.zeros(2, heads, head_dim, requires_grad=True),
    )
    options = {
        "mask": torch.ones(batch, 1, n, dtype=torch.bool) if masked else None,
        "multiply_keys_by_score": weighed,
    }
    _call_and_differentiate(kept, lambda: kernels.routed_attention(*arguments, **options))


def windowed_attention(
    head_dim,
    itemsize=None,
    batch=2,
    n=7,
    heads=2,
    masked=False,
    causal=False,
    kind=None,
    chunks=None,
    **_,
):
    """Arguments with the kind of positions of a planner."""
    if itemsize is None:
        itemsize, kind = 2, "rotary"
    if chunks is not None:
        kind = "bias"
    head_dim += head_dim % 2 if kind == "rotary" else 0
    qkv = torch.zeros(batch, n, 3 * heads * head_dim, dtype=DTYPES[itemsize], requires_grad=True)
    mask = torch.ones(batch, n, dtype=torch.bool) if masked else None
    options = {"heads": heads, "window_size": 4, "causal": causal, "mask": mask}
    if kind == "rotary":
        options["rotary_theta"] = 10000.0
    if kind == "bias":
        options["position_bias"] = torch.zeros(heads, 9, requires_grad=True)
    _call_and_differentiate(True, lambda: kernels.windowed_attention(qkv, **options))


def _but_for_programs(plan: Plan) -> object:
    """Any number of programs may share a row, which only moves addresses."""
    return tuple(sorted((name, value) for name, value in plan.settings.items() if name != "PROGRAMS"))


OPERATIONS = {
    "coor_descent": Operation(
        (descent_forward._plan, descent_backward._plan_sums, descent_backward._plan),
        coor_descent,
        _variants(per_row=BOOL, kept=BOOL, masked=BOOL, half=BOOL),
        key=_but_for_programs,
    ),
    "topk": Operation(
        (topk_kernels._plan,),
        topk,
        _variants(masked=BOOL, save=BOOL, itemsize=(2, 4)),
        {"n": around(most=topk_kernels.LONGEST), "selected": tuple(range(1, topk_kernels.MOST + 1))},
    ),
    "soft_topk": Operation(
        (soft_topk_kernels._plan, soft_topk_kernels._plan_slots, soft_topk_kernels._plan_together),
        soft_topk,
        _variants(per_row=BOOL, itemsize=(2, 4)),
    ),
    "select": Operation(
        (select_kernels._plan, select_kernels._plan_collection, select_kernels._plan_ranks),
        select,
        _variants(masked=BOOL, itemsize=(2, 4)),
    ),
    "segmented_coor_descent": Operation(
        (segmented_kernels._plan,),
        segmented_coor_descent,
        _variants(masked=BOOL, per_row=BOOL, kept=BOOL),
        {"itemsize": (2, 4, 8)},
    ),
    "routing_scores": Operation(
        (score_kernels._plan_scores, score_kernels._plan_gradients),
        routing_scores,
        _variants(cosine=BOOL, needs_x=BOOL),
    ),
    "gathered_gradients": Operation(
        (score_kernels._plan_gathered,), gathered_gradients, _variants(cosine=BOOL, itemsize=(2, 4))
    ),
    "gather": Operation(
        (gather_kernel._plan,), gather, _variants(itemsize=(2, 4), straight=BOOL, masked=BOOL, kept=BOOL)
    ),
    "spread": Operation((gather_kernel._plan_spread,), spread, _variants()),
    "normalize": Operation(
        (plans.plan_rows, plans.plan_sweep),
        normalize,
        _variants(center=BOOL, biased=BOOL, itemsize=(2, 4)),
    ),
    "biased_gelu": Operation((plans.plan_rows, plans.plan_wide_sweep), biased_gelu, _variants(itemsize=(2, 4))),
    "normalize_and_route": Operation(
        (plans.plan_rows, plans.plan_wide_sweep),
        normalize_and_route,
        _variants(center=BOOL, biased=BOOL, routes=(1, 2, 4), itemsize=(2, 4)),
        {"d": around(most=2048)},
    ),
    "combine": Operation(
        (plans.plan_rows, combine_kernels._plan_backward, combine_kernels._plan_places),
        combine,
        _variants(nulled=BOOL, lit=BOOL, residual=BOOL, biased=BOOL, started=BOOL, itemsize=(2, 4)),
    ),
    "route_prefixes": Operation(
        (
            prefix_forward._plan_descent,
            prefix_forward._plan_selection,
            order_kernels._plan_runs,
            order_kernels._plan_merge,
            prefix_backward._plan_thresholds,
            prefix_backward._plan_sums,
            prefix_backward._plan_tokens,
        ),
        route_prefixes,
        _variants(itemsize=(2, 4), kept=BOOL, straight=BOOL),
    ),
    "gathered_attention": Operation(
        (gathered_forward._plan, gathered_backward._plan_queries, gathered_backward._plan_keys),
        gathered_attention,
        _variants(weighed=BOOL),
    ),
    "lists": Operation((gathered_forward._plan_lists,), listed, _variants(masked=BOOL)),
    "inverse": Operation((inverse._plan_keys, inverse._plan_sorted), invert, _variants()),
    "routed_attention": Operation(
        (
            routed_attention_kernels._plan_forward,
            routed_attention_kernels._plan_queries,
            routed_attention_kernels._plan_keys,
        ),
        routed_attention,
        _variants(masked=BOOL, weighed=BOOL, kept=BOOL),
    ),
    "windowed_attention": Operation(
        (
            windowed_forward._plan_forward,
            windowed_backward._plan_backward,
            positions._plan_rotated_keys,
            bias_gradient._plan_bias_gradient,
        ),
        windowed_attention,
        _variants(masked=BOOL, causal=BOOL, kind=(None, "rotary", "bias")),
    ),
}


OPTIONS = ("launch_cooperative_grid", "maxnreg", "num_stages", "num_warps")
"""Options of a launch; all other settings define a tile."""


def _kind_of(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Properties of a plan's sizes that make another kernel with the same settings."""
    kind = {name: sizes[name] for name in ("aligned", "simple", "unmasked", "itemsize") if name in sizes}
    dim = sizes.get("dim", sizes.get("head_dim"))
    return {**kind, "ragged": is_ragged(dim, sizes["itemsize"])} if dim is not None and "itemsize" in sizes else kind


def _smallest(planner: Callable[..., Plan], operation: Operation) -> list[tuple[dict[str, Any], Plan]]:
    """The smallest sizes of each plan that is compiled differently, and the plan. If a plan has sizes without a 1,
    which would be compiled as a constant, these are used."""
    smallest: dict[object, tuple[tuple[int, int], dict[str, Any], Plan]] = {}
    for sizes in sizes_of(planner, **operation.limits):
        counts = [size for name, size in sizes.items() if name not in NOT_A_COUNT]
        if math.prod(counts) <= MOST_ENTRIES:
            rank = counts.count(1), math.prod(counts)
            plan = planner(**sizes)
            key = operation.key(plan), *_kind_of(sizes).items()
            smallest[key] = min(smallest.get(key, (rank, sizes, plan)), (rank, sizes, plan), key=lambda x: x[0])
    return [(sizes, plan) for _, sizes, plan in smallest.values()]


def _with_largest_tile(plans: list[tuple[dict[str, Any], Plan]]) -> list[tuple[dict[str, Any], Plan]]:
    """The plan with the least reserve for each set of options."""
    largest: dict[object, tuple[int, dict[str, Any], Plan]] = {}
    for sizes, plan in plans:
        tile = math.prod(size for name, size in plan.settings.items() if name not in (*OPTIONS, "PROGRAMS"))
        key = *(plan.settings.get(name) for name in OPTIONS), *_kind_of(sizes).items()
        largest[key] = max(largest.get(key, (tile, sizes, plan)), (tile, sizes, plan), key=lambda x: x[0])
    return [(sizes, plan) for _, sizes, plan in largest.values()]


def cases_of(operation: Operation, every: bool) -> list[Case]:
    """All plans that are compiled differently, at their smallest sizes, with each of the variants. Or some of these
    plans, with one variant each."""
    cases = []
    turn = itertools.cycle(operation.variants)
    for planner in operation.planners:
        plans = _smallest(planner, operation)
        for sizes, _ in plans if every else _with_largest_tile(plans):
            cases += [Case(planner, sizes, v) for v in (operation.variants if every else (next(turn),))]
    return cases
