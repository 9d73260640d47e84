"""The scalar functions of the kernels against fp64: in Triton's interpreter, and on a GPU if there is one."""

import pytest
import torch
import triton
import triton.language as tl

from kernels._common import primitives
from tests.kernels.devices import DEVICE

INTERPRETED = triton.knobs.runtime.interpret

pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or Triton's interpreter")


@triton.jit
def _apply(x_ptr, y_ptr, n, NAME: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=1.0)
    if NAME == "inverse":
        y = primitives.inverse(x)
    elif NAME == "log_normal":
        y = primitives.log_normal(x)
    elif NAME == "nearest_fp32":
        y = primitives.nearest_fp32(x)
    elif NAME == "lower_fp32":
        y = primitives.lower_fp32(x)
    elif NAME == "round_down":
        y = primitives.round_down(x)
    elif NAME == "integer_as_fp64":
        y = primitives.integer_as_fp64(x.to(tl.int64))
    elif NAME == "exp2_minus_1":
        y = primitives.exp2_minus_1(x)
    elif NAME == "exp2_wide":
        y = primitives.exp2_wide(x)
    else:
        tl.static_assert(NAME == "exp2")
        y = primitives.exp2(x.to(tl.float32))
    tl.store(y_ptr + at, y.to(tl.float64), mask=at < n)


def apply(name, x):
    x = x.to(DEVICE)
    y = torch.empty_like(x)
    _apply[(triton.cdiv(len(x), 1024),)](x, y, len(x), NAME=name, BLOCK=1024)
    return y


def spread(lowest, highest, n=4096):
    """fp64 numbers between two powers of two, many of them close to a power of two."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.empty(n, dtype=torch.float64).uniform_(lowest, highest, generator=generator)
    powers = torch.exp2(exponents.round()) * (1 + 1e-9 * torch.randn(n, dtype=torch.float64, generator=generator))
    return torch.cat([torch.exp2(exponents), powers])


@pytest.mark.parametrize(
    ("name", "function", "rtol"),
    [("inverse", torch.reciprocal, 1e-12), ("nearest_fp32", lambda x: x.float().double(), 2**-53)],
)
def test_of_positive_numbers(name, function, rtol):
    x = spread(-100, 100)
    torch.testing.assert_close(apply(name, x).cpu(), function(x), rtol=rtol, atol=0)


def test_log():
    x = spread(-60, 60)
    torch.testing.assert_close(apply("log_normal", x).cpu(), x.log(), rtol=0, atol=2e-11)


@pytest.mark.parametrize("name", ["lower_fp32", "round_down"])
def test_the_next_fp32_below(name):
    x = torch.cat([spread(-60, 30), -spread(-60, 30), torch.tensor([0.0, 1.0, -1.0, 1 + 2**-24], dtype=torch.float64)])
    y = apply(name, x).cpu()
    assert torch.equal(y, y.float().double())
    assert (y <= x).all()
    assert (torch.nextafter(y.float(), torch.tensor(torch.inf)).double() > x).all()


def test_integers():
    x = torch.tensor([0, 1, -1, 2**47 + 1, 2**51 - 1, -(2**51)], dtype=torch.float64)
    assert torch.equal(apply("integer_as_fp64", x).cpu(), x)


def test_exponential_minus_one():
    x = torch.linspace(0, 1, 5001, dtype=torch.float64)
    y = apply("exp2_minus_1", x).cpu()
    torch.testing.assert_close(
        y, torch.expm1(x * torch.tensor(2.0, dtype=torch.float64).log()), rtol=2**-20, atol=1e-29
    )
    assert (y > 0).all()


def test_exponential_of_wide_numbers():
    x = torch.empty(4096, dtype=torch.float64).uniform_(-20, 20)
    torch.testing.assert_close(apply("exp2_wide", x).cpu(), torch.exp2(x), rtol=2**-22, atol=0)


@pytest.mark.gpu
def test_what_the_exponential_lacks_on_average():
    """Over the exponents that count in a sum, weighted by their contribution to it."""
    for lowest in (-1, -2, -4, -9):
        x = torch.empty(2**22, dtype=torch.float32).uniform_(lowest, 0).double()
        expected = torch.exp2(x.to(DEVICE))
        lacking = 1 - apply("exp2", x).sum() / expected.sum()
        assert abs(lacking - primitives.EXP2_LACKS.value) < 2e-8
