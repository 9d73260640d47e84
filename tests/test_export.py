"""`torch.export` of every layer for any batch and length: saved, loaded, and run on other sizes than it has seen."""

import inspect
import io
import random

import pytest
import torch
from torch.export import Dim

from tests.calls import LAYERS, inputs_of, layer_of, results

OTHERS = [(3, 101, 33), (5, 32, 128), (2, 23, 13), (4, 27, 49)]
"""Batch, length, and length of a context: multiples of windows, and not; all longer than what is selected."""

# Dynamo takes its time: plain PyTorch is for layers that are not made of others, and both ways of export for those of
# which windows make most.
MADE_OF_OTHERS = {"ConditionalRoutedTransformerBlock", "ConditionalRoutedViT"}
CASES = [(name, True, True) for name in LAYERS] + [(name, False, False) for name in sorted({*LAYERS} - MADE_OF_OTHERS)]
CASES += [(f"ConditionalRouted{name}", False, True) for name in ("AutoregressiveAttention", "ImageAttention")]


def exported(layer, inputs, options, open_dims, strict):
    """What comes back from a file of the layer for any size of these dimensions of each input."""
    names = inspect.signature(layer.forward).parameters
    shapes = {name: dict.fromkeys(dims, Dim.DYNAMIC) for name, dims in zip(names, open_dims, strict=False)}
    shapes |= dict.fromkeys(options)
    program = torch.export.export(layer, inputs, options, dynamic_shapes=shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.parametrize(("name", "use_triton", "strict"), CASES)
def test_any_batch_and_length(name, use_triton, strict):
    depth = {"depth": 1} if name == "ConditionalRoutedViT" else {}
    layer = layer_of(name, random.Random(f"{name} {use_triton}"), use_triton, block_sizes=(None,), **depth)
    inputs, options = inputs_of(name, layer)
    features = 3 if name == "ConditionalRoutedViT" else 16
    open_dims = [[dim for dim, size in enumerate(x.shape) if size != features] for x in inputs]
    # Of a first call einops keeps something, of which Dynamo would warn.
    layer(*inputs, **options)
    loaded = exported(layer, inputs, options, open_dims, strict)
    for sizes in OTHERS:
        inputs, _ = inputs_of(name, layer, *sizes)
        for mine, theirs in zip(results(loaded(*inputs, **options)), results(layer(*inputs, **options)), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_kernels_take_lengths_of_which_a_block_selects_as_many():
    options = {"solver": "coor_descent", "normalize_to": "fetched", "block_sizes": (16,)}
    layer = layer_of("CoordinateDescentRouter", random.Random(0), True, **options)
    inputs, options = inputs_of("CoordinateDescentRouter", layer)
    loaded = exported(layer, inputs, options, [[0, 1]], strict=False)
    # 2 of each block, as of 60 tokens.
    inputs, _ = inputs_of("CoordinateDescentRouter", layer, batch=5, length=100)
    for mine, theirs in zip(results(loaded(*inputs, **options)), results(layer(*inputs, **options)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    inputs, _ = inputs_of("CoordinateDescentRouter", layer, length=33)
    with pytest.raises(AssertionError, match="Guard failed"):
        loaded(*inputs, **options)
