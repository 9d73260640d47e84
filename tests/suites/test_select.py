"""The hard top-k of difficult scores: the suite's scores, counts and failures."""

from collections import Counter
from dataclasses import replace
from math import isnan

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colt5_bench.case import FORWARD
from colt5_bench.loading import invite
from colt5_bench.measuring.conditions import Conditions
from colt5_bench.measuring.measure import measure
from colt5_bench.measuring.roofline import measure_ceilings
from colt5_bench.selection import Guest
from suites.select import DISTRIBUTIONS, SUITE, HostileCase, count_not_largest

CPU = torch.device("cpu")
VALUES = st.sampled_from([-torch.inf, -2.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 1.0 + 2**-23, torch.inf, torch.nan])


def case_of(distribution):
    return HostileCase(4, 256, 32, distribution)


def scores_of(distribution):
    return SUITE.problem(case_of(distribution), CPU).inputs["scores"]


@pytest.fixture(scope="module")
def conditions():
    return Conditions(CPU, "cpu", "abc", measure_ceilings(CPU))


@given(st.lists(st.tuples(VALUES, VALUES, VALUES), min_size=1, max_size=12), st.data())
@settings(max_examples=60, deadline=None)
def test_values_that_are_not_the_largest_are_counted(columns, data):
    scores = torch.tensor(columns).T.contiguous()
    k = data.draw(st.integers(1, scores.shape[1]))
    picks = data.draw(st.lists(st.integers(0, scores.shape[1] - 1), min_size=3 * k, max_size=3 * k))
    selected = scores.gather(1, torch.tensor(picks).view(3, k))

    def in_order(row):
        return sorted(((1, 0.0) if isnan(value) else (0, value) for value in row.tolist()), reverse=True)

    pairs = zip(selected, scores, strict=True)
    wrong = sum((Counter(in_order(got)) - Counter(in_order(row)[:k])).total() for got, row in pairs)
    assert count_not_largest(selected, scores) == wrong


HOLDS = {
    "narrow": lambda s: (s - 1).abs().max() < 1e-3 and len(s.unique()) > 100,
    "ties": lambda s: len(s.unique()) < 32,
    "constant": lambda s: (s == s[:, :1]).all(),
    "ascending": lambda s: (s.diff() >= 0).all() and len(s.unique()) > 100,
    "descending": lambda s: (s.diff() <= 0).all() and len(s.unique()) > 100,
    "signed_zeros": lambda s: (s == 0).all() and len({*s.signbit().flatten().tolist()}) == 2,
    "low_bits": lambda s: len((s.view(torch.int32) >> 8).unique()) == 2 and len(s.unique()) > 100,
    "denormal": lambda s: 0 < s.abs().max() < torch.finfo(torch.float32).tiny,
    "infinite": lambda s: (s == torch.inf).any() and (s == -torch.inf).any() and s.isfinite().any(),
    "nan": lambda s: len(s[s.isnan()].view(torch.int32).sign().unique()) == 2 and s.isfinite().any(),
    "any_bits": lambda s: len(s.abs().log2().nan_to_num().round().unique()) > 100,
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_scores_are_as_they_are_called(name):
    assert HOLDS[name](scores_of(name))


def rounded(scores, *, num_selected, mask=None):
    return scores.bfloat16().topk(num_selected).indices


def flushed(scores, *, num_selected, mask=None):
    return torch.where(scores.abs() < 2**-126, 0.0, scores).topk(num_selected).indices


def without_nan(scores, *, num_selected, mask=None):
    return scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).topk(num_selected).indices


def by_sign_of_nan(scores, *, num_selected, mask=None):
    bits = scores.view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).topk(num_selected).indices


def one_twice(scores, *, num_selected, mask=None):
    indices = scores.topk(num_selected).indices
    indices[:, -1] = indices[:, -2]
    return indices


FAULTS = {
    rounded: {"narrow", "low_bits"},
    flushed: {"denormal"},
    without_nan: {"nan", "any_bits"},
    by_sign_of_nan: {"nan", "any_bits"},
    one_twice: {*DISTRIBUTIONS} - {"ties", "constant", "signed_zeros", "infinite"},
}
"""Distributions that have to detect each fault."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_counted_and_refused(fault, conditions):
    suite = replace(invite(SUITE, [Guest.parse(f"theirs={__file__}:{fault.__name__}")]), timed=False)
    for name in FAULTS[fault]:
        theirs, ours = measure(suite, case_of(name), FORWARD, ["theirs", "ours"], conditions)
        assert (theirs.status, ours.status) == ("wrong", "ok"), (name, ours.reason)
        assert theirs.metrics["not_largest"] > 0 == ours.metrics["not_largest"], name
