"""The accuracy gates of all suites pass correct computations, for any order of sums, and fail faulty ones.

The environment variable GATE_SEEDS is the number of problems for each case (1). `make test-gates` runs this file with
20 of them under each of PyTorch's instruction sets, in one thread and two.
"""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from colt5_bench.case import Case
from colt5_bench.loading import load_suites
from colt5_bench.measuring.conditions import Conditions
from colt5_bench.measuring.measure import measure
from colt5_bench.measuring.roofline import measure_ceilings
from colt5_bench.suite import Implementation, Suite
from suites._descent import lenient

CPU = torch.device("cpu")
SEEDS = int(os.environ.get("GATE_SEEDS", "1"))


def judged(suite):
    """A suite without times, and without further figures that no gate judges."""
    implementations = {
        name: replace(each, metrics=Implementation.metrics) for name, each in suite.implementations.items()
    }
    return replace(suite, timed=False, implementations=implementations)


ALL = load_suites(Path(__file__).parents[2])
SUITES = {name: judged(suite) for name, suite in ALL.items() if isinstance(suite, Suite)}


@pytest.fixture(scope="module")
def conditions():
    return Conditions(CPU, "cpu", "abc", measure_ceilings(CPU))


@pytest.fixture
def seeded(monkeypatch):
    """A function that changes the problems of all cases by a seed."""

    def seed(number):
        def generator(case, device="cpu"):
            digest = hashlib.sha256(f"{case.id}:{number}".encode()).digest()
            return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:7], "big"))

        monkeypatch.setattr(Case, "generator", generator)

    return seed


