"""Entries more than 2**31 entries apart, beyond the range of 32 bits, though there are few of them."""

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
"""Strides within 32 bits, though not when doubled, and strides beyond."""

WRAPPED = 2**32
"""Error of an offset in 32 bits. This many zeros come before the entries, so that wrong offsets read no foreign
memory."""


NO_RESERVE = 0x4000
"""Linux's MAP_NORESERVE, which Python 3.11 does not define: there may be less memory than addresses."""


@pytest.fixture
def far_apart(monkeypatch):
    """Copies of tensors with a large stride, in memory that is almost never accessed."""
    # The interpreter would also copy everything between the entries to a GPU and back.
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
    """Results, and gradients of differentiable ones for `upstream`, or for a generated one."""
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
