"""`torch.export` of every layer for any batch and length, and of operations for any length. They run on other sizes
than the exported ones, layers after saving and loading."""

import inspect
import io
import random
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import kernels
from tests.calls import KERNELS, LAYERS, arguments_of, inputs_of, layer_of, results

OTHERS = [(3, 101, 33), (5, 32, 128), (2, 23, 13), (4, 27, 49)]
"""Batch, length, and length of a context: multiples of windows, and not; all longer than the number of selected
tokens."""

# Dynamo is slow. Plain PyTorch is for layers without inner layers, and both ways of export for those that depend most
# on windows.
MADE_OF_OTHERS = {"ConditionalRoutedTransformerBlock", "ConditionalRoutedViT"}
AUTOREGRESSIVE = "ConditionalRoutedAutoregressiveAttention"
CASES = [(name, True, True, {}) for name in LAYERS if name != AUTOREGRESSIVE]
CASES += [(name, False, False, {}) for name in sorted({*LAYERS} - MADE_OF_OTHERS - {AUTOREGRESSIVE})]
CASES += [("ConditionalRoutedImageAttention", False, True, {})]
# Both ways to route queries, with and without kernels, in both ways of export.
CASES += [
    (AUTOREGRESSIVE, use_triton, strict, {"causal_query_routing": use_triton != strict})
    for use_triton, strict in product((True, False), repeat=2)
]

LENGTH = {"x": -2, "qkv": -2, "scores": -1, "mask": -1}
"""Dimension of the length of an argument; for `topk`, x are scores."""

FIRST = {name: next(iter(inspect.signature(getattr(kernels, name)).parameters)) for name in KERNELS}
"""The first argument of an operation, by the name of the operation."""


class Call(nn.Module):
    """An operation with its options, as a function of tensors by name."""

    def __init__(self, operation, options):
        super().__init__()
        self.operation, self.options = operation, options

    def forward(self, tensors):
        return results(self.operation(**tensors, **self.options))


@pytest.fixture(autouse=True)
def without_a_cache_of_fake_tensors():
    """Its keys with symbolic sizes cost more time than the cache saves."""
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        yield


def exported(layer, inputs, options, open_dims, strict):
    """The layer after export, saving and loading, for any size of these dimensions of each input."""
    names = inspect.signature(layer.forward).parameters
    shapes = {name: dict.fromkeys(dims, Dim.DYNAMIC) for name, dims in zip(names, open_dims, strict=False)}
    shapes |= dict.fromkeys(options)
    program = torch.export.export(layer, inputs, options, dynamic_shapes=shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.parametrize(("name", "use_triton", "strict", "fixed"), CASES, ids=str)
def test_any_batch_and_length(name, use_triton, strict, fixed):
    depth = {"depth": 1} if name == "ConditionalRoutedViT" else {}
    layer = layer_of(name, random.Random(f"{name} {use_triton}"), use_triton, block_sizes=(None,), **depth, **fixed)
    inputs, options = inputs_of(name, layer)
    features = 3 if name == "ConditionalRoutedViT" else 16
    open_dims = [[dim for dim, size in enumerate(x.shape) if size != features] for x in inputs]
    # einops caches something in a first call, and Dynamo would warn about it.
    layer(*inputs, **options)
    loaded = exported(layer, inputs, options, open_dims, strict)
    for sizes in OTHERS:
        inputs, _ = inputs_of(name, layer, *sizes)
        for mine, theirs in zip(results(loaded(*inputs, **options)), results(layer(*inputs, **options)), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [name for name, first in FIRST.items() if first in LENGTH])
def test_an_operation_takes_any_length(name, seed):
    along = LENGTH | ({"x": -1} if name == "topk" else {})
    first, rng = FIRST[name], random.Random(seed)
    options = next(each for each in (arguments_of(name, rng) for _ in range(99)) if each[first].dim() >= -along[first])
    tensors = {argument: options.pop(argument) for argument in [*options] if isinstance(options[argument], Tensor)}
    shapes = {each: {x.dim() + along[each]: Dim.DYNAMIC} if each in along else None for each, x in tensors.items()}
    call = Call(getattr(kernels, name), options)
    program = torch.export.export(call, (tensors,), dynamic_shapes=(shapes,), strict=False).module()
    length = tensors[first].shape[along[first]]
    # Some fill up blocks and windows, others do not. PyTorch has a special rule for a single window.
    least = max(4, options.get("num_selected", 1), options.get("window_size", 0) + 1)
    for shorter in range(max(length - 7, least), length):
        cut = {each: x.narrow(along[each], 0, shorter) if each in along else x for each, x in tensors.items()}
        torch.testing.assert_close(program(cut), call(cut))


def test_kernels_take_lengths_of_which_a_block_selects_as_many():
    options = {"solver": "coor_descent", "normalize_to": "fetched", "block_sizes": (16,)}
    layer = layer_of("CoordinateDescentRouter", random.Random(0), True, **options)
    inputs, options = inputs_of("CoordinateDescentRouter", layer)
    loaded = exported(layer, inputs, options, [[0, 1]], strict=False)
    # 2 of each block, as for 60 tokens.
    inputs, _ = inputs_of("CoordinateDescentRouter", layer, batch=5, length=100)
    for mine, theirs in zip(results(loaded(*inputs, **options)), results(layer(*inputs, **options)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    inputs, _ = inputs_of("CoordinateDescentRouter", layer, length=33)
    with pytest.raises(AssertionError, match="Guard failed"):
        loaded(*inputs, **options)
