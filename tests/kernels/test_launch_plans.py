"""Plans of launches, for machines that need not be there: each can run."""

import pytest
from triton.runtime.jit import JITFunction

from kernels._launch import INTERPRETED, PLANNERS, triton_for_cpu_tensors
from tests.kernels.plans import OPERATIONS, sizes_of

THREADS, REGISTERS = 1024, 65536
"""Of a program, and of a multiprocessor; a thread has up to 255."""

MOST_PROGRAMS = 2**31 - 1
"""In the first direction of a grid."""


def name_of(planner):
    return f"{planner.__module__.removeprefix('kernels.')}.{planner.__name__}"


def planned(planner, sizes):
    """A plan, or why there is none."""
    try:
        return planner.__wrapped__(**sizes)
    except NotImplementedError as error:
        return str(error)


def test_all_that_plans_is_tried():
    tried = {planner for operation in OPERATIONS.values() for planner in operation.planners}
    assert {name_of(planner) for planner in PLANNERS} == {name_of(planner) for planner in tried}


# More than the second and third directions of a grid have room for; forward and backward, for all there is to repeat.
MANY = {
    "coor_descent": [{"n_rows": 70001, "n": 3}],
    "topk": [{"n_rows": 70001, "n": 3, "selected": 1}],
    "soft_topk": [{"n_rows": 70001, "n": 3}],
    "select": [{"n_rows": 70001, "n": 3, "selected": 2}, {"n_rows": 2, "n": 70001, "selected": 16384}],
    "segmented_coor_descent": [{"n_rows": 70001, "n": 3, "itemsize": 4}],
    "routing_scores": [{"batch": 70001, "n": 2, "d": 2, "routes": 2, "itemsize": 4}],
    "gathered_gradients": [{"batch": 70001, "selected": 1, "d": 2, "routes": 1}],
    "gather": [{"n_rows": 70001, "selected": 1, "d": 2}],
    "normalize": [{"n_rows": 70001, "d": 2}],
    "combine": [{"n_rows": 70001, "d": 2}],
    "route_prefixes": [{"n_rows": 70001, "n_windows": 2, "window_size": 1}],
    "gathered_attention": [
        {"batch": 70001, "heads": 1, "dim": 1, "itemsize": 4},
        {"batch": 1, "n_windows": 1, "heads": 70001, "dim": 1, "itemsize": 4},
        {"batch": 1, "n_windows": 70001, "heads": 1, "dim": 1, "itemsize": 4},
    ],
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


@pytest.mark.parametrize("planner", LIMITS, ids=name_of)
def test_a_multiprocessor_has_what_a_plan_asks_for(planner):
    for sizes in sizes_of(planner, **LIMITS[planner]):
        plan = planned(planner, sizes)
        if isinstance(plan, str):
            assert plan.endswith("programs; a GPU has up to 2147483647"), sizes
            continue
        threads = 32 * plan.settings.get("num_warps", 4)
        # Without a limit of its own, a thread gets what there is.
        registers = plan.settings.get("maxnreg", min(255, REGISTERS // threads))
        assert threads <= THREADS, sizes
        assert registers <= 255, sizes
        # They are given out eight at a time.
        assert threads * (-(-registers // 8) * 8) <= REGISTERS, sizes
        # None where there is nothing to do, as between the iterations of a single one.
        assert 0 <= plan.programs <= MOST_PROGRAMS, sizes
        if plan.settings.get("launch_cooperative_grid"):
            assert plan.programs <= sizes["available"], sizes
