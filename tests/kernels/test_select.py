import math

import pytest
import torch
import triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import reference
from kernels.select import order as order_kernels
from kernels.select import select, sort_rows
from kernels.select import triton as select_kernels
from tests.kernels.devices import DEVICES, capture

INTERPRETED = triton.knobs.runtime.interpret

pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(params=["listed at once", "counted", "shared"])
def path(request, set_sizes):
    """Each path of a kernel through a row of these tests' length. The interpreter shares no rows."""
    if request.param != "listed at once":
        set_sizes(select_kernels, LISTED=128)
    if request.param == "shared":
        set_sizes(select_kernels, CHUNK=128, LONGEST_ALONE=128)


def check(scores, k, mask=None):
    """Exactly the reference."""
    indices = select(scores, num_selected=k, mask=mask)
    assert indices.dtype == torch.int64
    assert torch.equal(indices, reference.select(scores, num_selected=k, mask=mask))


@pytest.mark.usefixtures("path")
def test_random_scores(device):
    scores = torch.randn(2, 150, device=device)
    check(scores, 20)
    check(scores[:1], 150)
    check(scores, 1, torch.rand(2, 150, device=device) > 0.5)


@pytest.mark.parametrize("most_ranked", [128, 512])
def test_more_than_are_listed(device, set_sizes, most_ranked):
    set_sizes(select_kernels, LISTED=128, MOST_RANKED=most_ranked)
    check((torch.randn(2, 300, device=device) * 20).round(), 200)


def _close_together(x):
    return 1000 + x * 1e-3


def _far_apart(x):
    return torch.exp(30 * x) * x.sign()


def _doubling(x):
    """Each entry has its own bucket, except for one, over and over."""
    return torch.exp2(-(torch.arange(x.shape[1], device=x.device) % 100).float()).expand(x.shape)


def _a_bit_apart(x):
    """Numbers that differ only in their last bits."""
    return (x * 3).round().to(torch.int32).add(0x3F800000).view(torch.float32)


KINDS = [torch.round, torch.zeros_like, torch.bfloat16, _close_together, _far_apart, _doubling, _a_bit_apart]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: getattr(kind, "__name__", str(kind)))
@pytest.mark.parametrize(("n", "k"), [(1000, 400), (3000, 1), (3000, 1024), (6000, 4096)])
def test_distributions(device, n, k, kind):
    """Rows that fit into a list, and rows that are counted first, in every possible order of keys."""
    x = torch.randn(3, n, device=device)
    check(x.to(kind) if isinstance(kind, torch.dtype) else kind(x), k)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: getattr(kind, "__name__", str(kind)))
@pytest.mark.parametrize(
    ("n_rows", "n", "k"), [(3, 100003, 2048), (3, 100000, 5000), (200, 50000, 4096), (1, 2**20, 64)]
)
def test_distributions_of_long_rows(device, n_rows, n, k, kind):
    x = torch.randn(n_rows, n, device=device)
    x = x.to(kind) if isinstance(kind, torch.dtype) else kind(x)
    check(x, k)
    check(x, k, torch.rand(n, device=device) > 0.1)
    assert torch.equal(select(x, num_selected=k), select(x, num_selected=k))


@pytest.mark.gpu
def test_many_rows(device):
    check((torch.randn(1000, 5000, device=device) * 1e3).round(), 2048)


@pytest.mark.usefixtures("path")
def test_ties(device):
    levels = torch.randint(-2, 3, (2, 140), device=device) / 2
    levels[0, ::7] = -0.0
    check(levels, 77)
    check(torch.full((1, 140), -3.25, device=device), 100, torch.arange(140, device=device) % 3 > 0)


@pytest.mark.usefixtures("path")
def test_extremes(device):
    scores = torch.randn(3, 90, device=device)
    scores[0, 5::9], scores[0, 7], scores[1, 3:] = math.nan, -math.nan, -math.inf
    scores[2, ::2] *= 1e30
    scores[2, 1::2] *= 1e-42
    mask = torch.rand(3, 90, device=device) > 0.3
    mask[1, :50] = False
    check(scores, 50, mask)
    check(scores, 20)


