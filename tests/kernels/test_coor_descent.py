"""The scalar-state kernel against the definition in fp64.

The same tests run on the CPU path, in Triton's interpreter (TRITON_INTERPRET=1) and on a GPU where there is one.
"""

import itertools

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from kernels import coor_descent
from kernels._common.tensors import triton_for_cpu_tensors
from kernels.coor_descent import backward as descent_backward
from kernels.coor_descent import forward as descent_forward
from tests.kernels.devices import DEVICE, capture

INTERPRETED = triton.knobs.runtime.interpret

# The interpreter is slow per iteration; the kernel has no additional code paths for more iterations.
CONSTANT = {"n_iters": 6 if INTERPRETED else 20, "eps": 0.1}
DECAYING = {"n_iters": 9, "eps_decay": 0.3} if INTERPRETED else {"n_iters": 20, "eps_decay": 0.7}
DECAYING = {**DECAYING, "eps": 0.03, "eps_init": 4.0}
COLD = {"n_iters": 12 if INTERPRETED else 30, "eps": 0.03}
SCHEDULES = {"constant": CONSTANT, "decaying": DECAYING, "cold": COLD, "once": {"n_iters": 1, "eps": 0.5}}

FORWARD = 2e-6
"""Bound on the error of an output. For the gradient it is multiplied by the contribution of an output, |g| / eps."""


def differentiate(operation, scores, grad, k, mask=None, **options):
    """Output, and the gradients of the scores and of k (None if k is a number)."""
    scores = scores.detach().clone().requires_grad_()
    k = k.detach().clone().requires_grad_() if isinstance(k, torch.Tensor) else k
    y = operation(scores, k=k, mask=mask, **options)
    y.backward(grad.to(y))
    return y.detach(), scores.grad, k.grad if isinstance(k, torch.Tensor) else None


def check(scores, k, mask=None, grad=None, **options):
    """Compare values and gradients with the definition in fp64 on the same inputs."""
    grad = torch.randn(scores.shape, device=scores.device).to(scores.dtype) if grad is None else grad
    wide_k = k.double() if isinstance(k, torch.Tensor) else k
    y, ds, dk = differentiate(coor_descent, scores, grad, k, mask, **options)
    expected = differentiate(reference.coor_descent, scores.double(), grad.double(), wide_k, mask, **options)

    # One rounding to the output's dtype; the interpreter truncates to bf16, which is two.
    rounding = 0.0 if scores.dtype in (torch.float32, torch.float64) else 2.0
    rounding *= torch.finfo(scores.dtype).eps
    scale = grad.abs().max().item() / options["eps"] if grad.numel() else 0.0
    for actual, wanted, bound in ((y, expected[0], FORWARD), (ds, expected[1], FORWARD * scale)):
        assert actual.dtype == scores.dtype
        assert actual.shape == scores.shape
        torch.testing.assert_close(actual.double(), wanted, rtol=rounding, atol=bound + rounding * 1e-2)
    if dk is not None:
        assert dk.dtype == k.dtype
        torch.testing.assert_close(dk.double(), expected[2], rtol=1e-5, atol=FORWARD * scale)
    return y, ds, dk


def randn(*shape, std=1.0):
    return torch.randn(shape, device=DEVICE) * std


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shape", [(5, 1), (3, 7), (2, 3, 33), (9, 128), (3, 513), (2, 2048)], ids=str)
def test_matches_the_definition(shape, schedule):
    scores = randn(*shape)
    scores[::2] *= 20
    check(scores, max(shape[-1] / 16, 0.5), **SCHEDULES[schedule])


@pytest.mark.parametrize("schedule", ["constant", "decaying"])
@pytest.mark.parametrize("shape", [(4, 40), (2, 2, 700)], ids=str)
def test_mask_and_one_k_a_row(shape, schedule):
    mask = torch.rand(shape, device=DEVICE) > 0.3
    mask[0] = False
    k = torch.rand(shape[:-1], device=DEVICE) * shape[-1] / 8 + 0.5
    y, ds, _ = check(randn(*shape), k, mask, **SCHEDULES[schedule])
    assert not y[~mask].any()
    assert not ds[~mask].any()


