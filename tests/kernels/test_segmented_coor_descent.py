"""The published algorithm against the definition in fp64, at every number of segments.

The same tests run on the CPU path, in Triton's interpreter (TRITON_INTERPRET=1) and on a GPU if there is one. The
kernels compute fp64 scores in fp64, which distinguishes a wrong algorithm from rounding.
"""

from itertools import pairwise, product

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from kernels import segmented_coor_descent
from kernels.segmented_coor_descent import triton as segmented_kernels
from reference._shared.arguments import epsilon_schedule
from tests.kernels.devices import DEVICE, capture

INTERPRETED = triton.knobs.runtime.interpret

CONSTANT = {"n_iters": 5, "eps": 0.1}
DECAYING = {"n_iters": 5, "eps": 0.05, "eps_init": 1.0, "eps_decay": 0.4}
"""It reaches eps in the last iteration, so that temperatures differ within segments and between them."""

SHORT = {"n_iters": 2, "eps": 0.1, "checkpoint_segments": 2}
"""Options for tests that do not depend on the number of iterations."""

SCHEDULES = pytest.mark.parametrize("options", [CONSTANT, DECAYING], ids=["constant", "decaying"])


# The CPU path has no limit on the length of rows.
@pytest.fixture(params=["resident", "streamed"] if INTERPRETED or DEVICE == "cuda" else ["CPU"])
def path(request, set_sizes):
    """Rows in registers, and rows read tile by tile, at sizes that are feasible for the interpreter."""
    if request.param == "streamed":
        # In fp64, which counts four times: tiles of 32.
        set_sizes(segmented_kernels, RESIDENT=0, STREAMED=128)
        # Settings for a tile that at most a few warps share.
        settings = {"BLOCK_N": 32, "num_warps": 1, "maxnreg": 255}
        assert segmented_kernels._plan(2, 100, torch.float64.itemsize) == (2, settings, 4)


def randn(*shape, std=1.0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, device=DEVICE) * std


def differentiate(operation, scores, grad, k, **options):
    """Output, and the gradients of the scores and of k (None if k is a number)."""
    scores = scores.detach().clone().requires_grad_()
    k = k.detach().clone().requires_grad_() if isinstance(k, torch.Tensor) else k
    y = operation(scores, k=k, **options)
    y.backward(grad)
    return y.detach(), scores.grad, k.grad if isinstance(k, torch.Tensor) else None


def shift_by_rounding(scores, n_iters, eps, eps_init=None, eps_decay=1.0):
    """Possible effect of rounding on an exponent of the output.

    An iteration rounds a and s + a, numbers of up to `largest`, and passes on an error in a times the share of the
    clipped entries, which is at most 1: errors at most add up.
    """
    largest = scores.detach().abs().max().item() + 5 * max(eps_init or eps, eps)
    precision = torch.promote_types(scores.dtype, torch.float32)
    return n_iters * torch.finfo(precision).eps * largest / eps


def check(scores, k, *, grad=None, mask=None, **options):
    """Compare values and gradients with the definition in fp64 on the same inputs."""
    grad = torch.randn_like(scores) if grad is None else grad
    schedule = {name: options[name] for name in options if name != "checkpoint_segments"}
    actual = differentiate(segmented_coor_descent, scores, grad, k, mask=mask, **options)
    wide_k = k.double() if isinstance(k, torch.Tensor) else k
    expected = differentiate(reference.coor_descent, scores.double(), grad.double(), wide_k, mask=mask, **schedule)

    shift = shift_by_rounding(scores, **schedule)
    # An output is at most 1, and the contribution of an entry to a gradient is |g| / eps times that.
    steepest = grad.abs().max().item() / options["eps"]
    bounds = {"output": shift, "gradient of scores": shift * steepest, "gradient of k": shift * steepest}
    # Half precision rounds once, and the interpreter truncates to bf16, which counts as two roundings.
    rounding = 2 * torch.finfo(scores.dtype).eps if scores.dtype.itemsize == 2 else 0.0
    for (name, bound), tensor, wanted in zip(bounds.items(), actual, expected, strict=True):
        if tensor is not None:
            assert tensor.dtype == (k if name == "gradient of k" else scores).dtype
            worst = (tensor.double() - wanted).abs().max().item()
            assert worst <= bound + rounding * wanted.abs().max().item(), name
    return actual


