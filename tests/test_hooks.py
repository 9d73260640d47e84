"""Every module of a layer is called: hooks see it, and an equivalent module may replace it."""

import copy
import random

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tests.calls import LAYERS, inputs_of, layer_of, results


class Wrapped(nn.Module):
    """A wrapper like that of an adapter: the layer knows only that it can be called."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def drawn(name, use_triton, seed):
    layer = layer_of(name, random.Random(f"{name} {seed}"), use_triton, block_sizes=(None,))
    return (layer, *inputs_of(name, layer))


def leaves(layer, kind=nn.Module):
    return {name: each for name, each in layer.named_modules() if isinstance(each, kind) and not list(each.children())}


def close(actual, expected):
    for mine, theirs in zip(results(actual), results(expected), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def replace(layer, name, module):
    parent, _, last = name.rpartition(".")
    setattr(layer.get_submodule(parent), last, module)


cases = pytest.mark.parametrize(
    ("name", "use_triton", "seed"),
    [(name, use_triton, seed) for name in LAYERS for use_triton in (False, True) for seed in range(4)],
)


@cases
def test_hooks_see_every_module(name, use_triton, seed):
    layer, inputs, options = drawn(name, use_triton, seed)
    expected = layer(*inputs, **options)
    called = {kind: set() for kind in ("before", "after")}
    # The autoregressive layer calls its routers in parts, so their modules are not called. A list is never called.
    modules = {key: each for key, each in layer.named_modules() if key and not isinstance(each, nn.ModuleList)}
    watched = {key: each for key, each in modules.items() if not key.endswith("router")}
    for key, each in watched.items():
        each.register_forward_pre_hook(lambda *_, key=key: called["before"].add(key))
        each.register_forward_hook(lambda *_, key=key: called["after"].add(key))
    close(layer(*inputs, **options), expected)
    assert called == {"before": set(watched), "after": set(watched)}


@cases
def test_equal_modules_in_the_places_of_linear_ones(name, use_triton, seed):
    layer, inputs, options = drawn(name, use_triton, seed)
    expected = layer(*inputs, **options)
    for key, each in leaves(layer, nn.Linear).items():
        replace(layer, key, Wrapped(each))
    close(layer(*inputs, **options), expected)


@cases
def test_parametrized_linear_layers(name, use_triton, seed):
    layer, inputs, options = drawn(name, use_triton, seed)
    doubled = copy.deepcopy(layer)
    for each in leaves(layer, nn.Linear).values():
        parametrize.register_parametrization(each, "weight", Doubled())
    for each in leaves(doubled, nn.Linear).values():
        each.weight.data *= 2
    close(layer(*inputs, **options), doubled(*inputs, **options))


@cases
def test_a_hook_changes_what_a_linear_layer_gives(name, use_triton, seed):
    layer, inputs, options = drawn(name, use_triton, seed)
    doubled = copy.deepcopy(layer)
    for each in leaves(layer, nn.Linear).values():
        if each.bias is None:
            each.register_forward_hook(lambda *arguments: 2 * arguments[-1])
    for each in leaves(doubled, nn.Linear).values():
        if each.bias is None:
            each.weight.data *= 2
    close(layer(*inputs, **options), doubled(*inputs, **options))


@cases
def test_a_bias(name, use_triton, seed):
    layer, inputs, options = drawn(name, use_triton, seed)
    wrapped = copy.deepcopy(layer)
    for key, each in leaves(layer, nn.Linear).items():
        with_bias = nn.Linear(each.in_features, each.out_features)
        with_bias.weight = each.weight
        replace(layer, key, with_bias)
        replace(wrapped, key, Wrapped(with_bias))
    close(layer(*inputs, **options), wrapped(*inputs, **options))
