import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from colt5_bench.measuring.rounding import NUMBERS, MovedOperands

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_operand_is_moved_by_about_a_rounding(dtype):
    x = torch.randn(10000).to(dtype)
    with MovedOperands(0):
        moved = x * 1.0
    away = ((moved.double() - x.double()) / x.double()).abs()
    assert 0 < away.max() <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_use_of_an_operand_moves_it_anew(dtype):
    x = torch.randn(10000).to(dtype)
    with MovedOperands(0):
        assert ((x - x) != 0).any()
        assert not torch.equal(x * 1.0, x * 1.0)


def test_the_same_seed_moves_in_the_same_way():
    x = torch.randn(300)

    def moved(seed):
        with MovedOperands(seed):
            return x.exp()

    assert torch.equal(moved(1), moved(1))
    assert not torch.equal(moved(1), moved(2))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.flip(0),
        lambda x: x[::2].clone(),
        lambda x: x.sort().values,
        lambda x: x.topk(5).values,
        lambda x: torch.cat((x, x)),
        lambda x: torch.where(x > 0, x, 0.0),
        lambda x: x.masked_fill(x < 0, -torch.inf),
        lambda x: x.relu(),
        lambda x: x.clamp(max=0.5),
        lambda x: x.gather(0, x.argsort()),
        lambda x: x.double(),
    ],
)
def test_what_rounds_nothing_stays(function):
    x = torch.randn(100)
    expected = function(x)
    with MovedOperands(0):
        assert torch.equal(function(x), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan_stay(dtype):
    x = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=dtype)
    with MovedOperands(0):
        assert torch.equal((x * 1.0).nan_to_num(7.0), x.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("multiple", [0, 1, 3, 50])
def test_a_number_that_is_rounded_to_multiples_of_the_least_one_is_moved_by_it(dtype, multiple):
    """Zeros, too, in fp16, where the least number is not small. They stay in other dtypes."""
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps if dtype == torch.float16 else 0.0
    x = torch.full((1000,), multiple * least, dtype=dtype)
    with MovedOperands(0):
        moved = (x * 1.0).double()
    assert (moved - x).abs().max() == least
    assert abs((moved - x).mean()) <= least / 10


@pytest.mark.parametrize("d", [1, 2, 3, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_of_layer_norm_is_moved_where_terms_cancel(dtype, d):
    x = torch.randn(300, d, dtype=dtype).requires_grad_()
    weight, grad = torch.randn(d, dtype=dtype), torch.randn(300, d, dtype=dtype)
    y = torch.layer_norm(x, (d,), weight, eps=1.0)
    (expected,) = torch.autograd.grad(y, x, grad, retain_graph=True)
    with MovedOperands(0):
        (moved,) = torch.autograd.grad(y, x, grad)
    away, products = (moved - expected).double(), (grad * weight).double()
    # It computes in fp32 at least, and rounds to a multiple of the least number.
    assert (away != 0).sum() > 100
    assert away.norm() <= 8 * torch.finfo(dtype).eps * products.norm()


def test_fp64_and_integers_stay():
    x, indices = torch.randn(100, dtype=torch.float64), torch.arange(100)
    with MovedOperands(0):
        assert torch.equal(x * 3.0, x * 3.0)
        assert torch.equal(indices + indices, 2 * indices)


def test_inputs_are_not_written_to():
    x, y = torch.randn(100), torch.randn(100)
    before = x.clone(), y.clone()
    with MovedOperands(0):
        torch.addcmul(x, x, y)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


def test_the_mask_of_an_attention_stays_as_it_lies():
    """Its rows may be padded, as PyTorch's kernels require, and are not contiguous then."""
    seen = []

    class Watch(TorchDispatchMode):
        """A replacement for an operation that exists only on GPUs."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "attention" not in func.overloadpacket.__name__:
                return func(*args, **(kwargs or {}))
            seen.extend(args)
            return (args[0],) * 4

    query, mask = torch.randn(1, 2, 6, 8), torch.zeros(6, 16)[:, :6].expand(1, 2, 6, 6)
    with Watch(), MovedOperands(0):
        torch.ops.aten._scaled_dot_product_efficient_attention(query, query, query, mask, False)
    assert any(each is mask for each in seen)
    assert not any(each is query for each in seen)


def test_what_is_repeated_is_moved():
    with MovedOperands(0):
        assert len((torch.ones(1, 3).expand(1000, 3) * 1.0).unique()) > 2


def test_a_result_in_place_is_moved():
    x = torch.ones(100)
    with MovedOperands(0):
        assert x.add_(0.0) is x
    assert (x != 1).any()


def test_the_backward_pass_is_moved_too():
    x = torch.randn(100, requires_grad=True)
    y = x.square().sum()
    with MovedOperands(0):
        (gradient,) = torch.autograd.grad(y, x)
    assert not torch.equal(gradient, 2 * x)
    torch.testing.assert_close(gradient, 2 * x)


@pytest.mark.parametrize("size", [NUMBERS - 1, NUMBERS, NUMBERS + 1, 2 * NUMBERS + 1])
def test_tensors_longer_than_the_factors_are_moved_everywhere(size):
    x = torch.ones(size)
    with MovedOperands(0):
        moved = x * 1.0
    assert all((piece != 1).float().mean() > 0.2 for piece in moved.split(NUMBERS // 2))
