"""Positions in the attention of all layers that have an option for them."""

import inspect

import pytest

import reference
from tests.calls import LAYERS, inputs_of

PUBLISHED = [(f"ConditionalRouted{name}Attention", "rotary_emb") for name in ("", "Autoregressive")]
"""Where checkpoints hold frequencies."""

ROTARY = [
    (name, option)
    for name in LAYERS
    for option in ("rotary_emb", "light_rotary_emb", "attn_rotary_emb", "attn_light_rotary_emb")
    if option in inspect.signature(getattr(reference, name)).parameters and (name, option) not in PUBLISHED
]


@pytest.mark.parametrize(("name", "option"), ROTARY)
def test_rotary_has_no_parameters_and_is_seen(build, name, option):
    """A checkpoint of a layer without it loads into one with it, and the other way round."""
    without, with_it = (build(name, **{option: use}) for use in (False, True))
    without.load_state_dict(with_it.state_dict(), strict=True)
    with_it.load_state_dict(without.state_dict(), strict=True)
    inputs, options = inputs_of(name, without)
    first, second = (layer(*inputs, **options) for layer in (without, with_it))
    assert (first - second).abs().max() > 1e-3