@SCHEDULES
@pytest.mark.parametrize("segments", range(1, 6))
def test_matches_the_definition_at_every_number_of_segments(path, segments, options):
    scores, mask = randn(2, 1, 50, std=2.0), torch.rand(2, 1, 50, device=DEVICE) > 0.2
    k = torch.tensor([[1.5], [15.0]], dtype=torch.float64, device=DEVICE)
    check(scores, k, mask=mask, checkpoint_segments=segments, **options)


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("shape", [(3, 1), (2, 7), (33,), (1, 2, 64), (1, 700)], ids=str)
def test_matches_the_definition_at_any_shape(shape, segments):
    scores = randn(*shape)
    check(scores, shape[-1] / 8, checkpoint_segments=segments, **CONSTANT)
    check(scores, shape[-1] / 8, checkpoint_segments=segments, **DECAYING)


@pytest.mark.parametrize("segments", [4, 20] if INTERPRETED else [1, 4, 20])
def test_many_iterations(segments):
    check(randn(1, 40, std=5.0), 6.0, n_iters=20, eps=0.03, checkpoint_segments=segments)


@SCHEDULES
@pytest.mark.parametrize("segments", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp32_inside_whatever_comes_in(path, dtype, segments, options):
    k = torch.tensor([4.0, 20.0], device=DEVICE)
    check(randn(2, 150).to(dtype), k, checkpoint_segments=segments, **options)


def test_what_is_kept_is_a_and_b_of_the_definition_at_the_borders_of_segments(path):
    """b at the start of each segment and a at its end: 5 iterations in 3 segments are 1, 2 and 2."""
    scores = randn(2, 50)
    *temperatures, last = epsilon_schedule(**{"eps_init": None, "eps_decay": 1.0, **DECAYING})
    _, kept_a, kept_b, kept_temperatures = torch.ops.colt5.segmented_coor_descent(
        scores, None, None, 6.0, 5, DECAYING["eps_init"], DECAYING["eps_decay"], DECAYING["eps"], 3, True
    )
    assert kept_a.shape == (3, 2)
    assert kept_b.shape == (3, 2, 50)
    assert kept_temperatures.tolist() == [*temperatures, last]

    log_k = torch.tensor(6.0, dtype=torch.float64, device=DEVICE).log()
    b = -scores
    for segment, (start, stop) in enumerate(pairwise((0, 1, 3, 5))):
        torch.testing.assert_close(kept_b[segment], b, rtol=0, atol=1e-13)
        for temperature in temperatures[start:stop]:
            a = temperature * (log_k - ((scores + b) / temperature).logsumexp(dim=-1, keepdim=True))
            b = -(scores + a).relu()
        torch.testing.assert_close(kept_a[segment], a[:, 0], rtol=0, atol=1e-13)


def test_nothing_is_kept_where_no_gradient_is_wanted():
    scores = randn(2, 50)
    y, a, b, temperatures = torch.ops.colt5.segmented_coor_descent(scores, None, None, 6.0, 5, 0.1, 1.0, 0.1, 3, False)
    assert a.numel() == b.numel() == temperatures.numel() == 0
    kept = torch.ops.colt5.segmented_coor_descent(scores, None, None, 6.0, 5, 0.1, 1.0, 0.1, 3, True)
    assert torch.equal(y, kept[0])


@pytest.mark.parametrize("segments", [1, 3, 5])
def test_what_is_masked_takes_part_in_nothing(path, segments):
    scores, grad, mask = randn(2, 50), randn(2, 50), torch.rand(2, 50, device=DEVICE) > 0.5
    k = torch.tensor([2.0, 5.0], dtype=torch.float64, device=DEVICE)
    y, ds, _ = clean = check(scores, k, grad=grad, mask=mask, checkpoint_segments=segments, **DECAYING)
    assert not y[~mask].any()
    assert not ds[~mask].any()

    scores[~mask] = torch.tensor([torch.nan, torch.inf, -torch.inf], device=DEVICE).double().repeat(50)[: (~mask).sum()]
    grad[~mask] = torch.inf
    polluted = differentiate(segmented_coor_descent, scores, grad, k, mask=mask, **DECAYING)
    for before, after in zip(clean, polluted, strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("segments", [1, 3])
def test_a_fully_masked_row_is_zero_and_has_no_gradient(path, segments):
    mask = torch.ones(3, 40, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    k = torch.full((3,), 4.0, dtype=torch.float64, device=DEVICE)
    y, ds, dk = check(randn(3, 40), k, mask=mask, checkpoint_segments=segments, **DECAYING)
    assert not y[1].any()
    assert not ds[1].any()
    assert dk[1] == 0


@pytest.mark.parametrize("segments", [1, 3])
def test_a_nan_stays_in_its_row(path, segments):
    scores, grad = randn(3, 40), randn(3, 40)
    k = torch.full((3,), 4.0, dtype=torch.float64, device=DEVICE)
    options = {"checkpoint_segments": segments, **CONSTANT}
    clean = differentiate(segmented_coor_descent, scores, grad, k, **options)
    scores[1, 11] = torch.nan
    for before, after in zip(clean, differentiate(segmented_coor_descent, scores, grad, k, **options), strict=True):
        assert after[1].isnan().all()
        assert torch.equal(after[::2], before[::2])


@pytest.mark.parametrize("segments", [1, 3])
def test_a_nan_leaves_what_is_masked_alone(path, segments):
    scores, mask = randn(2, 40), torch.rand(2, 40, device=DEVICE) > 0.3
    mask[:, 0], mask[:, 1] = True, False
    scores[0, 0], scores[1, 1] = torch.nan, torch.nan
    options = {"mask": mask, "checkpoint_segments": segments, **CONSTANT}
    for tensor in differentiate(segmented_coor_descent, scores, randn(2, 40), 4.0, **options)[:2]:
        assert torch.equal(tensor.isnan(), mask & torch.tensor([[True], [False]], device=DEVICE))
        assert not tensor[~mask].any()


def test_a_k_that_is_not_positive_makes_its_row_nan(path):
    scores, k = randn(4, 40), torch.tensor([4.0, 0.0, -1.0, torch.nan], dtype=torch.float64, device=DEVICE)
    y, ds, dk = differentiate(segmented_coor_descent, scores, randn(4, 40), k, checkpoint_segments=2, **CONSTANT)
    for tensor in (y[:, 0], ds[:, 0], dk):
        assert tensor.isnan().tolist() == [False, True, True, True]
    assert y[1:].isnan().all()


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("k", [0.25, 1.0, 30.0, 39.5, 100.0])
def test_k_from_below_one_to_above_the_number_of_entries(k, segments):
    check(randn(2, 40), k, checkpoint_segments=segments, **CONSTANT)
    check(randn(2, 40), k, checkpoint_segments=segments, **DECAYING)


@pytest.mark.parametrize("eps", [1e-3, 1.0])
@pytest.mark.parametrize("segments", [1, 3])
def test_extreme_scores(segments, eps):
    scores = randn(5, 40)
    scores[0, 3], scores[1, 5] = 1e4, -1e4
    scores[2] -= 1e4
    scores[3] += 1e4
    scores[4] *= 1e4
    check(scores, 4.0, checkpoint_segments=segments, n_iters=5, eps=eps)
    check(scores, 4.0, checkpoint_segments=segments, n_iters=5, eps=eps, eps_init=4.0, eps_decay=0.5)

    # For these, the rounding error in fp32 is half an exponent or more: the test is only about overflow.
    narrow, options = scores.float(), {"checkpoint_segments": segments, "n_iters": 5, "eps": eps}
    y, ds, _ = differentiate(segmented_coor_descent, narrow, narrow.sign(), 4.0, **options)
    assert ((y >= 0) & (y <= 1)).all()
    assert ds.isfinite().all()


@pytest.mark.parametrize("segments", [1, 3, 5])
def test_ties_and_kinks(segments):
    """Equal scores away from a kink, and scores at the kink of the first iteration, where relu'(0) = 0.

    With k = n the first a is exactly 0, and so is s + a for scores of 0.
    """
    tied = (2 * randn(3, 60)).round() / 2 + 0.1
    check(tied, 10.0, checkpoint_segments=segments, **CONSTANT)

    # n is a power of two, whose log2 is exact, and with it log k - log n.
    at_kink = torch.tensor([[0.0, 0.0, -1.0, 1.0], [0.0, -0.5, -0.25, -2.0]], dtype=torch.float64, device=DEVICE)
    check(at_kink, 4.0, checkpoint_segments=segments, **CONSTANT)


LAYOUTS = {
    "transposed": lambda: randn(40, 4).t(),
    "every other entry": lambda: randn(4, 80)[:, ::2],
    "misaligned": lambda: randn(4, 41)[:, 1:],
    "one row repeated": lambda: randn(1, 40).expand(4, 40),
    "one entry repeated": lambda: randn(4, 1).expand(4, 40),
    "leading dimensions exchanged": lambda: randn(2, 2, 40).transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_the_scores(layout):
    scores = LAYOUTS[layout]()
    options = {"k": 5.0, **SHORT}
    mask = torch.rand(40, device=DEVICE) > 0.2
    expected = differentiate(segmented_coor_descent, scores.contiguous(), torch.ones_like(scores), mask=mask, **options)

    view = scores.detach().requires_grad_()
    y = segmented_coor_descent(view, mask=mask, **options)
    # The gradient of a sum is one number with strides of 0.
    y.sum().backward()
    assert torch.equal(y, expected[0])
    assert torch.equal(view.grad, expected[1])


@pytest.mark.parametrize("shape", [(), (3,), (1, 3), (2, 1)], ids=str)
def test_k_broadcasts(shape):
    k = torch.rand(shape, dtype=torch.float64, device=DEVICE) * 5 + 1
    scores, grad = randn(2, 3, 40), randn(2, 3, 40)
    y, ds, dk = differentiate(segmented_coor_descent, scores, grad, k, **SHORT)
    each = differentiate(segmented_coor_descent, scores, grad, k.expand(2, 3).contiguous(), **SHORT)
    assert torch.equal(y, each[0])
    assert torch.equal(ds, each[1])
    torch.testing.assert_close(dk, each[2].sum_to_size(shape), rtol=1e-12, atol=0)


def test_k_of_any_layout():
    scores, k = randn(4, 40), torch.rand(8, dtype=torch.float64, device=DEVICE)[::2] + 3
    y = segmented_coor_descent(scores, k=k, **SHORT)
    assert torch.equal(y, segmented_coor_descent(scores, k=k.clone(), **SHORT))


@pytest.mark.parametrize("shape", [(40,), (3, 1, 40), (1, 2, 1), (2, 40)], ids=str)
def test_a_mask_broadcasts(shape):
    mask = torch.arange(torch.Size(shape).numel(), device=DEVICE).reshape(shape) % 3 > 0
    scores = randn(3, 2, 40)
    y = segmented_coor_descent(scores, k=4.0, mask=mask, **SHORT)
    # Strides affect which thread adds up which entries.
    spread_out = segmented_coor_descent(scores, k=4.0, mask=mask.expand(3, 2, 40).clone(), **SHORT)
    torch.testing.assert_close(y, spread_out, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)], ids=str)
def test_no_rows(shape):
    scores, k = randn(*shape).requires_grad_(), randn(*shape[:-1]).requires_grad_()
    y = segmented_coor_descent(scores, k=k, checkpoint_segments=2, **CONSTANT)
    y.sum().backward()
    assert y.shape == scores.grad.shape == shape
    assert k.grad.shape == shape[:-1]


@pytest.mark.skipif(INTERPRETED, reason="takes long in the interpreter, which has the comparison with the definition")
@SCHEDULES
@pytest.mark.parametrize("segments", [1, 3, 5])
def test_gradcheck(segments, options):
    scores, k = randn(2, 9).requires_grad_(), torch.tensor([1.5, 4.0], dtype=torch.float64, device=DEVICE)
    mask = torch.arange(9, device=DEVICE) != 4

    def operation(scores, k):
        return segmented_coor_descent(scores, k=k, mask=mask, checkpoint_segments=segments, **options)

    assert torch.autograd.gradcheck(operation, (scores, k.requires_grad_()), eps=1e-7)


def test_the_same_from_run_to_run(path):
    scores, grad, k = randn(2, 80), randn(2, 80), torch.full((2,), 20.0, dtype=torch.float64, device=DEVICE)
    options = {"checkpoint_segments": 3, **DECAYING}
    first, *others = (differentiate(segmented_coor_descent, scores, grad, k, **options) for _ in range(3))
    for other, (tensor, again) in product(others, enumerate(first)):
        assert torch.equal(other[tensor], again)


@settings(max_examples=4 if INTERPRETED else 60)
@given(data=st.data())
def test_segments_change_time_and_memory_alone(data):
    n_iters = data.draw(st.integers(2, 6))
    segments = data.draw(st.integers(2, n_iters))
    options = {"n_iters": n_iters, "eps": 0.1, **data.draw(st.sampled_from([{}, {"eps_init": 1.0, "eps_decay": 0.7}]))}
    row = data.draw(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=40))
    scores = torch.tensor([row], dtype=torch.float64, device=DEVICE)
    k = torch.tensor([data.draw(st.floats(0.5, 50))], dtype=torch.float64, device=DEVICE)
    grad = torch.linspace(-1, 1, len(row), dtype=torch.float64, device=DEVICE)[None]

    y, *gradients = differentiate(segmented_coor_descent, scores, grad, k, checkpoint_segments=1, **options)
    other_y, *other = differentiate(segmented_coor_descent, scores, grad, k, checkpoint_segments=segments, **options)
    assert torch.equal(y, other_y)
    for one, another in zip(gradients, other, strict=True):
        # Recomputed from another start, but in the same order: the same except for a last a that is not recomputed.
        torch.testing.assert_close(one, another, rtol=0, atol=shift_by_rounding(scores, **options) / 0.1)


BAD = {
    "n_iters": ({"n_iters": 0}, "n_iters must be >= 1, got 0"),
    "k": ({"k": 0}, "k must be > 0, got 0"),
    "k of another shape": ({"k": torch.ones(4)}, r"k must be of a shape that broadcasts to \(3,\)"),
    "eps": ({"eps": 0.0}, "eps must be > 0, got 0.0"),
    "eps_init": ({"eps_init": -1.0}, "eps_init must be None or > 0, got -1.0"),
    "eps_decay": ({"eps_decay": 0.0}, r"eps_decay must be in \(0, 1\], got 0.0"),
    "mask of another shape": ({"mask": torch.ones(3, 4, dtype=torch.bool)}, "mask must be of a shape that broadcasts"),
    "mask of numbers": ({"mask": torch.ones(3, 5)}, "mask must be a tensor of dtype torch.bool, got torch.float32"),
    "integers": ({"scores": torch.ones(3, 5, dtype=torch.int64)}, "scores must be a tensor of a float dtype"),
    "no entries": ({"scores": torch.ones(3, 0)}, "with n >= 1, got shape"),
    "a long row": (
        {"scores": torch.ones(131073), "k": 1.0},
        r"n \(the length of a row\) must be <= 131072, got 131073",
    ),
    "no segment": ({"checkpoint_segments": 0}, "checkpoint_segments must be from 1 to n_iters = 5, got 0"),
    "many segments": ({"checkpoint_segments": 6}, "checkpoint_segments must be from 1 to n_iters = 5, got 6"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_arguments_are_named(case):
    wrong, message = BAD[case]
    arguments = {"scores": torch.ones(3, 5), "n_iters": 5, "k": 2.0, **wrong}
    with pytest.raises(ValueError, match=message):
        segmented_coor_descent(arguments.pop("scores"), **arguments)


def test_a_second_derivative_is_refused():
    scores = randn(2, 10).requires_grad_()
    (gradient,) = torch.autograd.grad(
        segmented_coor_descent(scores, k=2.0, **CONSTANT).sum(), scores, create_graph=True
    )
    with pytest.raises(NotImplementedError, match=r"reference\.coor_descent"):
        gradient.sum().backward()


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("full", [False, True], ids=["scores alone", "mask and k a row"])
def test_opcheck(full, segments):
    scores = randn(2, 40, dtype=torch.float32).requires_grad_()
    mask = torch.rand(2, 40, device=DEVICE) > 0.3 if full else None
    k_rows = torch.full((2,), 4.0, device=DEVICE, requires_grad=True) if full else None
    operator = torch.ops.colt5.segmented_coor_descent.default
    torch.library.opcheck(operator, (scores, mask, k_rows, 3.0, 3, 0.4, 0.9, 0.1, segments, True))
    torch.library.opcheck(operator, (scores.detach(), mask, None, 3.0, 3, 0.4, 0.9, 0.1, segments, False))


@pytest.mark.skipif(INTERPRETED, reason="PyTorch's part, to which the interpreter adds nothing but time")
def test_compiles_as_one_graph():
    scores, grad, mask = randn(3, 40), randn(3, 40), torch.rand(3, 40, device=DEVICE) > 0.3
    k = torch.rand(3, dtype=torch.float64, device=DEVICE) + 2
    options = {"mask": mask, "checkpoint_segments": 3, **DECAYING}
    compiled = torch.compile(segmented_coor_descent, fullgraph=True, backend="aot_eager")
    actual = differentiate(compiled, scores, grad, k, **options)
    expected = differentiate(segmented_coor_descent, scores, grad, k, **options)
    for tensor, wanted in zip(actual, expected, strict=True):
        assert torch.equal(tensor, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [512, 20000])
def test_captured_in_a_cuda_graph(n):
    scores, grad = randn(16, n).float().requires_grad_(), randn(16, n).float()
    k = torch.full((16,), 8.0, device=DEVICE, requires_grad=True)

    def step():
        y = segmented_coor_descent(scores, k=k, checkpoint_segments=3, **DECAYING)
        return y.detach(), *torch.autograd.grad(y, (scores, k), grad)

    graph, captured = capture(step)
    with torch.no_grad():
        scores.copy_(randn(16, n))
    graph.replay()
    for tensor, wanted in zip(captured, step(), strict=True):
        assert torch.equal(tensor, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("segments", [1, 4, 20])
@pytest.mark.parametrize("shape", [(1024, 512), (64, 4096), (16, 8192), (16, 8193), (8, 32768), (2, 131072)], ids=str)
def test_rows_at_their_real_lengths(shape, segments):
    """In fp64, where all agree on the side of an entry near a kink."""
    options = {"n_iters": 20, "eps": 0.1, "checkpoint_segments": segments}
    check(randn(*shape), shape[-1] / 16, **options)
    y = segmented_coor_descent(scores := randn(*shape).float(), k=shape[-1] / 16, **options)
    expected = reference.coor_descent(scores.double(), k=shape[-1] / 16, n_iters=20, eps=0.1)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=shift_by_rounding(scores, n_iters=20, eps=0.1))
