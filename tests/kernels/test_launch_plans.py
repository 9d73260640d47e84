"""Plans of launches, for GPUs that need not exist: each can run, and does not spill."""

import itertools
import os
import random
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import triton
from triton.runtime.jit import JITFunction

import kernels
from colt5_bench.measuring.static_facts import compiled_kernels
from kernels._common.plans import PLANNERS
from kernels._common.tensors import INTERPRETED, triton_for_cpu_tensors
from tests.calls import inputs_of, layer_of, results
from tests.kernels.plans import OPERATIONS, cases_of, sizes_of

ROOT = Path(__file__).parents[2]

EVERY = "EVERY_PLAN" in os.environ

THREADS, REGISTERS = 1024, 65536
"""Limits of a program, and of a multiprocessor; a thread has up to 255 registers."""

MOST_PROGRAMS = 2**31 - 1
"""Limit of the first dimension of a grid."""

SHARED = {80: 163, 90: 227, 120: 99}
"""KiB of shared memory per program, by compute capability times ten."""


class Spill(NamedTuple):
    """Most bytes that a kernel is known to spill, in some of its variants. Plans do not depend on the target: without
    these spills, the kernel would be slower on targets that do not spill."""

    operation: str
    target: int
    kernel: str
    constants: dict[str, object]
    most: int

    def is_of(self, operation, kernel, target):
        constants = {**kernel["constants"], **self.constants}
        return (operation, target, kernel["name"]) == self[:3] and constants == kernel["constants"]


HALF = {"BLOCK_D": 128, "PRECISION": "ieee", "TILE": 64}

PINNED = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))["triton"]

BY_ANOTHER_COMPILER = 64
"""Bytes that a kernel may spill with another version of Triton. `KNOWN` is exact for the pinned one. Each version
allocates registers in its own way."""

