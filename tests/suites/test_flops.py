from dataclasses import replace

import pytest
import torch

import reference
from colt5_bench.case import FORWARD
from colt5_bench.measuring.conditions import Conditions
from colt5_bench.measuring.measure import measure
from colt5_bench.measuring.roofline import measure_ceilings
from suites import flops
from suites.flops import SUITE, FlopsCase

CPU = torch.device("cpu")
CASE = FlopsCase(1024, 256)


def metrics(implementation, case=CASE):
    return SUITE.implementations[implementation].metrics(case, SUITE.problem(case, CPU))


def test_the_terms_of_the_paper_make_its_table():
    case = FlopsCase(4096, 1024)
    *linear, quadratic = (value / (case.n * case.dim) for value in flops._colt5_paper(case).values())
    assert sum(linear) / case.dim == pytest.approx(7.25, rel=0.005)
    assert quadratic / case.n == pytest.approx(1 / 84, rel=0.02)


def test_projections_and_feed_forward_are_exactly_those_of_the_paper():
    for implementation in ("reference", "ours"):
        terms = metrics(implementation)
        names = ("light_feed_forward", "heavy_feed_forward", "light_projections", "heavy_projections")
        assert [terms[name] for name in names] == [1, 1, 1, 1]
        # One learned key in addition to the 128 routed ones.
        assert terms["heavy_attention"] == pytest.approx(129 / 128)


def test_t5_is_exactly_the_formula():
    assert metrics("t5") == {
        "feed_forward": 1,
        "projections": 1,
        "attention": 1,
        "total": 1,
        "unlisted": 0,
        "giga": 1024 * (12 * 256**2 + 2 * 1024 * 256) / 1e9,
    }


def test_longt5_comes_to_its_formula_as_the_window_comes_to_nothing():
    assert metrics("longt5")["attention"] == (64 + 384) / 64
    assert metrics("longt5", FlopsCase(2**20, 256))["attention"] == pytest.approx(1, abs=0.01)


def test_what_is_in_no_formula_is_the_light_attention_and_the_router():
    counted = flops.REFERENCE.count(CASE)
    assert counted["routing"] == 3 * 1024 * 256
    unlisted = counted["routing"] + counted["light_attention"]
    assert metrics("reference")["unlisted"] == pytest.approx(unlisted / sum(counted.values()))


@pytest.mark.parametrize(
    "slip", [{"heavy_heads": 2}, {"light_ff_mult": 1.99}, {"num_heavy_attn_tokens_kv": 127}], ids=str
)
def test_the_gate_sees_a_small_mistake(slip):
    def make(case):
        options = {
            "num_heavy_attn_tokens_q": 64,
            "num_heavy_attn_tokens_kv": 128,
            "num_heavy_ff_tokens": 64,
            "light_heads": 1,
            "heavy_heads": 3,
            "light_window_size": 254,
            "light_ff_mult": 2,
            "heavy_ff_mult": 16,
            "use_flash_attn": True,
        }
        return reference.ConditionalRoutedTransformerBlock(case.dim, **{**options, **slip})

    accounting = replace(flops.REFERENCE, make=make)
    suite = replace(SUITE, implementations={"mistaken": flops.implementation("mistaken", accounting, of_suite=True)})
    conditions = Conditions(CPU, "cpu", "abc", measure_ceilings(CPU))
    (record,) = measure(suite, CASE, FORWARD, ["mistaken"], conditions)
    assert record.status == "wrong"


def test_a_product_in_no_term_is_an_error():
    forgetful = replace(flops.REFERENCE, split=lambda of_all, of_attention: {"routing": 0})
    with pytest.raises(AssertionError, match="in no term"):
        forgetful.count(CASE)
