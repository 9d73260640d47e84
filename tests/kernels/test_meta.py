"""Meta tensors, which have a shape and no values: results have the shapes and dtypes of a real call."""

import random

import pytest
import torch
import triton

from tests.calls import LAYERS, OPERATIONS, arguments_of, inputs_of, layer_of, operation, results

# Real calls are slow in the interpreter. These layers contain other layers, and the path without kernels is the same.
SLOW = {"ConditionalRoutedTransformerBlock", "ConditionalRoutedViT"} if triton.knobs.runtime.interpret else set()
WAYS = [True] if triton.knobs.runtime.interpret else [False, True, None]


def as_seen(tensors):
    return [None if each is None else (each.shape, each.dtype) for each in tensors]


def shapes(function, sources, *inputs, **arguments):
    """Shapes and dtypes of the results of a call, and of the gradients of `sources`."""
    sources = [each for each in sources if each.is_floating_point()]
    for each in sources:
        each.requires_grad_()
    outputs = results(function(*inputs, **arguments))
    wanted = [each for each in outputs if each.requires_grad]
    gradients = []
    if wanted:
        gradients = torch.autograd.grad([each.sum(dtype=torch.float32) for each in wanted], sources, allow_unused=True)
    return as_seen(outputs), as_seen(gradients)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("package", "name"), OPERATIONS, ids=map(".".join, OPERATIONS))
def test_operations(package, name, seed):
    rng = random.Random(seed)
    arguments = arguments_of(name, rng)

    def call(device):
        moved = {key: each.to(device) if isinstance(each, torch.Tensor) else each for key, each in arguments.items()}
        return shapes(operation(package, name), [x for x in moved.values() if isinstance(x, torch.Tensor)], **moved)

    assert call("meta") == call("cpu")


@pytest.mark.parametrize("use_triton", WAYS)
@pytest.mark.parametrize("name", sorted({*LAYERS} - SLOW))
def test_layers(name, use_triton):
    layer = layer_of(name, random.Random(f"{name} {use_triton}"), use_triton)
    inputs, options = inputs_of(name, layer, length=24, context=30)
    real = shapes(layer, [*inputs, *layer.parameters()], *inputs, **options)
    layer, inputs = layer.to("meta"), [each.detach().to("meta") for each in inputs]
    assert shapes(layer, [*inputs, *layer.parameters()], *inputs, **options) == real
