"""Positions in the attention of all layers that have an option for them."""

import inspect

import pytest
import torch

import reference
from reference.layers.light_attention import WindowedAttention
from tests.calls import LAYERS, inputs_of

PUBLISHED = [(f"ConditionalRouted{name}Attention", "rotary_emb") for name in ("", "Autoregressive")]
"""Layers whose checkpoints contain frequencies."""

ROTARY = [
    (name, option)
    for name in LAYERS
    for option in ("rotary_emb", "light_rotary_emb", "attn_rotary_emb", "attn_light_rotary_emb")
    if option in inspect.signature(getattr(reference, name)).parameters and (name, option) not in PUBLISHED
]


@pytest.mark.parametrize(("name", "option"), ROTARY)
def test_rotary_has_no_parameters_and_is_seen(build, name, option):
    """A checkpoint of a layer without it loads into one with it, and the reverse."""
    without, with_it = (build(name, **{option: use}) for use in (False, True))
    without.load_state_dict(with_it.state_dict(), strict=True)
    with_it.load_state_dict(without.state_dict(), strict=True)
    inputs, options = inputs_of(name, without)
    first, second = (layer(*inputs, **options) for layer in (without, with_it))
    assert (first - second).abs().max() > 1e-3


BIASED = [name for name in LAYERS if "position_bias" in inspect.signature(getattr(reference, name)).parameters]


@pytest.mark.parametrize("name", BIASED)
def test_a_position_bias_is_one_parameter_more_and_starts_as_none(build, name):
    without, with_it = (build(name, position_bias=use) for use in (False, True))
    more = with_it.load_state_dict(without.state_dict(), strict=False)
    assert not more.unexpected_keys
    assert len(more.missing_keys) == 1
    inputs, options = inputs_of(name, without)
    first, second = (layer(*inputs, **options) for layer in (without, with_it))
    torch.testing.assert_close(first, second)
    (bias,) = (each for key, each in with_it.named_parameters() if key in more.missing_keys)
    second.square().sum().backward()
    assert bias.grad.any(dim=1).all()


def bucket(distance, causal, buckets=32, farthest=128):
    """T5's bucket of the distance from a query to a key, by thresholds that grow by a constant factor."""
    if not causal:
        buckets //= 2
    first = buckets if not causal and distance > 0 else 0
    distance = max(-distance, 0) if causal else abs(distance)
    exact = buckets // 2
    steps = [exact * (farthest / exact) ** (step / (buckets - exact)) for step in range(1, buckets - exact)]
    return first + (distance if distance < exact else exact + sum(distance >= step - 1e-9 for step in steps))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window_size", [1, 5, 40, 1000])
def test_position_bias_is_learned_by_bucket(window_size, causal):
    """Each bucket has the bias of its own distances, including those beyond the last one."""
    layer = WindowedAttention(8, window_size, 4, 2, causal, position_bias=True).double()
    plain = WindowedAttention(8, window_size, 4, 2, causal).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    torch.nn.init.normal_(layer.position_bias)
    x = torch.randn(1, 150, 8, dtype=torch.float64)
    qkv = plain.to_qkv(plain.norm(x))
    distances = range(-149, 150)
    table = layer.position_bias[:, [bucket(each, causal) for each in distances]]
    options = {"heads": 2, "window_size": window_size, "causal": causal, "position_bias": table}
    expected = plain.to_out(reference.windowed_attention(qkv, **options))
    torch.testing.assert_close(layer(x), expected)
