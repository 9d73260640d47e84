"""Kernels and CPU paths for any scores, with outliers and infinities, against the definition in fp64."""

import math

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
import reference
from tests.kernels.devices import DEVICE
from tests.reference.outliers import matrices

INTERPRETED = triton.knobs.runtime.interpret
EXAMPLES = 2 if INTERPRETED else 15
DTYPES = [torch.float32] if INTERPRETED else [torch.float16, torch.bfloat16, torch.float32]
WITH_FP64 = DTYPES if INTERPRETED else [*DTYPES, torch.float64]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

K = st.sampled_from([0.7, 1.0, 2.3, 3.0, 9.5])
CONSTANT = {"n_iters": 5, "eps": 0.1}
DECAYING = {"n_iters": 5, "eps": 0.05, "eps_init": 3.0, "eps_decay": 0.4}
OPTIONS = st.sampled_from([CONSTANT, DECAYING, {"n_iters": 1, "eps": 1.0}, {"n_iters": 2, "eps": 0.03}])
INFINITIES = st.sampled_from([(-math.inf,), (-math.inf, math.inf, math.nan)])


def compare(kernel, definition, scores, mask, options, scale=1):
    """Values, and gradients if those of the definition are on one side of a kink."""
    hidden = ~mask | (scores == -math.inf)
    upstream = torch.linspace(-1, 2, mask.numel(), dtype=scores.dtype, device=scores.device).view(mask.shape)
    # As of a logarithm: an entry that takes no part is a constant 0, for any use of it.
    upstream = upstream.masked_fill(hidden, math.inf)

    def differentiate(operation, scores):
        scores = scores.detach().requires_grad_()
        y = operation(scores, mask=mask, **options)
        return y.detach(), torch.autograd.grad(y, scores, upstream.to(y.dtype))[0]

    y, ds = differentiate(kernel, scores)
    wide, exact_ds = differentiate(definition, scores.double())
    assert y.dtype == ds.dtype == scores.dtype
    rounding = torch.finfo(scores.dtype).eps
    # A rounding of the exponent, a few units of 2**-24, in each iteration.
    tolerance = scale * 1e-6 * options.get("n_iters", 5)
    bad = ((scores.isnan() | (scores == math.inf)) & mask).any(dim=-1)
    assert y[bad].masked_fill(hidden[bad], math.nan).isnan().all()
    assert not y[~bad].isnan().any()
    torch.testing.assert_close(y[~bad].double(), wide[~bad], rtol=rounding, atol=tolerance)
    assert not y[~bad][hidden[~bad]].any()
    assert not ds[~bad][hidden[~bad]].any()

    nudge = 1e-5 * options["eps"]
    sides = [differentiate(definition, scores.double() + each)[1] for each in (-nudge, nudge)]
    smooth = ~bad & ((sides[0] - sides[1]).abs().amax(dim=-1) < 1e-2 / options["eps"])
    tolerance *= 8 / options["eps"]
    torch.testing.assert_close(ds[smooth].double(), exact_ds[smooth], rtol=4 * rounding, atol=tolerance)


@pytest.mark.parametrize("dtype", WITH_FP64)
@settings(max_examples=EXAMPLES)
@given(data=st.data(), k=K, options=OPTIONS, infinities=INFINITIES)
def test_coordinate_descent(dtype, data, k, options, infinities):
    scores, mask = (each.to(DEVICE) for each in data.draw(matrices(dtype, infinities)))
    compare(kernels.coor_descent, reference.coor_descent, scores, mask, {"k": k, **options})


@pytest.mark.parametrize("dtype", WITH_FP64)
@settings(max_examples=EXAMPLES)
@given(data=st.data(), k=K, eps=st.sampled_from([0.03, 0.1, 1.0, 50.0]), infinities=INFINITIES)
def test_soft_topk(dtype, data, k, eps, infinities):
    scores, mask = (each.to(DEVICE) for each in data.draw(matrices(dtype, infinities)))
    compare(kernels.soft_topk, reference.soft_topk, scores, mask, {"k": k, "eps": eps})