def smallest(suite):
    """Some cases of a smoke test, of each kind."""
    cases = suite.cases("smoke", CPU)
    return cases if len(cases) <= 12 else cases[:: len(cases) // 12]


class Reordered(TorchDispatchMode):
    """Within this context sums and matrix products add up their terms from the last to the first."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm"):
            args = args[0].flip(-1), args[1].flip(-2)
        elif name == "addmm":
            args = args[0], args[1].flip(-1), args[2].flip(-2)
        elif name in ("sum", "mean", "logsumexp") and len(args) > 1 and args[0].is_floating_point():
            args = args[0].flip(args[1]), *args[1:]
        return func(*args, **(kwargs or {}))


def within(context, function):
    def computed(**inputs):
        with context():
            return function(**inputs)

    return computed


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("name", SUITES)
def test_correct_implementations_pass(name, seed, seeded, conditions):
    seeded(seed)
    suite = SUITES[name]
    plain = suite.plain
    other_order = Implementation("reordered", lambda case: within(Reordered, plain(case)), bound=lenient)
    suite = replace(suite, implementations={**suite.implementations, "reordered": other_order})
    for case in smallest(suite):
        for record in measure(suite, case, suite.directions(case)[-1], [*suite.implementations], conditions):
            assert record.status in ("ok", "skipped"), (record.implementation, case.id, record.reason)


SUMMING = ("mm", "bmm", "addmm", "sum", "mean", "logsumexp", "logcumsumexp", "_softmax", "linalg_vector_norm")
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
LAYER_NORM = "native_layer_norm"


class SumsInHalfPrecision(TorchDispatchMode):
    """Within this context, functions that sum return fp16 numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in (*SUMMING, ATTENTION, LAYER_NORM):
            return result
        return tree_map(lambda x: x.half().to(x.dtype) if x.is_floating_point() else x, result)


class TermDropped(TorchDispatchMode):
    """Within this context each sum omits its last term."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, dict(kwargs or {})
        if name in ("mm", "bmm"):
            args = args[0][..., :-1], args[1][..., :-1, :]
        elif name == "addmm":
            args = args[0], args[1][..., :-1], args[2][..., :-1, :]
        elif name == ATTENTION:
            query, key, value, *rest = args
            args = query, key[..., :-1, :], value[..., :-1, :], *rest
            if kwargs.get("attn_mask") is not None:
                kwargs["attn_mask"] = kwargs["attn_mask"][..., :-1]
        elif name in SUMMING and len(args) > 1 and args[0].is_floating_point():
            dims = args[2] if name == "linalg_vector_norm" else args[1]
            dim = dims if isinstance(dims, int) else dims[0]
            nothing = 0.0 if name in ("sum", "mean", "linalg_vector_norm") else -torch.inf
            args = args[0].index_fill(dim, torch.tensor(args[0].shape[dim] - 1), nothing), *args[1:]
        elif name == LAYER_NORM:
            args = args[0].index_fill(-1, torch.tensor(args[0].shape[-1] - 1), 0.0), *args[1:]
        return func(*args, **kwargs)


def last_element_off(suite, case):
    """By a thousandth of its value."""

    def computed(**inputs):
        out = suite.plain(case)(**inputs)
        factors = torch.ones_like(out)
        factors.view(-1)[-1] = 1.001
        return out * factors

    return computed


def eps_off(suite, case):
    """By a hundredth of its value."""
    return suite.plain(replace(case, eps=1.01 * case.eps)) if hasattr(case, "eps_decay") else None


def wrong_mask(suite, case):
    """In the last row, where one more entry is masked."""
    names = suite.problem(case, CPU).inputs.keys()
    if not names & {"mask", "scores"} or names & {"indices", "routed"}:
        return None

    def computed(**inputs):
        if "mask" in inputs:
            mask = inputs["mask"].clone()
            row = mask.view(-1, mask.shape[-1])[-1]
            row[row.nonzero()[0]] = False
            return suite.plain(case)(**{**inputs, "mask": mask})
        hidden = torch.zeros_like(inputs["scores"], dtype=torch.bool)
        row = inputs["scores"].detach().view(-1, hidden.shape[-1])[-1]
        hidden.view(-1, hidden.shape[-1])[-1, row.argmax()] = True
        return suite.plain(case)(scores=inputs["scores"].masked_fill(hidden, -1e30))

    return computed


FAULTS = {
    "last element": last_element_off,
    "term dropped": lambda suite, case: within(TermDropped, suite.plain(case)),
    "sums in fp16": lambda suite, case: within(SumsInHalfPrecision, suite.plain(case)),
    "eps": eps_off,
    "mask": wrong_mask,
}

SUMS_NOTHING = {name: {"term dropped", "sums in fp16"} for name in ("biased_gelu", "combine", "select")}
"""Faults that cannot be planted, by suite: its operation moves tokens and adds two or three of them."""


NOT_JUDGED_HERE = ("flops", "first_call")
"""One computes nothing with floats, and the other has cases of suite `layers` only under autocast."""


@pytest.mark.parametrize("name", [name for name in SUITES if name not in NOT_JUDGED_HERE])
def test_planted_faults_are_found(name, conditions):
    suite = SUITES[name]
    bound = suite.implementations["ours"].bound
    left, planted = set(FAULTS) - SUMS_NOTHING.get(name, set()), set()
    for case in suite.cases("smoke", CPU):
        faulty = {fault: FAULTS[fault](suite, case) for fault in left}
        implementations = {
            fault: Implementation(fault, lambda case, function=function: function, bound=bound)
            for fault, function in faulty.items()
            if function is not None
        }
        planted |= implementations.keys()
        records = measure(
            replace(suite, implementations=implementations),
            case,
            suite.directions(case)[-1],
            list(implementations),
            conditions,
        )
        assert all(record.status in ("ok", "wrong") for record in records), [record.reason for record in records]
        left -= {record.implementation for record in records if record.status == "wrong"}
    assert "last element" in planted
    assert not left & planted


def test_a_count_that_is_off_is_found(conditions):
    """The suite of counts computes nothing with floats."""
    suite = SUITES["flops"]
    case = suite.cases("smoke", CPU)[0]
    off = Implementation("off", lambda case: lambda: suite.plain(case)() + torch.tensor([0, 0, 0, 0, 0, 0, 1]).double())
    (record,) = measure(replace(suite, implementations={"off": off}), case, "forward", ["off"], conditions)
    assert record.status == "wrong"
