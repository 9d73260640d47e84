"""Tests of the start of layers."""

import pytest
import torch

from tests.calls import inputs_of
from tests.reference.conftest import SIZES, build

ROUTED = [name for name in SIZES if name != "CoordinateDescentRouter"]


def started(name, init, **options):
    torch.manual_seed(3)
    return build(name, init=init, **options)


@pytest.mark.parametrize("name", ROUTED)
def test_zero_changes_values_of_the_heavy_output_alone(name):
    published, zero = (dict(started(name, init).named_parameters()) for init in ("published", "zero"))
    assert {key: each.shape for key, each in published.items()} == {key: each.shape for key, each in zero.items()}
    changed = {key for key, each in published.items() if not torch.equal(each, zero[key])}
    ends = ("null_q_token", "heavy_attn.to_out.weight", "heavy_ff.3.weight", "heavy_ff.3.bias")
    assert changed == {key for key in published if key.endswith(ends)}
    assert changed
    assert not any(zero[key].any() for key in changed)


@pytest.mark.parametrize("name", ROUTED)
def test_zero_starts_as_if_nothing_were_routed_and_trains(name):
    layer = started(name, "zero")
    inputs, _ = inputs_of(name, layer)
    before = layer(*inputs)
    with torch.no_grad():
        for key, parameter in layer.named_parameters():
            if key.endswith("routing_token"):
                parameter.normal_()
    assert torch.equal(layer(*inputs), before)
    (layer(*inputs) - 1).square().mean().backward()
    outputs = [each for key, each in layer.named_parameters() if key.endswith(("to_out.weight", "heavy_ff.3.weight"))]
    assert outputs
    assert all(each.grad.any() for each in outputs)


@pytest.mark.parametrize("name", ROUTED)
@pytest.mark.parametrize("init", ["Zero", "", None, 0])
def test_other_starts_are_refused(name, init):
    with pytest.raises(ValueError, match=r"init must be published or zero, got"):
        build(name, init=init)
