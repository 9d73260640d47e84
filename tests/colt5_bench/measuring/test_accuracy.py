from dataclasses import asdict
from math import inf, isnan, nan, sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colt5_bench.measuring import accuracy
from colt5_bench.measuring.accuracy import FEWEST, Spread, diverge, passes, tolerances
from colt5_bench.records.results import Divergence
from colt5_bench.tolerance import Tolerance

numbers = st.floats(-1e6, 1e6, width=32)


def fp64(*values):
    return torch.tensor(values, dtype=torch.float64)


NOTHING = torch.zeros(accuracy.MOST_POWER - accuracy.LEAST_POWER + 2, dtype=torch.float64)
LAX = Tolerance(NOTHING, 0.0, 1e300, torch.float32)


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
        kinks = torch.tensor([False, kink, False])
        found = diverge(fp64(1e9, actual, 1e9), fp64(0.0, expected, 0.0), kinks, tolerance=LAX)
        assert isnan(found.largest)
        assert isnan(found.relative)
        assert found.fraction_above == 1
        assert not passes(found)

    @pytest.mark.parametrize("kink", [False, True])
    @pytest.mark.parametrize(("actual", "expected"), [(inf, 1.0), (inf, -inf), (-inf, 0.0)])
    def test_an_infinity_that_is_not_expected_is_infinitely_far(self, actual, expected, kink):
        found = diverge(fp64(actual, 1.0), fp64(expected, 1.0), torch.tensor([kink, False]), tolerance=LAX)
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
            patch.setitem(accuracy.CHUNK, "cpu", chunk)
            pieces = diverge(actual.double(), expected.double(), kinks)
        assert pieces == Divergence(**{**asdict(whole), "relative": pytest.approx(whole.relative)})

    @given(st.data(), st.lists(st.integers(1, 4), max_size=3), st.integers(1, 7), st.sampled_from([1.0, nan]))
    def test_wrong_elements_are_counted_and_the_worst_is_named(self, data, shape, chunk, error):
        expected = torch.ones(shape, dtype=torch.float64)
        place = st.tuples(*(st.integers(0, size - 1) for size in shape))
        wrong = data.draw(st.lists(place, min_size=1, max_size=5, unique=True))
        actual, kinks = expected.clone(), torch.zeros(shape, dtype=torch.bool)
        for number, where in enumerate(wrong):
            # One error is larger than the others.
            actual[where] += error * (1 + (number == 0))
        kink = data.draw(place)
        kinks[kink] = kink not in wrong
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(accuracy.CHUNK, "cpu", chunk)
            found = diverge(actual, expected, kinks, tolerance=LAX.at_most(0.5))
            right = diverge(expected, expected, kinks, tolerance=LAX.at_most(0.5))
        assert found.off == len(wrong)
        assert found.worst_at == list(min(wrong) if isnan(error) else wrong[0])
        assert (right.off, right.worst_at) == (0, None)

    @given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=40))
    def test_norm_and_largest_bound_each_other(self, elements):
        actual, expected = (torch.tensor(column, dtype=torch.float64) for column in zip(*elements, strict=True))
        found = diverge(actual, expected)
        norm = expected.norm().item()
        if norm:
            assert found.largest * (1 - 1e-9) <= found.relative * norm
            assert found.relative * norm <= found.largest * sqrt(len(elements)) * (1 + 1e-9)


def sums(x):
    """Plain PyTorch's results for rows of x: sums, and their gradient."""
    x = x.detach().requires_grad_()
    y = (x * x).sum(dim=-1)
    return {"output": y, "x": torch.autograd.grad(y.sum(), x)[0]}