def test_a_masked_entry_takes_part_in_nothing():
    scores, mask = randn(2, 50), torch.rand(2, 50, device=DEVICE) > 0.5
    grad = randn(2, 50)
    clean = differentiate(coor_descent, scores, grad, 4.0, mask, **CONSTANT)
    scores[~mask], grad[~mask] = torch.nan, torch.inf
    polluted = differentiate(coor_descent, scores, grad, 4.0, mask, **CONSTANT)
    for before, after in zip(clean[:2], polluted[:2], strict=True):
        torch.testing.assert_close(before, after, rtol=0, atol=0)


def test_a_fully_masked_row_is_zero_and_has_no_gradient():
    mask = torch.ones(3, 20, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    k = torch.full((3,), 4.0, device=DEVICE)
    y, ds, dk = check(randn(3, 20), k, mask, **DECAYING)
    assert not y[1].any()
    assert not ds[1].any()
    assert dk[1] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("schedule", ["constant", "decaying"])
def test_half_precision_is_one_rounding_from_fp64(dtype, schedule):
    check(randn(3, 300).to(dtype), 20.0, **SCHEDULES[schedule])


@pytest.mark.skipif(INTERPRETED or DEVICE != "cpu", reason="fp64 stays fp64 on the CPU path alone")
def test_fp64_on_the_cpu():
    scores, grad = torch.randn(3, 200, dtype=torch.float64), torch.randn(3, 200, dtype=torch.float64)
    k = torch.tensor([5.0, 10.0, 20.0], dtype=torch.float64)
    for schedule in (CONSTANT, DECAYING):
        actual = differentiate(coor_descent, scores, grad, k, **schedule)
        expected = differentiate(reference.coor_descent, scores, grad, k, **schedule)
        for tensor, wanted in zip(actual, expected, strict=True):
            torch.testing.assert_close(tensor, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.skipif(INTERPRETED or DEVICE != "cpu", reason="finite differences need fp64")
@pytest.mark.parametrize("schedule", ["constant", "decaying"])
def test_gradcheck(schedule):
    options = {**SCHEDULES[schedule], "n_iters": 6}
    scores = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    k = torch.tensor([1.5, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda scores, k: coor_descent(scores, k=k, **options), (scores, k), eps=1e-7)


@pytest.mark.parametrize("k", [0.25, 1.0, 40.0, 100.0])
def test_k_from_below_one_to_above_the_number_of_entries(k):
    for schedule in (CONSTANT, DECAYING):
        check(randn(2, 40), k, **schedule)


@pytest.mark.parametrize("eps", [1e-3, 1.0])
def test_extreme_scores(eps):
    scores = randn(4, 64)
    scores[0, 3], scores[1, 5], scores[2], scores[3] = 1e4, -1e4, scores[2] - 1e4, scores[3] * 1e4
    check(scores, 4.0, n_iters=20, eps=eps)
    check(scores, 4.0, n_iters=20, eps=eps, eps_init=4.0, eps_decay=0.7)


def test_ties():
    """Away from kinks equal scores have equal gradients, and a row of equal scores sums to k."""
    scores = torch.round(randn(3, 100) * 2) / 2 + 0.1
    check(scores, 10.0, grad=torch.ones_like(scores), **CONSTANT)
    y, _, _ = check(torch.full((2, 64), 0.7, device=DEVICE), 16.0, n_iters=20, eps=0.1)
    torch.testing.assert_close(y.sum(-1), torch.full((2,), 16.0, device=DEVICE), rtol=1e-6, atol=0)


@pytest.mark.parametrize("iteration", [1, 3, 6])
def test_next_to_a_kink_the_gradient_is_that_of_one_side(iteration):
    """k puts the a of an iteration so close to a score that fp32 does not decide the side."""
    options = {"n_iters": 6, "eps": 0.03, "eps_init": 4.0, "eps_decay": 0.7}
    scores, grad = randn(1, 200, std=5.0), randn(1, 200)
    wide = scores.double()
    entry = wide.argsort(descending=True)[0, 9]

    def saturates(k):
        return reference.coor_descent(wide, k=k, **{**options, "n_iters": iteration})[0, entry] == 1

    below, above = 1.0, 200.0
    assert not saturates(below)
    assert saturates(above)
    while above - below > 1e-12 * above:
        middle = (below + above) / 2
        below, above = (below, middle) if saturates(middle) else (middle, above)

    sides = [differentiate(reference.coor_descent, wide, grad.double(), k, **options)[1] for k in (below, above)]
    bound = FORWARD * grad.abs().max() / options["eps"]
    assert (sides[1] - sides[0]).abs().max() > 10 * bound
    _, ds, _ = differentiate(coor_descent, scores, grad, above, **options)
    assert min((ds - side).abs().max() for side in sides) <= bound


def test_a_nan_stays_in_its_row():
    scores, grad = randn(5, 70), randn(5, 70)
    clean = differentiate(coor_descent, scores, grad, 6.0, **DECAYING)
    scores[2, 11] = torch.nan
    y, ds, _ = differentiate(coor_descent, scores, grad, 6.0, **DECAYING)
    others = [0, 1, 3, 4]
    assert y[2].isnan().all()
    assert ds[2].isnan().all()
    assert torch.equal(y[others], clean[0][others])
    assert torch.equal(ds[others], clean[1][others])


def test_a_k_that_is_not_positive_makes_its_row_nan():
    k = torch.tensor([4.0, 0.0, -1.0], device=DEVICE)
    y = coor_descent(randn(3, 30), k=k, **CONSTANT)
    assert y.isnan().all(dim=-1).tolist() == [False, True, True]


def layouts():
    return {
        "transposed": lambda: randn(40, 6).t(),
        "sliced": lambda: randn(6, 80)[:, ::2],
        "misaligned": lambda: randn(6, 41)[:, 1:],
        "one row repeated": lambda: randn(1, 40).expand(6, 40),
        "one entry repeated": lambda: randn(6, 1).expand(6, 40),
        "leading dimensions exchanged": lambda: randn(3, 2, 40).transpose(0, 1),
    }


@pytest.mark.parametrize("layout", layouts())
def test_any_layout(layout):
    scores = layouts()[layout]()
    mask = (torch.rand(scores.shape[-1:], device=DEVICE) > 0.2).expand(scores.shape)
    view = scores.detach().requires_grad_()
    y = coor_descent(view, k=5.0, mask=mask, **CONSTANT)
    y.sum().backward()
    # Not bitwise: the layout of entries in threads, and so the order of sums, depends on alignment.
    wide = scores.double().contiguous()
    expected = differentiate(reference.coor_descent, wide, torch.ones_like(wide), 5.0, mask.contiguous(), **CONSTANT)
    torch.testing.assert_close(y.detach().double(), expected[0], rtol=0, atol=FORWARD)
    torch.testing.assert_close(view.grad.double(), expected[1], rtol=0, atol=FORWARD / CONSTANT["eps"])


def test_an_upstream_gradient_of_any_layout():
    scores = randn(4, 30).requires_grad_()
    (one,) = torch.autograd.grad(coor_descent(scores, k=3.0, **CONSTANT).sum(), scores)
    (other,) = torch.autograd.grad(coor_descent(scores, k=3.0, **CONSTANT), scores, torch.ones_like(scores))
    assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)], ids=str)
