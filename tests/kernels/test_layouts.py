"""Tensors in any memory layout are read correctly. This covers every tensor argument of every operation, and every
incoming gradient, on the CPU path, in Triton's interpreter and on a GPU."""

import random

import pytest
import torch

from tests.calls import KERNELS, all_tensors_of, operation, results
from tests.kernels.devices import DEVICE


def poisoned(x, shape):
    """Memory that must not be read: NaN, or for another dtype the value that is always allowed."""
    return x.new_full(shape, torch.nan if x.is_floating_point() else 0)


def column(x):
    """One of three columns."""
    memory = poisoned(x, (*x.shape, 3))
    memory[..., 1] = x
    return memory[..., 1]


def inner(x):
    """The inner part, without the border, in every dimension."""
    memory = poisoned(x, [size + 2 for size in x.shape])
    for dim, size in enumerate(x.shape):
        memory = memory.narrow(dim, 1, size)
    return memory.copy_(x)


def transposed(x):
    """The first dimension is the innermost."""
    dims = list(reversed(range(x.dim())))
    return inner(x.permute(dims)).permute(dims)


def shifted(x):
    """Contiguous, but aligned to one element."""
    return poisoned(x, [x.numel() + 2])[1:-1].view(x.shape).copy_(x)


def repeated(x, dims):
    """Expanded in some dimensions, which memory has once; lists of indices, whose entries differ, in the first one."""
    narrow = x
    for dim in dims if x.dtype != torch.int64 else [0]:
        narrow = narrow.narrow(dim, 0, 1)
    return inner(narrow).expand(x.shape)


def repeated_last(x):
    return repeated(x, [-1][: x.dim()])


def repeated_throughout(x):
    return repeated(x, range(x.dim()))


LAYOUTS = [column, inner, transposed, shifted, repeated_last, repeated_throughout]


def everything(function, tensors, options, layout):
    """Outputs and gradients, by name; tensors and incoming gradients keep their layout."""
    tensors = {name: tensor.detach().requires_grad_(tensor.is_floating_point()) for name, tensor in tensors.items()}
    outputs = results(function(**tensors, **options))
    named = {f"output {number}": output.detach() for number, output in enumerate(outputs)}
    outputs = [output for output in outputs if output.requires_grad]
    if outputs:
        torch.manual_seed(3)
        upstream = [layout(torch.randn_like(output, memory_format=torch.contiguous_format)) for output in outputs]
        sources = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
        gradients = torch.autograd.grad(outputs, list(sources.values()), upstream)
        named |= {f"gradient of {name}": gradient for name, gradient in zip(sources, gradients, strict=True)}
    return named


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", KERNELS)
def test_is_that_of_a_contiguous_copy(name, layout):
    tensors, options = all_tensors_of(name, random.Random(f"{name} {layout.__name__}"))
    tensors = {key: layout(tensor.to(DEVICE)) for key, tensor in tensors.items()}
    copies = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    function = operation("kernels", name)
    expected = everything(function, copies, options, lambda x: layout(x).contiguous())
    actual = everything(function, tensors, options, layout)
    # PyTorch's order of additions depends on strides; no sum of these calls has more than 256 terms.
    largest = max((each.abs().max().item() for each in expected.values() if each.numel()), default=0.0)
    for key, truth in expected.items():
        bound = 256 * torch.finfo(truth.dtype).eps * largest if truth.is_floating_point() else 0
        torch.testing.assert_close(actual[key], truth, rtol=0, atol=bound, msg=lambda m, key=key: f"{key}: {m}")