class TestTolerances:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_any_order_of_a_sum_is_within(self, dtype):
        for seed in range(20):
            x = torch.randn(64, 300, generator=torch.Generator().manual_seed(seed)).to(dtype)
            expected = sums(x.double())
            allowed = tolerances(lambda x=x: sums(x), expected)
            for order in range(5):
                other = sums(x[:, torch.randperm(300, generator=torch.Generator().manual_seed(order))])["output"]
                assert passes(diverge(other, expected["output"], tolerance=allowed["output"]))

    @pytest.mark.parametrize("factor", [1.0, 0.1, 0.02, 0.004])
    @pytest.mark.parametrize("terms", [1, 16, 512])
    def test_it_does_not_matter_where_numbers_vanish_in_fp16(self, terms, factor):
        """For example, in a gradient whose terms cancel, so that only roundings remain."""
        for seed in range(5):
            u = torch.randn(64, terms, 30, generator=torch.Generator().manual_seed(seed))

            def plain(u=u):
                return {"output": ((u.sum(-1) - u.flip(-1).sum(-1)).half() * factor).sum(-1).float()}

            expected = torch.zeros(64, dtype=torch.float64)
            allowed = tolerances(plain, {"output": expected})["output"]
            left = u.sum(-1) - u.flip(-1).sum(-1)
            for other in ((left * factor).sum(-1).half(), (left.half() * factor).sum(-1), left.sum(-1).half() * factor):
                assert passes(diverge(other.float(), expected, tolerance=allowed))
            assert not passes(diverge(expected + 1e-3, expected, tolerance=allowed))

    def test_a_term_that_is_missing_is_not(self):
        x = torch.randn(64, 300)
        expected = sums(x.double())
        allowed = tolerances(lambda: sums(x), expected)["output"]
        assert not passes(diverge(sums(x[:, :-1])["output"], expected["output"], tolerance=allowed))

    def test_what_rounds_nothing_allows_a_rounding(self):
        x = torch.randn(500)
        allowed = tolerances(lambda: {"output": x.flip(0)}, {"output": x.flip(0).double()})["output"]
        rounding = torch.finfo(torch.float32).eps
        assert passes(diverge(x.flip(0) * (1 + rounding), x.flip(0).double(), tolerance=allowed))
        assert not passes(diverge(x.flip(0) * (1 + 8 * rounding), x.flip(0).double(), tolerance=allowed))

    def test_a_small_exponential_may_be_off_by_less_than_a_large_one(self):
        x = torch.linspace(-20, 0, 4000)
        expected = x.double().exp()
        allowed = tolerances(lambda: {"output": x.exp()}, {"output": expected})["output"].of(expected)
        assert (allowed <= 3e-4 * expected).all()
        assert (allowed.diff() >= 0).all()

    def test_a_small_sum_may_be_off_by_as_much_as_a_large_one(self):
        x = torch.randn(4000, 100)
        expected = x.double().sum(dim=-1)
        allowed = tolerances(lambda: {"output": x.sum(dim=-1)}, {"output": expected})["output"].of(expected)
        assert allowed.max() <= 4 * allowed.min()

    def test_a_zero_of_terms_that_cancel_is_judged_like_small_elements(self):
        expected = torch.cat((torch.zeros(3), torch.ones(100))).double()
        spread = Spread(expected)
        spread.add(expected + 1e-6)
        spread.add(expected + torch.cat((torch.full((3,), 1e-9), torch.zeros(100))))
        assert spread.tolerance().of(expected).unique().tolist() == pytest.approx([8e-6], rel=1e-6)

    def test_a_zero_that_is_exact_in_all_computations_has_to_be_exact(self):
        expected = torch.cat((torch.zeros(3), torch.ones(100))).double()
        spread = Spread(expected)
        spread.add(expected + 1e-6 * expected)
        assert spread.tolerance().of(expected)[:3].max() < 1e-30

    def test_few_small_elements_are_judged_like_the_others(self):
        expected = torch.cat([fp64(1e-9), torch.ones(200, dtype=torch.float64)])
        spread = Spread(expected)
        spread.add(expected + torch.cat([fp64(0), torch.full((200,), 1e-7, dtype=torch.float64)]))
        assert spread.tolerance().of(expected[:1]) == pytest.approx(8e-7)

    @pytest.mark.parametrize("useless", [nan, inf])
    def test_plain_pytorch_that_fails_allows_nothing_more(self, useless):
        spread = Spread(fp64(1.0, nan, inf))
        spread.add(torch.tensor([useless, nan, inf]))
        assert 0 < spread.tolerance().of(fp64(1.0)).item() < 1e-6

    @pytest.mark.parametrize("expected", [fp64(0.0), fp64(), fp64(nan)])
    def test_is_never_zero(self, expected):
        spread = Spread(expected)
        spread.add(expected.float())
        assert 0 < spread.tolerance().of(fp64(0.0)).item() < 1e-30

    def test_kinks_say_nothing(self):
        spread = Spread(fp64(1.0, 1.0), torch.tensor([False, True]))
        spread.add(torch.tensor([1.0, 100.0]))
        assert spread.tolerance().of(fp64(1.0)).item() < 1e-6

    @given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=40), st.integers(1, 7))
    def test_chunks_change_nothing(self, numbers, chunk):
        expected = fp64(*numbers)
        whole, pieces = Spread(expected), Spread(expected)
        moved = (expected * 1.001).float().clamp(-3e38, 3e38)
        whole.add(moved)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(accuracy.CHUNK, "cpu", chunk)
            pieces.add(moved)
        assert torch.equal(whole.tolerance().of(expected), pieces.tolerance().of(expected))

    @pytest.mark.parametrize("tables", [2, 7])
    def test_tables_change_nothing(self, monkeypatch, tables):
        random = torch.Generator().manual_seed(0)
        expected = torch.randn(3000, dtype=torch.float64, generator=random) ** 5
        one = Spread(expected)
        monkeypatch.setitem(accuracy.TABLES, "cpu", tables)
        many = Spread(expected)
        for _ in range(3):
            moved = (expected + 1e-3 * torch.randn(3000, generator=random)).float()
            one.add(moved)
            many.add(moved)
        assert torch.equal(one.tolerance().by_magnitude, many.tolerance().by_magnitude)

    def test_elements_count_once_however_many_results_there_are(self):
        """The error of a few small elements is random, and repeated computations do not add elements."""
        expected = torch.cat([fp64(1e-3).repeat(FEWEST - 1), fp64(1.0).repeat(FEWEST)])
        spread = Spread(expected)
        for _ in range(3):
            spread.add(torch.where(expected < 1, expected, 1.1).float())
        assert spread.tolerance().of(fp64(1e-3)).item() > 0.1

    def test_bounds_hold_for_every_element(self):
        spread = Spread(fp64(1.0, 1e-3))
        spread.add(torch.tensor([1.1, 1e-3]))
        assert spread.tolerance().at_most(1e-2).of(fp64(1.0, 1e-3)).max() == 1e-2
        assert spread.tolerance().at_least(2.0).of(fp64(1.0, 1e-3, 0.0)).min() == 2.0


class TestPasses:
    @pytest.mark.parametrize(
        ("worst", "allowed", "verdict"),
        [(1.0, 1.0, True), (1.0000001, 1.0, False), (inf, 1.0, False), (1.0, nan, False), (0.0, inf, True)],
    )
    def test_compares_the_worst_element_with_what_is_allowed(self, worst, allowed, verdict):
        assert passes(Divergence(worst, 0, 0, worst=worst, allowed=allowed)) is verdict

    def test_without_a_tolerance_all_but_nan_passes(self):
        assert passes(Divergence(1e9, 0, 0))
        assert not passes(Divergence(nan, 0, 0))

    @given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=20), st.floats(1e-6, 1e6))
    def test_means_that_no_element_is_off_by_more(self, elements, most):
        actual, expected = (torch.tensor(column, dtype=torch.float64) for column in zip(*elements, strict=True))
        allowed = Tolerance(NOTHING, 0.1, 1e-3, torch.float64, most)
        within = ((actual - expected).abs() <= allowed.of(expected)).all().item()
        assert passes(diverge(actual, expected, tolerance=allowed)) is within