KNOWN = (
    Spill("coor_descent", 80, "_streaming_kernel", {"HAS_MASK": True}, 24),
    Spill("coor_descent", 80, "_backward_kernel", {"WIDTH": 32, "HAS_K": True}, 8),
    Spill("coor_descent", 90, "_resident_kernel", {"WIDTH": 1024, "PROGRAMS": 4}, 40),
    Spill("coor_descent", 90, "_streaming_kernel", {"PROGRAMS": 1}, 16),
    # Rows that are not aligned. The first kernel loads spilled registers again in each iteration.
    Spill("coor_descent", 120, "_resident_kernel", {"WIDTH": 2048, "HAS_MASK": False, "PROGRAMS": 1}, 504),
    Spill("coor_descent", 120, "_resident_kernel", {"WIDTH": 1024, "HAS_MASK": False, "PROGRAMS": 4}, 128),
    Spill("coor_descent", 120, "_streaming_kernel", {"PROGRAMS": 132}, 72),
    *(Spill("coor_descent", 120, "_backward_kernel", {"WIDTH": width}, 24) for width in (16, 32, 64)),
    Spill("coor_descent", 120, "_backward_kernel", {"WIDTH": 1024, "HAS_K": True}, 8),
    *(Spill("topk", 90, "_topk_kernel", {"WIDTH": width, "SAVE": False}, 24) for width in (256, 512, 1024)),
    *(Spill("topk", 120, "_topk_kernel", {"WIDTH": width}, 8) for width in (256, 512)),
    *(Spill("select", 90, "_select_kernel", {"LISTED": listed}, 32) for listed in (2048, 4096)),
    *(Spill("select", 120, "_select_kernel", {"LISTED": listed}, 56) for listed in (1024, 2048, 4096)),
    *(Spill("routing_scores", 120, "_gradient_kernel", {"ROUTES": routes}, 8) for routes in (4, 8)),
    Spill("soft_topk", 120, "_resident_kernel", {"WIDTH": 2048, "REPEATS": 8, "HAS_MASK": False}, 8),
    Spill("routing_scores", 90, "_gradient_kernel", {"ROUTES": 2, "COSINE": True}, 8),
    Spill("gathered_gradients", 90, "_gradient_kernel", {"ROUTES": 2, "COSINE": True}, 8),
    Spill("gathered_gradients", 120, "_gradient_kernel", {"ROUTES": 8}, 8),
    *(Spill("gathered_gradients", target, "_gathered_kernel", {"ROUTES": 1}, 16) for target in SHARED),
    Spill("normalize", 80, "_backward_kernel", {"BLOCK_D": 4, "CENTER": True}, 8),
    Spill("normalize", 80, "_backward_kernel", {"BLOCK_D": 8192, "CENTER": False}, 8),
    *(Spill("normalize", 90, "_backward_kernel", {"BLOCK_D": d, "CENTER": True}, 8) for d in (128, 512)),
    Spill("normalize", 90, "_backward_kernel", {"BLOCK_D": 8192}, 32),
    Spill("normalize", 120, "_backward_kernel", {"BLOCK_D": 1, "CENTER": True}, 16),
    Spill("normalize", 120, "_backward_kernel", {"BLOCK_D": 4096, "CENTER": False}, 8),
    Spill("normalize", 120, "_backward_kernel", {"BLOCK_D": 8192}, 32),
    Spill("normalize_and_route", 80, "_forward_kernel", {"BLOCK_D": 1, "ROUTES": 4}, 40),
    *(Spill("normalize_and_route", 80, "_backward_kernel", {"BLOCK_D": d}, 8) for d in (1, 8)),
    Spill("normalize_and_route", 80, "_backward_kernel", {"BLOCK_D": 4}, 16),
    Spill("normalize_and_route", 90, "_forward_kernel", {"BLOCK_D": 1, "ROUTES": 4}, 48),
    *(Spill("normalize_and_route", 90, "_forward_kernel", {"BLOCK_D": d}, 8) for d in (16, 32)),
    *(Spill("normalize_and_route", 90, "_backward_kernel", {"BLOCK_D": d}, 8) for d in (1, 4, 16, 32, 512)),
    *(Spill("normalize_and_route", 90, "_backward_kernel", {"BLOCK_D": d}, 16) for d in (8, 1024, 2048)),
    Spill("normalize_and_route", 120, "_forward_kernel", {"BLOCK_D": 128}, 8),
    Spill("normalize_and_route", 120, "_backward_kernel", {"BLOCK_D": 1, "ROUTES": 4}, 56),
    *(Spill("normalize_and_route", 120, "_backward_kernel", {"BLOCK_D": d}, 16) for d in (2, 4, 8)),
    Spill("normalize_and_route", 120, "_backward_kernel", {"BLOCK_D": 256}, 8),
    Spill("combine", 80, "_forward_kernel", {"BLOCK_D": 128}, 8),
    Spill("combine", 80, "_backward_kernel", {"BLOCK_D": 2}, 16),
    Spill("combine", 90, "_forward_kernel", {"BLOCK_D": 256}, 8),
    *(Spill("combine", 90, "_backward_kernel", {"BLOCK_D": d}, 8) for d in (2, 32, 64)),
    *(Spill("combine", 90, "_backward_kernel", {"BLOCK_D": d}, 24) for d in (4096, 8192)),
    *(Spill("combine", 120, "_forward_kernel", {"BLOCK_D": d}, 8) for d in (4, 8, 256)),
    Spill("combine", 120, "_forward_kernel", {"BLOCK_D": 2}, 16),
    Spill("combine", 120, "_backward_kernel", {"BLOCK_D": 1}, 16),
    Spill("combine", 120, "_backward_kernel", {"BLOCK_D": 64}, 40),
    Spill("windowed_attention", 90, "_forward_kernel", {"BLOCK_D": 64, "BLOCK": 32}, 16),
    Spill("windowed_attention", 80, "_backward_kernel", {"BLOCK_D": 32, "ROTARY": True}, 8),
    Spill("windowed_attention", 80, "_backward_kernel", {"BLOCK_D": 128}, 40),
    Spill("windowed_attention", 80, "_forward_kernel", {"BLOCK_D": 64, "BLOCK": 32}, 8),
    Spill("windowed_attention", 120, "_forward_kernel", {"BLOCK_D": 32, "BLOCK": 32}, 48),
    Spill("windowed_attention", 120, "_backward_kernel", {"BLOCK_D": 16}, 8),
    Spill("windowed_attention", 120, "_backward_kernel", {"BLOCK_D": 32}, 16),
    Spill("windowed_attention", 120, "_backward_kernel", {"BLOCK_D": 64}, 16),
    Spill("windowed_attention", 120, "_backward_kernel", {"BLOCK_D": 128}, 32),
    Spill("windowed_attention", 120, "_bias_gradient_kernel", {}, 24),
    Spill("gathered_attention", 80, "_query_kernel", {"DIM": 32, "PRECISION": "tf32"}, 8),
    Spill("gathered_attention", 80, "_key_value_kernel", {"DIM": 64, "PRECISION": "tf32", "WEIGH_KEYS": False}, 8),
    Spill("gathered_attention", 80, "_key_value_kernel", {"DIM": 64, "PRECISION": "tf32", "WEIGH_KEYS": True}, 32),
    Spill("gathered_attention", 120, "_key_value_kernel", {"DIM": 64, "PRECISION": "tf32", "WEIGH_KEYS": False}, 40),
    Spill("gathered_attention", 120, "_key_value_kernel", {"DIM": 64, "PRECISION": "tf32", "WEIGH_KEYS": True}, 72),
    Spill("gathered_attention", 120, "_key_value_kernel", {"DIM": 32, "PRECISION": "tf32x3"}, 24),
    Spill("routed_attention", 80, "_query_kernel", HALF, 16),
    Spill("routed_attention", 80, "_key_value_kernel", HALF, 8),
    Spill("routed_attention", 90, "_forward_kernel", {"HEAD_DIM": 16, "PRECISION": "tf32x3"}, 8),
    Spill("routed_attention", 120, "_query_kernel", HALF, 16),
    Spill("routed_attention", 120, "_key_value_kernel", HALF, 24),
    Spill("routed_attention", 120, "_query_kernel", {"HEAD_DIM": 16, "PRECISION": "tf32x3"}, 24),
    Spill("routed_attention", 120, "_key_value_kernel", {"HEAD_DIM": 16, "PRECISION": "tf32x3"}, 8),
    Spill("routed_attention", 120, "_query_kernel", {"HEAD_DIM": 64, "PRECISION": "ieee"}, 56),
    Spill("routed_attention", 120, "_query_kernel", {"HEAD_DIM": 128, "PRECISION": "tf32x3", "WEIGH_KEYS": True}, 8),
)