@settings(max_examples=EXAMPLES)
@given(data=st.data(), k=K, options=OPTIONS, infinities=INFINITIES)
def test_segmented_coordinate_descent(data, k, options, infinities):
    """For scores without outliers, because it computes the plain definition in fp32."""
    scores, mask = (each.to(DEVICE) for each in data.draw(matrices(torch.float32, infinities, largest=100.0)))

    def segmented(scores, **options):
        return kernels.segmented_coor_descent(scores, checkpoint_segments=min(2, options["n_iters"]), **options)

    # Three roundings per iteration of numbers of up to 103, in units of the temperature.
    scale = 3 * 2**-24 * 103 / options["eps"] / 1e-6
    compare(segmented, reference.coor_descent, scores, mask, {"k": k, **options}, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=EXAMPLES)
@given(data=st.data(), k=st.sampled_from([1, 3, 9]), options=OPTIONS)
def test_topk(dtype, data, k, options):
    """The values are the scores, for any scores; if fewer than k take part, the rest is 0."""
    scores, mask = (each.to(DEVICE) for each in data.draw(matrices(dtype)))

    values, _, soft, gates = kernels.topk(scores, k, mask=mask, fused=True, **options)
    wide_values, _, wide_soft, wide_gates = reference.topk(scores.double(), k, mask=mask, **options)
    hidden = ~mask | (scores == -math.inf)
    expected = scores.masked_fill(hidden, -math.inf).sort(dim=-1, descending=True).values[:, :k]
    rounding = 2 * torch.finfo(scores.dtype).eps
    torch.testing.assert_close(values, expected.masked_fill(expected == -math.inf, 0.0), rtol=rounding, atol=0)
    torch.testing.assert_close(values.double(), wide_values, rtol=rounding, atol=0)
    torch.testing.assert_close(soft.double(), wide_soft, rtol=rounding, atol=1e-6 * options["n_iters"])
    torch.testing.assert_close(gates.double(), wide_gates, rtol=rounding, atol=0)

    # A gradient is as large as a value, and some values are too large for that.
    small = torch.where(scores.abs() < 100, scores, scores.sign()).masked_fill(hidden, -math.inf).requires_grad_()
    values, _, soft, gates = kernels.topk(small, k, fused=True, **options)
    upstream = torch.ones_like(values), *(x.detach().masked_fill(gates == 0, math.inf) for x in (soft, 1 - gates))
    (ds,) = torch.autograd.grad((values, soft, gates), small, upstream)
    assert ds.isfinite().all()
    assert not ds[hidden].any()


@settings(max_examples=EXAMPLES)
@given(data=st.data(), k=K, options=OPTIONS)
def test_prefixes(data, k, options):
    """For scores that are not all far below 0, where no digits are left for their differences."""
    scores, _ = data.draw(matrices(torch.float32, (-math.inf,), largest=1e4))
    scores = scores.nan_to_num(nan=0.5, neginf=-math.inf).to(DEVICE)[None]
    options = {"window_size": 2, "num_selected": 4, "k": k, **options}
    outs = []
    for operation, x in ((kernels.route_prefixes, scores), (reference.route_prefixes, scores.double())):
        x = x.detach().requires_grad_()
        indices, weights, _ = operation(x, **options)
        of_lowest = (x == -math.inf)[:, None].expand(*indices.shape[:-1], -1).gather(-1, indices)
        upstream = torch.ones_like(weights).masked_fill(of_lowest, math.inf)
        outs.append((indices, weights, torch.autograd.grad(weights, x, upstream)[0]))
    assert torch.equal(outs[0][0], outs[1][0])
    # A rounding of fp32 of scores of up to 1e4, divided by the temperature.
    torch.testing.assert_close(outs[0][1].double(), outs[1][1], rtol=0, atol=1e-6 * options["n_iters"])
    assert outs[0][2].isfinite().all()
    assert not outs[0][2][scores == -math.inf].any()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@settings(max_examples=EXAMPLES)
@given(data=st.data(), count=st.sampled_from([1, 4, 9]), infinities=INFINITIES)
def test_select(dtype, data, count, infinities):
    scores, mask = (each.to(DEVICE) for each in data.draw(matrices(dtype, infinities)))
    expected = reference.select(scores, num_selected=count, mask=mask)
    assert torch.equal(kernels.select(scores, num_selected=count, mask=mask), expected)
    # Entries that take no part come after all others.
    hidden = (~mask | (scores == -math.inf)).gather(-1, expected)
    assert (hidden.cummax(dim=-1).values == hidden).all()
