"""PyTorch's default dtype and device change no result: results have the dtype and device of their inputs."""

import pytest
import torch

import reference
from tests.calls import LAYERS, REFERENCES
from tests.reference import samples

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", REFERENCES)
def test_operations(name, dtype):
    samples.check_defaults(*samples.call(reference, name, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, dtype):
    layer, tensors = samples.layer(name, dtype, **samples.ROTARY.get(name, {}))
    if name == "CoordinateDescentRouter":
        samples.check_defaults(lambda x: layer(x, num_tokens=8), tensors)
    else:
        samples.check_defaults(layer, tensors)