def name_of(planner):
    return f"{planner.__module__.removeprefix('kernels.')}.{planner.__name__}"


def planned(planner, sizes):
    """A plan, or the reason why there is none."""
    try:
        return planner.__wrapped__(**sizes)
    except NotImplementedError as error:
        return str(error)


def test_all_that_plans_is_tried():
    tried = {planner for operation in OPERATIONS.values() for planner in operation.planners}
    assert {name_of(planner) for planner in PLANNERS} == {name_of(planner) for planner in tried}


# More than the second and third dimensions of a grid allow; forward and backward, for all repeatable sizes.
MANY = {
    "coor_descent": [{"n_rows": 70001, "n": 3}],
    "topk": [{"n_rows": 70001, "n": 3, "selected": 1}],
    "soft_topk": [{"n_rows": 70001, "n": 3}],
    "select": [{"n_rows": 70001, "selected": 2, "available": 132}, {"n_rows": 2, "n": 70001, "selected": 16384}],
    "segmented_coor_descent": [{"n_rows": 70001, "n": 3, "itemsize": 4}],
    "routing_scores": [{"batch": 70001, "n": 2, "d": 2, "routes": 2, "itemsize": 4}],
    "gathered_gradients": [{"batch": 70001, "selected": 1, "d": 2, "routes": 1}],
    "gather": [{"n_rows": 70001, "selected": 1, "d": 2}],
    "spread": [{"n_rows": 70001, "n": 2}],
    "normalize": [{"n_rows": 70001, "d": 2}],
    "biased_gelu": [{"n_rows": 70001, "d": 2}],
    "normalize_and_route": [{"n_rows": 70001, "d": 2}],
    "combine": [{"n_rows": 70001, "d": 2}],
    "route_prefixes": [{"n_rows": 70001, "n_windows": 2, "window_size": 1}],
    "gathered_attention": [
        {"batch": 70001, "heads": 1, "dim": 1, "itemsize": 4},
        {"batch": 1, "n_windows": 1, "heads": 70001, "dim": 1, "itemsize": 4},
        {"batch": 1, "n_windows": 70001, "heads": 1, "dim": 1, "itemsize": 4},
    ],
    "lists": [{"n_entries": 70001}],
    "inverse": [{"n_entries": 70001}],
    "routed_attention": [
        {"batch": 8192, "n": 1, "heads": 8, "head_dim": 1, "itemsize": 4},
        {"batch": 1, "n": 1, "heads": 70001, "head_dim": 1, "itemsize": 4},
        {"batch": 1, "n": 70001, "heads": 1, "head_dim": 1, "itemsize": 4},
    ],
    "windowed_attention": [
        {"batch": 70001, "n": 1, "heads": 1, "head_dim": 1, "itemsize": 4},
        {"batch": 1, "n": 1, "heads": 70001, "head_dim": 1, "itemsize": 4},
    ],
}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has a grid of any size")
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_grid_has_room_for_many_rows_sequences_and_heads(name, monkeypatch):
    grids = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *_, grid, **__: grids.append((self.__name__, grid)))
    with triton_for_cpu_tensors():
        for sizes in MANY[name]:
            OPERATIONS[name].call(**{**OPERATIONS[name].variants[0], **sizes})
    assert grids
    for kernel, (first, *others) in grids:
        assert 0 < first <= MOST_PROGRAMS, kernel
        assert all(0 < programs <= 65535 for programs in others), (kernel, first, *others)


