"""Weights that are rounded together give the results of autocast, and layers with observers are called."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from reference.layers.linear import linear, round_weights


def layers_of(seed):
    torch.manual_seed(seed)
    sizes = torch.randint(1, 20, (4,)).tolist()
    layers = [nn.Linear(first, then, bias=bool(torch.rand(()) < 0.5)) for first, then in pairwise(sizes)]
    return layers, torch.randn(3, sizes[0])


def together(layers, x):
    rounded = round_weights(x, *layers)
    for layer in layers:
        x = linear(layer, x, rounded)
    return x


def one_by_one(layers, x):
    return nn.Sequential(*layers)(x)


def results_of(apply, layers, x, **options):
    layers = copy.deepcopy(layers)
    parameters = [each for layer in layers for each in layer.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        out = apply(layers, x.to(torch.bfloat16))
    grads = torch.ones_like(out) if not options.get("is_grads_batched") else torch.ones(2, *out.shape, dtype=out.dtype)
    return out, *torch.autograd.grad(out, parameters, grads, **options)


@pytest.mark.parametrize("options", [{}, {"create_graph": True}, {"is_grads_batched": True}], ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_results_are_those_of_autocast(seed, options):
    layers, x = layers_of(seed)
    expected, found = (results_of(apply, layers, x, **options) for apply in (one_by_one, together))
    assert [each.dtype for each in found] == [each.dtype for each in expected]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_one_conversion_each_way(seed, count_casts):
    layers, x = layers_of(seed)
    x = x.to(torch.bfloat16)
    with count_casts() as casts, torch.autocast("cpu", torch.bfloat16):
        together(layers, x).sum(dtype=torch.bfloat16).backward()
    assert casts.found == ["_foreach_copy_"] * 2


def test_a_second_derivative():
    layers, x = layers_of(0)
    parameters = [each for layer in layers for each in layer.parameters()]
    found = []
    for apply in (one_by_one, together):
        with torch.autocast("cpu", torch.bfloat16):
            out = apply(layers, x.to(torch.bfloat16))
        first = torch.autograd.grad(out.float().square().sum(), parameters, create_graph=True)
        found.append(torch.autograd.grad(sum(each.square().sum() for each in first), parameters))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*found, strict=True))


class Adapter(nn.Linear):
    """A subclass of a linear layer."""


def hooked(layer):
    layer.register_forward_hook(lambda *_: None)
    return layer


def replaced(layer):
    layer.forward = lambda x: nn.Linear.forward(layer, x)
    return layer


WATCHED = {
    "hook": hooked,
    "replaced forward": replaced,
    "subclass": lambda layer: Adapter(layer.in_features, layer.out_features),
    "half precision": lambda layer: layer.bfloat16(),
    "fp64": lambda layer: layer.double(),
    "another module": lambda layer: nn.GELU(),
}


@pytest.mark.parametrize("change", WATCHED.values(), ids=WATCHED)
def test_a_layer_that_somebody_watches_is_left_alone(change):
    plain, watched = nn.Linear(4, 5), change(nn.Linear(4, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert list(round_weights(torch.randn(3, 4), plain, watched)) == [plain]


def test_nothing_is_rounded_without_autocast():
    assert round_weights(torch.randn(3, 4), nn.Linear(4, 5)) == {}
