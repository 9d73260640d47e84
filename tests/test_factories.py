"""New tensors have an explicit device and dtype, because PyTorch's defaults belong to the caller."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for package in ("reference", "kernels") for path in (ROOT / package).glob("*.py"))

OF_ITS_ARGUMENTS = {"arange", "tensor", "as_tensor", "asarray", "full", "scalar_tensor"}
"""Factories that take their dtype from a number: the default for a float."""

FLOAT = {"empty", "zeros", "ones", "eye", "linspace", "logspace", "rand", "randn", "normal"}
"""Factories with the default dtype."""

OTHER = {"randint", "randperm", "tril_indices", "triu_indices"}


def may_be_float(call):
    """True if the number that decides the dtype may be a float, as far as the code shows. Sizes and counts cannot."""
    if call.func.attr == "arange":
        return any(isinstance(each, ast.Constant) and isinstance(each.value, float) for each in ast.walk(call))
    return call.func.attr not in OTHER


def of_torch(node):
    named = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    return named and isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"


def is_kernel(node):
    """Triton's language makes tensors only in a kernel."""
    return isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(each) for each in node.decorator_list)


def is_parameter(node):
    """Parameters are made by the defaults of the user, as those of PyTorch's layers are."""
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "nn.Parameter"


def calls(tree):
    """Calls of torch's factories, except those in kernels and for parameters."""
    if is_kernel(tree) or is_parameter(tree):
        return
    if of_torch(tree) and tree.func.attr in OF_ITS_ARGUMENTS | FLOAT | OTHER:
        yield tree
    for child in ast.iter_child_nodes(tree):
        yield from calls(child)


def missing(source):
    """Arguments that each call leaves to PyTorch's defaults."""
    found = []
    for call in calls(ast.parse(source)):
        given = {keyword.arg for keyword in call.keywords}
        wanted = {"device", "dtype"} if may_be_float(call) else {"device"}
        found += [f"line {call.lineno}: {ast.unparse(call)} without {name}" for name in sorted(wanted - given)]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_factories_state_device_and_dtype(path):
    assert missing(path.read_text()) == []


@pytest.mark.parametrize("name", sorted(OF_ITS_ARGUMENTS | FLOAT | OTHER))
def test_the_check_sees(name):
    expected = 1 if name in OTHER | {"arange"} else 2
    assert len(missing(f"x = torch.{name}(n, y)")) == expected
    assert missing(f"x = torch.{name}(n, device=x.device, dtype=x.dtype)") == []
    assert missing(f"@triton.jit\ndef kernel():\n    torch.{name}(n)") == []
    assert missing(f"nn.Parameter(torch.{name}(n))") == []


def test_the_check_sees_a_float_range():
    assert len(missing("torch.arange(0, 1, 0.5, device=x.device)")) == 1