LIMITS = {planner: operation.limits for operation in OPERATIONS.values() for planner in operation.planners}


@pytest.mark.skipif(INTERPRETED, reason="is not about values")
@pytest.mark.parametrize("planner", LIMITS, ids=name_of)
def test_a_multiprocessor_has_what_a_plan_asks_for(planner):
    for sizes in sizes_of(planner, **LIMITS[planner]):
        plan = planned(planner, sizes)
        if isinstance(plan, str):
            assert plan.startswith("programs must be at most 2147483647 on a GPU, got "), sizes
            continue
        threads = 32 * plan.settings.get("num_warps", 4)
        # If there is no explicit limit, a thread gets all available registers.
        registers = plan.settings.get("maxnreg", min(255, REGISTERS // threads))
        assert threads <= THREADS, sizes
        assert registers <= 255, sizes
        # Registers are allocated eight at a time.
        assert threads * (-(-registers // 8) * 8) <= REGISTERS, sizes
        # None if there is no work, as between the iterations of a single one.
        assert 0 <= plan.programs <= MOST_PROGRAMS, sizes
        if plan.settings.get("launch_cooperative_grid"):
            assert plan.programs <= sizes["available"], sizes
            # Each word of a mailbox is read by one thread, because several may see different values.
            assert 4 * plan.settings.get("SLOTS", threads) >= threads, sizes


def faults_of(kernel, target, spared=0):
    """Resources that a GPU lacks for a kernel, with some spilled bytes allowed."""
    registers = -(-kernel["registers"] // 8) * 8 * 32 * kernel["num_warps"]
    found = {
        "spills": kernel["spilled_bytes"] > spared,
        "takes more registers than there are": registers > REGISTERS,
        "takes more shared memory than there is": kernel["shared_bytes"] > SHARED[target] * 1024,
    }
    return [fault for fault, is_found in found.items() if is_found]


def follows(kernel, plan):
    """True if a kernel was compiled with the settings of a plan."""
    facts = {**kernel, **kernel["constants"], "launch_cooperative_grid": kernel["cooperative"]}
    settings = {name: value for name, value in plan.settings.items() if name != "maxnreg"}
    return all(name in facts and facts[name] == value for name, value in settings.items())


def faults_of_cases(name, cases):
    """All faults of the kernels of cases, each for its target, and the known spills that did not occur."""
    operation = OPERATIONS[name]
    found, spilled = set(), {}
    for (planner, sizes, variant), target in cases:

        def launch(sizes=sizes, variant=variant):
            with triton_for_cpu_tensors(sizes.get("available", 132)):
                operation.call(**{**variant, **sizes})

        compiled = compiled_kernels(launch, target, disassemble=False)
        plan = planner(**sizes)
        assert not plan.programs or any(follows(kernel, plan) for kernel in compiled), (name_of(planner), sizes)
        for kernel in compiled:
            known = [spill for spill in KNOWN if spill.is_of(name, kernel, target)]
            spared = sum(spill.most for spill in known) if triton.__version__ == PINNED else BY_ANOTHER_COMPILER
            found |= {f"{fault}: {kernel}" for fault in faults_of(kernel, target, spared)}
            for spill in known:
                spilled[str(spill)] = spilled.get(str(spill), 0) + kernel["spilled_bytes"]
    return found, [spill for spill, any_bytes in spilled.items() if not any_bytes]


@pytest.mark.compiled
@pytest.mark.parametrize("target", SHARED)
@pytest.mark.parametrize("name", OPERATIONS)
def test_what_follows_a_plan_can_run_and_spills_nothing(name, target):
    """The plan with the least reserve for each set of options, in one variant, for one GPU."""
    cases = cases_of(OPERATIONS[name], every=False)[[*SHARED].index(target) :: len(SHARED)]
    found, _ = faults_of_cases(name, zip(cases, itertools.repeat(target), strict=False))
    assert not found


@pytest.mark.compiled
@pytest.mark.skipif(not EVERY, reason="compiles for hours: make test-plans")
@pytest.mark.parametrize("target", SHARED)
@pytest.mark.parametrize("name", OPERATIONS)
def test_what_follows_every_plan_can_run_and_spills_nothing(name, target):
    """Each plan is compiled for each of the GPUs in each of its variants."""
    cases = cases_of(OPERATIONS[name], every=True)
    found, no_longer = faults_of_cases(name, zip(cases, itertools.repeat(target), strict=False))
    assert not found
    assert not no_longer


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPERATIONS)
def test_many_rows_sequences_and_heads_on_a_gpu(name):
    with torch.device("cuda"):
        for sizes in MANY[name]:
            OPERATIONS[name].call(**{**OPERATIONS[name].variants[0], **sizes})
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_a_layer_of_many_sequences_on_a_gpu():
    layer = layer_of("ConditionalRoutedAttention", random.Random(0), use_triton=True)
    inputs, options = inputs_of("ConditionalRoutedAttention", layer, batch=9000)
    with torch.no_grad():
        for output in results(layer.cuda()(*(x.cuda() for x in inputs), **options)):
            assert output.isfinite().all()


@pytest.mark.gpu
def test_more_entries_than_32_bits_count():
    """In half precision, and only its last rows."""
    n_rows, d = 2**24 + 3, 256
    if torch.cuda.mem_get_info()[0] < 5 * n_rows * d * 2:
        pytest.skip("takes 40 GB")
    x = torch.randn(1, d, dtype=torch.half, device="cuda").repeat(n_rows, 1)
    x[-1000:] = torch.randn(1000, d, device="cuda")
    weight = torch.randn(d, device="cuda", dtype=torch.half)
    y = kernels.normalize(x, weight)
    assert torch.equal(y[-1000:], kernels.normalize(x[-1000:], weight))
    assert (y[:-1000] == y[0]).all()
