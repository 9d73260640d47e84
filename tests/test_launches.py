"""A training step launches no more kernels than necessary."""

import pytest
import torch

import kernels
from kernels._common.tensors import INTERPRETED
from tests.measurements.launches import counted, launches, launches_on_a_gpu

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter takes what kernels are launched by")

MOST = {"attention": 40, "feed_forward": 31, "block": 69, "autoregressive": 70}
"""Launches of a training step, of layers without a mask."""

MOST_MASKED = {"attention": 44, "feed_forward": 32, "block": 74}


def test_kernels_and_operators_are_counted_and_views_are_not():
    x, weight = torch.randn(3, 4, requires_grad=True), torch.ones(4, requires_grad=True)
    with counted() as counts:
        y = kernels.normalize(x, weight).view(4, 3)
        torch.autograd.backward(y.sort().values.clone(), x.new_empty(4, 3))
    assert counts.pop("sort") > 1
    assert counts == {
        "normalize.triton._forward_kernel": 1,
        "normalize.triton._backward_kernel": 1,
        "clone": 1,
        # The last two are the gradient of a sort.
        "new_zeros": 1,
        "scatter": 2,
    }


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((3, 4096), torch.float32, 4),
        ((5000,), torch.int16, 5),
        ((1, 5000), torch.int32, 7),
        ((4, 8192), torch.float32, 11),
    ],
)
def test_a_sort_counts_as_what_pytorch_launches_for_it(shape, dtype, expected):
    x = torch.zeros(shape, dtype=dtype)
    with counted() as counts:
        x.sort(dim=-1, stable=True)
    assert counts == {"sort": expected}


@pytest.mark.parametrize("name", MOST)
def test_of_a_training_step(name):
    found = launches(name)
    assert found.total() <= MOST[name], found.most_common()


@pytest.mark.parametrize("name", MOST_MASKED)
def test_with_a_mask(name):
    found = launches(name, masked=True)
    assert found.total() <= MOST_MASKED[name], found.most_common()


@pytest.mark.gpu
@pytest.mark.parametrize("name", MOST)
def test_on_a_gpu(name):
    """The same number as counted without one, except that cuBLAS may add up a product's parts in a separate kernel."""
    expected = launches(name)
    found = launches_on_a_gpu(name)
    assert found.total() <= expected.total() + expected["mm"] + expected["addmm"], found.most_common()


def test_no_kernel_selects_from_one_entry():
    """Triton 3.6 cannot compile it."""
    with counted() as counts:
        kernels.select(torch.randn(3, 1), num_selected=1)
        assert not [name for name in counts if name.startswith("select.")]
        kernels.select(torch.randn(3, 2), num_selected=1)
    assert [name for name in counts if name.startswith("select.")]