def test_no_rows(shape):
    scores = randn(*shape).requires_grad_()
    y = coor_descent(scores, k=2.0, **CONSTANT)
    y.sum().backward()
    assert y.shape == scores.grad.shape == shape


@pytest.mark.parametrize("schedule", ["constant", "decaying"])
@pytest.mark.parametrize("masked", [False, True])
def test_rows_over_several_programs(set_sizes, schedule, masked):
    """Long rows at small sizes: streamed in the interpreter, shared by programs on a GPU, the gradient in chunks."""
    set_sizes(descent_forward, RESIDENT=4096, STREAMED=1024)
    set_sizes(descent_backward, CHUNK=1024)
    scores = randn(2, 5003, std=5.0)
    mask = torch.rand(scores.shape, device=DEVICE) > 0.3 if masked else None
    k = torch.tensor([100.0, 400.0], device=DEVICE)
    check(scores, k, mask, **{**SCHEDULES[schedule], "n_iters": 8})


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8192, 512), (1024, 4096), (64, 32768), (300, 40000), (8, 131072), (1, 1048576)])
@pytest.mark.parametrize("schedule", ["constant", "decaying"])
def test_large_shapes(shape, schedule):
    check_all_but_few(randn(*shape, std=5.0), shape[-1] / 16, **SCHEDULES[schedule])


@pytest.mark.gpu
def test_a_row_too_long_for_the_registers_of_the_device():
    check_all_but_few(randn(1, 4194304 + 5, std=5.0), 1024.0, **DECAYING)


