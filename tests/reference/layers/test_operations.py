"""A tree of layers calls the operations of one object, and no others."""

import ast
import copy
import pickle
import random
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

import reference
from reference.layers.operations import ByDevice, Operations
from tests.calls import LAYERS, inputs_of, layer_of, results

NAMES = [each.name for each in fields(Operations) if each.name != "use_triton"]
ROOT = Path(reference.__file__).parents[1]


def drawn(name, use_triton, seed=0):
    return layer_of(name, random.Random(f"{name} {seed}"), use_triton)


def operations_in(layer):
    return {id(each.operations): each.operations for each in layer.modules() if hasattr(each, "operations")}


@pytest.mark.parametrize("use_triton", [False, True, None])
@pytest.mark.parametrize("name", LAYERS)
def test_one_object_for_a_tree_and_for_its_copies(name, use_triton):
    layer = drawn(name, use_triton)
    for each in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        (operations,) = operations_in(each).values()
        assert operations.use_triton is use_triton


@pytest.mark.parametrize("use_triton", [False, True])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_takes_operations_as_they_are(name, seed, use_triton):
    called = set()

    def watched(each, function):
        def watching(*args, **kwargs):
            called.add(each)
            return function(*args, **kwargs)

        return watching

    chosen = Operations.of(use_triton)
    functions = {each: getattr(chosen, each) for each in NAMES}
    operations = replace(chosen, **{each: watched(each, function) for each, function in functions.items() if function})
    layer, expected = (drawn(name, use, seed) for use in (operations, use_triton))
    layer.load_state_dict(expected.state_dict())
    inputs, options = inputs_of(name, layer)
    for mine, theirs in zip(results(layer(*inputs, **options)), results(expected(*inputs, **options)), strict=True):
        assert torch.equal(mine, theirs)
    assert [*operations_in(layer).values()] == [operations]
    assert called & {"route", "normalize_and_route", "select"}
    if "Attention" in name or "Block" in name or "ViT" in name:
        assert called & {each for each in NAMES if each.endswith(("routed_attention", "gathered_attention"))}


def function_of(operation):
    """A partial function is a new object each time."""
    return getattr(operation, "func", operation)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("has_gpu", [False, True])
def test_none_chooses_by_the_device_of_the_first_tensor(monkeypatch, name, has_gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    chosen, fused, plain = (getattr(Operations.of(use_triton), name) for use_triton in (None, True, False))
    if has_gpu and plain is not None:
        assert chosen.on_gpu is fused
        assert function_of(chosen.elsewhere) is function_of(plain)
    else:
        assert function_of(chosen) is function_of(fused if has_gpu else plain)


def test_an_operation_by_device_passes_everything_on():
    class OnGpu:
        is_cuda = True

    def operation(way):
        return lambda *args, **options: (way, args, options)

    chosen = ByDevice(operation("gpu"), operation("elsewhere"))
    x = torch.zeros(1)
    assert chosen(x, x, k=3) == ("elsewhere", (x, x), {"k": 3})
    there = OnGpu()
    assert chosen(there, x, k=3) == ("gpu", (there, x), {"k": 3})


def test_plain_layers_import_no_kernels():
    code = (
        "import sys, torch, reference\n"
        "reference.ConditionalRoutedAttention(16, num_heavy_tokens_q=2, num_heavy_tokens_kv=2)(torch.randn(1, 8, 16))\n"
        "reference.topk(torch.randn(8), 2)\n"
        "assert 'kernels' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_kernels_are_imported_in_one_place():
    def names(path):
        return {each.id for each in ast.walk(ast.parse(path.read_text())) if isinstance(each, ast.Name)}

    importing = [
        path.name for path in (ROOT / "reference").rglob("*.py") if {"import_module", "__import__"} & names(path)
    ]
    assert importing == ["_kernels.py"]
