"""Entries that lie more than 2**31 entries apart, which 32 bits do not count, though there are few of them."""

import mmap
import random

import pytest
import torch
import triton
from triton.runtime.interpreter import GridExecutor

import kernels
from tests.calls import KERNELS, arguments_of, results

INTERPRETED = triton.knobs.runtime.interpret

NEAR, FAR = 3 * 2**29, 2**31 + 16
"""Strides that 32 bits count, though not twice of them, and that they do not count."""

WRAPPED = 2**32
"""By how much an offset is wrong in 32 bits: so many zeros before the entries are read for them, no foreign memory."""


NO_RESERVE = 0x4000
"""Linux's MAP_NORESERVE, which Python 3.11 has no name for: there may be less memory than addresses."""


@pytest.fixture
def far_apart(monkeypatch):
    """Copies of tensors with some stride that is large, in memory of which nearly nothing is ever touched."""
    # What the interpreter would copy to a GPU and back is all that is between the entries, too.
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)

    def copy(x, rng):
        wanted = [dim for dim in range(x.dim()) if x.shape[dim] > 1]
        if not wanted:
            return x
        far = rng.choice(wanted[:-1] or wanted)
        strides = list(x.contiguous().stride())
        strides[far] = NEAR if x.shape[far] > 2 else FAR
        entries = WRAPPED + 1 + sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
        pages = mmap.mmap(-1, entries * x.element_size(), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
        return torch.frombuffer(pages, dtype=x.dtype).as_strided(x.shape, strides, WRAPPED).copy_(x)

    return copy


def run(name, arguments, upstream=None):
    """Results, and gradients of what has one for `upstream`, or for one that is made."""
    tensors = {key: each for key, each in arguments.items() if isinstance(each, torch.Tensor)}
    sources = [each.requires_grad_() for each in tensors.values() if each.is_floating_point()]
    outputs = results(getattr(kernels, name)(**arguments))
    wanted = [each for each in outputs if each.requires_grad]
    if upstream is None:
        upstream = [torch.randn_like(each) for each in wanted]
    gradients = torch.autograd.grad(wanted, sources, upstream, allow_unused=True) if wanted else ()
    return [each.detach() for each in (*outputs, *gradients) if each is not None], upstream


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="about offsets in kernels")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", KERNELS)
def test_entries_may_lie_far_apart(name, seed, far_apart):
    rng = random.Random(seed)
    arguments = arguments_of(name, rng)
    copies = {key: far_apart(each, rng) if isinstance(each, torch.Tensor) else each for key, each in arguments.items()}
    expected, upstream = run(name, arguments)
    actual, _ = run(name, copies, [far_apart(each, rng) for each in upstream])
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
