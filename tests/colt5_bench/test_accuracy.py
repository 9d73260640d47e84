from math import inf, isnan, nan, sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colt5_bench import accuracy
from colt5_bench.accuracy import budget, diverge, passes
from colt5_bench.results import Divergence

numbers = st.floats(-1e6, 1e6, width=32)


def fp64(*values):
    return torch.tensor(values, dtype=torch.float64)


class TestDiverge:
    def test_figures_of_a_known_difference(self):
        found = diverge(fp64(1.0, 2.5, 3.0, -4.0), fp64(1.0, 2.0, 3.0005, -4.0))
        assert found.largest == 0.5
        assert found.relative == pytest.approx(sqrt(0.25 + 0.0005**2) / sqrt(1 + 4 + 3.0005**2 + 16))
        assert found.fraction_above == 0.25
        assert (found.kinks, found.largest_at_kink, found.budget) == (0, 0.0, None)

    def test_the_bound_itself_is_not_above(self):
        assert diverge(fp64(0.5, 0.75), fp64(0.0, 0.0), bound=0.5).fraction_above == 0.5

    def test_kinks_are_apart(self):
        kinks = torch.tensor([False, True, False])
        found = diverge(fp64(1.25, 7.0, 2.0), fp64(1.0, 3.0, 2.0), kinks)
        assert found.largest == 0.25
        assert found.relative == pytest.approx(0.25 / sqrt(5))
        assert found.fraction_above == 0.5
        assert (found.kinks, found.largest_at_kink) == (1, 4.0)

    def test_only_kinks_leave_nothing_to_gate(self):
        found = diverge(fp64(1.0), fp64(2.0), torch.tensor([True]))
        assert (found.largest, found.relative, found.fraction_above, found.largest_at_kink) == (0, 0, 0, 1.0)

    def test_is_computed_in_fp64(self):
        expected = fp64(1 + 1e-12)
        assert diverge(torch.ones(1), expected).largest == pytest.approx(1e-12, rel=1e-3)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_equal_tensors_do_not_differ(self, dtype):
        x = torch.randn(3, 5).to(dtype)
        found = diverge(x, x.double())
        assert (found.largest, found.relative, found.fraction_above) == (0, 0, 0)

    @pytest.mark.parametrize("value", [nan, inf, -inf])
    def test_the_same_non_finite_value_agrees(self, value):
        found = diverge(fp64(value, 1.5), fp64(value, 1.0))
        assert (found.largest, found.relative, found.fraction_above) == (0.5, 0.5, 0.5)

    @pytest.mark.parametrize("kink", [False, True])
    @pytest.mark.parametrize(("actual", "expected"), [(nan, 1.0), (1.0, nan), (nan, inf), (inf, nan)])
    def test_one_nan_spoils_everything(self, actual, expected, kink):
        found = diverge(fp64(1e9, actual, 1e9), fp64(0.0, expected, 0.0), torch.tensor([False, kink, False]))
        found.budget = inf
        assert isnan(found.largest)
        assert isnan(found.relative)
        assert found.fraction_above == 1
        assert not passes(found)

    @pytest.mark.parametrize("kink", [False, True])
    @pytest.mark.parametrize(("actual", "expected"), [(inf, 1.0), (inf, -inf), (-inf, 0.0)])
    def test_an_infinity_that_is_not_expected_is_infinitely_far(self, actual, expected, kink):
        found = diverge(fp64(actual, 1.0), fp64(expected, 1.0), torch.tensor([kink, False]))
        found.budget = 1e300
        assert found.largest == inf
        assert not passes(found)

    def test_zero_where_zero_is_expected_is_exact_and_else_infinitely_far(self):
        assert diverge(fp64(0.0), fp64(0.0)).relative == 0
        assert diverge(fp64(0.1), fp64(0.0)).relative == inf

    def test_empty_tensors_agree(self):
        found = diverge(torch.empty(0, 4), torch.empty(0, 4, dtype=torch.float64))
        assert (found.largest, found.relative, found.fraction_above) == (0, 0, 0)

    @pytest.mark.parametrize("shapes", [((3,), (4,), (4,)), ((4,), (4,), (1,)), ((4, 1), (4,), (4,))])
    def test_shapes_that_differ_are_refused(self, shapes):
        actual, expected, kink = (torch.zeros(shape) for shape in shapes)
        with pytest.raises(ValueError, match="one shape"):
            diverge(actual, expected, kink.bool())

    def test_tensors_of_any_strides_can_be_compared(self):
        x = torch.randn(6, 8, dtype=torch.float64)
        kinks = torch.rand(1, 6).lt(0.5).expand(8, 6)
        assert diverge(x.t(), x.t().contiguous() + 0.25, kinks).largest == pytest.approx(0.25)

    @given(st.lists(st.tuples(numbers, numbers, st.booleans()), min_size=1, max_size=40), st.integers(1, 7))
    def test_chunks_change_nothing(self, elements, chunk):
        actual, expected, kinks = (torch.tensor(column) for column in zip(*elements, strict=True))
        whole = diverge(actual.double(), expected.double(), kinks)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(accuracy, "CHUNK", chunk)
            pieces = diverge(actual.double(), expected.double(), kinks)
        assert pieces == Divergence(**{**vars(whole), "relative": pytest.approx(whole.relative)})

    @given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=40))
    def test_norm_and_largest_bound_each_other(self, elements):
        actual, expected = (torch.tensor(column, dtype=torch.float64) for column in zip(*elements, strict=True))
        found = diverge(actual, expected)
        norm = expected.norm().item()
        if norm:
            assert found.largest * (1 - 1e-9) <= found.relative * norm
            assert found.relative * norm <= found.largest * sqrt(len(elements)) * (1 + 1e-9)


class TestBudget:
    def test_is_a_multiple_of_what_plain_pytorch_does(self):
        assert budget(Divergence(1e-3, 0, 0), fp64(1.0), torch.float32) == pytest.approx(1.5e-3)
        assert budget(Divergence(1e-3, 0, 0), fp64(1.0), torch.float32, factor=4) == pytest.approx(4e-3)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_allows_the_rounding_of_the_result(self, dtype):
        expected = 100 * torch.rand(1000, dtype=torch.float64)
        allowed = budget(Divergence(0, 0, 0), expected, dtype)
        rounding = diverge(expected.to(dtype), expected).largest
        assert 2 * rounding <= allowed <= 20 * rounding

    @pytest.mark.parametrize("useless", [nan, inf])
    def test_plain_pytorch_that_fails_allows_nothing_more(self, useless):
        expected = fp64(1.0, nan, inf)
        allowed = budget(Divergence(useless, 0, 0), expected, torch.float32)
        assert allowed == budget(Divergence(0, 0, 0), expected, torch.float32)
        assert 0 < allowed < 1e-5

    @pytest.mark.parametrize("expected", [fp64(0.0), fp64(), fp64(nan)])
    def test_is_never_zero(self, expected):
        assert 0 < budget(Divergence(0, 0, 0), expected, torch.float32) < 1e-30


class TestPasses:
    @pytest.mark.parametrize(
        ("largest", "allowed", "verdict"),
        [(1.0, 1.0, True), (1.1, 1.0, False), (nan, 1.0, False), (inf, 1.0, False), (1.0, nan, False)],
    )
    def test_compares_with_the_budget(self, largest, allowed, verdict):
        assert passes(Divergence(largest, 0, 0, budget=allowed)) is verdict

    def test_without_a_budget_all_but_nan_passes(self):
        assert passes(Divergence(1e9, 0, 0))
        assert not passes(Divergence(nan, 0, 0))