def check_all_but_few(scores, k, **options):
    """a is exact to about 1e-7 of a temperature. Of millions of scores, a few are within this error, on one side of the
    kink for the kernel and on the other for fp64. Their error is the gradient that they pass on. Of millions of
    outputs, whose errors are sums of many roundings, a few exceed slightly the bound for thousands."""
    grad = torch.randn_like(scores)
    y, ds, _ = differentiate(coor_descent, scores, grad, k, **options)
    expected = differentiate(reference.coor_descent, scores.double(), grad.double(), k, **options)
    errors = (y - expected[0]).abs()
    assert (errors > FORWARD).float().mean() <= 1e-5
    assert errors.max() <= 1.5 * FORWARD
    off = (ds - expected[1]).abs() > FORWARD * grad.abs().max() / options["eps"]
    assert off.float().mean() <= 1e-5


def test_the_same_from_run_to_run():
    scores, grad = randn(2, 900, std=5.0), randn(2, 900)
    first, *others = (differentiate(coor_descent, scores, grad, 30.0, **DECAYING) for _ in range(3))
    for other in others:
        assert torch.equal(first[0], other[0])
        assert torch.equal(first[1], other[1])


def test_the_same_with_and_without_a_gradient():
    scores = randn(2, 900, std=5.0)
    with torch.no_grad():
        alone = coor_descent(scores.requires_grad_(), k=30.0, **DECAYING)
    assert torch.equal(alone, coor_descent(scores, k=30.0, **DECAYING).detach())


@settings(max_examples=8 if INTERPRETED else 50)
@given(data=st.data())
def test_laws(data):
    """Entries are exchangeable, keep the order of their scores, and depend on temperatures only in units of scores."""
    scores = torch.tensor([data.draw(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30))], device=DEVICE)
    k, options = data.draw(st.floats(0.5, 30)), data.draw(st.sampled_from([CONSTANT, DECAYING]))
    y = coor_descent(scores, k=k, **options)
    assert ((y >= 0) & (y <= 1)).all()

    order = torch.tensor(data.draw(st.permutations(range(scores.shape[-1]))), device=DEVICE)
    torch.testing.assert_close(coor_descent(scores[:, order], k=k, **options), y[:, order], rtol=1e-5, atol=FORWARD)

    by_score = y.gather(-1, scores.argsort(dim=-1))
    assert (by_score.diff(dim=-1) >= 0).all()

    twice = {name: 2 * value if name in ("eps", "eps_init") else value for name, value in options.items()}
    torch.testing.assert_close(coor_descent(2 * scores, k=k, **twice), y, rtol=1e-5, atol=FORWARD)


BAD = {
    "n_iters": ({"n_iters": 0}, "n_iters must be >= 1, got 0"),
    "k": ({"k": 0}, "k must be > 0, got 0"),
    "k tensor": ({"k": torch.ones(4)}, r"k must be of a shape that broadcasts to \(3,\)"),
    "eps": ({"eps": -0.1}, "eps must be > 0, got -0.1"),
    "eps_init": ({"eps_init": 0.0}, "eps_init must be None or > 0, got 0.0"),
    "eps_decay": ({"eps_decay": 1.5}, r"eps_decay must be in \(0, 1\], got 1.5"),
    "mask shape": ({"mask": torch.ones(3, 4, dtype=torch.bool)}, "mask must be of a shape that broadcasts"),
    "mask dtype": ({"mask": torch.ones(3, 5)}, "mask must be a tensor of dtype torch.bool, got torch.float32"),
    "scores": ({"scores": torch.ones(3, 5, dtype=torch.int64)}, "scores must be a tensor of a float dtype"),
    "no entries": ({"scores": torch.ones(3, 0)}, "with n >= 1, got shape"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("operation", [coor_descent, reference.coor_descent], ids=["kernel", "reference"])
def test_wrong_arguments_are_named(operation, case):
    wrong, message = BAD[case]
    arguments = {"scores": torch.randn(3, 5), "n_iters": 5, "k": 2.0, **wrong}
    with pytest.raises(ValueError, match=message):
        operation(arguments.pop("scores"), **arguments)


def test_a_second_derivative_is_refused():
    scores = randn(2, 10).requires_grad_()
    (gradient,) = torch.autograd.grad(coor_descent(scores, k=2.0, **CONSTANT).sum(), scores, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"reference\.coor_descent"):
        gradient.sum().backward()


def operator_arguments():
    scores = randn(3, 40).requires_grad_()
    mask = torch.rand(3, 40, device=DEVICE) > 0.3
    k = torch.rand(3, device=DEVICE).add(2).requires_grad_()
    for masked, by_row, save in itertools.product((None, mask), (None, k), (True, False)):
        yield scores if save else scores.detach(), masked, by_row if save else None, 3.0, 5, 0.1, 0.4, 0.9, save


def test_opcheck():
    # A call with all inputs shows that a kernel writes to none of them.
    for arguments in list(operator_arguments())[-2 if INTERPRETED else 0 :]:
        torch.library.opcheck(torch.ops.colt5.coor_descent.default, arguments)


@pytest.mark.skipif(INTERPRETED, reason="what is compiled is PyTorch's part; the interpreter adds nothing but time")
def test_compiles_as_one_graph():
    scores, grad = randn(3, 40), randn(3, 40)
    mask = torch.rand(3, 40, device=DEVICE) > 0.3
    k = torch.rand(3, device=DEVICE) + 2
    compiled = torch.compile(coor_descent, fullgraph=True, backend="aot_eager")
    actual = differentiate(compiled, scores, grad, k, mask, **DECAYING)
    expected = differentiate(coor_descent, scores, grad, k, mask, **DECAYING)
    for tensor, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(tensor, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 512), (4, 100000)], ids=str)
