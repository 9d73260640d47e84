"""The policy by which every operation reaches PyTorch: calls of an operator, and calls past the dispatcher."""

import random
from functools import partial
from importlib import import_module

import pytest
import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels._common.operation import Operation
from tests.calls import KERNELS, all_tensors_of, operation, results
from tests.kernels.devices import DEVICE

INTERPRETED = triton.knobs.runtime.interpret

IN_PYTORCH = {
    *("biased_gelu", "combine", "normalize", "normalize_and_route", "routed_attention", "topk", "windowed_attention")
}
"""Operations that are not called if no kernel accepts the tensors."""


class Subclass(Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def without_gradient(call, tensors):
    return call(tensors)


def with_gradient(call, tensors):
    made = call({key: x.clone().requires_grad_(x.is_floating_point()) for key, x in tensors.items()})
    wanted = [each.sum() for each in made if each.requires_grad]
    if wanted:
        torch.autograd.backward(wanted)
    return made


def in_a_dispatch_mode(call, tensors):
    with Seen():
        return call(tensors)


def of_a_subclass(call, tensors):
    return call({key: x.as_subclass(Subclass) for key, x in tensors.items()})


def in_a_transform(call, tensors):
    return torch.func.functionalize(call)(tensors)


def call_of(name):
    """An operation as a function of tensors by name, and such tensors."""
    tensors, options = all_tensors_of(name, random.Random(name))
    options |= {"fused": True, "non_differentiable": False} if name == "topk" else {}
    if name == "normalize_and_route":
        # Routing tokens that differ within a batch make it two operations.
        tensors["routing_tokens"] = tensors["routing_tokens"][:1]

    def call(tensors):
        return tuple(results(operation("kernels", name)(**tensors, **options)))

    return call, {key: x.to(DEVICE) for key, x in tensors.items()}


@pytest.fixture
def way(monkeypatch):
    """The ways by which the operation of a name was called, as a list."""

    def watch(name):
        taken = []
        watched = import_module(f"kernels.{name}.api")._operation
        for attribute in ("_forward", "_differentiable", "_operator"):

            def spy(called, attribute, *inputs):
                taken.append(attribute)
                return called(*inputs)

            monkeypatch.setattr(watched, attribute, partial(spy, getattr(watched, attribute), attribute))
        return taken

    return watch


@pytest.mark.parametrize(
    ("situation", "expected"),
    [
        (without_gradient, "_forward"),
        (with_gradient, "_differentiable"),
        (in_a_dispatch_mode, "_operator"),
        (of_a_subclass, "_operator"),
        (in_a_transform, "_operator"),
    ],
)
@pytest.mark.parametrize("name", KERNELS)
def test_an_operator_is_called_where_somebody_sees_it(name, situation, expected, way):
    call, tensors = call_of(name)
    truth = call(tensors)
    taken = way(name)
    made = situation(call, tensors)
    if name == "select" and situation is with_gradient:
        expected = "_forward"
    assert taken == ([] if name in IN_PYTORCH and DEVICE == "cpu" and not INTERPRETED else [expected])
    for one, other in zip(made, truth, strict=True):
        torch.testing.assert_close(one.detach().as_subclass(Tensor), other)


@pytest.mark.parametrize("name", KERNELS)
def test_tensors_outlive_their_transform(name):
    """They have no memory that a kernel could read."""
    call, tensors = call_of(name)
    kept = {}

    def keep(x):
        # A sum with the argument is a tensor of the transform.
        kept.update({key: each + 0 * x if each.is_floating_point() else each for key, each in tensors.items()})
        return x

    torch.func.grad(keep)(torch.zeros((), device=DEVICE))
    for one, other in zip(call(kept), call(tensors), strict=True):
        torch.testing.assert_close(one.detach(), other)


def _double(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    return factor * x, x.new_zeros(3)


@pytest.mark.parametrize("parameter", ["grad_z", "needs_z", "z", "grad_factor_", "needs_", "Y"])
def test_a_parameter_that_nothing_is_called_by_is_refused(parameter):
    body = f"def backward(grad_y: Tensor, x: Tensor, factor: float, {parameter}: Tensor) -> Tensor: ..."
    scope = {"Tensor": Tensor}
    exec(body, scope)
    name = f"unknown_{parameter.lower()}"
    with pytest.raises(TypeError, match=f"backward must be among x, factor, y, kept, got '{parameter}'"):
        Operation(name, _double, scope["backward"], outputs=("y", "kept"), gradients=("x",))


def test_the_operator_of_a_backward_pass_gives_an_empty_tensor_for_none():
    scores = torch.randn(3, 7, device=DEVICE)
    y, state = torch.ops.colt5.coor_descent(scores, None, None, 2.0, 3, 0.3, 0.3, 1.0, True)
    arguments = (torch.ones_like(y), scores, None, None, state, 2.0, 3, 0.3, 0.3, 1.0)
    ds, dk = torch.ops.colt5.coor_descent_backward(*arguments)
    assert ds.shape == scores.shape
    assert dk.shape == (0,)
    assert import_module("kernels.coor_descent.api").descend_rows_backward(*arguments)[1] is None
