"""A backward pass within autocast gives the gradients of one outside of it, for every layer."""

import random

import pytest
import torch

from tests.calls import LAYERS, inputs_of, layer_of, results


def gradients(layer, inputs, options, *, inside):
    sources = [each.clone().requires_grad_() for each in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        outputs = results(layer(*sources, **options))
    loss = sum(each.float().square().sum() for each in outputs if each.requires_grad)
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        return torch.autograd.grad(loss, [*sources, *layer.parameters()], allow_unused=True)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("use_triton", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_backward_within_autocast(name, use_triton, seed):
    layer = layer_of(name, random.Random(f"{name} {seed}"), use_triton)
    inputs, options = inputs_of(name, layer)
    inside, outside = (gradients(layer, inputs, options, inside=inside) for inside in (True, False))
    for mine, theirs in zip(inside, outside, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is None:
            continue
        assert mine.dtype == theirs.dtype == torch.float32
        # PyTorch rounds the factors of the plain router's products, and their results. Within autocast it does so for
        # all products of the backward pass. The operators of `kernels` choose their own dtypes.
        bound = 0.0 if use_triton else 2 * torch.finfo(torch.bfloat16).eps * theirs.norm()
        assert (mine - theirs).norm() <= bound