def test_captured_in_a_cuda_graph(shape):
    scores, grad = randn(*shape).requires_grad_(), randn(*shape)

    def step():
        y = coor_descent(scores, k=8.0, **DECAYING)
        return y.detach(), torch.autograd.grad(y, scores, grad)[0]

    graph, (y, ds) = capture(step)
    with torch.no_grad():
        scores.copy_(randn(*shape))
    graph.replay()
    expected = step()
    assert torch.equal(y, expected[0])
    assert torch.equal(ds, expected[1])


def test_what_is_kept_for_the_backward_pass():
    """16 bytes per row and iteration, and the schedule as one more row: no tensor has the size of the scores."""
    from colt5_bench.measuring.memory import saved_bytes

    rows, n_iters = 3, CONSTANT["n_iters"]
    scores = randn(rows, 300).requires_grad_()
    kept = saved_bytes(lambda: coor_descent(scores, k=8.0, **CONSTANT), [scores])
    assert kept == 16 * (rows + 1) * (n_iters + 1)


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED or DEVICE != "cpu", reason="about the CPU path")
def test_the_cpu_path_is_worth_it():
    """Forward and backward, 64 x 4096, 50 iterations: four times faster than the definition, a tenth of the memory."""
    from colt5_bench.measuring.memory import measure_memory
    from colt5_bench.measuring.timing import time_interleaved

    scores, grad = torch.randn(64, 4096).requires_grad_(), torch.randn(64, 4096)

    def call(operation):
        return lambda: torch.autograd.grad(operation(scores, k=256.0, n_iters=50), scores, grad)

    calls = {"plain": call(reference.coor_descent), "ours": call(coor_descent)}
    peak = {name: measure_memory(run, device=torch.device("cpu")) for name, run in calls.items()}
    assert peak["ours"] * 10 <= peak["plain"]

    threads = torch.get_num_threads()
    try:
        # On one core, so that other programs on the machine have little effect.
        torch.set_num_threads(1)
        timings = time_interleaved(calls, device=torch.device("cpu"), columns=("wall",))
    finally:
        torch.set_num_threads(threads)
    median = {name: torch.tensor(columns["wall"].samples).median() for name, columns in timings.items()}
    assert median["ours"] * 4 <= median["plain"]


@pytest.mark.compiled
def test_short_rows_are_spread_over_the_warp_that_they_share():
    """Otherwise the compiler adds up every four entries of a row by hundreds of shuffles."""
    from colt5_bench.measuring.static_facts import compiled_kernels

    with triton_for_cpu_tensors(), torch.no_grad():
        (fact,) = compiled_kernels(lambda: coor_descent(torch.empty(8192, 512), k=8.0, **DECAYING), 90)
    assert fact["constants"]["ROWS"] == 4
    assert fact["instructions"]["shuffle"] < 50
    assert fact["instructions"]["global_load_128"] >= 16