def test_masked_rows(device):
    mask = torch.zeros(2, 9, dtype=torch.bool, device=device)
    mask[1, 4] = True
    scores = torch.full((2, 9), -math.inf, device=device)
    assert select(scores, num_selected=4, mask=mask).tolist() == [[0, 1, 2, 3], [4, 0, 1, 2]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(device, dtype):
    scores = torch.randn(2, 130, device=device).to(dtype)
    check(scores, 50)
    check(scores, 50, torch.rand(2, 130, device=device) > 0.5)


def test_layouts(device):
    n = 37
    storage = torch.randn(2 * n * 3 + 1, device=device)
    mask = torch.rand(n, device=device) > 0.2
    for scores in (
        storage[1 : 1 + 2 * n].view(2, n),
        storage[: 4 * n].view(2, 2 * n)[:, ::2],
        storage[: 2 * n].view(n, 2).t(),
        storage[:n].expand(2, n),
        storage[: 2 * n].view(2, 1, n),
        storage[:n],
        storage[:2].view(2, 1),
        storage[: 2 * n].view(2, n)[:0],
    ):
        check(scores, min(5, scores.shape[-1]), mask[: scores.shape[-1]])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"num_selected": 0}, "num_selected"), ({"num_selected": 6}, "num_selected"), ({"mask": torch.ones(5)}, "mask")],
)
def test_wrong_arguments(device, arguments, named):
    with pytest.raises(ValueError, match=rf"^{named} must be .*, got "):
        select(**{"scores": torch.randn(2, 5), "num_selected": 2, **arguments})


@pytest.mark.skipif(INTERPRETED, reason="says nothing about kernels")
def test_is_an_operator(device):
    scores, mask = torch.randn(2, 9, device=device), torch.rand(2, 9, device=device) > 0.2
    torch.library.opcheck(torch.ops.colt5.select, (scores, mask, 3))
    compiled = torch.compile(lambda s: select(s * 2, num_selected=3), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(scores), select(scores * 2, num_selected=3))
    assert not select(scores.requires_grad_(), num_selected=3).requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("n", [512, 2**20])
def test_long_rows_and_graphs(device, n):
    if device == "cpu":
        pytest.skip("graphs are CUDA's")
    scores = torch.randn(2, n, device=device)
    check((scores * 1e3).round(), min(n, 5000))
    graph, captured = capture(lambda: select(scores, num_selected=500))
    scores.copy_(torch.randn_like(scores))
    for _ in range(2):
        graph.replay()
        assert torch.equal(captured, reference.select(scores, num_selected=500))


@settings(max_examples=3 if INTERPRETED else 50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.floats(width=32), min_size=1, max_size=30), st.data())
def test_any_numbers(device, numbers, data):
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(numbers), max_size=len(numbers))), device=device)
    scores = torch.tensor(numbers, dtype=torch.float32, device=device)
    check(scores, data.draw(st.integers(1, len(numbers))), mask)


@pytest.fixture(params=[16, 512])
def run(request, set_sizes):
    """Rows of these tests' length are one run, or several that are merged a few at a time."""
    set_sizes(order_kernels, RUN=request.param, RANKED_AGAINST=8, MERGED_RUNS=2)


def check_order(scores):
    """Exactly PyTorch's order, if there is only one NaN and one zero."""
    if not (scores.is_cuda or INTERPRETED):
        pytest.skip("a CPU sorts by PyTorch alone")
    ordered, order = sort_rows(scores)
    alike = (scores.float() + 0.0).masked_fill(scores.isnan(), math.nan)
    expected = alike.sort(dim=1, descending=True, stable=True).indices
    assert torch.equal(order, expected)
    assert torch.equal(ordered.isnan(), scores.gather(1, expected).isnan())
    assert torch.equal(ordered.nan_to_num(0.0), scores.gather(1, expected).nan_to_num(0.0))


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("n", [2, 15, 16, 17, 31, 32, 33, 100])
def test_order_of_all(device, n):
    check_order(torch.randn(3, n, device=device))
    check_order((torch.randn(2, n, device=device) * 2).round())


@pytest.mark.usefixtures("run")
def test_order_of_extremes(device):
    scores = torch.randn(3, 70, device=device)
    scores[0, 5::9], scores[0, 7], scores[1, 3:], scores[2, 4] = math.nan, -math.nan, -math.inf, math.inf
    scores[2, ::2], scores[2, 1] = -0.0, 0.0
    check_order(scores)


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_order_of_other_dtypes_and_layouts(device, dtype):
    storage = torch.randn(3 * 41 + 1, device=device).to(dtype)
    for scores in (storage[1:83].view(2, 41), storage[:123].view(3, 41)[:, :37], storage[:41].expand(2, 41)):
        check_order(scores)


@pytest.mark.gpu
@pytest.mark.parametrize(("n_rows", "n"), [(4, 8192), (60, 1025), (1, order_kernels.LONGEST), (2, 20000), (9, 8000)])
def test_order_of_long_rows(device, n_rows, n):
    scores = (torch.randn(n_rows, n, device=device) * 1e3).round()
    check_order(scores)
    check_order(scores[:, 1:])
    assert torch.equal(sort_rows(scores)[1], sort_rows(scores)[1])
