"""`torch.jit.trace` is refused, because it would turn numbers that depend on a size into constants."""

import random
from functools import partial

import pytest
import torch

from tests.calls import LAYERS, OPERATIONS, arguments_of, inputs_of, layer_of, operation, results

ADVICE = "use torch.export.export instead"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("package", "name"), OPERATIONS, ids=map(".".join, OPERATIONS))
def test_operations(package, name):
    arguments = arguments_of(name, random.Random(0))
    first, tensor = next(iter(arguments.items()))

    def call(x):
        return results(operation(package, name)(**arguments | {first: x}))

    with pytest.raises(NotImplementedError, match=ADVICE):
        torch.jit.trace(call, tensor)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_triton", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, use_triton):
    layer = layer_of(name, random.Random(name), use_triton)
    inputs, options = inputs_of(name, layer)
    layer.forward = partial(layer.forward, **options)
    with pytest.raises(NotImplementedError, match=ADVICE):
        torch.jit.trace(layer, inputs)
